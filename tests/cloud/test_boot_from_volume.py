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

"""Servers that boot from Cinder volumes, as users have them."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

from openstack import exceptions

from tests.fixtures import cloud
from tests.fixtures import cloud_volumes
from tests.fixtures import machine
from tests.fixtures import turns


class BootCases(cloud_volumes.BootFromVolumeTools):
    """Tests for back ends with block devices."""

    def test_life(self) -> None:
        """Boot a new volume, and boot another server from the same volume."""
        server, volume = self.from_image()
        filled = self.fill(server)
        for kind in ('SOFT', 'HARD'):
            self.cloud.compute.reboot_server(server.id, kind)
            self.wait_status(server.id, 'ACTIVE')
            self.assertEqual(filled, self.sum(server))
        self.cloud.compute.stop_server(server.id)
        self.wait_status(server.id, 'SHUTOFF')
        self.cloud.compute.start_server(server.id)
        self.wait_status(server.id, 'ACTIVE')
        self.assertEqual(filled, self.sum(server))
        # Placement has no allocation of disk for it.
        allocations = self.admin.placement.get(
            f'/allocations/{server.id}').json()['allocations']
        self.assertNotIn('DISK_GB', str(allocations))
        self.assertRaises(exceptions.HttpException,
                          self.cloud.compute.rescue_server, server.id)
        self.delete(server.id)
        self.assert_gone(server.id, [])
        self.wait_volume(volume, 'available')
        self.assert_released(volume)
        second, _volume = self.boot_from(source_type='volume', uuid=volume)
        self.assertEqual(filled, self.sum(second))

    @turns.alone
    def test_lxd_is_killed(self) -> None:
        """The guest keeps running, and all operations work afterwards."""
        server, volume = self.from_image()
        filled, began = self.fill(server), self.started_at(server)
        for how in (signal.SIGKILL, signal.SIGTERM):
            if how == signal.SIGKILL:
                os.kill(int((cloud.PREFIX / 'run' / 'lxd.pid').read_text()
                            .split()[0]), how)
            cloud.quickstart('restart', 'lxd')
            self.assertEqual(began, self.started_at(server))
            self.assertEqual(filled, self.sum(server))
        self.cloud.compute.stop_server(server.id)
        self.wait_status(server.id, 'SHUTOFF')
        cloud.quickstart('restart', 'lxd')
        cloud.quickstart('restart', 'nova-compute')
        self.cloud.compute.start_server(server.id)
        self.wait_status(server.id, 'ACTIVE')
        self.assertEqual(filled, self.sum(server))
        self.delete(server.id)
        self.assert_gone(server.id, [])
        self.wait_volume(volume, 'available')
        self.assert_released(volume)

    def test_shelve(self) -> None:
        """Nova keeps the volume instead of making an image of it."""
        server, volume = self.from_image()
        filled = self.fill(server)
        for _turn in range(2):
            self.cloud.compute.shelve_server(server.id)
            self.wait_status(server.id, 'SHELVED_OFFLOADED')
            self.assert_gone(server.id, [])
            self.assert_released(volume)
            self.cloud.compute.unshelve_server(server.id)
            self.wait_status(server.id, 'ACTIVE')
            self.assertEqual(filled, self.sum(server))

    def test_extend(self) -> None:
        """The root filesystem grows while the guest runs."""
        if not machine.grows_ext4():
            self.skipTest('this machine lacks CAP_SYS_RESOURCE, without '
                          'which a mounted ext4 cannot grow; '
                          'tests.functional.test_boot_from_volume has xfs')
        server, volume = self.from_image()
        filled, began = self.fill(server), self.started_at(server)
        before = self.size_of_root(server)
        self.cloud.block_storage.post(
            f'/volumes/{volume}/action', microversion='3.42',
            json={'os-extend': {'new_size': 2}}).raise_for_status()
        cloud.wait_for('a larger root', lambda: (
            self.size_of_root(server) > 1.8 * before), cloud.ACTION_TIMEOUT)
        self.assertEqual(filled, self.sum(server))
        self.assertEqual(began, self.started_at(server))

    def size_of_root(self, server: Any) -> int:
        """Return the size of the root filesystem in the guest, in KiB."""
        return int(self.execute(server, 'df -k / | tail -n 1').split()[-5])

    def test_snapshot(self) -> None:
        """An image of such a server consists of snapshots of its volumes."""
        server, _volume = self.from_image(2)
        filled = self.fill(server)
        image = self.cloud.compute.create_server_image(
            server.id, self.unique('test'), wait=True,
            timeout=cloud.ACTION_TIMEOUT)
        self.addCleanup(self._delete_image, image.id)
        other = self.boot(image.id)
        self.addCleanup(self.delete_volume, other.attached_volumes[0]['id'])
        self.assertEqual(filled, self.sum(other))
        self.assertEqual(filled, self.sum(server))

    def _delete_image(self, image_id: str) -> None:
        image = self.cloud.image.get_image(image_id)
        self.cloud.image.delete_image(image_id)
        for device in json.loads(image.properties['block_device_mapping']):
            self.delete_snapshot(device['snapshot_id'])

    def test_new_image(self) -> None:
        """Rebuild with another image, which replaces the volume's content."""
        server, volume = self.from_image()
        self.fill(server)
        self.cloud.compute.post(
            f'/servers/{server.id}/action', microversion='2.93',
            json={'rebuild': {'imageRef': self.image()}})
        cloud.wait_for('the rebuild', lambda: self.cloud.compute.get_server(
            server.id).status != 'ACTIVE', 10, 0.05)
        self.wait_status(server.id, 'ACTIVE', cloud.BOOT_TIMEOUT)
        self.assertEqual('', self.execute(server, 'ls /root/data 2>/dev/null '
                                          '|| true'))
        filled = self.fill(server)
        self.cloud.compute.reboot_server(server.id, 'HARD')
        self.wait_status(server.id, 'ACTIVE')
        self.assertEqual(filled, self.sum(server))
        self.delete(server.id)
        self.wait_volume(volume, 'available')
        self.assert_released(volume)


class BlockBootTest(BootCases, cloud.CloudTestCase):
    """From block devices of the host."""

    volume_type = 'loop'


class IscsiBootTest(BootCases, cloud.CloudTestCase):
    """From volumes of LVM, over iSCSI."""

    volume_type = 'lvm'
