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

"""What tenants may write on their volumes, against their host.

Each volume is prepared as its owner can: with an image, or in a guest that has
it as a block device. Beside all of them is a directory of the host, whose
content must neither show up in a guest nor change.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import shutil
import struct
import subprocess
import tempfile
import time
from typing import Any
import unittest
import uuid
import zlib

from nova.compute import power_state
from nova import exception

from tests.fixtures import lab_volumes
from tests.fixtures import lxd_daemon
from tests.fixtures import volume_host

NO_LXD = lxd_daemon.missing()
NO_XFS = None if shutil.which('mkfs.xfs') else (
    'mkfs.xfs is not installed (package xfsprogs)')

SECRET = 'secret of the host'

LOOP_MAJOR = 7


def make(kind: str, volume: lab_volumes.Volume, *options: str) -> None:
    subprocess.run([f'mkfs.{kind}', '-q', *options, volume.file], check=True,
                   capture_output=True)


def write(volume: lab_volumes.Volume, offset: int, content: bytes) -> None:
    with open(volume.file, 'r+b') as stream:
        stream.seek(offset)
        stream.write(content)


class HostileTestCase(volume_host.VolumeHost):

    kind = lab_volumes.FileVolume
    options = {'volume_filesystems': ['ext4', 'xfs'],
               'volume_mode': 'filesystem'}

    def setUp(self) -> None:
        super().setUp()
        self.canary = pathlib.Path(tempfile.mkdtemp(prefix='canary-'))
        self.addCleanup(shutil.rmtree, self.canary)
        (self.canary / 'file').write_text(SECRET)
        self.canary.chmod(0o755)
        self.addCleanup(self.assert_untouched)
        self.server = self.host.spawn()

    def assert_untouched(self) -> None:
        self.assertEqual(['file'], os.listdir(self.canary))
        self.assertEqual(SECRET, (self.canary / 'file').read_text())
        self.assertEqual([], [
            line for line in pathlib.Path('/proc/self/mounts').read_text(
            ).splitlines() if str(self.canary) in line])

    def assert_refused(self, volume: lab_volumes.Volume, reason: str) -> None:
        """Attaching fails before what hangs is killed, and leaves nothing."""
        begin = time.monotonic()
        self.assertRaisesRegex(exception.VolumeAttachFailed, reason,
                               self.attach, self.server, volume)
        self.assertLess(time.monotonic() - begin, 90)
        self.assertEqual({}, self.devices(self.server))
        self.assertEqual(set(), self.storage.left_on_host())


@unittest.skipIf(NO_LXD, NO_LXD or '')
class SuperblockTest(HostileTestCase, unittest.TestCase):
    """Filesystems that the host does not mount."""

    def test_external_journal(self) -> None:
        """The kernel opens the device of the host with this number."""
        volume = self.storage.volume()
        make('ext4', volume)
        # s_journal_dev, and no s_journal_inum
        write(volume, 1024 + 0xe0, struct.pack('<2I', 0, 7 << 8))
        self.assert_refused(volume, 'an external journal')

    def test_mount_options(self) -> None:
        volume = self.storage.volume()
        make('ext4', volume)
        write(volume, 1024 + 0x200, b'journal_path=/dev/loop0')
        self.assert_refused(volume, 'mount options')

    @unittest.skipIf(NO_XFS, NO_XFS or '')
    def test_external_log(self) -> None:
        volume = self.storage.volume()
        make('xfs', volume)
        write(volume, 48, bytes(8))
        self.assert_refused(volume, 'an external log')

    def test_corrupted(self) -> None:
        # s_log_block_size, s_blocks_per_group, s_inodes_per_group,
        # s_inode_size, s_blocks_count
        for offset, content in ((0x18, b'\xff' * 4), (0x20, bytes(4)),
                                (0x28, bytes(4)), (0x58, b'\1\0'),
                                (0x04, b'\xff' * 4)):
            volume = self.storage.volume()
            make('ext4', volume, '-O', '^metadata_csum')
            write(volume, 1024 + offset, content)
            self.assert_refused(volume, '')

    @unittest.skipIf(NO_XFS, NO_XFS or '')
    def test_corrupted_xfs(self) -> None:
        # sb_blocksize, sb_agblocks, sb_sectsize
        for offset, content in ((4, b'\xff' * 4), (84, bytes(4)),
                                (102, b'\xff' * 2)):
            volume = self.storage.volume()
            make('xfs', volume)
            write(volume, offset, content)
            self.assert_refused(volume, '')


@unittest.skipIf(NO_LXD, NO_LXD or '')
class IdentityTest(HostileTestCase, unittest.TestCase):
    """Filesystems with the UUID and label of another one."""

    def check(self, kind: str) -> None:
        other = self.host.spawn()
        first, second = self.storage.volume(), self.storage.volume()
        make(kind, first, '-L', 'same')
        shutil.copyfile(first.file, second.file)
        mine = self.attach(self.server, first)
        theirs = self.attach(other, second)
        self.host.run(self.server, 'touch', '/mnt/vdb/mine')
        self.host.run(other, 'touch', '/mnt/vdb/theirs')
        for server, name in ((self.server, 'mine'), (other, 'theirs')):
            self.assertEqual([name], [
                found for found in self.host.run(server, 'ls', '/mnt/vdb'
                                                 ).split()
                if found != 'lost+found'])
        self.detach(other, theirs)
        self.detach(self.server, mine)

    def test_ext4(self) -> None:
        self.check('ext4')

    @unittest.skipIf(NO_XFS, NO_XFS or '')
    def test_xfs(self) -> None:
        self.check('xfs')

    def test_that_of_the_pool(self) -> None:
        """A btrfs that the kernel would take for a part of LXD's pool."""
        pool = (f'{self.host.lxd.directory}/storage-pools/'
                f'{self.host.lxd.pool}')
        shown = subprocess.run(
            ['nsenter', '--target', str(self.host.lxd._process.pid),
             '--mount', 'btrfs', 'filesystem', 'show', pool],
            check=True, capture_output=True, text=True).stdout
        identifier = shown.split('uuid:')[1].split()[0]
        volume = self.storage.volume()
        subprocess.run(['mkfs.btrfs', '-q', volume.file], check=True)
        # mkfs refuses to give one twice.
        subprocess.run(['btrfstune', '-f', '-M', str(uuid.uuid4()),
                        volume.file], check=True, capture_output=True)
        content = volume.file.read_bytes()[0x10000:0x11000]
        block = bytearray(content)
        block[0x20:0x30] = uuid.UUID(identifier).bytes
        block[:4] = struct.pack('<I', _crc32c(bytes(block[0x20:])))
        write(volume, 0x10000, bytes(block))
        self.assert_refused(volume, 'it holds btrfs')
        self.server.metadata = {'lxd_volume_mode': 'block'}
        connection = self.attach(self.server, volume)
        again = subprocess.run(
            ['nsenter', '--target', str(self.host.lxd._process.pid),
             '--mount', 'btrfs', 'filesystem', 'show', pool],
            check=True, capture_output=True, text=True).stdout
        self.assertEqual(shown.count('devid'), again.count('devid'))
        self.assertEqual(power_state.RUNNING,
                         self.host.state(self.host.spawn()))
        self.detach(self.server, connection)


