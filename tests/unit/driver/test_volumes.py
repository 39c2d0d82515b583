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


"""Cinder volumes, through the driver as Nova calls it."""

from __future__ import annotations

import contextlib
import errno
import threading
from typing import Any

from nova import exception
from nova import objects
from os_brick import exception as brick_exception
from oslo_utils import units

from nova_lxd_py.virt.guest import root_quota
from tests.fixtures import disks
from tests.fixtures import memory_cinder
from tests.fixtures import volume_case

PATH = volume_case.PATH


class VolumeCases:
    """Tests for all kinds of connections and both modes."""

    def test_hot(self) -> None:
        for _time in range(2):
            connection = self.attach()
            self.assertEqual([self.volume.id], list(self.given()))
        # The key of the storage stays with Nova.
        self.assertNotIn('open-sesame', str(self.given()))
        for _time in range(2):
            self.detach(connection)
            self.assert_detached()

    def test_cold(self) -> None:
        self.driver.power_off(self.server)
        connection = self.attach()
        self.driver.power_on(self.context, self.server, [], self.info())
        self.assertEqual([self.volume.id], list(self.given()))
        self.driver.power_off(self.server)
        self.detach(connection)
        self.assert_detached()
        self.driver.power_on(self.context, self.server, [], self.info())

    def test_hard_reboot_repairs(self) -> None:
        self.attach()
        before = self.given()
        device = self.storage.device_of(self.volume)
        self.storage.remove_device(device)
        self.storage.mounts.clear()
        for _time in range(2):
            self.driver.reboot(self.context, self.server, [], 'HARD',
                               self.info())
            self.assertEqual(set(before), set(self.given()))
            self.assertIsNotNone(self.storage.device_of(self.volume))
        # Nova has forgotten it.
        self.driver.reboot(self.context, self.server, [], 'HARD',
                           disks.described())
        self.assertEqual({}, self.given())

    def test_server_in_use(self) -> None:
        connection = self.attach()
        self.storage.processes = [4711, 4712]
        error = self.assertRaises(exception.DeviceDetachFailed, self.detach,
                                  connection)
        self.assertIn('2 processes', str(error))
        self.assertEqual([self.volume.id], list(self.given()))
        self.storage.processes = []
        self.detach(connection)
        self.assert_detached()

    def test_nova_has_no_connection(self) -> None:
        """Its database ended while the volume was being attached."""
        self.attach()
        # Another device name.
        self.detach({}, path='/dev/vdc')
        self.assertEqual([self.volume.id], list(self.given()))
        for _time in range(2):
            self.detach({})
            self.assert_detached()

    def test_another_server_has_it(self) -> None:
        connection = self.attach()
        other = self.host.spawn()
        self.assertRaises(exception.VolumeAttachFailed, self.attach,
                          server=other)
        self.assertEqual({}, self.given(other))
        self.assertEqual([self.volume.id], list(self.given()))
        # Detaching from who never had it takes nothing away.
        self.detach(self.volume.connection(), other)
        self.assertIsNotNone(self.storage.device_of(self.volume))
        self.detach(connection)
        self.attach(server=other)

    def test_bad_names(self) -> None:
        for path in ('/dev/null', '/dev/../etc/passwd', '/dev/sda1/x'):
            self.assertRaises(exception.InvalidDevicePath, self.attach,
                              path=path)
            self.assert_detached()

    def test_connection_fails(self) -> None:
        for error in (brick_exception.BrickException('10.0.0.1 is dead'),
                      OSError(errno.EIO, 'I/O error on /dev/sdx')):
            self.storage.fail(self.connect, error)
            raised = self.assertRaises(exception.VolumeAttachFailed,
                                       self.attach)
            self.assertNotIn('10.0.0.1', str(raised))
            self.assertNotIn('sdx', str(raised))
            self.assert_detached()

    def test_disconnection_fails(self) -> None:
        connection = self.attach()
        self.storage.fail(self.disconnect, OSError(errno.EBUSY, 'busy'))
        self.assertRaises(exception.VolumeDetachFailed, self.detach,
                          connection)
        self.detach(connection)
        self.assert_detached()

    def test_lxd_refuses(self) -> None:
        name = self.server.name
        self.lxd.fail_next('PATCH', f'/1.0/instances/{name}')
        self.assertRaises(exception.NovaException, self.attach)
        self.assert_detached()
        connection = self.attach()
        self.lxd.fail_operation('PUT', f'/1.0/instances/{name}')
        self.assertRaises(exception.NovaException, self.detach, connection)
        # What the guest has is never disconnected.
        self.assertEqual([self.volume.id], list(self.given()))
        self.assertIsNotNone(self.storage.device_of(self.volume))
        self.detach(connection)
        self.assert_detached()

    def test_disk_is_full_beyond_its_extension(self) -> None:
        """LXD changes the guest, and then cannot write that down."""
        name = self.server.name
        fake = self.host.fake(self.server)
        fake.devices['root']['size'] = (
            f'{units.Gi + root_quota.MAX_EXTENSION}B')
        fake.config[root_quota.KEY_ROOT_QUOTA] = '1GiB'
        full = 'open backup.yaml: disk quota exceeded'
        path = f'/1.0/instances/{name}'
        self.lxd.before('PATCH', path, lambda request: fake.devices.update(
            request.json()['devices']))
        self.lxd.fail_next('PATCH', path, 500, full)
        self.lxd.fail_operation('PUT', path, full, after=True)
        self.assertRaisesRegex(exception.NovaException, 'is full',
                               self.attach)
        self.assert_detached()

    def test_answer_is_lost(self) -> None:
        self.lxd.drop_connection(
            'PATCH', f'/1.0/instances/{self.server.name}', after=True)
        self.assertRaises(exception.HypervisorUnavailable, self.attach)
        self.assert_detached()

    def test_lxd_is_gone_for_good(self) -> None:
        """The guest may have it; it stays connected until LXD is back."""
        name = self.server.name
        self.lxd.drop_connection('PATCH', f'/1.0/instances/{name}',
                                 after=True)
        gone = self.lxd.drop_connection('GET', f'/1.0/instances/{name}',
                                        times=None)
        gone.times = 0
        self.lxd.before('PATCH', f'/1.0/instances/{name}',
                        lambda request: setattr(gone, 'times', None))
        with self.host.no_pauses():
            self.assertRaises(exception.HypervisorUnavailable, self.attach)
        self.assertIsNotNone(self.storage.device_of(self.volume))
        gone.release()
        self.assertEqual([self.volume.id], list(self.given()))
        # Another server does not get it as long as this one may have it.
        other = self.host.spawn()
        with contextlib.suppress(exception.VolumeAttachFailed):
            self.attach(server=other)
        self.assertEqual([self.volume.id],
                         [*self.given(), *self.given(other)])

    def test_lxd_is_gone(self) -> None:
        connection = self.attach()
        with self.host.lxd_down():
            self.assertRaises(exception.HypervisorUnavailable, self.detach,
                              connection)
            self.assertIsNotNone(self.storage.device_of(self.volume))
        self.detach(connection)
        self.assert_detached()

    def test_server_is_gone(self) -> None:
        connection = self.attach()
        self.driver.destroy(self.context, self.server, [], self.info())
        self.detach(connection)
        self.assertEqual(set(), self.storage.left())
        self.assertRaises(exception.InstanceNotFound, self.attach)
        self.assertEqual(set(), self.storage.left())

    def test_destroy_without_the_connections(self) -> None:
        self.attach()
        self.driver.destroy(self.context, self.server, [])
        self.assertEqual({}, self.host.own())

    def test_extend(self) -> None:
        connection = self.attach()
        self.volume.extend(2)
        self.driver.extend_volume(self.context, connection, self.server,
                                  2 * units.Gi)
        self.assertEqual(2 * units.Gi,
                         self.storage.device_of(self.volume).size)
        self.assertEqual([self.volume.id], list(self.given()))

    def test_extend_that_the_host_does_not_see(self) -> None:
        connection = self.attach()
        self.assertRaises(exception.VolumeExtendFailed,
                          self.driver.extend_volume, self.context, connection,
                          self.server, 2 * units.Gi)

    # -- another tenant's data ----------------------------------------------

    def test_device_that_is_too_small(self) -> None:
        """A stale path leads to another tenant's volume."""
        self.volume.disk.size -= 512
        error = self.assertRaises(exception.VolumeAttachFailed, self.attach)
        self.assertIn('not this volume', str(error))
        self.assert_detached()

    def test_device_of_another_volume(self) -> None:
        self.attach()
        stale = self.storage.volume(self.kind)
        stale.disk = self.volume.disk
        if self.kind == 'nfs':
            return
        other = self.host.spawn()
        self.assertRaises(exception.VolumeAttachFailed, self.attach, stale,
                          other, '/dev/vdc')
        self.assertEqual({}, self.given(other))
        self.assertEqual([self.volume.id], list(self.given()))

    # -- at the same time ---------------------------------------------------

    def test_one_volume_two_servers(self) -> None:
        """Only one of two servers that ask at once gets it."""
        other = self.host.spawn()
        waiting = threading.Event()
        results: list[Any] = []

        def attach(server: objects.Instance) -> None:
            try:
                self.attach(server=server)
                results.append(server.uuid)
            except exception.VolumeAttachFailed:
                results.append(None)
        first = threading.Thread(target=attach, args=(self.server,))
        second = threading.Thread(target=attach, args=(other,))

        def pause() -> None:
            second.start()
            # Without a lock it would get through meanwhile.
            second.join(0.3)
            waiting.set()
        self.storage.before(self.connect, pause)
        first.start()
        for thread in (first, second):
            waiting.wait(5)
            thread.join(10)
        self.assertEqual(1, results.count(None), results)
        self.assertEqual(1, len(self.given()) + len(self.given(other)))


