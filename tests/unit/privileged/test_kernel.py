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


"""Mounts of volumes and of root filesystems, and what is copied to volumes."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from unittest import mock

from oslotest import base

from nova_lxd_py.virt.privileged import block_copy
from nova_lxd_py.virt.privileged import mounts
from nova_lxd_py.virt.privileged import rootfs
from tests.fixtures import fake_kernel

VOLUME = '9a0b6f0e-5d2c-4f4e-8a57-6a1c1b1f0e11'
IDS = (165536, 165537, 65536)


class MountsTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.kernel = self.useFixture(fake_kernel.Mounts())
        self.target = self.kernel.target(VOLUME)
        self.device = self.kernel.device


class MountTest(MountsTestCase):

    def mount(self, read_only: bool = False, ids: tuple = IDS) -> None:
        mounts.mount(self.device, 'ext4', self.target, read_only, *ids)

    def test_flags(self) -> None:
        """No volume of a tenant brings devices or other users' programs."""
        for read_only in (False, True):
            self.mount(read_only)
            [found] = self.kernel.placed
            self.assertEqual(mounts.MS_NOSUID | mounts.MS_NODEV |
                             (mounts.MS_RDONLY if read_only else 0),
                             found.flags)
            self.assertEqual((self.device, 'ext4', self.target),
                             (found.device, found.kind, found.target))
            self.assertEqual(mounts.MOUNT_ATTR_IDMAP,
                             found.attributes.attr_set)
            self.assertEqual(0, found.attributes.attr_clr)
            self.assertIn('namespace 165536 165537 65536', self.kernel.calls)

    def test_ids_of_the_host(self) -> None:
        self.mount(ids=(0, 0, 0))
        [found] = self.kernel.placed
        self.assertIsNone(found.attributes)

    def test_kernel_cannot_map_ids(self) -> None:
        for call in ('open_tree', 'mount_setattr', 'move_mount'):
            self.kernel.errors = {call: errno.EINVAL}
            self.assertRaises(OSError, self.mount)
            self.assertEqual([], self.kernel.placed)

    def test_unmount(self) -> None:
        self.mount()
        self.kernel.busy = True
        error = self.assertRaises(OSError, mounts.unmount, self.target, False)
        self.assertEqual(errno.EBUSY, error.errno)
        self.kernel.calls.clear()
        self.assertTrue(mounts.unmount(self.target, True))
        # What was written is on the storage before the device goes.
        self.assertEqual(['syncfs', 'umount'], self.kernel.calls)
        self.assertFalse(mounts.unmount(self.target, True))
        self.assertFalse(os.path.exists(self.target))

    def test_grow(self) -> None:
        self.assertRaises(FileNotFoundError, mounts.grow, self.device, 'ext4',
                          self.target)
        self.mount()
        mounts.grow(self.device, 'ext4', self.target)
        mounts.grow(self.device, 'xfs', self.target)
        self.assertEqual([('resize2fs', self.device),
                          ('xfs_growfs', '-d', self.target)],
                         self.kernel.commands)

    def test_make(self) -> None:
        """Without force: the programs refuse where there is anything."""
        for kind in mounts.MAKERS:
            mounts.make_filesystem(self.device, kind, 'x')
        for words in self.kernel.commands:
            self.assertFalse({'-F', '-f'} & set(words))
            self.assertEqual(('-L', 'x', self.device), words[-3:])

    def test_in_use(self) -> None:
        for number, result in ((errno.EBUSY, True), (errno.EIO, None)):
            with mock.patch('os.open', side_effect=OSError(number, 'x')):
                if result is None:
                    self.assertRaises(OSError, mounts.is_in_use, self.device)
                else:
                    self.assertTrue(mounts.is_in_use(self.device))
        self.assertFalse(mounts.is_in_use('/dev/null'))


