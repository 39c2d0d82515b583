#    Licensed under the Apache License, Version 2.0 (the "License"); you may
#    not use this file except in compliance with the License. You may obtain
#    a copy of the License at
#
#         http://www.apache.org/licenses/LICENSE-2.0
#
#    Unless required by applicable law or agreed to in writing, software
#    distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
#    WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
#    License for the specific language governing permissions and limitations
#    under the License.

"""Mount points below symbolic links in the guest."""

from __future__ import annotations

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import mount_points
from nova_lxd_py.virt.lxd import errors
from tests.fixtures import session_case


class MountPointsTestCase(session_case.SessionTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.create()

    def link(self, path: str, target: str) -> None:
        self.session.write_file('c1', path, target.encode(), mode=0o777,
                                kind='symlink')

    def resolve(self, path: str, kind: str = 'disk') -> str | None:
        found = mount_points.resolve(self.session, 'c1', {
            'data': {'type': kind, 'path': path, 'source': '/x'}})
        if found:
            self.assertEqual({'type': 'disk', 'source': '/x', 'path':
                              found['data']['path']}, found['data'])
            return found['data']['path']
        return None

    def test_no_link(self) -> None:
        self.assertIsNone(self.resolve('/srv/data'))
        self.assertIsNone(self.resolve('/'))

    def test_links(self) -> None:
        self.link('/media', '/run/media')
        self.link('/data', 'srv/../media/x')
        self.assertEqual('/run/media/usb', self.resolve('/media/usb'))
        self.assertEqual('/run/media/x/y', self.resolve('/data/y'))
        self.assertIsNone(self.resolve('/media', 'nic'))

    def test_not_in_sysfs(self) -> None:
        """Nothing below it is chosen by the guest."""
        self.link('/sys', 'srv')
        self.assertIsNone(self.resolve('/sys/block'))

    def test_out_of_the_guest(self) -> None:
        """A link never leads above the guest's own root."""
        self.link('/up', '../../../../etc')
        self.assertEqual('/etc/x', self.resolve('/up/x'))

    def test_as_many_links_as_are_followed(self) -> None:
        for number in range(9):
            self.link(f'/l{number}', f'/l{number + 1}')
        self.assertEqual('/l9', self.resolve('/l1'))
        self.assertIsNone(self.resolve('/l0'))

    def test_endless(self) -> None:
        self.link('/a', '/b')
        self.link('/b', '/a')
        self.assertIsNone(self.resolve('/a'))

    def test_targets_that_are_not_allowed(self) -> None:
        for number, target in enumerate((
                '/proc', '/sys/kernel', '/dev', '/x rw,suid', '/.x',
                f'/{"x" * 300}', '/x\\040y')):
            self.link(f'/bad{number}', target)
            self.assertIsNone(self.resolve(f'/bad{number}/y'), target)
        for number, target in enumerate(('/device', '/system', '/process')):
            self.link(f'/good{number}', target)
            self.assertEqual(f'{target}/y', self.resolve(f'/good{number}/y'))

    def test_start(self) -> None:
        """LXD does not mount below a link; the guest's start is tried again
        once there is one."""
        guest = lxd_guest.Guest(self.session,
                                self.session.get('instances', 'c1'))
        guest.update(devices={'data': {
            'type': 'disk', 'path': '/media/usb', 'source': self.lxd.endpoint}
            })
        url = '/1.0/instances/c1/state'
        self.lxd.fail_operation('PUT', url, 'Failed to run: forkstart')
        self.assertRaises(errors.OperationFailed, guest.start)
        self.link('/media', '/run/media')
        self.lxd.fail_operation('PUT', url, 'Failed to run: forkstart')
        guest.start()
        self.assertEqual('Running', self.status())
        self.assertEqual('/run/media/usb',
                         guest.reload().devices['data']['path'])
