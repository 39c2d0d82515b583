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

"""Mounts of volumes."""

from __future__ import annotations

from collections.abc import Callable
import errno
import os
import signal
import tempfile
import time
from unittest import mock

import fixtures
from oslotest import base

from nova_lxd_py.virt.privileged import mounts
from nova_lxd_py.virt.privileged import probe
from nova_lxd_py.virt.privileged import validation
from tests.fixtures import mounts_case

VOLUME = '9a0b6f0e-5d2c-4f4e-8a57-6a1c1b1f0e11'
TARGET = f'/var/lib/nova/volumes/{VOLUME}'


class InputTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        mounts.privileged.context.set_client_mode(False)
        self.addCleanup(mounts.privileged.context.set_client_mode, True)

    def test_devices(self) -> None:
        for path in ('/dev/null', '/etc/passwd', '', None, 7, 'sda',
                     '/dev/sda;id', '/tmp'):
            for call in (lambda: probe.content(path),
                         lambda: mounts.make_filesystem(path, 'ext4', 'x'),
                         lambda: mounts.is_in_use(path),
                         lambda: probe.make_blank(path, ''),
                         lambda: mounts.sync_device(path, 60),
                         lambda: mounts.grow(path, 'ext4', TARGET),
                         lambda: mounts.mount(path, 'ext4', TARGET, False,
                                              False, 1, 1, 1)):
                self.assertRaises(ValueError, call)

    def test_targets(self) -> None:
        for path in ('/', '/mnt', VOLUME, None, f'/mnt/../{VOLUME}',
                     f'/mnt/{VOLUME}/', f'//{VOLUME}', f'/mnt/{VOLUME}x'):
            self.assertRaises(ValueError, mounts.create_mount_point, path)
            self.assertRaises(ValueError, mounts.unmount, path, True)
            self.assertRaises(ValueError, mounts.sync, path, 60)
            with mock.patch.object(validation, 'checked_device',
                                   lambda path: path):
                self.assertRaises(ValueError, mounts.mount, '/dev/x', 'ext4',
                                  path, False, False, 1, 1, 1)
                self.assertRaises(ValueError, mounts.grow, '/dev/x', 'ext4',
                                  path)

    def test_kinds_labels_and_ids(self) -> None:
        with mock.patch.object(validation, 'checked_device',
                               lambda path: path):
            for kind in ('btrfs', 'vfat', '', None):
                self.assertRaises(ValueError, mounts.make_filesystem,
                                  '/dev/x', kind, 'x')
                self.assertRaises(ValueError, mounts.mount, '/dev/x', kind,
                                  TARGET, False, False, 1, 1, 1)
            for label in ('', 'x' * 13, '-L /', None, 'A'):
                self.assertRaises(ValueError, mounts.make_filesystem,
                                  '/dev/x', 'ext4', label)
            for ids in ((0, 0, 65536), (0, 1, 1), (1, 0, 1), (-1, 1, 1),
                        (1, 1, 2 ** 32), ('1', 1, 1)):
                self.assertRaises(ValueError, mounts.mount, '/dev/x', 'ext4',
                                  TARGET, False, False, *ids)

    def test_nothing_is_mounted(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            target = os.path.join(directory, VOLUME)
            mounts.create_mount_point(target)
            mounts.create_mount_point(target)
            self.assertEqual(0, os.stat(target).st_mode & 0o777)
            self.assertFalse(mounts.unmount(target, False))
            self.assertFalse(os.path.exists(target))
            self.assertFalse(mounts.unmount(target, False))


class SyncTestCase(base.BaseTestCase):
    """Writing of cached data, with a stand-in for the kernel."""

    def setUp(self) -> None:
        super().setUp()
        mounts.privileged.context.set_client_mode(False)
        self.addCleanup(mounts.privileged.context.set_client_mode, True)
        self.target = os.path.join(
            self.useFixture(fixtures.TempDir()).path, VOLUME)
        mounts.create_mount_point(self.target)

    def syncfs(self, effect: Callable[[int], int]) -> None:
        self.useFixture(fixtures.MockPatchObject(
            mounts, '_libc', mock.Mock(syncfs=effect)))

    def mounted(self) -> None:
        self.useFixture(fixtures.MockPatchObject(mounts, 'is_mounted',
                                                 self.target.__eq__))

    def test_only_what_is_mounted(self) -> None:
        """Not the filesystem of the host with the mount point."""
        def refuse(descriptor: int) -> int:
            raise AssertionError(os.readlink(f'/proc/self/fd/{descriptor}'))

        self.syncfs(refuse)
        mounts.sync(self.target, 60)
        self.mounted()
        error = self.assertRaises(AssertionError, mounts.sync, self.target,
                                  60)
        self.assertEqual(self.target, str(error))

    def test_hangs(self) -> None:
        self.syncfs(lambda descriptor: signal.pause() or 0)
        self.mounted()
        began = time.monotonic()
        self.assertRaisesRegex(TimeoutError, 'syncfs did not finish',
                               mounts.sync, self.target, 0.3)
        self.assertLess(time.monotonic() - began, 30)

    def test_input(self) -> None:
        for deadline in (0, -1, 1e9):
            self.assertRaises(ValueError, mounts.sync, self.target, deadline)
        for pool in ('/', '/etc', '/x/storage-pools', '/storage-pools/../x',
                     'storage-pools/x', None):
            self.assertRaises(ValueError, mounts.sync_pool, pool, 60)

    def test_pool(self) -> None:
        synced = os.path.join(os.path.dirname(self.target), 'synced')

        def write(descriptor: int) -> int:
            os.symlink(os.readlink(f'/proc/self/fd/{descriptor}'), synced)
            return 0

        self.syncfs(write)
        pool = os.path.join(os.path.dirname(self.target), 'storage-pools',
                            'default')
        os.makedirs(pool)
        mounts.sync_pool(pool, 60)
        self.assertEqual(pool, os.readlink(synced))


class MountTest(mounts_case.MountsTestCase):

    def mount(self, read_only: bool = False,
              ids: tuple = mounts_case.IDS) -> None:
        mounts.mount(self.device, 'ext4', self.target, read_only, False, *ids)

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
