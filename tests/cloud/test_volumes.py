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

"""Cinder volumes as users see them: through the APIs and in the guest."""

from __future__ import annotations

from typing import Any


from tests.fixtures import cloud
from tests.fixtures import cloud_volumes
from tests.fixtures import turns

PATH = cloud_volumes.PATH


class VolumeCases(cloud_volumes.VolumeTools):
    """Tests for every back end."""

    def test_attach_and_detach(self) -> None:
        server, other = self.boot(), self.boot()
        volume = self.make_volume()
        self.attach(server, volume)
        written = self.write(server)
        self.assertEqual(written, self.read(server))
        self.cloud.compute.reboot_server(server.id, 'HARD')
        self.wait_status(server.id, 'ACTIVE')
        self.assertEqual(written, self.read(server))
        self.detach(server, volume)
        self.assertEqual('no', self.execute(
            server, f'[ -e {PATH} ] && echo yes || echo no'))
        self.assert_released(volume.id)
        self.attach(other, volume)
        self.assertEqual(written, self.read(other))
        self.detach(other, volume)

    def test_stopped(self) -> None:
        server = self.boot()
        volume = self.make_volume()
        self.cloud.compute.stop_server(server.id)
        self.wait_status(server.id, 'SHUTOFF')
        self.attach(server, volume)
        self.cloud.compute.start_server(server.id)
        self.wait_status(server.id, 'ACTIVE')
        written = self.write(server)
        self.cloud.compute.stop_server(server.id)
        self.wait_status(server.id, 'SHUTOFF')
        self.cloud.compute.start_server(server.id)
        self.wait_status(server.id, 'ACTIVE')
        self.assertEqual(written, self.read(server))
        self.cloud.compute.stop_server(server.id)
        self.wait_status(server.id, 'SHUTOFF')
        self.detach(server, volume)
        self.assert_released(volume.id)

    def test_at_boot_and_delete(self) -> None:
        volume = self.make_volume()
        image = self.image_id(self.cloud, cloud.TINY)
        server = self.boot(block_device_mapping=[
            {'source_type': 'image', 'destination_type': 'local',
             'uuid': image, 'boot_index': 0, 'delete_on_termination': True},
            {'source_type': 'volume', 'destination_type': 'volume',
             'uuid': volume.id, 'boot_index': -1, 'device_name': PATH}])
        written = self.write(server)
        self.delete(server.id)
        self.assert_gone(server.id, [])
        self.wait_volume(volume.id, 'available')
        self.assert_released(volume.id)
        second = self.boot()
        self.attach(second, volume)
        self.assertEqual(written, self.read(second))

    def test_busy(self) -> None:
        server = self.boot()
        volume = self.make_volume()
        self.attach(server, volume)
        written = self.write(server)
        self.execute(server, f'(exec 3<>{PATH}; exec sleep 1000) '
                     '</dev/null >/dev/null 2>&1 & echo $! >/tmp/holder')
        self.cloud.compute.delete_volume_attachment(server.id, volume.id)
        self.wait_volume(volume.id, 'detaching')
        self.wait_volume(volume.id, 'in-use')
        self.assertEqual(written, self.read(server))
        self.execute(server, 'kill $(cat /tmp/holder)')
        self.detach(server, volume)
        self.assert_released(volume.id)

    def test_resize(self) -> None:
        server = self.boot()
        volume = self.make_volume()
        self.attach(server, volume)
        written = self.write(server)
        for action in (self.cloud.compute.revert_server_resize,
                       self.cloud.compute.confirm_server_resize):
            flavor = self.cloud.compute.find_flavor('lxd.small')
            self.cloud.compute.resize_server(server.id, flavor)
            self.wait_status(server.id, 'VERIFY_RESIZE', 180)
            self.assertEqual(written, self.read(server))
            action(server.id)
            self.wait_status(server.id, 'ACTIVE', 180)
            self.assertEqual(written, self.read(server))
        self.detach(server, volume)
        self.assert_released(volume.id)

    def test_rebuild(self) -> None:
        server = self.boot()
        volume = self.make_volume()
        self.attach(server, volume)
        written = self.write(server)
        self.cloud.compute.rebuild_server(
            server.id, image=self.image_id(self.cloud, cloud.TINY))
        self.wait_status(server.id, 'ACTIVE', cloud.BOOT_TIMEOUT)
        self.assertEqual(written, self.read(server))
        self.detach(server, volume)
        self.assert_released(volume.id)

    @turns.alone
    def test_nova_compute_restart(self) -> None:
        server = self.boot()
        volume = self.make_volume()
        self.attach(server, volume)
        written = self.write(server)
        cloud.quickstart('restart', 'nova-compute')
        self.assertEqual(written, self.read(server))
        self.detach(server, volume)
        self.assert_released(volume.id)


