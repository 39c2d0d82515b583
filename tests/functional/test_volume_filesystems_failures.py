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

"""Volumes that the host mounts, when LXD fails or nova-compute ends."""

from __future__ import annotations

import os
import pathlib
import subprocess
import time
import unittest

import fixtures
from nova import exception

from tests.fixtures import faulty_proxy
from tests.fixtures import killed_process
from tests.fixtures import lab_volumes
from tests.fixtures import lxd_daemon
from tests.fixtures import variants
from tests.fixtures import volume_host

NO_LXD = lxd_daemon.missing()

PATH = volume_host.PATH


class FilesystemFailureCases(volume_host.FilesystemHost):
    """Tests with ext4."""

    filesystem = 'ext4'

    def test_lxd_fails(self) -> None:
        server = self.host.spawn()
        volume = self.storage.volume()
        for how in faulty_proxy.Spoil:
            self.proxy.spoil(0, how)
            self.assertRaises(exception.NovaException, self.attach, server,
                              volume)
            self.proxy.behave()
            self.assertEqual({}, self.devices(server), how)
            self.assertEqual(set(), self.storage.left_on_host())
        connection = self.attach(server, volume)
        self.fill(server)
        self.detach(server, connection)

    def test_nova_compute_is_killed_while_it_attaches(self) -> None:
        """The mount and the loop device are removed at start."""
        server, volume = self.host.spawn(), self.storage.volume()
        target = os.path.join(lab_volumes.CONF.lxd.volume_mount_directory,
                              volume.id)

        def attach_and_hang() -> None:
            with fixtures.MonkeyPatch(
                    'nova_lxd_py.virt.volume.lxd_devices.add',
                    lambda *args: time.sleep(60)):
                self.host.make_driver().attach_volume(
                    self.host.context, volume.connection(), server, PATH)
        self.assertTrue(killed_process.run(
            attach_and_hang, lambda: target in str(
                self.storage.left_on_host())))
        self.host.restart_driver()
        self.assertEqual(set(), self.storage.left_on_host())
        connection = self.attach(server, volume)
        self.fill(server)
        self.detach(server, connection)

    def test_lxd_has_crashed_while_it_attached(self) -> None:
        server, volume = self.host.spawn(), self.storage.volume()
        filled, left = self.fill_and_detach(server, volume)
        for what in ('attach', 'detach'):
            target = self.fail_to_attach(server, volume)
            # LXD mounts it here before it does so in the guest.
            left.mkdir()
            subprocess.run(['mount', '--bind', target, left], check=True)
            connection = volume.connection()
            if what == 'attach':
                connection = self.attach(server, volume)
                self.assertEqual(filled, self.sum(server))
            self.detach(server, connection)
            self.assertFalse(left.exists(), what)
            self.assertEqual(set(), self.storage.left_on_host(), what)

    def test_lxd_has_crashed_before_it_recorded_that(self) -> None:
        """The guest has the mount already, and may use it."""
        server, volume = self.host.spawn(), self.storage.volume()
        filled, left = self.fill_and_detach(server, volume)
        target = self.fail_to_attach(server, volume)
        left.mkdir()
        self.mount_in_guest(server, target)
        self.hold_open(server, f'{self.directory}/data')
        self.assertRaises(exception.DeviceDetachFailed, self.attach, server,
                          volume)
        self.assertRaises(exception.DeviceDetachFailed, self.detach, server,
                          volume.connection())
        self.assertEqual(filled, self.sum(server))
        self.release(server)
        connection = self.attach(server, volume)
        self.assertEqual(filled, self.sum(server))
        self.detach(server, connection)
        self.assertFalse(left.exists())
        self.assertEqual(set(), self.storage.left_on_host())

    @property
    def lxd_directory(self) -> pathlib.Path:
        if self.host.lxd.directory is None:
            self.skipTest('it needs the directory of a private LXD')
        return self.host.lxd.directory

    def fill_and_detach(self, server, volume) -> tuple[str, pathlib.Path]:
        """Write files to an attached volume, and detach it.

        :returns: checksum of one, and where LXD had mounted the volume.
        """
        connection = self.attach(server, volume)
        filled = self.fill(server)
        devices = self.lxd_directory / 'devices'
        [left] = devices.glob(f'*/*{volume.id[-12:]}*')
        self.detach(server, connection)
        return filled, left

    def fail_to_attach(self, server, volume) -> str:
        """Simulate a crash of LXD while it attaches a volume.

        :returns: where the host has mounted the volume.
        """
        self.proxy.refuse_from('PATCH')
        self.assertRaises(exception.NovaException, self.attach, server, volume)
        self.proxy.behave()
        return os.path.join(lab_volumes.CONF.lxd.volume_mount_directory,
                            volume.id)

    def mount_in_guest(self, server, target: str) -> None:
        """Mount a directory of the host in a guest, as LXD does."""
        name = f'{self.host.project}_{server.name}'
        passage = self.lxd_directory / 'shmounts' / name / 'volume'
        passage.mkdir()
        subprocess.run(['mount', '--bind', target, passage], check=True)
        pid = self.host.lxd.api.must(
            'GET', f'/1.0/instances/{server.name}/state',
            params={'project': self.host.project})['pid']
        self.host.run(server, 'mkdir', self.directory)
        subprocess.run(
            ['nsenter', '--target', str(pid), '--mount', 'busybox', 'mount',
             '-o', 'move', f'{lxd_daemon.GUEST_MOUNTS}/volume',
             self.directory],
            check=True)
        subprocess.run(['umount', passage], check=True)
        passage.rmdir()


@unittest.skipIf(NO_LXD, NO_LXD or '')
class FilesystemFailureTest(FilesystemFailureCases, unittest.TestCase):
    """With a range of user ids for each server."""

    options = {'idmap_isolation': 'server'}


@unittest.skipIf(NO_LXD, NO_LXD or '')
@variants.keep('test_lxd_has_crashed_before_it_recorded_that')
class DaemonFilesystemFailureTest(FilesystemFailureCases, unittest.TestCase):
    """With the capabilities of the privsep daemon."""

    daemon = True