class BlockTest(VolumeCases, volume_case.VolumeTestCase):
    """Block devices over iSCSI."""

    connect, disconnect = 'brick.connect', 'brick.disconnect'

    def test_device(self) -> None:
        self.attach()
        device = self.given()[self.volume.id]
        self.assertEqual(
            ('unix-block', PATH, self.storage.device_of(self.volume).path),
            (device['type'], device['path'], device['source']))

    def test_name_that_the_device_has(self) -> None:
        """The storage says how the device calls itself."""
        device = self.storage.add_device(self.volume.disk)
        self.storage.set_attribute(device, 'wwid', 'naa.6001405aaaa')
        self.assertRaises(exception.VolumeAttachFailed, self.attach,
                          wwn='0x6001405bbbb')
        device = self.storage.add_device(self.volume.disk)
        self.storage.set_attribute(device, 'wwid', 'naa.6001405bbbb')
        self.attach(wwn='0x6001405bbbb')

    def test_unknown_type(self) -> None:
        connection = self.volume.connection()
        connection['driver_volume_type'] = 'carrier-pigeon'
        self.assertRaises(
            exception.VolumeDriverNotFound, self.driver.attach_volume,
            self.context, connection, self.server, PATH)

    def test_shared(self) -> None:
        other = self.host.spawn()
        for recorded in (True, False):
            connections = []
            for server in (self.server, other):
                connection = {**self.volume.connection(), 'multiattach': True}
                self.driver.attach_volume(self.context, connection, server,
                                          PATH)
                connections.append(connection)
            self.detach(connections[0] if recorded else {})
            self.assertIsNotNone(self.storage.device_of(self.volume))
            self.detach(connections[1], other)
            self.assertEqual(set(), self.storage.left())

    def test_after_a_reboot_of_the_host(self) -> None:
        """The name of the device may be another volume's by now."""
        connection = self.attach()
        self.driver.power_off(self.server)
        device = self.devices(self.server)[f'volume-{self.volume.id}']
        device['user.nova.boot'] = 'an earlier one'
        stolen = self.storage.device_of(self.volume)
        stolen.disk = memory_cinder.Disk(units.Gi)
        self.storage.processes = [1]
        self.detach(connection)
        self.assertEqual({}, self.given())

    def test_names(self) -> None:
        bdms = [objects.BlockDeviceMapping(device_name='/dev/sdb')]
        choose = self.driver.get_device_name_for_instance
        self.assertEqual('/dev/sdc', choose(self.server, bdms, {}))
        self.assertEqual('/dev/vdx', choose(
            self.server, bdms, {'device_name': 'vdx'}))
        for name, kind in (('/dev/sdb', exception.DevicePathInUse),
                           ('/dev/null', exception.InvalidDevicePath)):
            self.assertRaises(kind, choose, self.server, bdms,
                              {'device_name': name})