def _crc32c(content: bytes) -> int:
    value = 0xffffffff
    for byte in content:
        value ^= byte
        for _bit in range(8):
            value = value >> 1 ^ (0x82f63b78 if value & 1 else 0)
    return value ^ 0xffffffff


@unittest.skipIf(NO_LXD, NO_LXD or '')
class SignatureTest(HostileTestCase, unittest.TestCase):
    """What the host would activate; udev's part is in the rule of the driver
    (tests/unit/host/test_device_activation.py)."""

    def prepare(self) -> list[tuple[lab_volumes.Volume, str]]:
        """Write what libblkid takes for LVM, MD, swap and LUKS."""
        label = bytearray(512)
        label[:8] = b'LABELONE'
        label[8:16] = struct.pack('<Q', 1)
        label[20:32] = struct.pack('<I8s', 32, b'LVM2 001')
        label[32:64] = b'A' * 32
        # The checksum of LVM is a CRC-32 with another beginning.
        crc = zlib.crc32(bytes(label[20:]), 0xf597a6cf ^ 0xffffffff)
        label[16:20] = struct.pack('<I', crc ^ 0xffffffff)
        raid = bytearray(256)
        raid[:8] = struct.pack('<2I', 0xa92b4efc, 1)
        raid[16:32] = uuid.uuid4().bytes
        raid[144:152] = struct.pack('<Q', 8)
        return [(self.volume_with(offset, bytes(content)), name)
                for offset, content, name in (
                    (512, label, 'LVM2_member'),
                    (4096, raid, 'linux_raid_member'),
                    (4086, b'SWAPSPACE2', '(swap|unknown)'),
                    (0, b'LUKS\xba\xbe\0\2', 'crypto_LUKS'))]

    def volume_with(self, offset: int, content: bytes) -> lab_volumes.Volume:
        volume = self.storage.volume()
        write(volume, offset, content)
        return volume

    def activated(self) -> list[str]:
        """List the devices that the kernel has made of the volumes, such as
        those of device-mapper and MD.

        Other tests activate volumes of theirs meanwhile.
        """
        found = []
        for holder in pathlib.Path('/sys/block').glob('*/slaves/*'):
            with contextlib.suppress(OSError):
                file = (holder / 'loop/backing_file').read_text()
                if any(volume.id in file for volume in self.storage._made):
                    found.append(f'{holder} of {file.strip()}')
        return found

    def test_no_mode_activates_them(self) -> None:
        for volume, name in self.prepare():
            checksum = volume.checksum(1 << 20)
            self.server.metadata = {}
            self.assert_refused(volume, f'it holds {name}')
            self.server.metadata = {'lxd_volume_mode': 'block'}
            connection = self.attach(self.server, volume)
            self.assertEqual([], self.activated())
            self.detach(self.server, connection)
            self.assertEqual(checksum, volume.checksum(1 << 20))
        self.assertEqual([], self.activated())