class RootTest(MountsTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.parent = self.kernel.target(f'top/{rootfs.mount_parent(VOLUME)}')
        self.target = f'{self.parent}/{VOLUME}'

    def mount(self, ids: tuple = IDS) -> None:
        rootfs.mount(self.device, 'ext4', self.target, *ids)

    def test_programs_may_change_their_user(self) -> None:
        """But only where nobody else of the host gets to."""
        self.kernel.content = {'rootfs/etc': None}
        self.mount()
        [found] = self.kernel.placed
        self.assertEqual(mounts.MOUNT_ATTR_NOSUID, found.attributes.attr_clr)
        self.assertEqual(mounts.MOUNT_ATTR_IDMAP, found.attributes.attr_set)
        self.assertEqual(0o100, stat.S_IMODE(os.stat(self.parent).st_mode))
        self.assertEqual({self.parent: IDS[0]}, self.kernel.owners)
        # Nothing of the plain mount is left, from which it was made.
        self.assertEqual(self.target, found.target)

    def test_ids_of_the_host(self) -> None:
        self.kernel.content = {'etc': None, 'sbin': None}
        self.mount((0, 0, 0))
        [found] = self.kernel.placed
        self.assertEqual(0, found.attributes.attr_set)
        self.assertEqual({self.parent: 0}, self.kernel.owners)

    def test_no_complete_root(self) -> None:
        for content in ({}, {rootfs.STAGING: None}, {'home': None}):
            self.kernel.content = content
            self.assertRaises(FileNotFoundError, self.mount)
            self.assertEqual([], self.kernel.placed)
            self.tidy()

    def tidy(self) -> None:
        for parent, directories, _files in os.walk(self.target,
                                                   topdown=False):
            for name in directories:
                os.rmdir(f'{parent}/{name}')

    def test_kernel_cannot_map_ids(self) -> None:
        self.kernel.content = {'rootfs': None}
        self.kernel.errors = {'mount_setattr': errno.EINVAL}
        self.assertRaises(OSError, self.mount)
        self.assertEqual([], self.kernel.placed)

    def test_place(self) -> None:
        self.assertRaises(ValueError, rootfs.mount, self.device, 'ext4',
                          self.kernel.target(VOLUME), *IDS)

    def test_unmount(self) -> None:
        self.assertFalse(rootfs.unmount(self.target, False))
        self.kernel.content = {'rootfs': None}
        self.mount()
        self.kernel.busy = True
        self.assertRaises(OSError, rootfs.unmount, self.target, False)
        self.assertTrue(rootfs.unmount(self.target, True))

    def test_state(self) -> None:
        target = self.kernel.target(VOLUME)
        for content, state in (
                ({}, rootfs.UNFINISHED), ({'lost+found': None},
                                          rootfs.UNFINISHED),
                ({'home': None}, rootfs.OTHER),
                ({rootfs.STAGING: None}, rootfs.UNFINISHED),
                ({'rootfs': None}, rootfs.READY),
                ({'etc': None, 'sbin': None, 'home': None}, rootfs.READY)):
            self.kernel.content = content
            self.assertEqual(state, rootfs.root_state(self.device, 'ext4',
                                                      target))
            self.assertEqual([], self.kernel.placed)
            for name in content:
                os.rmdir(f'{target}/{name}')

    def test_first_boot(self) -> None:
        target = self.kernel.target(VOLUME)
        staging = rootfs.open_staging(self.device, 'ext4', target)
        self.assertRaises(OSError, rootfs.complete, target)
        container = f'{staging}/containers/nova_x'
        os.makedirs(container)
        self.assertRaises(OSError, rootfs.complete, target)
        os.mkdir(f'{container}/rootfs')
        rootfs.complete(target)
        self.assertTrue(os.path.isdir(f'{target}/rootfs'))
        rootfs.close_staging(target)
        self.assertFalse(os.path.exists(staging))
        rootfs.close_staging(target)
        self.assertEqual([], self.kernel.placed)
        # Never a second time.
        self.assertRaises(FileExistsError, rootfs.open_staging, self.device,
                          'ext4', target)

    def test_image(self) -> None:
        path = self.kernel.target('disk')
        with open(path, 'wb') as stream:
            stream.write(b'image' + b'rest' * 500000)
        checksum = hashlib.md5(b'image', usedforsecurity=False).hexdigest()
        self.assertTrue(rootfs.contains_image(path, 5, checksum))
        self.assertFalse(rootfs.contains_image(path, 6, checksum))
        self.assertFalse(rootfs.contains_image(path, 10 ** 9, checksum))
        self.assertEqual(b'mage', rootfs.read(path, 1, 4))
        self.assertRaises(ValueError, rootfs.read, path, -1, 4)
        self.assertRaises(ValueError, rootfs.read, path, 0, 1 << 40)
        self.assertRaises(ValueError, rootfs.contains_image, path, 0, '')
        self.assertRaises(OSError, rootfs.wipe_image, path, 6, checksum)
        self.assertEqual([], self.kernel.commands)
        rootfs.wipe_image(path, 5, checksum)
        self.assertEqual('wipefs', self.kernel.commands[0][0])
        with open(path, 'rb') as stream:
            self.assertFalse(any(stream.read(1 << 20)))


class CopyTest(MountsTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.source, self.other = (self.kernel.target(name)
                                   for name in ('a', 'b'))
        self.data = b'x' * 1000 + bytes(3 << 20) + b'y' * 1000
        for path, data in ((self.source, self.data),
                           (self.other, bytes(len(self.data)))):
            with open(path, 'wb') as stream:
                stream.write(data)
        # Plain files are block devices here.
        self.numbers = mock.patch.object(block_copy.stat, 'S_ISBLK',
                                         lambda mode: True)
        self.numbers.start()
        self.addCleanup(self.numbers.stop)
        real = os.fstat
        patched = mock.patch.object(
            block_copy.os, 'fstat', lambda fd: mock.Mock(
                st_mode=real(fd).st_mode, st_rdev=real(fd).st_ino))
        patched.start()
        self.addCleanup(patched.stop)

    def test_copy(self) -> None:
        written = block_copy.copy(self.source, self.other, 0, len(self.data))
        with open(self.other, 'rb') as stream:
            self.assertEqual(self.data, stream.read())
        # What is blank on both is not written.
        self.assertLess(written, 3 << 20)

    def test_part(self) -> None:
        block_copy.copy(self.source, self.other, 500, 100)
        with open(self.other, 'rb') as stream:
            self.assertEqual(bytes(500) + b'x' * 100 + bytes(400),
                             stream.read(1000))

    def test_end(self) -> None:
        self.assertRaises(OSError, block_copy.copy, self.source, self.other,
                          len(self.data), 1)

    def test_arguments(self) -> None:
        for offset, length in ((-1, 1), (0, -1), ('0', 1)):
            self.assertRaises(ValueError, block_copy.copy, self.source,
                              self.other, offset, length)
        self.assertRaises(ValueError, block_copy.copy, 'relative',
                          self.other, 0, 1)
        self.numbers.stop()
        self.assertRaises(ValueError, block_copy.copy, self.source,
                          self.other, 0, 1)
        self.numbers.start()
