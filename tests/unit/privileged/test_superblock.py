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

"""Filesystems of tenants that the host must not mount."""

import os
import shutil
import struct
import subprocess
import tempfile
from unittest import mock

from oslotest import base

from nova_lxd_py.virt import privileged
from nova_lxd_py.virt.privileged import mounts
from nova_lxd_py.virt.privileged import probe
from nova_lxd_py.virt.privileged import superblock
from nova_lxd_py.virt.privileged import validation

SIZE = 320 << 20
VOLUME = '9a0b6f0e-5d2c-4f4e-8a57-6a1c1b1f0e11'


class SuperblockTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        privileged.context.set_client_mode(False)
        self.addCleanup(privileged.context.set_client_mode, True)
        patch = mock.patch.object(validation, 'checked_device',
                                  lambda path: path)
        patch.start()
        self.addCleanup(patch.stop)
        self.file = tempfile.NamedTemporaryFile()
        self.addCleanup(self.file.close)

    def make(self, name: str, *options: str) -> str:
        """Create a filesystem and identify it."""
        path = shutil.which(name, path='/sbin:/usr/sbin')
        if path is None:
            self.skipTest(f'{name} is not installed')
        self.file.truncate(0)
        self.file.truncate(SIZE)
        subprocess.run([path, *options, self.file.name], check=True,
                       capture_output=True)
        return probe.content(self.file.name)

    def write(self, layout: str, offset: int, *values: int | bytes) -> str:
        """Change the superblock and identify the filesystem."""
        os.pwrite(self.file.fileno(), struct.pack(layout, *values), offset)
        return probe.content(self.file.name)

    def test_plain(self) -> None:
        for kind, options in (('ext4', ('-q',)), ('xfs', ('-q',)),
                              ('ext4', ('-q', '-O', '^has_journal'))):
            self.assertEqual(kind, self.make(f'mkfs.{kind}', *options))

    def test_multiple_mount_protection(self) -> None:
        """The kernel would sleep in mount(2) for hours."""
        self.assertEqual('ext4 with multiple mount protection',
                         self.make('mkfs.ext4', '-q', '-O', 'mmp'))

    def test_external_journal(self) -> None:
        self.assertEqual('jbd with an external journal',
                         self.make('mkfs.ext4', '-q', '-O', 'journal_dev'))
        self.make('mkfs.ext4', '-q')
        # s_journal_dev, beside the journal in the filesystem
        self.assertEqual('ext4 with an external journal',
                         self.write('<I', 1024 + 0xe4, 0x700))
        # s_journal_inum
        self.assertEqual('ext4 with an external journal',
                         self.write('<2I', 1024 + 0xe0, 0, 0))

    def test_mount_options(self) -> None:
        self.make('mkfs.ext4', '-q')
        # s_mount_opts
        self.assertEqual('ext4 with mount options in its superblock',
                         self.write('6s', 1024 + 0x200, b'debug'))

    def test_xfs(self) -> None:
        self.make('mkfs.xfs', '-q')
        self.assertEqual('xfs', probe.content(self.file.name))
        for offset, word in ((48, 'external log'), (16, 'realtime section')):
            self.make('mkfs.xfs', '-q')
            before = os.pread(self.file.fileno(), 8, offset)
            value = 0 if offset == 48 else 7
            self.assertIn(word, self.write('>Q', offset, value))
            self.assertEqual('xfs', self.write('8B', offset, *before))

    def test_luks(self) -> None:
        self.file.truncate(SIZE)
        self.assertEqual('crypto_LUKS',
                         self.write('8s', 0, b'LUKS\xba\xbe\0\1'))
        # Iterations of the first key slot.
        self.assertIn('costs too much', self.write('>I', 212, 1 << 31))

    def test_not_mounted(self) -> None:
        """The superblock is checked again immediately before mount(2)."""
        self.make('mkfs.ext4', '-q', '-O', 'mmp')
        error = self.assertRaises(
            PermissionError, mounts.attach_plain, self.file.name, 'ext4',
            f'/nonexistent/{VOLUME}', 0)
        self.assertIn('multiple mount protection', str(error))


class RefusalTestCase(base.BaseTestCase):
    """Superblocks made here, also where the programs for them are missing."""

    def refusal(self, kind: str, content: bytes) -> str:
        with tempfile.TemporaryFile() as file:
            file.write(content)
            file.flush()
            return superblock.refusal(file.fileno(), kind)

    def ext(self, magic: int = 0xef53, compat: int = 0, incompat: int = 0,
            inode: int = 0, device: int = 0, options: bytes = b'') -> str:
        block = bytearray(2048)
        struct.pack_into('<H', block, 1024 + 0x38, magic)
        struct.pack_into('<2I', block, 1024 + 0x5c, compat, incompat)
        struct.pack_into('<2I', block, 1024 + 0xe0, inode, device)
        block[1024 + 0x200:1024 + 0x200 + len(options)] = options
        [found] = {self.refusal(kind, block) for kind in (
            'ext2', 'ext3', 'ext4', 'ext4dev', 'jbd')}
        return found

    def test_ext(self) -> None:
        self.assertEqual('', self.ext())
        self.assertEqual('', self.ext(compat=4, inode=8))
        self.assertEqual('an invalid superblock', self.ext(magic=0xef52))
        self.assertEqual('multiple mount protection',
                         self.ext(incompat=0x100))
        for how in ({'incompat': 8}, {'device': 0x700}, {'compat': 4},
                    {'compat': 4, 'inode': 8, 'device': 1}):
            self.assertEqual('an external journal', self.ext(**how))
        self.assertEqual('mount options in its superblock',
                         self.ext(options=b'debug'))
        self.assertEqual('an incomplete superblock',
                         self.refusal('ext4', bytes(2047)))

    def test_xfs(self) -> None:
        def xfs(realtime: int = 0, log: int = 1, magic: bytes = b'XFSB',
                size: int = 56) -> str:
            block = struct.pack('>4s12xQ24xQ', magic, realtime, log)
            return self.refusal('xfs', block[:size])
        self.assertEqual('', xfs())
        self.assertEqual('an external log', xfs(log=0))
        self.assertEqual('a realtime section', xfs(realtime=1))
        for refused in (xfs(magic=b'XFSC'), xfs(size=55)):
            self.assertEqual('an invalid superblock', refused)

    def test_others(self) -> None:
        """Mounting them opens no other device; an allow-list has the rest."""
        for kind in ('btrfs', 'squashfs', ''):
            self.assertEqual('', self.refusal(kind, b''))
