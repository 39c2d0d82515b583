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
import pathlib
import stat
import subprocess
import sys
import threading
import time
from typing import Any
import unittest

import fixtures
from nova.compute import power_state
from nova.compute import task_states
from nova.compute import vm_states
from nova import exception
from nova.network import model as network_model
from nova import objects
from oslo_utils import units

from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.privileged import fuser
from tests.fixtures import driver_host
from tests.fixtures import faulty_proxy
from tests.fixtures import killed_process
from tests.fixtures import lab_volumes
from tests.fixtures import lxd_daemon

NO_LXD = lxd_daemon.missing()

PATH = '/dev/vdb'
#: Maps a file in a second process, which does not keep it open.
MAPPING = '''
import ctypes, os, sys, time
if os.fork() == 0:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int,
                          ctypes.c_int, ctypes.c_int, ctypes.c_long]
    file = os.open(sys.argv[1], os.O_RDONLY)
    if libc.mmap(None, 4096, 1, 1, file, 0) == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), 'mmap')
    os.close(file)
    print('ready', flush=True)
time.sleep(1000)
'''


class Mapping(dict):
    """A volume of a server as Nova hands it to the driver at a start."""

    def __init__(self, volume: lab_volumes.Volume, path: str = PATH,
                 **fields: Any) -> None:
        super().__init__(
            connection_info=volume.connection(), mount_device=path,
            boot_index=None, disk_bus=None, device_type=None,
            guest_format=None, delete_on_termination=False, **fields)
        self.volume_size = volume.size // units.Gi
        self.saved: dict[str, Any] | None = None

    def save(self) -> None:
        self.saved = dict(self['connection_info'])


def described(*mappings: Mapping) -> dict[str, Any]:
    """Describe volumes as Nova does."""
    return {'root_device_name': '/dev/sda', 'swap': None, 'ephemerals': [],
            'block_device_mapping': list(mappings)}


class Host:
    """A host, its storage, and what Nova and guests do."""

    kind: type[lab_volumes.Volume]
    daemon = False
    options: dict[str, Any] = {}

    def setUp(self) -> None:
        super().setUp()
        self.log = fixtures.FakeLogger(level=0)
        self.log.setUp()
        self.addCleanup(self.log.cleanUp)
        lxd = self.lxd()
        self.proxy = faulty_proxy.FaultyProxy(lxd.endpoint)
        self.proxy.setUp()
        self.addCleanup(self.proxy.cleanUp)
        self.host = driver_host.DriverHost(
            lxd, endpoint=self.proxy.path, operation_timeout=20,
            request_timeout=10, directory=str(lxd.directory), **self.options)
        self.host.setUp()
        self.addCleanup(self.host.cleanUp)
        self.storage = lab_volumes.Storage(self.kind, daemon=self.daemon)
        self.storage.setUp()
        self.addCleanup(self.storage.cleanUp)
        self.addCleanup(lambda: self.assertEqual(
            set(), self.storage.left_on_host()))

    def lxd(self) -> lxd_daemon.RealLXD:
        """The LXD to use."""
        return lxd_daemon.shared()

    # -- what Nova does -----------------------------------------------------

    def attach(self, server, volume, path: str = PATH, **data: Any) -> dict:
        connection = volume.connection(**data)
        self.storage.refused.discard((volume.id, server.uuid))
        try:
            self.host.driver.attach_volume(self.host.context, connection,
                                           server, path, 'virtio', 'disk')
        except Exception:
            self.storage.refused.add((volume.id, server.uuid))
            raise
        return connection

    def detach(self, server, connection: dict, path: str = PATH) -> None:
        self.host.driver.detach_volume(self.host.context, connection, server,
                                       path)

    def grow(self, server, volume, connection: dict) -> None:
        """Extend an attached volume to 2 GiB."""
        volume.extend(2 * units.Gi)
        self.host.driver.extend_volume(self.host.context, connection, server,
                                       volume.size)

    def destroy(self, server, info: dict | None = None) -> None:
        self.host.driver.destroy(self.host.context, server, [], info)

    def reboot(self, server, info: dict, kind: str = 'HARD') -> None:
        self.host.driver.reboot(self.host.context, server, [], kind, info)

    # -- what the guest does ------------------------------------------------

    def write(self, server, path: str = PATH, megabytes: int = 2) -> str:
        """Write random bytes in the guest.

        :returns: their checksum.
        """
        self.host.run(server, 'sh', '-c',
                      f'dd if=/dev/urandom of=/root/data bs=1M '
                      f'count={megabytes} && dd if=/root/data of={path} bs=1M '
                      f'conv=fsync')
        return self.host.run(server, 'busybox', 'sha256sum',
                             '/root/data').split()[0]

    def read(self, server, path: str = PATH, megabytes: int = 2) -> str:
        """Read in the guest.

        :returns: the checksum of what it read.
        """
        return self.host.run(
            server, 'sh', '-c', f'dd if={path} bs=1M count={megabytes} | '
            'busybox sha256sum').split()[0]

    def device_size(self, server) -> int:
        """Bytes of a volume as the guest finds them."""
        return int(self.host.run(server, 'busybox', 'blockdev',
                                 '--getsize64', PATH))

    def hold_open(self, server, path: str = PATH) -> None:
        """Have a process of the guest keep a volume open."""
        self.host.run(server, 'sh', '-c',
                      f'(exec 3<>{path}; exec busybox sleep 1000) >/dev/null '
                      '2>&1 </dev/null & echo $! >/root/holder; '
                      'busybox sleep 0.2')

    def release(self, server) -> None:
        self.host.run(server, 'sh', '-c', 'kill $(cat /root/holder); '
                      'busybox sleep 0.2')

    def has(self, server, path: str = PATH) -> bool:
        return self.host.run(
            server, 'sh', '-c', f'[ -b {path} ] && echo yes || echo no'
            ).strip() == 'yes'

    def asked_for_state(self) -> bool:
        """Whether LXD has been asked about all that a guest has and does."""
        return any('/state' in request.path for request in self.proxy.seen)

    def devices(self, server) -> dict:
        return {name: device for name, device in
                self.host.lxd_instances()[server.name]['devices'].items()
                if name.startswith('volume-')}


