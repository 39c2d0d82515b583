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

"""Changes of an LXD instance whose root disk is full."""

from __future__ import annotations

import os

import fixtures

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import root_quota
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.privileged import btrfs
from tests.fixtures import session_case

URL = '/1.0/instances/c1'
FULL = 'Failed to write backup file: open backup.yaml: disk quota exceeded'


class FullDiskTestCase(session_case.SessionTestCase):

    def setUp(self):
        super().setUp()
        self.session.post('instances', body={
            'name': 'c1', 'source': {'type': 'image', 'alias': 'tiny'},
            'profiles': [], 'config': {lxd_guest.KEY_UUID: 'u'},
            'devices': {'root': {'type': 'disk', 'path': '/',
                                 'pool': 'default', 'size': '1GiB'}}})
        self.guest = lxd_guest.Guest(self.session,
                                     self.session.get('instances', 'c1'))

    def fill(self, method='PUT', path=URL, times=1):
        self.lxd.fail_next(method, path, 500, FULL, times=times)

    def size(self):
        return root_quota.size_bytes(self.guest.reload().devices['root'])

    def assert_extended(self, times=1):
        self.assertEqual((1 << 30) + times * root_quota.EXTENSION,
                         self.size())
        self.assertEqual('1GiB', self.guest.config[root_quota.KEY_ROOT_QUOTA])

    def test_update(self):
        self.fill()
        self.guest.update(config={'user.a': 'b'})
        self.assertEqual('b', self.guest.config['user.a'])
        self.assert_extended()

    def test_update_keeps_the_extension(self):
        self.fill()
        self.guest.update(devices={'root': {
            'type': 'disk', 'path': '/', 'pool': 'default', 'size': '1GiB',
            'limits.read': '1MB'}})
        self.assertEqual('1MB', self.guest.devices['root']['limits.read'])
        self.assert_extended()

    def test_new_device(self):
        self.fill('PATCH')
        self.guest.add_devices({'d': {'type': 'none'}})
        self.assertIn('d', self.guest.reload().devices)
        self.assert_extended()

    def test_start_and_freeze(self):
        for action, change in (('start', self.guest.start),
                               ('freeze', self.guest.freeze)):
            self.fill(path=URL + '/state')
            change()
        self.assertEqual('Frozen', self.status())
        self.assert_extended(2)

    def test_stopping_needs_no_space(self):
        self.guest.start()
        self.lxd.fail_next('PUT', URL + '/state', 500, FULL)
        self.refused(errors.OperationFailed, self.guest.stop)
        self.guest.stop()
        self.assertEqual('Stopped', self.status())
        self.fill(path=URL + '/state')
        self.guest.stop()
        self.assertEqual(1 << 30, self.size())

    def test_more_than_one_extension(self):
        self.fill(times=3)
        self.guest.update(config={'user.a': 'b'})
        self.assert_extended(3)

    def test_quota_that_lxd_cannot_raise(self):
        """It is raised on the pool first."""
        calls = []
        self.useFixture(fixtures.MockPatchObject(
            btrfs, 'set_quota', lambda *args: calls.append(args)))
        directory = self.useFixture(fixtures.TempDir()).path
        self.session.options.directory = directory
        pool = os.path.join(directory, 'storage-pools', 'default')
        os.makedirs(pool)
        self.fill(times=2)
        self.guest.update(config={'user.a': 'c'})
        self.assertEqual([(pool, self.guest.container,
                           (1 << 30) + root_quota.MAX_EXTENSION)], calls)

    def test_extensions_have_an_end(self):
        self.fill(times=20)
        self.refused(errors.DiskFull, self.guest.update,
                     config={'user.a': 'b'})
        self.assertLessEqual(self.size(),
                             (1 << 30) + root_quota.MAX_EXTENSION)

    def test_extensions_of_many_changes_have_an_end(self):
        for number in range(4):
            self.fill()
            self.guest.update(config={'user.a': str(number)})
        self.fill()
        self.refused(errors.DiskFull, self.guest.update,
                     config={'user.a': 'x'})
        self.assert_extended(4)

    def test_mount_point_that_cannot_be_made(self):
        # LXD does not say why; the next change of a key does.
        self.lxd.fail_next('PATCH', URL, 500, 'Failed to run: forkmount')
        self.fill()
        self.guest.add_devices({'d': {'type': 'none'}})
        self.assert_extended()
        self.assertNotIn(root_quota.KEY_SPACE_CHECK, self.guest.config)

    def test_mount_point_and_space_enough(self):
        self.lxd.fail_next('PATCH', URL, 500, 'Failed to run: forkmount')
        self.refused(errors.OperationFailed, self.guest.add_devices,
                     {'d': {'type': 'none'}})
        self.assertEqual(1 << 30, self.size())

    def test_no_quota(self):
        self.guest.update(devices={'root': {
            'type': 'disk', 'path': '/', 'pool': 'default'}})
        self.fill()
        self.refused(errors.OperationFailed, self.guest.update,
                     config={'user.a': 'b'})
