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

"""Volumes that the host mounts for servers, with a real LXD."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import fcntl
import mmap
import os
import shutil
import struct
import subprocess
import tempfile
import time
import unittest

from nova import exception
from oslo_utils import units

from tests.fixtures import disks
from tests.fixtures import lab_volumes
from tests.fixtures import lxd_daemon
from tests.fixtures import variants
from tests.fixtures import volume_host

# From linux/xfs_fs.h.
XFS_IOC_GOINGDOWN = 0x8004587d
XFS_FSOP_GOING_FLAGS_NOLOGFLUSH = 2

NO_LXD = lxd_daemon.missing()

PATH = volume_host.PATH


class FilesystemCases(volume_host.FilesystemHost):
    """Volumes in filesystem mode, for every filesystem and id range."""

    def test_moves_between_servers(self) -> None:
        first, second = self.host.spawn(), self.host.spawn()
        volume = self.storage.volume()
        connection = self.attach(first, volume)
        filled = self.fill(first)
        self.assertTrue(filled.endswith('\n0 0\n7 8\n'), filled)
        self.assertFalse(self.has(first))
        self.detach(first, connection)
        self.assertEqual({}, self.devices(first))
        self.assertEqual(set(), self.storage.left_on_host())
        connection = self.attach(second, volume)
        self.assertEqual(filled, self.sum(second))
        self.detach(second, connection)

    def test_mount_is_safe(self) -> None:
        server = self.host.spawn()
        connection = self.attach(server, self.storage.volume())
        with open('/proc/self/mounts', encoding='utf-8') as stream:
            line = next(line for line in stream
                        if connection['serial'] in line)
        for option in ('nosuid', 'nodev'):
            self.assertIn(option, line)
        self.detach(server, connection)

    def test_boot_reboot_and_destroy(self) -> None:
        volume = self.storage.volume()
        mapping = volume.mapping()
        server = self.host.spawn(block_device_info=disks.described(mapping))
        filled = self.fill(server)
        assert mapping.saved is not None
        again = volume.mapping()
        again['connection_info'] = mapping.saved
        self.reboot(server, disks.described(again))
        self.assertEqual(filled, self.sum(server))
        self.reboot(server, disks.described(again), 'SOFT')
        self.assertEqual(filled, self.sum(server))
        self.host.driver.power_off(server)
        self.host.driver.power_on(self.host.context, server, [],
                                  disks.described(volume.mapping()))
        self.assertEqual(filled, self.sum(server))
        self.destroy(server, disks.described(again))
        self.assertEqual(set(), self.storage.left_on_host())

    def test_cold(self) -> None:
        server = self.host.spawn(power_on=False)
        volume = self.storage.volume()
        connection = self.attach(server, volume)
        self.host.driver.power_on(self.host.context, server, [],
                                  disks.described(volume.mapping()))
        self.fill(server)
        self.host.driver.power_off(server)
        self.detach(server, connection)
        self.assertEqual(set(), self.storage.left_on_host())

    def test_stop_writes_cached_data(self) -> None:
        """A crash of the host after that loses nothing."""
        server = self.host.spawn()
        volume = self.storage.volume()
        connection = self.attach(server, volume)
        # The kernel writes by itself too: after some seconds, and at once if a
        # file is replaced.
        for number in range(10):
            content = f'written-{number}-{volume.id}'
            self.host.run(server, 'sh', '-c', f'for i in $(seq 5000); do echo '
                          f'{content}; done >{self.directory}/data{number}')
            if not self.is_stored(volume, content):
                break
        else:
            self.fail('The kernel caches nothing')
        self.host.driver.power_off(server)
        self.assertTrue(self.is_stored(volume, content))
        self.detach(server, connection)

    def test_space_of_deleted_files_comes_back(self) -> None:
        server = self.host.spawn()
        volume = self.storage.volume()
        connection = self.attach(server, volume)
        self.host.write_random(server, f'{self.directory}/data', 70)
        filled = volume.file.stat().st_blocks * 512
        self.assertGreater(filled, 70 * units.Mi)
        self.host.run(server, 'rm', f'{self.directory}/data')
        # The kernel discards when the journal is written.
        deadline = time.monotonic() + 60
        while volume.file.stat().st_blocks * 512 > filled - 60 * units.Mi:
            self.assertLess(time.monotonic(), deadline)
            self.host.run(server, 'sync')
            time.sleep(0.5)
        self.detach(server, connection)

    def is_stored(self, volume: lab_volumes.Volume, content: str) -> bool:
        """Whether something is on the storage of a volume, and not only in
        the cache of its mount."""
        with (open(volume.file, 'rb') as stream,
              mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data):
            return data.find(content.encode()) >= 0

    def test_busy_stays_attached(self) -> None:
        server = self.host.spawn()
        volume = self.storage.volume()
        connection = self.attach(server, volume)
        filled = self.fill(server)
        self.hold_open(server, f'{self.directory}/data')
        self.proxy.behave()
        self.assertRaisesRegex(exception.DeviceDetachFailed, 'processes',
                               self.detach, server, connection)
        self.assertFalse(self.asked_for_state())
        self.assertEqual(filled, self.sum(server))
        self.release(server)
        # A bind mount keeps it busy without a process.
        self.host.run(server, 'sh', '-c', 'mkdir -p /other && busybox mount '
                      f'-o bind {self.directory} /other')
        self.assertRaises(exception.DeviceDetachFailed, self.detach, server,
                          connection)
        self.assertEqual(filled, self.sum(server))
        self.host.run(server, 'busybox', 'umount', '/other')
        self.detach(server, connection)
        self.assertEqual(set(), self.storage.left_on_host())

    def test_read_only(self) -> None:
        server = self.host.spawn()
        volume = self.storage.volume()
        self.assertRaisesRegex(exception.VolumeAttachFailed, 'empty',
                               self.attach, server, volume, access_mode='ro')
        connection = self.attach(server, volume)
        filled = self.fill(server)
        self.detach(server, connection)
        connection = self.attach(server, volume, access_mode='ro')
        self.assertEqual(filled, self.sum(server))
        with self.assertRaises(AssertionError):
            self.host.run(server, 'touch', f'{self.directory}/x')
        self.detach(server, connection)

    def test_content_is_never_overwritten(self) -> None:
        server = self.host.spawn()
        for offset, content in ((0, b'\x7fELF'), (510, b'\x55\xaa'),
                                (4096, b'something'),
                                (0x10040, b'_BHRfS_M')):
            volume = self.storage.volume()
            with open(volume.file, 'r+b') as stream:
                stream.seek(offset)
                stream.write(content)
            before = volume.checksum(1 << 20)
            self.assertRaisesRegex(exception.VolumeAttachFailed, 'it holds',
                                   self.attach, server, volume)
            self.assertEqual(before, volume.checksum(1 << 20))
        self.assertEqual(set(), self.storage.left_on_host())

    def test_mode_of_volume_and_server(self) -> None:
        server = self.host.spawn()
        volume = self.storage.volume()
        server.metadata = {'lxd_volume_mode': 'filesystem'}
        self.metadata['lxd_volume_mode'] = 'block'
        connection = self.attach(server, volume)
        self.assertTrue(self.has(server))
        self.detach(server, connection)
        self.metadata.clear()
        connection = self.attach(server, volume)
        self.assertFalse(self.has(server))
        self.detach(server, connection)
        server.metadata = {'lxd_volume_mode': 'tape'}
        self.assertRaisesRegex(exception.VolumeAttachFailed, 'tape',
                               self.attach, server, volume)
        shared = {**volume.connection(), 'multiattach': True}
        server.metadata = {}
        self.assertRaisesRegex(
            exception.VolumeAttachFailed, 'several servers',
            self.host.driver.attach_volume, self.host.context, shared, server,
            PATH)

    def test_destroy_while_it_is_used(self) -> None:
        server = self.host.spawn()
        connection = self.attach(server, self.storage.volume())
        self.fill(server)
        self.hold_open(server, f'{self.directory}/data')
        self.destroy(server)
        self.assertEqual(set(), self.storage.left_on_host())
        self.detach(server, connection)


@unittest.skipIf(NO_LXD, NO_LXD or '')
class Ext4VolumeTest(FilesystemCases, unittest.TestCase):
    filesystem = 'ext4'
    options = {'idmap_isolation': 'server'}

    def test_unsafe_superblock(self) -> None:
        """The kernel would sleep in mount(2) for hours."""
        server = self.host.spawn()
        volume = self.storage.volume()
        subprocess.run(['mkfs.ext4', '-q', '-O', 'mmp', volume.file],
                       check=True)
        self.assertRaisesRegex(
            exception.VolumeAttachFailed, 'multiple mount protection',
            self.attach, server, volume)
        self.assertEqual(set(), self.storage.left_on_host())


@unittest.skipIf(NO_LXD or not shutil.which('mkfs.xfs'),
                 NO_LXD or 'mkfs.xfs is not installed (package xfsprogs)')
@variants.keep(
    'test_moves_between_servers', 'test_boot_reboot_and_destroy',
    'test_stop_writes_cached_data', 'test_space_of_deleted_files_comes_back',
    'test_read_only', 'test_destroy_while_it_is_used')
class XfsVolumeTest(FilesystemCases, unittest.TestCase):
    filesystem = 'xfs'
    COPY = r'''
while read -r _ _ _ _ target _; do
    case $target in
    *"$1"*) ;;
    "$2"/*|/run/nova-*) targets="$target $targets" ;;
    esac
done </proc/self/mountinfo
for target in $targets; do
    umount --lazy "$target"
done
echo ready
exec sleep 4
'''

    def shut_down_filesystem(self, volume: lab_volumes.Volume) -> None:
        """Shut down xfs, as the kernel does if it cannot write the log."""
        descriptor = os.open(os.path.join(
            lab_volumes.CONF.lxd.volume_mount_directory, volume.id),
            os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, XFS_IOC_GOINGDOWN,
                        struct.pack('I', XFS_FSOP_GOING_FLAGS_NOLOGFLUSH))
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def copy_of_mount(self, volume: lab_volumes.Volume) -> Iterator[None]:
        """Let a process keep a copy of the mount for a while, as LXD's helpers
        in the guest do, but not of the mounts of tests in other processes."""
        with subprocess.Popen(
                ['unshare', '--mount', '--propagation', 'private', 'sh', '-c',
                 self.COPY, 'sh', volume.id, tempfile.gettempdir()],
                stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            self.assertEqual(b'ready\n', process.stdout.readline())
            yield

    def test_shut_down_filesystem(self) -> None:
        """It is unmounted, and usable again after that."""
        server = self.host.spawn()
        volume = self.storage.volume()
        for way in ('stop', 'reboot', 'destroy'):
            mapping = volume.mapping()
            connection = self.attach(server, volume)
            self.host.run(server, 'touch', f'{self.directory}/{way}')
            self.host.run(server, 'sync')
            self.shut_down_filesystem(volume)
            if way == 'stop':
                self.assertRaisesRegex(
                    exception.DeviceDetachFailed, 'shut itself down',
                    self.detach, server, connection)
                self.host.driver.power_off(server)
                self.detach(server, connection)
                self.host.driver.power_on(self.host.context, server, [])
            elif way == 'reboot':
                with self.copy_of_mount(volume):
                    self.reboot(server, disks.described(mapping))
                self.host.run(server, 'touch', f'{self.directory}/again')
                self.detach(server, connection)
            else:
                self.host.driver.power_off(server)
                self.destroy(server, disks.described(mapping))
            self.assertEqual(set(), self.storage.left_on_host(), way)

    def test_extended_while_detached(self) -> None:
        first, second = self.host.spawn(), self.host.spawn()
        volume = self.storage.volume()
        connection = self.attach(first, volume)
        filled = self.fill(first)
        before = self._size(first)
        self.detach(first, connection)
        volume.extend(2 * units.Gi)
        connection = self.attach(second, volume)
        self.assertGreater(self._size(second), before + 900 * 1024)
        self.assertEqual(filled, self.sum(second))
        self.detach(second, connection)

    def test_extend(self) -> None:
        server = self.host.spawn()
        volume = self.storage.volume()
        connection = self.attach(server, volume)
        filled = self.fill(server)
        before = self._size(server)
        self.grow(server, volume, connection)
        self.assertGreater(self._size(server), before + 900 * 1024)
        self.assertEqual(filled, self.sum(server))
        self.detach(server, connection)

    def _size(self, server) -> int:
        """Return the size of the filesystem in the guest in KiB."""
        return int(self.host.run(server, 'busybox', 'df', '-k', self.directory
                                 ).splitlines()[1].split()[1])


@unittest.skipIf(NO_LXD, NO_LXD or '')
class PrivilegedVolumeTest(volume_host.VolumeHost, unittest.TestCase):
    """A guest with the ids of the host needs no mapping."""

    kind = lab_volumes.LocalVolume
    options = {'volume_filesystems': ['ext4'], 'volume_mode': 'filesystem'}

    def test_owner(self) -> None:
        image = self.host.image()
        server = self.host.spawn(self.host.instance(
            image, {'lxd:privileged_allowed': 'true'}), image)
        connection = self.attach(server, self.storage.volume())
        self.host.run(server, 'touch', '/mnt/vdb/x')
        self.assertEqual('0', self.host.run(
            server, 'busybox', 'stat', '-c', '%u', '/mnt/vdb/x').strip())
        self.detach(server, connection)

    def test_detach_after_a_reboot_of_the_host(self) -> None:
        """The device of the volume is another one's, which is mounted."""
        first, second = self.host.spawn(), self.host.spawn()
        one = self.storage.volume()
        mine = self.attach(first, one)
        self.host.driver.power_off(first)
        subprocess.run(['umount', os.path.join(
            lab_volumes.CONF.lxd.volume_mount_directory, one.id)],
            check=True)
        lab_volumes.reboot_host(self.host)
        self.host.restart_driver()
        connection = self.attach(second, self.storage.volume(),
                                 device_path=one.device)
        self.host.run(second, 'touch', '/mnt/vdb/x')
        self.detach(first, mine)
        self.assertEqual({}, self.devices(first))
        self.host.run(second, 'ls', '/mnt/vdb/x')
        self.detach(second, connection)


@unittest.skipIf(NO_LXD, NO_LXD or '')
@variants.keep(
    'test_moves_between_servers', 'test_mount_is_safe', 'test_cold',
    'test_stop_writes_cached_data', 'test_busy_stays_attached',
    'test_read_only', 'test_content_is_never_overwritten',
    'test_destroy_while_it_is_used')
class DaemonVolumeTest(FilesystemCases, unittest.TestCase):
    """With the capabilities of the privsep daemon."""

    filesystem = 'ext4'
    daemon = True
