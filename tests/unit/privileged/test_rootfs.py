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

"""Root filesystems on volumes."""

from __future__ import annotations

import errno
import hashlib
import os
import pathlib
import stat

import fixtures
from oslotest import base

from nova_lxd_py.virt.privileged import mounts
from nova_lxd_py.virt.privileged import rootfs
from tests.fixtures import mounts_case

VOLUME = '9a0b6f0e-5d2c-4f4e-8a57-6a1c1b1f0e11'
OTHER = '9a0b6f0e-5d2c-4f4e-8a57-6a1c1b1f0e12'
TARGET = f'/run/x/root-{VOLUME}/{VOLUME}'


class RootTest(mounts_case.MountsTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.parent = self.kernel.target(f'top/{rootfs.mount_parent(VOLUME)}')
        self.target = f'{self.parent}/{VOLUME}'

    def mount(self, ids: tuple = mounts_case.IDS) -> None:
        rootfs.mount(self.device, 'ext4', self.target, False, *ids)

    def test_programs_may_change_their_user(self) -> None:
        """But only where nobody else of the host gets to."""
        self.kernel.content = {'rootfs/etc': None}
        self.mount()
        [found] = self.kernel.placed
        # Until then the volume cannot be used.
        self.assertEqual([mounts.MS_NOSUID | mounts.MS_NODEV],
                         self.kernel.flags)
        self.assertEqual(mounts.MOUNT_ATTR_NOSUID, found.attributes.attr_clr)
        self.assertEqual(mounts.MOUNT_ATTR_IDMAP, found.attributes.attr_set)
        self.assertEqual(0o100, stat.S_IMODE(os.stat(self.parent).st_mode))
        self.assertEqual({self.parent: mounts_case.IDS[0]}, self.kernel.owners)
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
                          self.kernel.target(VOLUME), False,
                          *mounts_case.IDS)

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
            self.assertEqual(mounts.MS_RDONLY | mounts.MS_NOSUID |
                             mounts.MS_NODEV | mounts.MS_NOEXEC,
                             self.kernel.flags[-1])
            for name in content:
                os.rmdir(f'{target}/{name}')

    def test_first_boot(self) -> None:
        target = self.kernel.target(VOLUME)
        staging = rootfs.open_staging(self.device, 'ext4', target)
        self.assertEqual([mounts.MS_NOSUID | mounts.MS_NODEV],
                         self.kernel.flags)
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
        # It would mean all of the volume.
        self.assertRaises(ValueError, rootfs.read, path, 0, -1)
        self.assertRaises(ValueError, rootfs.contains_image, path, 0, '')
        self.assertRaises(OSError, rootfs.wipe_image, path, 6, checksum)
        self.assertEqual([], self.kernel.commands)
        rootfs.wipe_image(path, 5, checksum)
        self.assertEqual('wipefs', self.kernel.commands[0][0])
        with open(path, 'rb') as stream:
            self.assertFalse(any(stream.read(1 << 20)))


class ContentTestCase(base.BaseTestCase):
    """Content of volumes, and refused arguments."""

    def setUp(self) -> None:
        super().setUp()
        rootfs.privileged.context.set_client_mode(False)
        self.addCleanup(rootfs.privileged.context.set_client_mode, True)
        self.directory = pathlib.Path(self.useFixture(fixtures.TempDir()).path)

    def find(self, *names: str, **links: str) -> str:
        directory = self.directory / str(len(list(self.directory.iterdir())))
        directory.mkdir()
        for name in names:
            (directory / name).mkdir(parents=True)
        for name, target in links.items():
            (directory / name).symlink_to(target)
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            return rootfs._find(descriptor)
        finally:
            os.close(descriptor)

    def test_states(self) -> None:
        self.assertEqual(rootfs.READY, self.find('rootfs', 'lost+found'))
        self.assertEqual(rootfs.READY, self.find(
            'etc', 'usr', sbin='usr/sbin'))
        self.assertEqual(rootfs.READY, self.find('rootfs', 'nova-unpack'))
        self.assertEqual(rootfs.UNFINISHED, self.find())
        self.assertEqual(rootfs.UNFINISHED, self.find('lost+found'))
        self.assertEqual(rootfs.UNFINISHED, self.find('nova-unpack/x'))
        self.assertEqual(rootfs.OTHER, self.find('etc'))
        self.assertEqual(rootfs.OTHER, self.find('data'))

    def test_symbolic_links(self) -> None:
        self.assertEqual(rootfs.OTHER, self.find(rootfs='/'))
        self.assertEqual(rootfs.OTHER, self.find(**{'nova-unpack': '/'}))

    def test_digest(self) -> None:
        file = self.directory / 'volume'
        file.write_bytes(b'image' + bytes(100))
        self.assertEqual('78805a221a988e79ef3f42d7c5bfd418',
                         rootfs._digest(str(file), 5))
        self.assertEqual('', rootfs._digest(str(file), 1000))
        for size in (0, -1, None, '5'):
            self.assertRaises(ValueError, rootfs._digest, str(file), size)

    def test_targets(self) -> None:
        for path in ('/', None, f'/run/{VOLUME}/{VOLUME}',
                     f'/run/root-{OTHER}/{VOLUME}', TARGET + '/',
                     f'/run/../root-{VOLUME}/{VOLUME}'):
            self.assertRaises(ValueError, rootfs.unmount, path, True)
            self.assertRaises(ValueError, rootfs.mount, '/dev/x', 'ext4',
                              path, False, 1, 1, 1)
        self.assertRaises(ValueError, rootfs.mount, '/dev/x', 'ext4', TARGET,
                          False, 0, 0, 65536)
        self.assertRaises(ValueError, rootfs.root_state, '/dev/x', 'ext4', '/')
        for function in (rootfs.complete, rootfs.close_staging):
            self.assertRaises(ValueError, function, '/mnt')

    def test_nothing_is_mounted(self) -> None:
        target = self.directory / f'root-{VOLUME}' / VOLUME
        self.assertFalse(rootfs.unmount(str(target), False))
        rootfs.close_staging(str(self.directory / VOLUME))
