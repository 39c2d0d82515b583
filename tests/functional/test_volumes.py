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

"""Cinder volumes on a real LXD and real block devices, through the driver."""

from __future__ import annotations

import hashlib
import os
import subprocess
import threading
import unittest

from nova import exception
from oslo_utils import units

from tests.fixtures import disks
from tests.fixtures import faulty_proxy
from tests.fixtures import lab_volumes
from tests.fixtures import lxd_daemon
from tests.fixtures import variants
from tests.fixtures import volume_host

NO_LXD = lxd_daemon.missing()
PATH = volume_host.PATH


class VolumeCases(volume_host.VolumeHost):
    """Tests for every kind of volume."""

    # -- attach and detach --------------------------------------------------

    def test_hot(self) -> None:
        server = self.host.spawn()
        volume = self.storage.volume()
        self.assertFalse(self.has(server))
        connection = self.attach(server, volume)
        self.assertTrue(os.path.exists(connection['lxd_device_path']))
        written = self.write(server)
        self.assertEqual(written, self.read(server))
        self.detach(server, connection)
        self.assertFalse(self.has(server))
        self.assertEqual({}, self.devices(server))
        self.assertEqual(set(), self.storage.left_on_host())
        self.assertEqual(written, volume.checksum(2 * units.Mi))
        # Another server reads the same.
        other = self.host.spawn()
        connection = self.attach(other, volume, '/dev/sdc')
        self.assertEqual(written, self.read(other, '/dev/sdc'))
        self.detach(other, connection, '/dev/sdc')

    def test_cold(self) -> None:
        server = self.host.spawn(power_on=False)
        volume = self.storage.volume()
        connection = self.attach(server, volume)
        info = disks.described(volume.mapping())
        self.host.driver.power_on(self.host.context, server, [], info)
        written = self.write(server)
        self.host.driver.power_off(server)
        self.detach(server, connection)
        self.assertEqual(set(), self.storage.left_on_host())
        self.assertEqual(written, volume.checksum(2 * units.Mi))
        self.host.driver.power_on(self.host.context, server, [],
                                  disks.described())
        self.assertFalse(self.has(server))

    def test_twice_is_once(self) -> None:
        server = self.host.spawn()
        volume = self.storage.volume()
        self.attach(server, volume)
        before = self.devices(server)
        connection = self.attach(server, volume)
        self.assertEqual(before, self.devices(server))
        self.detach(server, connection)
        self.detach(server, connection)
        # A volume that was refused for its device name.
        self.detach(server, connection, '/dev/../etc')
        # Nova does so after an aborted build.
        self.destroy(server)
        self.detach(server, connection)

    def test_several_in_any_order(self) -> None:
        server = self.host.spawn()
        volumes = [self.storage.volume() for _number in range(3)]
        paths = ['/dev/vdb', '/dev/vdc', '/dev/vdd']
        made = [self.attach(server, volume, path)
                for volume, path in zip(volumes, paths)]
        written = [self.write(server, path, 1) for path in paths]
        for number in (1, 0, 2):
            self.detach(server, made[number], paths[number])
            for other, path in enumerate(paths):
                if self.has(server, path):
                    self.assertEqual(written[other],
                                     self.read(server, path, 1))
        self.assertEqual(set(), self.storage.left_on_host())

    def test_at_the_same_time(self) -> None:
        servers = [self.host.spawn() for _number in range(2)]
        work = [(servers[number % 2], self.storage.volume(),
                 f'/dev/vd{letter}') for number, letter in enumerate('bcde')]
        failures: list[Exception] = []

        def cycle(server, volume, path) -> None:
            try:
                for _turn in range(3):
                    connection = self.attach(server, volume, path)
                    self.detach(server, connection, path)
            except Exception as error:
                failures.append(error)
        threads = [threading.Thread(target=cycle, args=each) for each in work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual([], failures)
        self.assertEqual({}, self.devices(servers[0]))
        self.assertEqual(set(), self.storage.left_on_host())

    def test_busy_stays_attached(self) -> None:
        server = self.host.spawn()
        volume = self.storage.volume()
        connection = self.attach(server, volume)
        written = self.write(server)
        self.hold_open(server)
        self.assertRaisesRegex(exception.DeviceDetachFailed, '1 processes',
                               self.detach, server, connection)
        self.assertEqual(written, self.read(server))
        self.release(server)
        self.detach(server, connection)
        self.assertEqual(set(), self.storage.left_on_host())

    def test_users_are_found_without_lxd(self) -> None:
        """LXD is asked only where the guest has hidden the volume."""
        server = self.host.spawn()
        volume = self.storage.volume()
        for hidden in (False, True):
            connection = self.attach(server, volume)
            self.hold_open(server)
            if hidden:
                self.host.run(server, 'busybox', 'umount', '-l', PATH)
            self.proxy.behave()
            self.assertRaisesRegex(exception.DeviceDetachFailed,
                                   '1 processes', self.detach, server,
                                   connection)
            self.assertEqual(hidden, self.asked_for_state())
            self.release(server)
            self.detach(server, connection)
        self.assertEqual(set(), self.storage.left_on_host())

    def test_busy_in_another_server_does_not_count(self) -> None:
        first, second = self.host.spawn(), self.host.spawn()
        connections = [self.attach(server, self.storage.volume())
                       for server in (first, second)]
        self.hold_open(second)
        self.detach(first, connections[0])
        self.destroy(second, disks.described(*[]))
        self.detach(second, connections[1])

    # -- extend -------------------------------------------------------------

    def test_extend(self) -> None:
        server = self.host.spawn()
        volume = self.storage.volume()
        connection = self.attach(server, volume)
        self.grow(server, volume, connection)
        self.assertEqual(2 * units.Gi, self.device_size(server))
        self.assertRaises(exception.VolumeExtendFailed,
                          self.host.driver.extend_volume, self.host.context,
                          connection, server, 3 * units.Gi)
        self.detach(server, connection)

    # -- refusals -----------------------------------------------------------

    def test_refusals(self) -> None:
        server = self.host.spawn()
        volume = self.storage.volume()
        for error, message, change in (
                (exception.VolumeDriverNotFound, 'Supported types: .*nfs',
                 {'driver_volume_type': 'carrier-pigeon'}),
                (exception.InvalidVolume, 'does not say', {'serial': ''}),
                (exception.InvalidVolume, 'does not say',
                 {'serial': '../../etc'})):
            self.assertRaisesRegex(
                error, message, self.host.driver.attach_volume,
                self.host.context, {**volume.connection(), **change}, server,
                PATH)
        for path in ('/dev/null', '/dev/../etc/x', '/etc/x', 'root', '',
                     '/dev/sda/b', '/dev/vdb\n', '/dev/console'):
            self.assertRaises(exception.InvalidDevicePath, self.attach,
                              server, volume, path)
        self.assertEqual({}, self.devices(server))
        self.assertEqual(set(), self.storage.left_on_host())

    def test_wrong_size_is_not_the_volume(self) -> None:
        server = self.host.spawn()
        volume = self.storage.volume()
        volume.size = 2 * units.Gi
        self.assertRaises(exception.VolumeAttachFailed, self.attach, server,
                          volume)
        self.assertIn('bytes and not the 2 GiB', self.log.output)
        self.assertEqual({}, self.devices(server))

    def test_attached_to_another_server(self) -> None:
        first, second = self.host.spawn(), self.host.spawn()
        volume = self.storage.volume()
        connection = self.attach(first, volume)
        written = self.write(first)
        self.assertRaisesRegex(exception.VolumeAttachFailed,
                               'another server', self.attach, second, volume)
        self.assertEqual(written, self.read(first))
        self.detach(first, connection)

    def test_shared_by_servers(self) -> None:
        servers = [self.host.spawn(), self.host.spawn()]
        volume = self.storage.volume()
        shared = [{**volume.connection(), 'multiattach': True}
                  for _server in servers]
        for server, connection in zip(servers, shared):
            self.host.driver.attach_volume(self.host.context, connection,
                                           server, PATH)
        written = self.write(servers[0])
        # Not a stale cache of the host.
        self.assertEqual(written, self.read(servers[1]))
        self.detach(servers[0], shared[0])
        self.assertFalse(self.has(servers[0]))
        self.assertEqual(written, self.read(servers[1]))
        mapping = volume.mapping()
        mapping['connection_info'] = shared[1]
        self.destroy(servers[1], disks.described(mapping))
        self.assertEqual(set(), self.storage.left_on_host())

    def test_released_by_another_server_during_a_start(self) -> None:
        """The device may be another volume's when the server starts."""
        first, second = self.host.spawn(), self.host.spawn()
        volume = self.storage.volume()
        shared = [{**volume.connection(), 'multiattach': True}
                  for _server in range(2)]
        for server, connection in zip((first, second), shared):
            self.host.driver.attach_volume(self.host.context, connection,
                                           server, PATH)
        written = self.write(first)
        self.host.driver.power_off(first)
        lab_volumes.reboot_host(self.host)
        mapping = volume.mapping()
        mapping['connection_info']['multiattach'] = True
        # Nova saves the connection before LXD has the device.
        mapping.save = lambda: self.detach(second, shared[1])
        self.assertRaisesRegex(
            exception.VolumeAttachFailed, 'released',
            self.host.driver.power_on, self.host.context, first, [],
            disks.described(mapping))
        mapping.save = lambda: None
        self.host.driver.power_on(self.host.context, first, [],
                                  disks.described(mapping))
        self.assertEqual(written, self.read(first))
        self.detach(first, shared[0])

    def test_failure_does_not_hurt_another_server(self) -> None:
        first, second = self.host.spawn(), self.host.spawn()
        volume = self.storage.volume()
        shared = {**volume.connection(), 'multiattach': True}
        self.host.driver.attach_volume(self.host.context, dict(shared), first,
                                       PATH)
        written = self.write(first)
        self.proxy.spoil(0, faulty_proxy.Spoil.REFUSE)
        self.assertRaises(
            exception.NovaException, self.host.driver.attach_volume,
            self.host.context, dict(shared), second, PATH)
        self.proxy.behave()
        self.assertEqual(written, self.read(first))
        self.detach(first, shared)

    def test_server_is_gone(self) -> None:
        server = self.host.instance(self.host.image())
        self.assertRaises(exception.InstanceNotFound, self.attach, server,
                          self.storage.volume())
        self.assertEqual(set(), self.storage.left_on_host())

    def test_secrets_stay_secret(self) -> None:
        server = self.host.spawn()
        volume = self.storage.volume()
        connection = self.attach(server, volume)
        config = str(self.host.lxd_instances()[server.name])
        self.assertNotIn(lab_volumes.PASSWORD, config)
        self.detach(server, connection)
        volume.file.unlink()
        broken = volume.connection(device_path='/dev/no-such-device')
        with self.assertRaises(exception.VolumeAttachFailed) as caught:
            self.host.driver.attach_volume(self.host.context, broken, server,
                                           PATH)
        self.assertNotIn(lab_volumes.PASSWORD, str(caught.exception))
        self.assertNotIn('/dev/no', str(caught.exception))
        self.assertNotIn(lab_volumes.PASSWORD, self.log.output)


@unittest.skipIf(NO_LXD, NO_LXD or '')
@variants.keep(
    'test_hot', 'test_cold', 'test_twice_is_once', 'test_extend',
    'test_wrong_size_is_not_the_volume', 'test_shared_by_servers',
    'test_released_by_another_server_during_a_start')
class LocalVolumeTest(VolumeCases, unittest.TestCase):
    kind = lab_volumes.LocalVolume

    def test_read_only(self) -> None:
        """Nothing keeps a guest from writing to such a device."""
        server = self.host.spawn()
        volume = self.storage.volume()
        self.assertRaisesRegex(
            exception.VolumeAttachFailed, 'cannot enforce', self.attach,
            server, volume, access_mode='ro')
        self.assertEqual({}, self.devices(server))
        self.detach(server, self.attach(server, volume))

    def test_device_of_another_volume(self) -> None:
        """As with a stale connection of the host."""
        first, second = self.host.spawn(), self.host.spawn()
        one, other = self.storage.volume(), self.storage.volume()
        connection = self.attach(first, one)
        self.assertRaisesRegex(
            exception.VolumeAttachFailed, 'for another volume', self.attach,
            second, other, device_path=one.device)
        self.assertEqual({}, self.devices(second))
        self.detach(first, connection)

    def test_device_of_another_volume_after_a_reboot_of_the_host(self) -> None:
        """The device of a stopped server is another volume's by now."""
        first, second = self.host.spawn(), self.host.spawn()
        one, other = self.storage.volume(), self.storage.volume()
        mine = self.attach(first, one)
        self.host.driver.power_off(first)
        lab_volumes.reboot_host(self.host)
        self.host.restart_driver()
        connection = self.attach(second, other, device_path=one.device)
        written = self.write(second)
        # Its own volume has another device now.
        mapping = one.mapping()
        mapping['connection_info']['data']['device_path'] = other.device
        self.host.driver.power_on(self.host.context, first, [],
                                  disks.described(mapping))
        self.assertNotEqual(written, self.read(first))
        self.assertRaisesRegex(
            exception.VolumeAttachFailed, 'for another volume', self.attach,
            second, self.storage.volume(), '/dev/vdc',
            device_path=other.device)
        self.detach(first, mine)
        self.assertEqual(written, self.read(second))
        self.detach(second, connection)


@unittest.skipIf(NO_LXD, NO_LXD or '')
class FileVolumeTest(VolumeCases, unittest.TestCase):
    kind = lab_volumes.FileVolume

    def test_loop_device(self) -> None:
        server = self.host.spawn()
        connection = self.attach(server, self.storage.volume())
        name = os.path.basename(connection['lxd_device_path'])
        for file, wanted in (('loop/dio', '1'), ('ro', '0')):
            with open(f'/sys/block/{name}/{file}', encoding='ascii') as stream:
                self.assertEqual(wanted, stream.read().strip(), file)
        self.detach(server, connection)

    def test_guest_cannot_take_it_off_its_file(self) -> None:
        """The loop device could become another volume's."""
        for specs in ({}, {'lxd:privileged_allowed': 'true'}):
            server = self.host.spawn(self.host.instance(
                image := self.host.image(), specs), image)
            volume = self.storage.volume()
            self.attach(server, volume)
            with self.assertRaisesRegex(AssertionError, 'not permitted'):
                self.host.run(server, 'busybox', 'losetup', '-d', PATH)
            self.write(server)
            self.destroy(server)

    def test_after_a_reboot_of_the_host(self) -> None:
        server = self.host.spawn()
        volume = self.storage.volume()
        connection = self.attach(server, volume)
        written = self.write(server)
        self.host.driver.power_off(server)
        share = os.path.join(
            self.host.driver._services.volumes._connections._plugins['nfs']
            .options.volume_share_directory,
            hashlib.md5(f'fileserver:{volume.file.parent}'.encode()
                        ).hexdigest())
        subprocess.run(['losetup', '--detach',
                        connection['lxd_device_path']], check=True)
        subprocess.run(['umount', share], check=True)
        self.host.driver.resume_state_on_host_boot(
            self.host.context, server, [], [],
            disks.described(volume.mapping()))
        self.assertEqual(written, self.read(server))
        self.detach(server, connection)

    def test_share_serves_several(self) -> None:
        server = self.host.spawn()
        first, second = self.storage.volume(), self.storage.volume()
        one = self.attach(server, first)
        other = self.attach(server, second, '/dev/vdc')
        written = self.write(server, '/dev/vdc')
        self.detach(server, one)
        self.assertEqual(written, self.read(server, '/dev/vdc'))
        self.detach(server, other, '/dev/vdc')

    def test_only_raw_files(self) -> None:
        server = self.host.spawn()
        volume = self.storage.volume()
        self.assertRaisesRegex(exception.VolumeAttachFailed, 'qcow2',
                               self.attach, server, volume, format='qcow2')
        # Content that a guest writes does not change the format.
        connection = self.attach(server, volume)
        self.host.run(server, 'sh', '-c',
                      f'printf "QFI\\373\\000\\000\\000\\003" > {PATH}')
        self.detach(server, connection)
        connection = self.attach(server, volume)
        self.detach(server, connection)

    def test_not_a_file(self) -> None:
        server = self.host.spawn()
        volume = self.storage.volume()
        volume.file.unlink()
        os.symlink('/etc/passwd', volume.file)
        self.assertRaises(exception.VolumeAttachFailed, self.attach, server,
                          volume)
        volume.file.unlink()
        self.assertRaises(exception.VolumeAttachFailed, self.attach, server,
                          volume)

    def test_read_only(self) -> None:
        server = self.host.spawn()
        connection = self.attach(server, self.storage.volume(),
                                 access_mode='ro')
        self.read(server)
        with self.assertRaises(AssertionError):
            self.host.run(server, 'dd', 'if=/dev/zero', f'of={PATH}',
                          'count=1', 'conv=fsync')
        self.detach(server, connection)
