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


"""Servers that boot from volumes, through the driver as Nova calls it."""

from __future__ import annotations

import errno
from typing import Any
import uuid

from nova.compute import power_state
from nova import exception
from nova import objects
from oslo_utils import units

from nova_lxd_py.virt.privileged import rootfs
from tests.fixtures import boot_volume_case
from tests.fixtures import disks


class BootFromVolumeTest(boot_volume_case.BootVolumeTestCase):

    def test_discard(self) -> None:
        self.spawn()
        mount = self.storage.mount_of(self.volume)
        assert mount is not None
        self.assertTrue(mount.discard)

    def refused(self, kind: type[Exception] = exception.BuildAbortException,
                **kwargs: Any) -> str:
        """Have a server not booted, with nothing left of the attempt."""
        error = self.assertRaises(kind, self.spawn, **kwargs)
        self.assert_clean()
        return str(error)

    # -- the life of it -----------------------------------------------------

    def test_first_boot_and_deletion(self) -> None:
        ports = self.host.ports()
        server = self.spawn(network_info=ports)
        self.assert_state(power_state.RUNNING, server)
        disk = self.volume.disk
        self.assertEqual(('ext4', rootfs.READY), (disk.content, disk.root))
        mount = self.storage.mount_of(self.volume)
        self.assertTrue(mount.is_root)
        config = self.config(server)
        self.assertEqual(int(config['security.idmap.base']), mount.ids[0])
        self.assertIn('lxc.rootfs.path = dir:', config['raw.lxc'])
        self.assertEqual(self.volume.id, config['user.nova.root_volume'])
        self.assertEqual([server.name], list(self.host.own()))
        self.assertEqual({'default'}, self.pools())
        self.driver.destroy(self.context, server, ports, self.info())
        self.assert_clean()
        # What was on it stays.
        self.assertEqual(rootfs.READY, disk.root)

    def test_usage(self) -> None:
        """Counted since the root filesystem was made."""
        device = self.storage.add_device(self.volume.disk)
        self.storage.before('rootfs.complete', lambda: (
            self.storage.set_attribute(device, 'stat',
                                       '1 0 2 0 300 0 4000 0 0 0 0')))
        server = self.spawn()
        bdm = objects.BlockDeviceMapping(volume_id=self.volume.id,
                                         device_name=server.root_device_name)
        host_volumes = [{'instance': server, 'instance_bdms': [bdm]}]
        self.storage.set_attribute(device, 'stat',
                                   '2 0 10 0 301 0 4024 0 0 0 0')
        expected = {'volume': self.volume.id, 'instance': server, 'rd_req': 1,
                    'rd_bytes': 4096, 'wr_req': 1, 'wr_bytes': 12288}
        for _start in range(2):
            self.assertEqual([expected], self.driver.get_all_volume_usage(
                self.context, host_volumes))
            self.assertEqual([1, 4096, 1, 12288, -1], self.driver.block_stats(
                server, server.root_device_name.removeprefix('/dev/')))
            self.driver.reboot(self.context, server, [], 'HARD', self.info())
        self.assertIsNone(self.driver.block_stats(server, 'vdb'))

    def test_next_boot(self) -> None:
        server = self.spawn()
        self.driver.destroy(self.context, server, [], self.info())
        self.storage.calls.clear()
        again = self.spawn()
        self.assert_state(power_state.RUNNING, again)
        self.assertNotIn('mounts.make_filesystem', self.storage.calls)
        self.assertNotIn('rootfs.open_staging', self.storage.calls)

    def test_grown_meanwhile(self) -> None:
        server = self.spawn()
        self.driver.destroy(self.context, server, [], self.info())
        self.volume.extend(3)
        self.spawn()
        self.assertEqual(3 * units.Gi, self.volume.disk.filesystem_size)

    def test_power_and_reboot(self) -> None:
        server = self.spawn()
        self.driver.power_off(server)
        self.driver.power_on(self.context, server, [], self.info())
        self.assert_state(power_state.RUNNING, server)
        self.driver.power_off(server)
        # The host was rebooted.
        self.storage.mounts.clear()
        self.storage.remove_device(self.storage.device_of(self.volume))
        self.driver.reboot(self.context, server, [], 'HARD', self.info())
        self.assert_state(power_state.RUNNING, server)
        self.assertTrue(self.storage.mount_of(self.volume).is_root)

    def test_start_without_its_connection(self) -> None:
        server = self.spawn()
        self.driver.power_off(server)
        self.assertRaises(exception.VolumeAttachFailed, self.driver.power_on,
                          self.context, server, [],
                          disks.described())
        self.assert_state(power_state.SHUTDOWN, server)

    def test_extend(self) -> None:
        info = self.info()
        server = self.spawn(info)
        connection = info['block_device_mapping'][0]['connection_info']
        self.volume.extend(2)
        self.driver.extend_volume(self.context, connection, server,
                                  2 * units.Gi)
        self.assertEqual(2 * units.Gi, self.volume.disk.filesystem_size)

    def test_detach_for_a_rebuild(self) -> None:
        info = self.info()
        server = self.spawn(info)
        connection = info['block_device_mapping'][0]['connection_info']
        self.assertRaises(exception.DeviceDetachFailed,
                          self.driver.detach_volume, self.context, connection,
                          server, '/dev/sda')
        self.driver.power_off(server)
        for _time in range(2):
            self.driver.detach_volume(self.context, connection, server,
                                      '/dev/sda')
            self.assertEqual(set(), self.storage.left())
            # What describes the connection is gone; it boots from it later.
            self.assertEqual(
                {'user.nova.root_quota', 'user.nova.root_volume'},
                {key for key in self.config(server)
                 if key.startswith('user.nova.root_')})

    def test_with_a_data_volume(self) -> None:
        data = self.storage.volume()
        server = self.spawn(self.info(data.mapping('/dev/vdb')))
        self.assertIn(f'volume-{data.id}', self.devices(server))
        self.driver.destroy(self.context, server, [],
                            self.info(data.mapping('/dev/vdb')))
        self.assert_clean()

    def test_destroy_without_the_connection(self) -> None:
        server = self.spawn()
        self.driver.destroy(self.context, server, [])
        self.assertEqual({}, self.host.own())
        self.assertEqual({}, self.storage.mounts)

    # -- what no server boots from ------------------------------------------

    def test_host_that_mounts_nothing(self) -> None:
        self.host._set('volume_filesystems', [], 'lxd')
        self.assertIn('does not mount volumes', self.refused())

    def test_read_only(self) -> None:
        self.refused(info=self.info(access_mode='ro'))

    def test_shared(self) -> None:
        info = self.info()
        info['block_device_mapping'][0]['connection_info'][
            'multiattach'] = True
        self.refused(info=info)

    def test_empty_one(self) -> None:
        self.volume.disk.content, self.volume.disk.data = '', b''
        self.volume.properties.clear()
        self.assertIn('empty', self.refused())

    def test_empty_filesystem(self) -> None:
        """Cinder does not say of which image the volume is."""
        self.volume = self.storage.volume(content='ext4')
        self.volume.disk.root = rootfs.UNFINISHED
        self.assertIn('filesystem is empty', self.refused())

    def test_content_that_is_not_the_image(self) -> None:
        """Nothing that anybody has written is ever overwritten."""
        self.volume.disk.data = b'precious' + self.volume.disk.data[8:]
        self.refused()
        self.assertEqual(b'precious', self.volume.disk.data[:8])

    def test_filesystem_without_a_system(self) -> None:
        self.volume.disk.content = 'ext4'
        self.volume.disk.root = rootfs.OTHER
        self.refused()

    def test_image_is_gone_but_on_the_volume(self) -> None:
        self.host.glance.delete(None, self.image.id)
        server = self.spawn()
        self.assert_state(power_state.RUNNING, server)

    def test_image_is_gone_and_the_volume_is_wiped(self) -> None:
        """LXD has what was on the volume, and on no other one."""
        self.host.glance.delete(None, self.image.id)
        self.storage.fail('rootfs.open_staging', OSError(errno.EIO, 'killed'))
        self.refused(exception.NovaException)
        self.storage.heal()
        self.assertEqual('ext4', self.volume.disk.content)
        first = self.volume
        self.volume = self.made_of(self.image, self.data)
        self.volume.disk.content, self.volume.disk.data = '', b''
        self.assertIn('not in Glance', self.refused())
        self.volume = first
        self.assert_state(power_state.RUNNING, self.spawn())

    def test_image_is_gone_for_good(self) -> None:
        self.host.glance.delete(None, self.image.id)
        self.volume.disk.content, self.volume.disk.data = '', b''
        self.assertIn('not in Glance', self.refused())

    def test_image_that_its_owner_has_made_up(self) -> None:
        self.volume.properties['volume_image_metadata']['image_id'] = '../x'
        self.refused()

    # -- failures -----------------------------------------------------------

    def test_a_step_on_the_host_fails(self) -> None:
        for what in ('brick.connect', 'probe.content',
                     'rootfs.contains_image', 'rootfs.wipe_image',
                     'mounts.make_filesystem', 'rootfs.open_staging',
                     'rootfs.complete', 'rootfs.mount'):
            with self.subTest(what=what):
                self.volume = self.made_of(self.image, self.data)
                self.storage.fail(what, OSError(errno.EIO, '/dev/sdx: I/O'))
                said = self.refused(exception.NovaException)
                self.assertNotIn('sdx', said)
                self.storage.heal()
                # The next attempt goes on from there.
                server = self.spawn()
                self.assert_state(power_state.RUNNING, server)
                self.driver.destroy(self.context, server, [], self.info())
                self.assert_clean()

    def test_lxd_refuses_a_step(self) -> None:
        name = 'instance-00000001'
        for method, path, where in (
                ('POST', '/1.0/storage-pools', {}),
                ('POST', '/1.0/instances', {'name': f'{name}-unpacked'}),
                ('POST', '/1.0/instances', {'name': name}),
                ('PUT', f'/1.0/instances/{name}/state',
                 {'action': 'start'})):
            with self.subTest(path=path, where=where):
                self.volume = self.made_of(self.image, self.data)
                self.lxd.fail_next(method, path, where=where)
                self.refused(exception.NovaException)
                server = self.spawn()
                self.driver.destroy(self.context, server, [], self.info())
                self.assert_clean()

    def test_image_does_not_fit(self) -> None:
        self.lxd.fail_operation(
            'POST', '/1.0/instances', 'write: no space left on device',
            where={'name': 'instance-00000001-unpacked'})
        self.assertIn('does not fit', self.refused())

    def test_growth_fails(self) -> None:
        """A filesystem of the old size is better than no server."""
        self.storage.fail('mounts.grow', OSError(errno.EIO, 'resize2fs'))
        self.assert_state(power_state.RUNNING, self.spawn())

    def test_another_server_has_it(self) -> None:
        self.spawn()
        other = self.host.instance(None)
        self.assertRaises(exception.VolumeAttachFailed, self.host.spawn,
                          other, objects.ImageMeta.from_dict(
                              {'properties': {}}),
                          block_device_info=self.info())
        self.assertTrue(self.storage.mount_of(self.volume).is_root)

    # -- what a crash leaves ------------------------------------------------

    def test_restart_removes_leftover_pools(self) -> None:
        project = self.host.project
        for owner in (project, 'another-nova'):
            self.lxd.api.must('POST', '/1.0/storage-pools', {
                'name': f'nova-boot-{uuid.uuid4()}', 'driver': 'dir',
                'config': {'user.nova.lxd_project': owner}})
        self.host.restart_driver()
        left = self.pools() - {'default'}
        self.assertEqual(1, len(left))
        self.assertEqual('another-nova', self.lxd.daemon.store.pools[
            left.pop()].config['user.nova.lxd_project'])