class BlockCases(VolumeCases):
    """Tests for back ends with block devices."""

    def test_shelved(self) -> None:
        """Attached while no host has the server."""
        server = self.boot()
        self.cloud.compute.shelve_server(server.id)
        self.wait_status(server.id, 'SHELVED_OFFLOADED')
        volume = self.make_volume()
        self.attach(server, volume)
        self.cloud.compute.unshelve_server(server.id)
        self.wait_status(server.id, 'ACTIVE')
        # Nova drops the wanted name and asks the driver for one.
        path = self.cloud.compute.get_volume_attachment(
            server.id, volume.id).device
        self.assertEqual('yes', self.execute(
            server, f'[ -b {path} ] && echo yes || echo no'))
        written = self.write(server, path)
        self.assertEqual(written, self.read(server, path))
        self.detach(server, volume)
        self.assert_released(volume.id)

    def test_extend(self) -> None:
        server = self.boot()
        volume = self.make_volume()
        self.attach(server, volume)
        written = self.write(server)
        self.cloud.block_storage.extend_volume(volume.id, 2)
        cloud.wait_for('the new size', lambda: self.execute(
            server, f'blockdev --getsize64 {PATH}') == str(2 << 30), 60)
        self.assertEqual(written, self.read(server))
        self.detach(server, volume)

    def test_mounted(self) -> None:
        """The host mounts a volume for one server, then for another one."""
        volume = self.make_volume(metadata={'lxd_volume_mode': 'filesystem'})
        found = ''
        for turn in range(2):
            server = self.boot()
            self.attach(server, volume)
            if not turn:
                self.execute(server, 'dd if=/dev/urandom of=/mnt/vdb/data '
                             'bs=1M count=4 2>/dev/null; '
                             'chown 7:8 /mnt/vdb/data')
                found = self._data(server)
                self.assertTrue(found.endswith('7 8'), found)
            self.assertEqual(found, self._data(server))
            self.cloud.compute.reboot_server(server.id, 'HARD')
            self.wait_status(server.id, 'ACTIVE')
            self.assertEqual(found, self._data(server))
            self.detach(server, volume)
            self.assert_released(volume.id)
            self.assertEqual('no', self.execute(
                server, '[ -e /mnt/vdb/data ] && echo yes || echo no'))

    def _data(self, server: Any) -> str:
        """Return checksum and owner of the file in the mounted volume."""
        return self.execute(server, 'sha256sum </mnt/vdb/data; '
                            'stat -c "%u %g" /mnt/vdb/data')

    def test_clone_and_snapshot(self) -> None:
        server = self.boot()
        volume = self.make_volume()
        self.attach(server, volume)
        written = self.write(server)
        snapshot = self.cloud.block_storage.create_snapshot(
            volume_id=volume.id, force=True, name=self.unique('test'))
        self.addCleanup(self.delete_snapshot, snapshot.id)
        cloud.wait_for('the snapshot', lambda: (
            self.cloud.block_storage.get_snapshot(snapshot.id).status ==
            'available'), cloud.ACTION_TIMEOUT)
        self.write(server)
        copy = self.make_volume(snapshot_id=snapshot.id)
        self.attach(server, copy, '/dev/vdc')
        self.assertEqual(written, self.read(server, '/dev/vdc'))
        self.detach(server, copy)
        self.detach(server, volume)


class BlockVolumeTest(BlockCases, cloud.CloudTestCase):
    """On the back end with block devices of the host."""

    volume_type = 'loop'
    together = 15

    def test_moved_to_other_storage(self) -> None:
        """Cinder migrates an attached volume, and Nova swaps it."""
        server = self.boot()
        volume = self.make_volume()
        self.attach(server, volume)
        written = self.write(server)
        self.admin.block_storage.retype_volume(volume.id, 'nfs', 'on-demand')

        def moved() -> bool:
            found = self.admin.block_storage.get_volume(volume.id)
            self.assertNotEqual('error', found.migration_status)
            return found.volume_type == 'nfs' and found.status == 'in-use'
        cloud.wait_for('the volume on its new storage', moved, 120)
        self.assertEqual(written, self.read(server))
        self.cloud.compute.reboot_server(server.id, 'HARD')
        self.wait_status(server.id, 'ACTIVE')
        self.assertEqual(written, self.read(server))
        self.detach(server, volume)
        self.assert_released(volume.id)
        self.assertEqual('no', self.execute(
            server, f'[ -e {PATH} ] && echo yes || echo no'))
        self.attach(server, volume)
        self.assertEqual(written, self.read(server))
        self.detach(server, volume)

    def test_several_servers(self) -> None:
        self.volume_type = 'multiattach'
        servers = [self.boot(), self.boot()]
        volume = self.make_volume()
        for server in servers:
            self.cloud.compute.create_volume_attachment(
                server.id, volume_id=volume.id, device=PATH)
            cloud.wait_for('the volume in the server', lambda: self.execute(
                server, f'[ -b {PATH} ] && echo yes || echo no') == 'yes', 60)
        written = self.write(servers[0])
        self.assertEqual(written, self.read(servers[1]))
        self.cloud.compute.delete_volume_attachment(servers[0].id, volume.id)
        cloud.wait_for('one server less', lambda: len(
            self.cloud.block_storage.get_volume(volume.id).attachments) == 1,
            60)
        self.assertEqual(written, self.read(servers[1]))
        self.detach(servers[1], volume)
        self.assert_released(volume.id)
        # Two hosts must not mount the same filesystem.
        self.cloud.block_storage.set_volume_metadata(
            volume.id, lxd_volume_mode='filesystem')
        self.cloud.compute.create_volume_attachment(
            servers[0].id, volume_id=volume.id, device=PATH)
        self.wait_volume(volume.id, 'available')
        self.assertIn('several servers', self._last_failure(servers[0]))

    def _last_failure(self, server: Any) -> str:
        """Return the error of the last failed action for administrators."""
        actions = self.admin.compute.get(
            f'/servers/{server.id}/os-instance-actions',
            microversion='2.84').json()['instanceActions']
        failed = self.admin.compute.get(
            f'/servers/{server.id}/os-instance-actions/'
            f'{actions[0]["request_id"]}', microversion='2.84').json()
        return ' '.join(str(event['details']) for event in
                        failed['instanceAction']['events'])


class FileVolumeTest(VolumeCases, cloud.CloudTestCase):
    """On the back end with files on a share."""

    volume_type = 'nfs'
    together = 8


class IscsiVolumeTest(BlockCases, cloud.CloudTestCase):
    """On the back end with LVM, over iSCSI."""

    volume_type = 'lvm'
    together = 12