@unittest.skipIf(NO_LXD, NO_LXD or '')
class FilesOnVolumesTest(HostileTestCase, unittest.TestCase):

    def mounted(self, connection: dict[str, Any]) -> str:
        """Return where the host has mounted a volume."""
        with open('/proc/self/mounts', encoding='utf-8') as stream:
            return next(line.split()[1] for line in stream
                        if connection['serial'] in line)

    def test_setuid_and_devices(self) -> None:
        """Neither a user of the host nor root of a guest gains by them."""
        volume = self.storage.volume()
        make('ext4', volume)
        with tempfile.TemporaryDirectory() as directory:
            subprocess.run(['mount', '-o', 'loop', volume.file, directory],
                           check=True)
            try:
                program = os.path.join(directory, 'id')
                shutil.copyfile('/usr/bin/id', program)
                os.chmod(program, 0o4755)
                for name, kind, number in (
                        ('disk', 0o060666, os.makedev(LOOP_MAJOR, 0)),
                        ('memory', 0o020666, os.makedev(1, 1)),
                        ('null', 0o020666, os.makedev(1, 3))):
                    path = os.path.join(directory, name)
                    os.mknod(path, kind, number)
                    os.chmod(path, 0o666)
            finally:
                subprocess.run(['umount', directory], check=True)
        connection = self.attach(self.server, volume)
        directory = self.mounted(connection)
        self.assertEqual('65534', subprocess.run(
            ['./id', '-u'], cwd=directory, user=65534, check=True,
            capture_output=True, text=True).stdout.strip())
        for name in ('disk', 'memory', 'null'):
            error = None
            try:
                os.close(os.open(os.path.join(directory, name), os.O_RDONLY))
            except OSError as exc:
                error = exc.errno
            self.assertEqual(errno.EACCES, error, name)
            with self.assertRaisesRegex(AssertionError, 'ermission denied'):
                self.host.run(self.server, 'dd', f'if=/mnt/vdb/{name}',
                              'of=/dev/null', 'count=1')
        self.detach(self.server, connection)

    def test_links_at_mount_points(self) -> None:
        """Whatever the guest has there, nothing of the host is mounted on."""
        depth = '/..' * 12
        for script in (
                f'rm -rf /mnt && ln -s {depth}{self.canary} /mnt',
                f'rm -rf /mnt && mkdir /mnt && ln -s {self.canary} /mnt/vdb',
                'rm -rf /mnt && ln -s /proc/1/root /mnt',
                'rm -rf /mnt && echo file > /mnt'):
            self.host.run(self.server, 'sh', '-c', script)
            volume = self.storage.volume()
            with contextlib.suppress(exception.NovaException):
                connection = self.attach(self.server, volume)
                self.assert_untouched()
                self.detach(self.server, connection)
            self.assertEqual({}, self.devices(self.server))
            self.assertEqual(set(), self.storage.left_on_host())
            self.assert_untouched()

    def test_links_at_device_names(self) -> None:
        self.server.metadata = {'lxd_volume_mode': 'block'}
        self.host.run(self.server, 'ln', '-s', f'{self.canary}/file',
                      '/dev/vdb')
        volume = self.storage.volume()
        with contextlib.suppress(exception.NovaException):
            connection = self.attach(self.server, volume)
            self.assert_untouched()
            self.detach(self.server, connection)
        self.assertEqual({}, self.devices(self.server))

    def test_read_only_block_device(self) -> None:
        """Root of the guest cannot make it writable."""
        self.server.metadata = {'lxd_volume_mode': 'block'}
        volume = self.storage.volume()
        connection = self.attach(self.server, volume, access_mode='ro')
        before = volume.checksum(1 << 20)
        with self.assertRaises(AssertionError):
            self.host.run(self.server, 'busybox', 'blockdev', '--setrw',
                          '/dev/vdb')
        with self.assertRaises(AssertionError):
            self.host.run(self.server, 'dd', 'if=/dev/urandom', 'of=/dev/vdb',
                          'count=1', 'conv=fsync')
        self.detach(self.server, connection)
        self.assertEqual(before, volume.checksum(1 << 20))
