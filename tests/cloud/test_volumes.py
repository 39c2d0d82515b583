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

import contextlib
import pathlib
from typing import Any

from openstack import exceptions

from tests.fixtures import cloud

PATH = '/dev/vdb'


class VolumeTools:
    """Helpers for volumes."""

    volume_type = ''
    together_arguments: dict[str, Any] = {'networks': 'none', 'key_name': None}

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        if not cls.cloud.config.has_service('block-storage') or not list(
                cls.admin.identity.services(type='block-storage')):
            raise cls.skipException(
                'This cloud has no volumes: devstack/quickstart.sh up '
                '--with-cinder')
        if cls.volume_type and cls.admin.block_storage.find_type(
                cls.volume_type) is None:
            raise cls.skipException(
                f'This cloud has no volumes of type {cls.volume_type}; '
                'devstack/quickstart.sh up prints why')

    def boot(self, *args: Any, **kwargs: Any) -> Any:
        """Make a server without ports, which no test here needs."""
        return super().boot(*args, **self.together_arguments, **kwargs)

    # -- volumes

    def make_volume(self, size: int = 1, **arguments: Any) -> Any:
        volume = self.cloud.block_storage.create_volume(
            size=size, name=self.unique('test'),
            volume_type=self.volume_type, **arguments)
        self.addCleanup(self.delete_volume, volume.id)
        return self.wait_volume(volume.id, 'available')

    def wait_volume(self, volume_id: str, status: str) -> Any:
        def reached() -> Any:
            volume = self.cloud.block_storage.get_volume(volume_id)
            if volume.status.startswith('error') and status != volume.status:
                raise AssertionError(f'Volume {volume_id}: {volume.status}')
            return volume if volume.status == status else None
        return cloud.wait_for(f'volume {status}', reached,
                              cloud.ACTION_TIMEOUT)

    def delete_volume(self, volume_id: str) -> None:
        """Delete a volume and the servers that have it."""
        try:
            volume = self.cloud.block_storage.get_volume(volume_id)
        except exceptions.NotFoundException:
            return
        for attachment in volume.attachments:
            self.delete(attachment['server_id'])
        cloud.wait_for(
            'the volume to be free', lambda: not
            self.cloud.block_storage.get_volume(volume_id).attachments, 30)
        self.cloud.block_storage.delete_volume(volume_id, ignore_missing=True)

        def gone() -> bool:
            try:
                self.cloud.block_storage.get_volume(volume_id)
            except exceptions.NotFoundException:
                return True
            return False
        cloud.wait_for('the volume to be deleted', gone, cloud.ACTION_TIMEOUT)

    def attach(self, server: Any, volume: Any, path: str = PATH) -> None:
        self.cloud.compute.create_volume_attachment(
            server.id, volume_id=volume.id, device=path)
        self.wait_volume(volume.id, 'in-use')

    def detach(self, server: Any, volume: Any) -> None:
        self.cloud.compute.delete_volume_attachment(server.id, volume.id)
        self.wait_volume(volume.id, 'available')

    # -- in the guest

    def write(self, server: Any, path: str = PATH) -> str:
        """Write random bytes at the beginning of a volume.

        :returns: checksum of what was written.
        """
        return self.execute(
            server, 'dd if=/dev/urandom of=/tmp/data bs=1M count=4 '
            f'2>/dev/null; dd if=/tmp/data of={path} bs=1M conv=fsync '
            '2>/dev/null; sha256sum </tmp/data')

    def read(self, server: Any, path: str = PATH) -> str:
        return self.execute(
            server, f'dd if={path} bs=1M count=4 2>/dev/null | sha256sum')

    # -- on the host

    def left_of_volume(self, volume_id: str) -> list[str]:
        """List loop devices, LXD devices and iSCSI sessions of a volume."""
        found = [f'LXD device of {instance["name"]}'
                 for instance in self.host.instances()
                 if f'volume-{volume_id}' in instance['devices']]
        for directory, names in (('/sys/block', 'loop*/loop/backing_file'),
                                 ('/sys/class/iscsi_session', '*/targetname')):
            for file in pathlib.Path(directory).glob(names):
                # Devices of other tests may vanish meanwhile.
                with contextlib.suppress(OSError):
                    text = file.read_text()
                    if volume_id in text:
                        found.append(f'{file} {text}')
        return found

    def assert_released(self, volume_id: str) -> None:
        try:
            cloud.wait_for('a clean host', lambda: not self.left_of_volume(
                volume_id), 10)
        except AssertionError:
            self.assertEqual([], self.left_of_volume(volume_id))

    def delete_snapshot(self, snapshot_id: str) -> None:
        self.cloud.block_storage.delete_snapshot(snapshot_id)
        cloud.wait_for('the snapshot to be deleted', lambda: not any(
            snapshot.id == snapshot_id for snapshot in
            self.cloud.block_storage.snapshots()), cloud.ACTION_TIMEOUT)


class VolumeCases(VolumeTools):
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

    @cloud.alone
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