class ShareFileTest(VolumeCases, volume_case.VolumeTestCase):
    """Files on a share, through loop devices."""

    kind = 'nfs'

    def test_nova_compute_ended_before_nova_had_the_connection(self) -> None:
        self.attach()
        self.host.restart_driver()
        self.detach({})
        self.assert_detached()
    connect, disconnect = 'loop.attach', 'loop.detach'

    def test_format(self) -> None:
        self.assertRaises(exception.VolumeAttachFailed, self.attach,
                          format='qcow2')
        self.assert_detached()

    def test_share_is_released(self) -> None:
        """It stays mounted only as long as a volume on it is connected."""
        released = 'loop.release_share'
        connection = self.attach()
        self.assertNotIn(released, self.storage.calls)
        self.detach(connection)
        self.assertIn(released, self.storage.calls)
        self.storage.calls.clear()
        self.storage.fail('loop.attach', OSError(errno.EBUSY, 'busy'))
        self.assertRaises(exception.VolumeAttachFailed, self.attach)
        self.assertIn(released, self.storage.calls)

    def test_read_only(self) -> None:
        self.attach(access_mode='ro')
        self.assertTrue(self.storage.device_of(self.volume).read_only)


class FilesystemTest(VolumeCases, volume_case.VolumeTestCase):
    """Filesystems that the host mounts."""

    options = {'volume_mode': 'filesystem', 'volume_filesystems': ['ext4']}
    connect, disconnect = 'brick.connect', 'brick.disconnect'

    def test_device(self) -> None:
        self.attach()
        device = self.given()[self.volume.id]
        self.assertEqual(('disk', '/mnt/vdb'),
                         (device['type'], device['path']))
        mount = self.storage.mount_of(self.volume)
        self.assertEqual(device['source'], [
            target for target, each in self.storage.mounts.items()
            if each is mount][0])
        # Root in the guest is root on the volume, and nobody on the host.
        config = self.config(self.server)
        self.assertEqual(int(config['security.idmap.base']), mount.ids[0])
        self.assertEqual(65536, mount.ids[2])

    def test_mount_fails(self) -> None:
        self.storage.fail('mounts.mount', OSError(errno.EIO, '10.0.0.1'))
        error = self.assertRaises(exception.VolumeAttachFailed, self.attach)
        self.assertNotIn('10.0.0.1', str(error))
        self.assert_detached()

    def test_server_goes_although_unmounting_fails(self) -> None:
        self.attach()
        self.storage.fail('mounts.unmount', OSError(errno.EIO, 'I/O error'),
                          always=True)
        self.driver.destroy(self.context, self.server, [], self.info())
        self.assertNotIn(self.server.name, self.lxd.instances)
        self.storage.heal()

    def test_unmount_fails(self) -> None:
        connection = self.attach()
        self.storage.fail('mounts.unmount', OSError(errno.EBUSY, '10.0.0.1'))
        error = self.assertRaises(exception.DeviceDetachFailed, self.detach,
                                  connection)
        self.assertNotIn('10.0.0.1', str(error))
        self.assertIsNotNone(self.storage.device_of(self.volume))
        self.detach(connection)
        self.assert_detached()

    def test_discard(self) -> None:
        for wanted in (True, False):
            self.host._set('volume_discard', wanted, 'lxd')
            server = self.host.spawn()
            connection = self.volume.connection()
            self.driver.attach_volume(self.context, connection, server,
                                      '/dev/vdb')
            mount = self.storage.mount_of(self.volume)
            assert mount is not None
            self.assertEqual(wanted, mount.discard)
            self.driver.detach_volume(self.context, connection, server,
                                      '/dev/vdb')

    def test_empty_one_gets_a_filesystem(self) -> None:
        self.attach()
        self.assertEqual('ext4', self.volume.disk.content)

    def test_content_is_never_overwritten(self) -> None:
        for content in ('xfs', 'crypto_LUKS', 'dos', 'unknown'):
            self.volume.disk.content = content
            self.assertRaises(exception.VolumeAttachFailed, self.attach)
            self.assertEqual(content, self.volume.disk.content)
            self.assert_detached()

    def test_read_only(self) -> None:
        self.assertRaises(exception.VolumeAttachFailed, self.attach,
                          access_mode='ro')
        self.volume.disk.content = 'ext4'
        self.attach(access_mode='ro')
        self.assertTrue(self.storage.mount_of(self.volume).read_only)
        self.assertEqual('true', self.given()[self.volume.id]['readonly'])

    def test_shared(self) -> None:
        connection = {**self.volume.connection(), 'multiattach': True}
        self.assertRaises(
            exception.VolumeAttachFailed, self.driver.attach_volume,
            self.context, connection, self.server, PATH)
        self.assert_detached()

    def test_old_kernel(self) -> None:
        self.storage.fail('mounts.mount', OSError(errno.EINVAL, 'mount'))
        error = self.assertRaises(exception.VolumeAttachFailed, self.attach)
        self.assertIn('kernel', str(error))
        self.assert_detached()

    def test_grows(self) -> None:
        connection = self.attach()
        self.volume.extend(2)
        self.driver.extend_volume(self.context, connection, self.server,
                                  2 * units.Gi)
        self.assertEqual(2 * units.Gi, self.volume.disk.filesystem_size)

    def test_who_says_which_mode(self) -> None:
        """The volume before the server before its flavor."""
        image = self.host.image()
        server = self.host.spawn(self.host.instance(
            image, {'lxd:volume_mode': 'filesystem'},
            metadata={'lxd_volume_mode': 'block'}), image)
        self.attach(server=server)
        self.assertEqual('unix-block',
                         self.given(server)[self.volume.id]['type'])
        volume = self.storage.volume(
            volume_metadata={'lxd_volume_mode': 'filesystem'})
        self.attach(volume, server, '/dev/vdc')
        self.assertEqual('disk', self.given(server)[volume.id]['type'])
        bad = self.storage.volume(
            volume_metadata={'lxd_volume_mode': 'floppy'})
        self.assertRaises(exception.VolumeAttachFailed, self.attach, bad,
                          server, '/dev/vdd')

    def test_held_on_the_host(self) -> None:
        """Another container that is just starting holds all mounts."""
        connection = self.attach()
        target = self.given()[self.volume.id]['source']
        self.storage.held.add(target)
        self.assertRaises(exception.DeviceDetachFailed, self.detach,
                          connection)
        self.assertEqual([self.volume.id], list(self.given()))
        self.storage.held.clear()
        self.detach(connection)
        self.assert_detached()