def _fail(*_args: Any, **_kwargs: Any) -> None:
    raise errors.OperationFailed('test')


class VolumeCases(Host):
    """What holds for every kind of volume."""

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
        # At another server it is the same.
        other = self.host.spawn()
        connection = self.attach(other, volume, '/dev/sdc')
        self.assertEqual(written, self.read(other, '/dev/sdc'))
        self.detach(other, connection, '/dev/sdc')

    def test_cold(self) -> None:
        server = self.host.spawn(power_on=False)
        volume = self.storage.volume()
        connection = self.attach(server, volume)
        info = described(Mapping(volume))
        self.host.driver.power_on(self.host.context, server, [], info)
        written = self.write(server)
        self.host.driver.power_off(server)
        self.detach(server, connection)
        self.assertEqual(set(), self.storage.left_on_host())
        self.assertEqual(written, volume.checksum(2 * units.Mi))
        self.host.driver.power_on(self.host.context, server, [], described())
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
        # One that was refused for its device name.
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
        self.destroy(second, described(*[]))
        self.detach(second, connections[1])

    # -- with the life of the server ----------------------------------------

    def test_boot_and_destroy(self) -> None:
        volumes = [self.storage.volume(), self.storage.volume()]
        mappings = [Mapping(volumes[0], '/dev/vdb'),
                    Mapping(volumes[1], '/dev/vdc')]
        server = self.host.spawn(block_device_info=described(*mappings))
        for mapping in mappings:
            assert mapping.saved is not None
            self.assertTrue(mapping.saved['lxd_device_path'])
            self.assertTrue(self.has(server, mapping['mount_device']))
        written = self.write(server, '/dev/vdc')
        self.hold_open(server)
        self.destroy(server, described(*mappings))
        self.assertEqual(set(), self.storage.left_on_host())
        self.assertEqual(written, volumes[1].checksum(2 * units.Mi))
        self.destroy(server, described(*mappings))

    def test_destroy_without_the_connections(self) -> None:
        server = self.host.spawn()
        self.attach(server, self.storage.volume())
        self.destroy(server)
        self.assertEqual(set(), self.storage.left_on_host())

    def test_failed_boot_leaves_nothing(self) -> None:
        good, bad = Mapping(self.storage.volume()), Mapping(
            self.storage.volume(), '/dev/vdc')
        bad['connection_info']['driver_volume_type'] = 'carrier-pigeon'
        self.assertRaises(exception.VolumeDriverNotFound, self.host.spawn,
                          block_device_info=described(good, bad))
        self.assertEqual({}, self.host.lxd_instances())
        self.assertEqual(set(), self.storage.left_on_host())

    def test_hard_reboot_repairs(self) -> None:
        server = self.host.spawn()
        volume = self.storage.volume()
        self.attach(server, volume)
        written = self.write(server)
        info = described(Mapping(volume))
        # Somebody takes it away by hand.
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
        self.reboot(server, described())
        self.assertFalse(self.has(server))
        self.detach(server, volume.connection())

    def test_guest_reboot_and_restarts(self) -> None:
        server = self.host.spawn()
        volume = self.storage.volume()
        connection = self.attach(server, volume)
        written = self.write(server)
        self.reboot(server, described(Mapping(volume)), 'SOFT')
        self.assertEqual(written, self.read(server))
        self.host.restart_driver()
        self.assertEqual(written, self.read(server))
        self.host.driver.power_off(server)
        self.host.driver.resume_state_on_host_boot(
            self.host.context, server, [], [], described(Mapping(volume)))
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
        info = described(Mapping(volume))
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
        mapping = Mapping(volume)
        self.host.driver.attach_volume(
            self.host.context, mapping['connection_info'], server, PATH)
        written = self.write(server)
        old, new = server.flavor, server.flavor.obj_clone()
        new.memory_mb = 192
        migration = objects.Migration(source_compute='testhost',
                                      dest_compute='testhost', id=1)
        self.host.driver.migrate_disk_and_power_off(
            self.host.context, server, self.host.driver.get_host_ip_addr(),
            new, [], described(mapping), timeout=0)
        # Nova frees the connection and makes another one.
        self.assertEqual(set(), self.storage.left_on_host())
        self.assertEqual({}, self.devices(server))
        server.old_flavor, server.flavor = old, new
        server.new_flavor = new
        mapping = Mapping(volume)
        self.host.driver.finish_migration(
            self.host.context, migration, server, {}, [],
            server.image_meta, False, {}, described(mapping), True)
        self.assertEqual(written, self.read(server))
        server.task_state = task_states.RESIZE_REVERTING
        self.destroy(server, described(mapping))
        self.assertEqual(set(), self.storage.left_on_host())
        server.flavor = old
        mapping = Mapping(volume)
        self.host.driver.finish_revert_migration(
            self.host.context, server, [], migration, described(mapping),
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
        self.destroy(server, described(Mapping(volume)))
        mapping = Mapping(volume)
        self.host.spawn(server, block_device_info=described(mapping))
        self.assertEqual(written, self.read(server))
        self.destroy(server, described(mapping))

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

    # -- what cannot be -----------------------------------------------------

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
        # Not what the host's cache holds for the other one.
        self.assertEqual(written, self.read(servers[1]))
        self.detach(servers[0], shared[0])
        self.assertFalse(self.has(servers[0]))
        self.assertEqual(written, self.read(servers[1]))
        mapping = Mapping(volume)
        mapping['connection_info'] = shared[1]
        self.destroy(servers[1], described(mapping))
        self.assertEqual(set(), self.storage.left_on_host())

    def test_let_go_by_another_server_during_a_start(self) -> None:
        """The host may have another volume there by the time it starts."""
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
        mapping = Mapping(volume)
        mapping['connection_info']['multiattach'] = True
        # Nova is told when the host is connected, before LXD is.
        mapping.save = lambda: self.detach(second, shared[1])
        self.assertRaisesRegex(
            exception.VolumeAttachFailed, 'released',
            self.host.driver.power_on, self.host.context, first, [],
            described(mapping))
        mapping.save = lambda: None
        self.host.driver.power_on(self.host.context, first, [],
                                  described(mapping))
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

    def test_lxd_fails(self) -> None:
        """LXD refuses to take a volume, or does and nobody hears of it."""
        server = self.host.spawn()
        first = self.attach(server, self.storage.volume())
        volume = self.storage.volume()
        for how in faulty_proxy.Spoil:
            self.proxy.spoil(0, how)
            self.assertRaises(exception.NovaException, self.attach, server,
                              volume, '/dev/vdc')
            self.proxy.behave()
            self.assertEqual(1, len(self.devices(server)), how)
            connection = self.attach(server, volume, '/dev/vdc')
            written = self.write(server, '/dev/vdc')
            self.proxy.spoil(0, how)
            self.assertRaises(exception.NovaException, self.detach, server,
                              connection, '/dev/vdc')
            self.proxy.behave()
            self.detach(server, connection, '/dev/vdc')
            self.assertEqual(written, volume.checksum(2 * units.Mi))
        self.detach(server, first)
        self.assertEqual(set(), self.storage.left_on_host())

    def test_lxd_has_crashed_while_it_attached(self) -> None:
        server = self.host.spawn()
        volume = self.storage.volume()
        connection = self.attach(server, volume)
        directory = self.host.lxd.directory
        if directory is None:
            self.skipTest('It reads the directory of an LXD of its own')
        [node] = (directory / 'devices').glob(f'*/*{volume.id[-12:]}*')
        number = os.stat(node).st_rdev
        self.detach(server, connection)
        self.assertFalse(node.exists())
        os.mknod(node, stat.S_IFBLK | 0o600, number)
        connection = self.attach(server, volume)
        written = self.write(server)
        self.assertEqual(written, self.read(server))
        self.detach(server, connection)
        self.assertFalse(node.exists())
        os.mknod(node, stat.S_IFBLK | 0o600, number)
        self.detach(server, volume.connection())
        self.assertFalse(node.exists())
        # It is back when the driver asks what has become of it.
        os.mknod(node, stat.S_IFBLK | 0o600, number)
        self.proxy.spoil(0, faulty_proxy.Spoil.LOSE_REQUEST)
        self.assertRaises(exception.NovaException, self.attach, server,
                          volume)
        self.proxy.behave()
        self.assertFalse(node.exists())
        self.assertEqual(set(), self.storage.left_on_host())

    def test_lxd_is_gone_for_good(self) -> None:
        """Nova is told that a server has no volume, which it has in truth."""
        first, second = self.host.spawn(), self.host.spawn()
        volume = self.storage.volume()
        self.proxy.refuse_from('PATCH', faulty_proxy.Spoil.LOSE_ANSWER)
        self.assertRaises(exception.NovaException, self.attach, first, volume)
        self.proxy.behave()
        self.assertEqual(1, len(self.devices(first)))
        self.hold_open(first)
        with self.assertRaisesRegex(exception.VolumeAttachFailed,
                                    f'{first.uuid}.*may have it'):
            self.attach(second, volume)
        self.assertEqual(1, len(self.devices(first)))
        self.release(first)
        connection = self.attach(second, volume)
        self.assertEqual({}, self.devices(first))
        self.assertFalse(self.has(first))
        written = self.write(second)
        self.detach(second, connection)
        self.assertEqual(written, volume.checksum(2 * units.Mi))
        self.assertEqual(set(), self.storage.left_on_host())

    def test_nova_compute_is_killed_while_it_attaches(self) -> None:
        """Nova knows nothing of the connection, so it is removed at start."""
        server = self.host.spawn()
        kept = self.attach(server, self.storage.volume())
        written = self.write(server)
        attached = self.storage.left_on_host()
        volume = self.storage.volume()

        def attach_and_hang() -> None:
            with fixtures.MonkeyPatch(
                    'nova_lxd_py.virt.volume.attachment.add_device',
                    lambda *args: time.sleep(60)):
                self.host.make_driver().attach_volume(
                    self.host.context, volume.connection(), server,
                    '/dev/vdc')
        self.assertTrue(killed_process.run(
            attach_and_hang, lambda: self.is_connected(volume)))
        self.host.restart_driver()
        self.assertEqual(attached, self.storage.left_on_host())
        self.assertEqual(written, self.read(server))
        self.detach(server, kept)
        self.detach(server, self.attach(server, volume))

    def is_connected(self, volume: lab_volumes.Volume) -> bool:
        """Whether the host has something of the connection that it makes."""
        return volume.kind == 'local' or volume.id in str(
            self.storage.left_on_host())

    def test_build_that_cannot_be_undone(self) -> None:
        """The server runs on, and so do its volumes."""
        mapping = Mapping(self.storage.volume())
        server = self.host.instance(self.host.image())
        with fixtures.MonkeyPatch(
                'nova_lxd_py.virt.guest.guest.Guest.delete', _fail), \
            fixtures.MonkeyPatch(
                'nova_lxd_py.virt.guest.password.AdminPassword.give', _fail):
            self.assertRaises(exception.NovaException, self.host.spawn,
                              server, block_device_info=described(mapping))
        written = self.write(server)
        self.assertEqual(written, self.read(server))
        self.assertIn('stays connected after a failed build', self.log.output)
        self.host.driver._services.volume_reconciler.run()
        self.assertEqual(written, self.read(server))
        # Nova does so later ([DEFAULT] running_deleted_instance_action).
        self.destroy(server, described(mapping))
        self.assertEqual(set(), self.storage.left_on_host())

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
class MappedVolumeTest(unittest.TestCase):
    """Processes that have not opened what they use."""

    def setUp(self) -> None:
        super().setUp()
        self.storage = lab_volumes.Storage(lab_volumes.LocalVolume)
        self.storage.setUp()
        self.addCleanup(self.storage.cleanUp)

    def container(self, path: str) -> int:
        """Start processes with process ids of their own, the second of which
        has mapped a file.

        :returns: process id of the first.
        """
        outer = subprocess.Popen(
            ['unshare', '--pid', '--fork', '--kill-child', sys.executable,
             '-c', MAPPING, path], stdout=subprocess.PIPE, text=True)
        assert outer.stdout is not None
        self.addCleanup(outer.stdout.close)
        self.addCleanup(outer.wait)
        self.addCleanup(outer.kill)
        self.assertEqual('ready\n', outer.stdout.readline())
        children = pathlib.Path(f'/proc/{outer.pid}/task/{outer.pid}/children')
        return int(children.read_text())

    def test_mapped(self) -> None:
        device = os.path.realpath(self.storage.volume().data()['device_path'])
        number = os.stat(device).st_rdev
        init = self.container(device)
        using = fuser.find_users(init, number, 0)
        self.assertEqual(1, len(using))
        self.assertNotIn(init, using)
        self.assertEqual([], fuser.find_users(init, number + 1, 0))


@unittest.skipIf(NO_LXD, NO_LXD or '')
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
        """What a stale connection of the host leads to."""
        first, second = self.host.spawn(), self.host.spawn()
        one, other = self.storage.volume(), self.storage.volume()
        connection = self.attach(first, one)
        self.assertRaisesRegex(
            exception.VolumeAttachFailed, 'for another volume', self.attach,
            second, other, device_path=one.device)
        self.assertEqual({}, self.devices(second))
        self.detach(first, connection)

    def test_device_of_another_volume_after_a_reboot_of_the_host(self) -> None:
        """What a stopped server had is another volume's by now."""
        first, second = self.host.spawn(), self.host.spawn()
        one, other = self.storage.volume(), self.storage.volume()
        mine = self.attach(first, one)
        self.host.driver.power_off(first)
        lab_volumes.reboot_host(self.host)
        self.host.restart_driver()
        connection = self.attach(second, other, device_path=one.device)
        written = self.write(second)
        # Its own has another device now.
        mapping = Mapping(one)
        mapping['connection_info']['data']['device_path'] = other.device
        self.host.driver.power_on(self.host.context, first, [],
                                  described(mapping))
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
        """Whose the loop device would be next, nobody knows."""
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
            self.host.context, server, [], [], described(Mapping(volume)))
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
        # What a guest writes changes nothing of the format.
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
