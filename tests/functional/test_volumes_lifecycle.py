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


"""Cinder volumes through the life of their instance, with a real LXD."""

from __future__ import annotations

import unittest

import fixtures
from nova.compute import power_state
from nova.compute import task_states
from nova.compute import vm_states
from nova import exception
from nova.network import model as network_model
from nova import objects
from oslo_utils import units

from tests.fixtures import disks
from tests.fixtures import lab_volumes
from tests.fixtures import lxd_daemon
from tests.fixtures import variants
from tests.fixtures import volume_host

NO_LXD = lxd_daemon.missing()
PATH = volume_host.PATH


class VolumeLifecycleCases(volume_host.VolumeHost):
    """Tests for every kind of volume."""

    def test_boot_and_destroy(self) -> None:
        volumes = [self.storage.volume(), self.storage.volume()]
        mappings = [volumes[0].mapping('/dev/vdb'),
                    volumes[1].mapping('/dev/vdc')]
        server = self.host.spawn(block_device_info=disks.described(*mappings))
        for mapping in mappings:
            assert mapping.saved is not None
            self.assertTrue(mapping.saved['lxd_device_path'])
            self.assertTrue(self.has(server, mapping['mount_device']))
        written = self.write(server, '/dev/vdc')
        self.hold_open(server)
        self.destroy(server, disks.described(*mappings))
        self.assertEqual(set(), self.storage.left_on_host())
        self.assertEqual(written, volumes[1].checksum(2 * units.Mi))
        self.destroy(server, disks.described(*mappings))

    def test_destroy_without_the_connections(self) -> None:
        server = self.host.spawn()
        self.attach(server, self.storage.volume())
        self.destroy(server)
        self.assertEqual(set(), self.storage.left_on_host())

    def test_failed_boot_leaves_nothing(self) -> None:
        good, bad = self.storage.volume().mapping(), disks.Mapping(
            self.storage.volume(), '/dev/vdc')
        bad['connection_info']['driver_volume_type'] = 'carrier-pigeon'
        self.assertRaises(exception.VolumeDriverNotFound, self.host.spawn,
                          block_device_info=disks.described(good, bad))
        self.assertEqual({}, self.host.lxd_instances())
        self.assertEqual(set(), self.storage.left_on_host())

    def test_hard_reboot_repairs(self) -> None:
        server = self.host.spawn()
        volume = self.storage.volume()
        self.attach(server, volume)
        written = self.write(server)
        info = disks.described(volume.mapping())
        # An operator removes it by hand.
        api, params = self.host.lxd.api, {'project': self.host.project}
        instance = self.host.lxd_instances()[server.name]
        del instance['devices'][f'volume-{volume.id}']
        api.must('PUT', f'/1.0/instances/{server.name}', instance,
                 params=params)
        self.assertFalse(self.has(server))
        self.reboot(server, info)
        self.assertEqual(written, self.read(server))
        self.reboot(server, info)
        self.assertEqual(written, self.read(server))
        # Nova has forgotten it.
        self.reboot(server, disks.described())
        self.assertFalse(self.has(server))
        self.detach(server, volume.connection())

    def test_guest_reboot_and_restarts(self) -> None:
        server = self.host.spawn()
        volume = self.storage.volume()
        connection = self.attach(server, volume)
        written = self.write(server)
        self.reboot(server, disks.described(volume.mapping()), 'SOFT')
        self.assertEqual(written, self.read(server))
        self.host.restart_driver()
        self.assertEqual(written, self.read(server))
        self.host.driver.power_off(server)
        self.host.driver.resume_state_on_host_boot(
            self.host.context, server, [], [],
            disks.described(volume.mapping()))
        self.assertEqual(written, self.read(server))
        self.detach(server, connection)

    def test_rescue_leaves_it_alone(self) -> None:
        server = self.host.spawn()
        server.info_cache = objects.InstanceInfoCache(
            instance_uuid=server.uuid,
            network_info=network_model.NetworkInfo())
        volume = self.storage.volume()
        connection = self.attach(server, volume)
        written = self.write(server)
        info = disks.described(volume.mapping())
        with fixtures.MonkeyPatch(
                'nova.virt.driver.get_block_device_info',
                lambda instance, bdms: info), fixtures.MonkeyPatch(
                'nova.objects.BlockDeviceMappingList.get_by_instance_uuid',
                lambda *args: []):
            self.host.driver.power_off(server)
            self.host.driver.rescue(self.host.context, server, [],
                                    self.host.image(), 'secret', info, [])
            server.vm_state = vm_states.RESCUED
            self.reboot(server, info)
            self.host.driver.unrescue(self.host.context, server)
            server.vm_state = vm_states.ACTIVE
        self.assertEqual(written, self.read(server))
        self.detach(server, connection)

    def test_resize_and_back(self) -> None:
        server = self.host.spawn()
        volume = self.storage.volume()
        mapping = volume.mapping()
        self.host.driver.attach_volume(
            self.host.context, mapping['connection_info'], server, PATH)
        written = self.write(server)
        old, new = server.flavor, server.flavor.obj_clone()
        new.memory_mb = 192
        migration = objects.Migration(source_compute='testhost',
                                      dest_compute='testhost', id=1)
        self.host.driver.migrate_disk_and_power_off(
            self.host.context, server, self.host.driver.get_host_ip_addr(),
            new, [], disks.described(mapping), timeout=0)
        # Nova deletes the attachment and creates another one.
        self.assertEqual(set(), self.storage.left_on_host())
        self.assertEqual({}, self.devices(server))
        server.old_flavor, server.flavor = old, new
        server.new_flavor = new
        mapping = volume.mapping()
        self.host.driver.finish_migration(
            self.host.context, migration, server, {}, [],
            server.image_meta, False, {}, disks.described(mapping), True)
        self.assertEqual(written, self.read(server))
        server.task_state = task_states.RESIZE_REVERTING
        self.destroy(server, disks.described(mapping))
        self.assertEqual(set(), self.storage.left_on_host())
        server.flavor = old
        mapping = volume.mapping()
        self.host.driver.finish_revert_migration(
            self.host.context, server, [], migration, disks.described(mapping),
            True)
        server.task_state = None
        self.assertEqual(power_state.RUNNING, self.host.state(server))
        self.assertEqual(written, self.read(server))
        self.detach(server, mapping['connection_info'])

    def test_rebuild(self) -> None:
        server = self.host.spawn()
        volume = self.storage.volume()
        connection = self.attach(server, volume)
        written = self.write(server)
        self.host.driver.power_off(server)
        self.detach(server, connection)
        self.destroy(server, disks.described(volume.mapping()))
        mapping = volume.mapping()
        self.host.spawn(server, block_device_info=disks.described(mapping))
        self.assertEqual(written, self.read(server))
        self.destroy(server, disks.described(mapping))


@unittest.skipIf(NO_LXD, NO_LXD or '')
@variants.keep(
    'test_boot_and_destroy', 'test_hard_reboot_repairs',
    'test_guest_reboot_and_restarts')
class LocalVolumeLifecycleTest(VolumeLifecycleCases, unittest.TestCase):
    kind = lab_volumes.LocalVolume


@unittest.skipIf(NO_LXD, NO_LXD or '')
class FileVolumeLifecycleTest(VolumeLifecycleCases, unittest.TestCase):
    kind = lab_volumes.FileVolume
