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
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any
import unittest
import uuid
import zlib

from nova.compute import power_state
from nova import exception
from oslo_privsep import priv_context

from nova_lxd_py.virt import privileged
from nova_lxd_py.virt.privileged import mounts
from nova_lxd_py.virt.privileged import network
from tests.fixtures import encrypted_volumes
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
        """Attaching fails in a few seconds and leaves nothing."""
        begin = time.monotonic()
        self.assertRaisesRegex(exception.VolumeAttachFailed, reason,
                               self.attach, self.server, volume)
        self.assertLess(time.monotonic() - begin, 30)
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

    def activated(self) -> tuple[set[str], str]:
        mapped = set(os.listdir('/dev/mapper')) if os.path.isdir(
            '/dev/mapper') else set()
        with contextlib.suppress(FileNotFoundError):
            return mapped, pathlib.Path('/proc/mdstat').read_text()
        return mapped, ''

    def test_no_mode_activates_them(self) -> None:
        before = self.activated()
        for volume, name in self.prepare():
            checksum = volume.checksum(1 << 20)
            self.server.metadata = {}
            self.assert_refused(volume, f'it holds {name}')
            self.server.metadata = {'lxd_volume_mode': 'block'}
            self.detach(self.server, self.attach(self.server, volume))
            self.assertEqual(checksum, volume.checksum(1 << 20))
        self.assertEqual(before, self.activated())


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


@unittest.skipIf(NO_LXD, NO_LXD or '')
class KeyDerivationTest(encrypted_volumes.EncryptedCases,
                        unittest.TestCase):
    """LUKS headers that take hours and all memory to open."""

    kind = lab_volumes.FileVolume

    def refuse(self, header: bytes) -> None:
        volume = self.storage.volume()
        write(volume, 0, header)
        self.assertRaisesRegex(
            exception.VolumeAttachFailed, 'costs too much',
            self.attach_encrypted, self.server, volume)
        self.assertFalse(self.opened(volume))
        self.assertEqual(set(), self.storage.left_on_host())

    def test_not_opened(self) -> None:
        self.install()
        self.server = self.host.spawn()
        self.metadata['provider'] = 'luks'
        first = bytearray(592)
        first[:8] = b'LUKS\xba\xbe\0\1'
        first[208:216] = struct.pack('>2I', 0x00ac71f3, 4_000_000_000)
        self.refuse(bytes(first))
        self.metadata['provider'] = 'luks2'
        second = bytearray(0x4000)
        second[:16] = b'LUKS\xba\xbe\0\2' + struct.pack('>Q', 0x4000)
        text = (b'{"keyslots":{"0":{"type":"luks2","kdf":{"type":"argon2id",'
                b'"time":4000000,"memory":4194304,"cpus":4}}}}')
        second[4096:4096 + len(text)] = text
        self.refuse(bytes(second))
        # In the copy of the header only.
        plain = bytearray(0x4000)
        plain[:16] = second[:16]
        copy = bytes(second).replace(b'LUKS', b'SKUL', 1)
        self.refuse(bytes(plain) + copy)
        self.assertNotIn('luksOpen', pathlib.Path(
            f'{self.program}.arguments').read_text())


@unittest.skipIf(NO_LXD, NO_LXD or '')
class ManyFilesTest(volume_host.VolumeHost, unittest.TestCase):
    """A detach whose look at the guest's processes would take for ever."""

    kind = lab_volumes.FileVolume
    PROCESSES, FILES = 26, 20_000
    SCRIPT = r'''
import os, resource, sys, time
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
for _process in range(int(sys.argv[1])):
    if os.fork() == 0:
        for _file in range(min(int(sys.argv[2]), most - 10)):
            os.dup(0)
        os.write(1, b'ready\n')
        time.sleep(1000)
time.sleep(1000)
'''

    def test_bounded(self) -> None:
        server = self.host.spawn()
        connection = self.attach(server, self.storage.volume())
        init = self.host.lxd.api.must(
            'GET', f'/1.0/instances/{server.name}/state',
            params={'project': self.host.project})['pid']
        # Programs of the host among the processes of the guest.
        started = subprocess.Popen(
            ['nsenter', '--target', str(init), '--pid', sys.executable, '-c',
             self.SCRIPT, str(self.PROCESSES), str(self.FILES)],
            stdout=subprocess.PIPE, stdin=subprocess.DEVNULL,
            start_new_session=True)
        try:
            assert started.stdout is not None
            for _process in range(self.PROCESSES):
                self.assertEqual(b'ready\n', started.stdout.readline())
            begin = time.monotonic()
            self.assertRaisesRegex(
                exception.DeviceDetachFailed, 'too many open files',
                self.detach, server, connection)
            self.assertLess(time.monotonic() - begin, 60)
        finally:
            os.killpg(started.pid, signal.SIGKILL)
            started.wait()
        deadline = time.monotonic() + 30
        while True:
            try:
                self.detach(server, connection)
                break
            except exception.DeviceDetachFailed:
                self.assertLess(time.monotonic(), deadline)
                time.sleep(0.5)


