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


"""Which processes use a volume: this one stands in for those of a guest."""

from __future__ import annotations

import errno
import io
import os
from typing import Any
from unittest import mock

import fixtures
from oslotest import base

from nova_lxd_py.virt import privileged
from nova_lxd_py.virt.privileged import fuser
from tests.fixtures import fake_kernel

VOLUME = '9a0b6f0e-5d2c-4f4e-8a57-6a1c1b1f0e11'


class FuserTest(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        privileged.context.set_client_mode(False)
        self.addCleanup(privileged.context.set_client_mode, True)
        self.useFixture(fake_kernel.InProcess())

    def users(self, device: int = 0, filesystem: int = 0) -> list[int]:
        return fuser.find_users(os.getpid(), device, filesystem)

    def test_open_device(self) -> None:
        with open('/dev/null', 'rb') as stream:
            number = os.fstat(stream.fileno()).st_rdev
            self.assertIn(os.getpid(), self.users(number))
        self.assertEqual([], self.users(os.makedev(511, 1)))

    def test_file_on_the_filesystem(self) -> None:
        # The working directory is somewhere.
        number = os.stat('.').st_dev
        self.assertIn(os.getpid(), self.users(0, number))
        self.assertEqual([], self.users(0, os.makedev(511, 1)))

    def test_guest_that_has_stopped(self) -> None:
        self.assertEqual([], fuser.find_users(2 ** 22 + 1, 1, 1))

    def test_too_many_files(self) -> None:
        self.useFixture(fixtures.MockPatchObject(fuser, '_MOST_LINKS', 1))
        error = self.assertRaises(OSError, self.users, os.makedev(511, 1))
        self.assertEqual(errno.E2BIG, error.errno)

    def test_numbers_and_names(self) -> None:
        for arguments in ((-1, 1, 1), (1, '1', 1), (1, 1, None)):
            self.assertRaises(ValueError, fuser.find_users, *arguments)
        for arguments in (('../x', VOLUME, 0), ('x', 'a/b', 0), ('', VOLUME,
                          0), ('x', VOLUME, -1), (None, VOLUME, 0)):
            self.assertRaises(ValueError, fuser.find_init, *arguments)


class InitTest(base.BaseTestCase):
    """The first process of a guest, by its control group."""

    def setUp(self) -> None:
        super().setUp()
        privileged.context.set_client_mode(False)
        self.addCleanup(privileged.context.set_client_mode, True)
        self.useFixture(fake_kernel.InProcess())
        self.groups = self.useFixture(fixtures.TempDir()).path
        self.useFixture(fixtures.MockPatchObject(
            fuser, '_HIERARCHIES', (self.groups,)))
        node = f'/unix.volume--{VOLUME.replace("-", "--")}.dev-vdb'
        self.files = {
            '/proc/70/status': 'Name:\tlxc\nNSpid:\t70\n',
            '/proc/71/status': 'Name:\tinit\nNSpid:\t71\t1\n',
            '/proc/71/mountinfo': '1 0 0:9 / / rw\n'
                                  f'2 1 0:5 {node} /dev/vdb rw\n'
                                  '3 1 7:3 / /mnt/vdc rw\n'}
        opened = mock.patch.object(fuser, 'open', self._open, create=True)
        opened.start()
        self.addCleanup(opened.stop)
        os.makedirs(f'{self.groups}/lxc.payload.nova_x/init.scope')
        with open(f'{self.groups}/lxc.payload.nova_x/init.scope/cgroup.procs',
                  'w') as stream:
            stream.write('69\n70\n71\n')

    def _open(self, path: str, *args: Any, **kwargs: Any) -> Any:
        if not path.startswith('/proc/'):
            return open(path, *args, **kwargs)
        if path not in self.files:
            raise FileNotFoundError(path)
        return io.StringIO(self.files[path])

    def test_block_device(self) -> None:
        self.assertEqual(71, fuser.find_init('nova_x', VOLUME, 0))
        self.assertEqual(0, fuser.find_init('nova_y', VOLUME, 0))
        self.assertEqual(0, fuser.find_init(
            'nova_x', VOLUME.replace('9', '8'), 0))

    def test_filesystem(self) -> None:
        self.assertEqual(71, fuser.find_init('nova_x', VOLUME,
                                             os.makedev(7, 3)))
        self.assertEqual(0, fuser.find_init('nova_x', VOLUME,
                                            os.makedev(7, 4)))


class ArgumentsTestCase(base.BaseTestCase):
    """The privileged daemon refuses wrong arguments."""

    def setUp(self) -> None:
        super().setUp()
        privileged.context.set_client_mode(False)
        self.addCleanup(privileged.context.set_client_mode, True)

    def test_numbers(self) -> None:
        for numbers in ((-1, 0, 0), ('1', 0, 0), (1, None, 0), (1, 0, 2.5)):
            self.assertRaises(ValueError, fuser.find_users, *numbers)
        self.assertEqual([], fuser.find_users(2 ** 30, 1, 1))

    def test_containers(self) -> None:
        for arguments in (('../x', VOLUME, 0), ('', VOLUME, 0),
                          (None, VOLUME, 0), ('x', 'a/b', 0),
                          ('x', VOLUME, -1), ('x', VOLUME, None)):
            self.assertRaises(ValueError, fuser.find_init, *arguments)
        self.assertEqual(0, fuser.find_init('no-such-one', VOLUME, 0))
