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

"""Volumes over iSCSI, with a real LXD, initiator and target."""

from __future__ import annotations

from typing import Any
import unittest

import fixtures
from nova import exception
from oslo_utils import units

from tests.fixtures import disks
from tests.fixtures import iscsi
from tests.fixtures import lab_volumes
from tests.fixtures import lxd_daemon
from tests.fixtures import volume_host

LACKING = lxd_daemon.missing() or iscsi.missing()


class IscsiCases(volume_host.VolumeHost):
    kind = iscsi.IscsiVolume

    def setUp(self) -> None:
        initiator = iscsi.Initiator()
        initiator.setUp()
        self.addCleanup(initiator.cleanUp)
        super().setUp()
        patch = fixtures.MonkeyPatch('nova.volume.cinder.API.get',
                                     lambda *args: {})
        patch.setUp()
        self.addCleanup(patch.cleanUp)
        self.addCleanup(lambda: self.assertEqual([], iscsi.sessions()))

    def assert_secret(self, *more: Any) -> None:
        for text in (self.log.output, *map(str, more)):
            self.assertNotIn(lab_volumes.PASSWORD, text)


@unittest.skipIf(LACKING, LACKING or '')
class IscsiVolumeTest(IscsiCases, unittest.TestCase):
    """As block devices."""

    def test_two(self) -> None:
        server = self.host.spawn()
        first, second = self.storage.volume(), self.storage.volume()
        one = self.attach(server, first)
        other = self.attach(server, second, '/dev/vdc')
        self.assertEqual({first.name, second.name}, set(iscsi.sessions()))
        written = self.write(server), self.write(server, '/dev/vdc')
        self.detach(server, one)
        self.assertEqual([second.name], iscsi.sessions())
        self.assertEqual(written[1], self.read(server, '/dev/vdc'))
        self.detach(server, other, '/dev/vdc')
        self.assertEqual(written, (first.checksum(2 * units.Mi),
                                   second.checksum(2 * units.Mi)))
        self.assert_secret(self.host.lxd_instances())

    def test_boot_reboot_and_destroy(self) -> None:
        volume = self.storage.volume()
        mapping = volume.mapping()
        server = self.host.spawn(block_device_info=disks.described(mapping))
        written = self.write(server)
        self.reboot(server, disks.described(mapping))
        self.host.restart_driver()
        fresh = volume.mapping()
        self.reboot(server, disks.described(fresh))
        self.assertEqual(written, self.read(server))
        self.destroy(server, disks.described(fresh))

    def test_extend(self) -> None:
        server = self.host.spawn()
        volume = self.storage.volume()
        connection = self.attach(server, volume)
        self.grow(server, volume, connection)
        self.assertEqual(2 * units.Gi, self.device_size(server))
        self.detach(server, connection)

    def test_busy(self) -> None:
        server = self.host.spawn()
        connection = self.attach(server, self.storage.volume())
        self.hold_open(server)
        self.assertRaises(exception.DeviceDetachFailed, self.detach, server,
                          connection)
        self.assertTrue(self.has(server))
        self.release(server)
        self.detach(server, connection)

    def test_wrong_password(self) -> None:
        server = self.host.spawn()
        self.assertRaises(
            exception.VolumeAttachFailed, self.attach, server,
            self.storage.volume(), auth_password='wrong-password')
        self.assertEqual({}, self.devices(server))


@unittest.skipIf(LACKING, LACKING or '')
class IscsiFilesystemTest(IscsiCases, unittest.TestCase):
    """Mounted by the host."""

    options = {'volume_filesystems': ['ext4'], 'volume_mode': 'filesystem'}

    def test_grows_while_mounted(self) -> None:
        server = self.host.spawn()
        volume = self.storage.volume()
        connection = self.attach(server, volume)
        written = self.write(server, '/mnt/vdb/file')
        before = self.blocks(server)
        self.grow(server, volume, connection)
        self.assertGreater(self.blocks(server), 1.8 * before)
        self.assertEqual(written, self.read(server, '/mnt/vdb/file'))
        self.detach(server, connection)
        connection = self.attach(server, volume)
        self.assertEqual(written, self.read(server, '/mnt/vdb/file'))
        self.detach(server, connection)

    def blocks(self, server) -> int:
        """Return the size of the filesystem in the guest."""
        return int(self.host.run(server, 'busybox', 'stat', '-f', '-c', '%b',
                                 '/mnt/vdb'))