class DeafFilesystem:
    """A FUSE filesystem that reads each request and answers none.

    As from an NFS server that has gone, nothing that asks it can be killed. It
    ends, with an error for all who wait, when its process does: that is
    another one, which ends with this one.
    """

    SERVER = '''
import ctypes, os, struct, sys, threading
channel = os.open('/dev/fuse', os.O_RDWR | os.O_CLOEXEC)
if ctypes.CDLL(None).mount(
        b'deaf', os.fsencode(sys.argv[1]), b'fuse', 0,
        f'fd={channel},rootmode=40000,user_id=0,group_id=0'.encode()):
    sys.exit(1)
# Nothing is sent before the first request is answered.
unique, = struct.unpack_from('<Q', os.read(channel, 1 << 17), 8)
body = struct.pack('<4I2HI', 7, 19, 0, 0, 0, 0, 4096)
os.write(channel, struct.pack('<IiQ', 16 + len(body), 0, unique) + body)

def swallow():
    while True:
        os.read(channel, 1 << 17)

threading.Thread(target=swallow, daemon=True).start()
print('ready', flush=True)
sys.stdin.read()
os._exit(0)
'''

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._server = subprocess.Popen(
            [sys.executable, '-c', self.SERVER, directory],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._server.stdout is not None
        if self._server.stdout.readline() != b'ready\n':
            raise OSError('FUSE cannot be mounted')

    def end(self) -> None:
        self._server.kill()
        self._server.communicate()
        subprocess.run(['umount', '-l', self._directory], check=True)


@unittest.skipIf(os.geteuid(), 'mounting needs root')
class DeafStorageTest(unittest.TestCase):
    """Storage that does not answer holds up nothing else."""

    def setUp(self) -> None:
        super().setUp()
        directory = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, directory)
        helper = pathlib.Path(sys.executable).parent / 'privsep-helper'
        config = pathlib.Path(directory, 'privsep.conf')
        config.write_text('[DEFAULT]\n')
        for context in (privileged.context, privileged.network_context):
            lab_volumes.CONF.set_override(
                'helper_command', f'{helper} --config-file {config}',
                context.cfg_section)
            self.addCleanup(lab_volumes.CONF.clear_override, 'helper_command',
                            context.cfg_section)
            context.set_client_mode(True)
            self.addCleanup(context.stop)
            context.start(priv_context.Method.ROOTWRAP)
        self.target = os.path.join(directory, str(uuid.uuid4()))
        os.mkdir(self.target)
        self.deaf = DeafFilesystem(self.target)
        self.addCleanup(self.deaf.end)

    def test_ports_and_other_volumes(self) -> None:
        """More requests than the daemon has threads; all end in time."""
        ended: list[BaseException | None] = []

        def ask() -> None:
            try:
                mounts.sync(self.target, 2.0)
                ended.append(None)
            except OSError as exc:
                ended.append(exc)

        threads = [threading.Thread(target=ask) for _number in range(
            lab_volumes.CONF[privileged.context.cfg_section].thread_pool_size
            + 8)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        begin = time.monotonic()
        suffix = str(uuid.uuid4())[:11]
        network.create_veth(f'tap{suffix}', f'tin{suffix}',
                            'fa:16:3e:00:00:01', 1442, False)
        took = time.monotonic() - begin
        network.delete_device(f'tap{suffix}')
        self.assertFalse(ended)
        self.assertLess(took, 2)
        for thread in threads:
            thread.join(60)
            self.assertFalse(thread.is_alive())
        self.assertEqual({TimeoutError}, {type(exc) for exc in ended})
        # The storage daemon has threads again for volumes that answer.
        begin = time.monotonic()
        mounts.sync(os.path.join('/tmp', str(uuid.uuid4())), 5.0)
        self.assertLess(time.monotonic() - begin, 10)
