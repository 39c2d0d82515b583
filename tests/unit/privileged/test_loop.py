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


"""Loop devices of volumes."""

from __future__ import annotations

import errno
import os
import tempfile

import fixtures
from oslotest import base

from nova_lxd_py.virt.privileged import children
from nova_lxd_py.virt.privileged import loop
from tests.fixtures import fake_kernel

VOLUME = '9a0b6f0e-5d2c-4f4e-8a57-6a1c1b1f0e11'
OTHER = '9a0b6f0e-5d2c-4f4e-8a57-6a1c1b1f0e22'


class LoopTest(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.kernel = self.useFixture(fake_kernel.Loops())
        self.here = self.kernel.directory

    def attach(self, path: str, volume: str, read_only: bool = False) -> str:
        return loop.attach(path, volume, read_only, self.here)

    def detach(self, volume: str, force: bool = False) -> bool:
        return loop.detach(volume, force, self.here)

    def file(self, name: str = 'volume') -> str:
        path = os.path.join(self.kernel.directory, name)
        with open(path, 'wb') as stream:
            stream.truncate(4096)
        return path

    def test_once(self) -> None:
        path = self.file()
        self.assertEqual('/dev/loop0', self.attach(path, VOLUME, False))
        self.assertEqual('/dev/loop0', self.attach(path, VOLUME, False))
        self.assertEqual('/dev/loop1', self.attach(self.file('x'), OTHER,
                                                   True))
        self.assertEqual([0, 1], [each.flags for each
                                  in self.kernel.devices.values()])

    def test_other_file_with_the_label(self) -> None:
        """The device that bears the volume's id is not the volume."""
        self.attach(self.file('stale'), VOLUME, False)
        error = self.assertRaises(OSError, self.attach, self.file(), VOLUME,
                                  False)
        self.assertEqual(errno.EBUSY, error.errno)

    def test_other_access_mode(self) -> None:
        path = self.file()
        self.attach(path, VOLUME, True)
        self.assertRaises(OSError, self.attach, path, VOLUME, False)

    def test_what_is_no_plain_file(self) -> None:
        link = os.path.join(self.kernel.directory, 'link')
        os.symlink(self.file(), link)
        fifo = os.path.join(self.kernel.directory, 'fifo')
        os.mkfifo(fifo)
        for path in (link, fifo, '/nonexistent'):
            self.assertRaises(OSError, self.attach, path, VOLUME, True)
        for name in ('../x', '', None, 'volume'):
            self.assertRaises(ValueError, self.attach, self.file(), name,
                              True)
        self.assertEqual({}, self.kernel.devices)

    def test_another_process_is_faster(self) -> None:
        self.kernel.taken = 3
        self.assertEqual('/dev/loop0', self.attach(self.file(), VOLUME,
                                                   False))
        self.kernel.taken = 99
        self.assertRaises(OSError, self.attach, self.file('x'), OTHER, False)

    def test_detach(self) -> None:
        self.attach(self.file(), VOLUME, False)
        self.assertFalse(self.detach(OTHER, False))
        self.assertTrue(self.detach(VOLUME, False))
        self.assertFalse(self.detach(VOLUME, False))

    def test_detach_of_one_in_use(self) -> None:
        self.attach(self.file(), VOLUME, False)
        self.kernel.held = {0}
        self.assertRaises(OSError, self.detach, VOLUME, False)
        self.assertEqual([0], list(self.kernel.devices))
        self.assertTrue(self.detach(VOLUME, True))

    def test_detach_of_one_that_is_read(self) -> None:
        """Another process opens all devices and looks at them."""
        for force in (False, True):
            self.attach(self.file(), VOLUME, False)
            self.kernel.read[0] = 2
            self.assertTrue(self.detach(VOLUME, force))
            self.assertEqual({}, self.kernel.devices)

    def test_size(self) -> None:
        self.assertRaises(FileNotFoundError, loop.update_size, VOLUME,
                          self.here)
        self.attach(self.file(), VOLUME, False)
        loop.update_size(VOLUME, self.here)
        self.assertEqual(1, self.kernel.devices[0].size_updates)

    def test_share(self) -> None:
        share = os.path.join(self.kernel.directory, 'f' * 32)
        os.mkdir(share)
        self.assertIsNone(loop.share_path(VOLUME, self.here))
        path = self.file(f'{"f" * 32}/volume')
        self.attach(path, VOLUME, False)
        self.assertEqual(share, loop.share_path(VOLUME, self.here))
        # Another volume on it is in use.
        self.assertFalse(loop.release_share(share))
        self.detach(VOLUME, False)
        # Not mounted.
        self.assertFalse(loop.release_share(share))
        for path in ('/', '/mnt', f'{share}/..', None):
            self.assertRaises(ValueError, loop.release_share, path)

    def test_volumes_of_this_container(self) -> None:
        """Those of other containers, with the same paths, are not touched."""
        share = os.path.join(self.kernel.directory, 'f' * 32)
        os.mkdir(share)
        for name, volume in (('volume', VOLUME), ('other', OTHER)):
            self.attach(self.file(f'{"f" * 32}/{name}'), volume, False)
        self.assertEqual({VOLUME: '/dev/loop0', OTHER: '/dev/loop1'},
                         loop.volumes(self.kernel.directory))
        # Another file with this path.
        os.rename(f'{share}/other', f'{share}/renamed')
        self.file(f'{"f" * 32}/other')
        self.assertEqual([VOLUME], list(loop.volumes(self.kernel.directory)))
        # No file with this path.
        os.unlink(f'{share}/other')
        self.assertEqual([VOLUME], list(loop.volumes(self.kernel.directory)))
        # Cinder has deleted it.
        self.kernel.devices[1].path += ' (deleted)'
        self.assertEqual([VOLUME, OTHER],
                         list(loop.volumes(self.kernel.directory)))

    def test_share_that_does_not_answer(self) -> None:
        """A child process looks at its files, and is killed in time."""
        self.useFixture(fixtures.MockPatchObject(
            children, 'run', side_effect=TimeoutError))
        self.assertRaises(TimeoutError, loop.volumes, self.kernel.directory)

    def test_another_host_on_this_machine(self) -> None:
        """It has the same volume while a server migrates."""
        share = 'f' * 32
        for name in ('here', 'there'):
            os.makedirs(os.path.join(self.kernel.directory, name, share))
        other = os.path.join(self.kernel.directory, 'there')
        loop.attach(self.file(f'there/{share}/volume'), VOLUME, False, other)
        self.here = os.path.join(self.kernel.directory, 'here')
        self.assertEqual([VOLUME], list(loop.volumes(other)))
        self.kernel.opened.clear()
        self.assertEqual({}, loop.volumes(self.here))
        self.assertFalse(self.detach(VOLUME, True))
        self.assertIsNone(loop.share_path(VOLUME, self.here))
        self.assertRaises(FileNotFoundError, loop.update_size, VOLUME,
                          self.here)
        # It could not detach it meanwhile.
        self.assertEqual(set(), self.kernel.opened)
        self.assertEqual('/dev/loop1', self.attach(
            self.file(f'here/{share}/volume'), VOLUME, True))
        self.assertTrue(self.detach(VOLUME))
        self.assertEqual([0], list(self.kernel.devices))

    def test_mount_that_is_gone(self) -> None:
        """The kernel does not know where it was."""
        for path in '/volume (deleted)', '/config-drives/drive (deleted)':
            self.attach(self.file(), VOLUME)
            self.kernel.devices[0].path = path
            self.assertTrue(self.detach(VOLUME))


class ArgumentsTestCase(base.BaseTestCase):
    """The privileged daemon refuses what is no volume."""

    def setUp(self) -> None:
        super().setUp()
        loop.privileged.context.set_client_mode(False)
        self.addCleanup(loop.privileged.context.set_client_mode, True)

    def test_volumes(self) -> None:
        for identifier in ('', 'x', None, 7, VOLUME + '\0', b'x' * 36):
            for call in (lambda: loop.attach('/tmp/x', identifier, False,
                                             '/tmp'),
                         lambda: loop.detach(identifier, False, '/tmp'),
                         lambda: loop.update_size(identifier, '/tmp'),
                         lambda: loop.share_path(identifier, '/tmp')):
                self.assertRaises(ValueError, call)

    def test_files(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            link = os.path.join(directory, 'link')
            os.symlink('/etc/passwd', link)
            for path in ('/dev/null', directory, link, directory + '/none'):
                self.assertRaises(OSError, loop.attach, path, VOLUME, True,
                                  directory)

    def test_shares(self) -> None:
        for path in ('/', '/home', '', None, 'x' * 32, '/../' + 'a' * 32,
                     '/mnt/' + 'A' * 32):
            self.assertRaises(ValueError, loop.release_share, path)
