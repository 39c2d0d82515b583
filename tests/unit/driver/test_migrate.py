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

"""Servers on their way to another host, through two drivers as Nova calls
them."""

from __future__ import annotations

from typing import Any

import fixtures
from nova.compute import power_state
from nova.compute import vm_states
from nova import exception
from nova import objects
import oslo_messaging as messaging

from nova_lxd_py.virt import peer
from nova_lxd_py.virt.privileged import rootfs
from tests.fixtures import disks
from tests.fixtures import driver_host
from tests.fixtures import fake_driver_host
from tests.fixtures import fake_lxd
from tests.fixtures import two_hosts

GIB = 1 << 30
CONF = driver_host.CONF


class TwoHostsTestCase(fake_driver_host.FakeDriverTestCase):
    """Two hosts in memory.

    :cvar pools: drivers of their storage pools.
    """

    pools = ('btrfs', 'btrfs')
    options: dict[str, Any] = {'migration_address': '192.0.2.1',
                               'volume_filesystems': ['ext4']}
    other_options: dict[str, Any] = {'migration_address': '192.0.2.2'}

    def setUp(self) -> None:
        # Before the drivers, which serve on it.
        self.bus = self.useFixture(two_hosts.Bus())
        CONF.set_override('rpc_response_timeout', 5)
        self.addCleanup(CONF.clear_override, 'rpc_response_timeout')
        super().setUp()
        self.lxd.daemon.store.pools['default'].driver = self.pools[0]
        self.other_lxd = self.useFixture(fake_lxd.FakeLXD(self.pools[1]))
        daemons = self.lxd.daemon, self.other_lxd.daemon
        for daemon, peer_ in (daemons, daemons[::-1]):
            daemon.network = [peer_]
            daemon.host_paths = daemons[0].host_paths
            daemon.host_interfaces = daemons[0].host_interfaces
            daemon.interface_moved = daemons[0].interface_moved
        self.other = self.useFixture(two_hosts.SecondHost(
            self.host, self.other_lxd, **self.other_options))
        self.info: dict[str, Any] | None = None
        self.ports = self.host.ports()

    def make(self, *, power_on: bool = True, **fields: Any
             ) -> objects.Instance:
        image = self.host.image()
        return self.host.spawn(
            self.host.instance(image, **fields), image, self.ports,
            block_device_info=self.info, power_on=power_on)

    def move(self, server: objects.Instance, **kwargs: Any) -> two_hosts.Move:
        return two_hosts.Move(self.bus, server, self.host, self.other,
                              ports=self.ports, info=self.info, **kwargs)

    def there(self, server: objects.Instance) -> Any:
        """Look at a server's LXD instance on the other host."""
        return self.other_lxd.instance(server.name, self.other.project)

    def write(self, server: objects.Instance, text: bytes) -> None:
        """Write a file in the guest."""
        self.lxd.api.must(
            'POST', f'/1.0/instances/{server.name}/files', text,
            params={'project': self.host.project, 'path': '/root/file'},
            headers={'X-LXD-type': 'file',
                     'Content-Type': 'application/octet-stream'})

    def read(self, host: driver_host.DriverHost, server: objects.Instance
             ) -> bytes:
        return host.lxd.api.must(
            'GET', f'/1.0/instances/{server.name}/files',
            params={'project': host.project, 'path': '/root/file'})

    def assert_here(self, server: objects.Instance) -> None:
        """Check that a server runs where it was, and is nowhere else."""
        self.assertEqual([server.uuid], self.driver.list_instance_uuids())
        self.assert_state(power_state.RUNNING, server)
        self.assertEqual([], self.other.driver.list_instance_uuids())
        # The other host is told so without waiting for it.
        self.other_lxd.wait_for(lambda: not self.other.own())
        self.other_lxd.wait_for(lambda: not self.other.lxd_volumes())

    def refused(self, server: objects.Instance, words: str, **kwargs: Any
                ) -> None:
        """Check that a server does not go, and why."""
        error = self.assertRaises(exception.InstanceFaultRollback,
                                  self.move(server, **kwargs).send)
        self.assertIn(words, str(error.inner_exception))

    def pulls(self) -> list[tuple[bool, str]]:
        """List what the other LXD has pulled: whether it was a refresh, and
        the state of the guest at the time."""
        return self._pulls

    def record_pulls(self, server: objects.Instance) -> None:
        self._pulls: list[tuple[bool, str]] = []

        def note(request: Any) -> None:
            if request.json()['name'] != server.name:
                return
            self._pulls.append((
                bool(request.json()['source'].get('refresh')),
                self.host.fake(server).status))

        self.other_lxd.before('POST', '/1.0/instances', note, times=None,
                              where={'type': 'container'})


class MigrateTest(TwoHostsTestCase):

    def test_there(self) -> None:
        server = self.make()
        self.write(server, b'precious')
        move = self.move(server)
        self.record_pulls(server)
        move.send()
        self.assertEqual([(False, 'Stopped')], self.pulls())
        # Neither counts before Nova has decided.
        for host in (self.host, self.other):
            self.assertEqual([], host.driver.list_instance_uuids())
            self.assertEqual(0, host.driver.get_num_instances())
            self.assertFalse(host.driver.instance_exists(server))
        move.finish()
        self.assertEqual([server.uuid],
                         self.other.driver.list_instance_uuids())
        self.assertEqual(power_state.RUNNING, self.other.state(server))
        self.assertEqual((0, 1), (self.driver.get_num_instances(),
                                  self.other.driver.get_num_instances()))
        self.assertEqual(b'precious', self.read(self.other, server))
        config = self.there(server).config
        self.assertEqual('server', config['user.nova.role'])
        self.assertNotIn('user.nova.migration', config)
        self.assertNotIn('user.nova.complete', config)
        self.assertEqual('moved', self.config(server)['user.nova.role'])
        self.ports = ()
        move.confirm()
        self.assertEqual({}, self.host.own())
        self.assertEqual(power_state.RUNNING, self.other.state(server))

    def test_keys_are_as_after_a_build(self) -> None:
        server = self.make()
        before = dict(self.config(server))
        self.move(server).whole()
        after = self.there(server).config
        self.assertEqual(
            {key: value for key, value in before.items()
             if not key.startswith(('volatile.', 'image.'))},
            {key: value for key, value in after.items()
             if not key.startswith('volatile.')})

    def test_back(self) -> None:
        server = self.make()
        self.write(server, b'before')
        move = self.move(server)
        move.whole()
        move.revert()
        self.assert_here(server)
        self.assertEqual(b'before', self.read(self.host, server))
        self.assertNotIn('user.nova.migration', self.config(server))

    def test_there_and_back_and_there_again(self) -> None:
        server = self.make()
        self.move(server).whole()
        two_hosts.Move(self.bus, server, self.host, self.other).confirm()
        back = two_hosts.Move(self.bus, server, self.other, self.host,
                              ports=self.ports)
        back.whole()
        self.assertEqual([server.uuid], self.driver.list_instance_uuids())
        # Its confirmation has been lost.
        again = self.move(server)
        again.whole()
        self.assertEqual([server.uuid],
                         self.other.driver.list_instance_uuids())

    def test_stopped(self) -> None:
        server = self.make(power_on=False)
        server.vm_state = vm_states.STOPPED
        move = self.move(server)
        move.whole(power_on=False)
        self.assertEqual(power_state.SHUTDOWN, self.other.state(server))
        move.revert(power_on=False)
        self.assert_state(power_state.SHUTDOWN, server)
        self.driver.power_on(self.context, server, self.ports)
        self.assert_state(power_state.RUNNING, server)

    def test_resize(self) -> None:
        server = self.make()
        bigger = self.host.instance(memory_mb=256, root_gb=2).flavor
        move = self.move(server, flavor=bigger)
        move.whole()
        self.assertEqual('256MiB', self.there(server).config['limits.memory'])
        self.assertEqual('2GiB', self.there(server).devices['root']['size'])
        move.revert()
        self.assertEqual('128MiB', self.config(server)['limits.memory'])
        self.assertEqual('1GiB', self.devices(server)['root']['size'])

    def test_smaller_disk(self) -> None:
        server = self.make(root_gb=2)
        self.refused(server, 'cannot be made smaller',
                     flavor=self.host.instance(root_gb=1).flavor)
        self.assert_here(server)

    def test_local_disks(self) -> None:
        self.info = disks.described(ephemerals=[
            {'size': 1, 'device_name': '/dev/sdb', 'guest_format': None}])
        server = self.make(config_drive='True', ephemeral_gb=1)
        pool = self.host.project, 'default'
        drive = f'config-drive-{server.uuid}'
        files = self.lxd.daemon.store.volumes[(*pool, drive)].files
        self.assertTrue(files)
        move = self.move(server)
        move.whole()
        names = {drive, f'ephemeral-{server.uuid}-0'}
        self.assertEqual(names, set(self.other.lxd_volumes()))
        self.assertLess(names, {
            device.get('source')
            for device in self.there(server).devices.values()} | {''})
        moved = self.other_lxd.daemon.store.volumes[
            self.other.project, 'default', drive]
        self.assertEqual(files, moved.files)
        self.assertEqual('1GiB', self.other_lxd.daemon.store.volumes[
            self.other.project, 'default', f'ephemeral-{server.uuid}-0'
        ].config['size'])
        self.ports = ()
        move.confirm()
        self.assertEqual([], self.host.lxd_volumes())
        self.assertEqual(names, set(self.other.lxd_volumes()))

    def test_ports(self) -> None:
        server = self.make()
        move = self.move(server)
        move.send()
        self.assertEqual(set(), self.network.names())
        self.assertEqual({}, self.network.ports)
        move.finish()
        self.assertEqual(1, len(self.network.ports))

    def test_volumes(self) -> None:
        volume = self.storage.volume()
        self.info = disks.described(disks.Mapping(volume))
        server = self.make()
        device = f'volume-{volume.id}'
        self.assertIn(device, self.devices(server))
        move = self.move(server)
        move.send()
        self.assertEqual(set(), self.storage.left())
        # Nova makes new connections.
        move.info = self.info = disks.described(disks.Mapping(volume))
        move.finish()
        self.assertIn(device, self.there(server).devices)
        self.assertNotIn(device, self.devices(server))
        move.info = disks.described(disks.Mapping(volume))
        move.revert()
        self.assert_here(server)
        self.assertIn(device, self.devices(server))

    def test_progress(self) -> None:
        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.server.outgoing._POLL', 0.05))
        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.server.outgoing._REPORT_INTERVAL', 0.1))
        log = self.useFixture(fixtures.FakeLogger())
        server = self.make()
        self.host.fake(server).usage['disk'] = 3000000
        self.other_lxd.daemon.transfer_time = 1.0
        self.move(server).send()
        self.assertEqual(50, server.progress)
        self.assertIn('Sending root disk to host otherhost: c1: 1.50MB',
                      log.output)

    def test_serial_port_stays(self) -> None:
        server = self.make()
        self.host.fake(server).config['user.nova.serial_port'] = '10000'
        self.move(server).whole()
        self.assertNotIn('user.nova.serial_port', self.there(server).config)

    def test_not_complete(self) -> None:
        server = self.make()
        move = self.move(server)
        move.send()
        del self.there(server).config['user.nova.complete']
        error = self.assertRaises(exception.MigrationError, move.finish)
        self.assertIn('completely', str(error))
        self.assertEqual('Stopped', self.there(server).status)

    def test_failed_start(self) -> None:
        """A hard reboot repairs it."""
        server = self.make()
        move = self.move(server)
        move.send()
        self.other_lxd.fail_operation(
            'PUT', '/1.0/instances/*/state', where={'action': 'start'})
        self.assertRaises(exception.NovaException, move.finish)
        server.vm_state, server.task_state = vm_states.ERROR, None
        self.other.driver.reboot(self.context, server, self.ports, 'HARD')
        self.assertEqual(power_state.RUNNING, self.other.state(server))

    def test_lost_on_the_way_to_the_destination(self) -> None:
        """Nova has given the server to the destination and no more."""
        server = self.make()
        self.move(server).send()
        self.other.driver.reboot(self.context, server, self.ports, 'HARD')
        self.assertEqual(power_state.RUNNING, self.other.state(server))
        self.assertEqual([server.uuid],
                         self.other.driver.list_instance_uuids())

    def test_lost_on_the_source(self) -> None:
        """Nova fails between the drivers."""
        server = self.make()
        self.move(server).send()
        self.driver.reboot(self.context, server, self.ports, 'HARD')
        self.assert_state(power_state.RUNNING, server)

    def test_incomplete_is_never_started(self) -> None:
        server = self.make()
        self.move(server).send()
        del self.there(server).config['user.nova.complete']
        self.assertRaises(
            exception.InstanceNotFound, self.other.driver.reboot,
            self.context, server, self.ports, 'HARD')
        self.assertEqual('Stopped', self.there(server).status)

    def test_restarted_before_anything_moved(self) -> None:
        server = self.make()
        move = self.move(server)
        self.host.restart_driver()
        self.driver.plug_vifs(server, self.ports)
        move.finish_revert()
        self.assert_here(server)

    def test_restarted_in_the_middle(self) -> None:
        """The process was killed before Nova had given the server away."""
        server = self.make()
        move = self.move(server)
        move.send()
        server.host = CONF.host
        self.host.restart_driver()
        move.finish_revert()
        self.assert_here(server)

    def test_deleted_while_resized(self) -> None:
        self.info = disks.described(ephemerals=[
            {'size': 1, 'device_name': '/dev/sdb', 'guest_format': None}])
        server = self.make(ephemeral_gb=1, config_drive='True')
        move = self.move(server)
        move.whole()
        self.driver.confirm_migration(self.context, move.record, server,
                                      self.ports)
        self.other.driver.destroy(self.context, server, self.ports, self.info)
        self.assert_nothing_left()
        self.assertEqual({}, self.other.own())
        self.assertEqual([], self.other.lxd_volumes())


class IncrementalTest(TwoHostsTestCase):
    pools = ('dir', 'dir')

    def test_copied_ahead(self) -> None:
        server = self.make()
        self.record_pulls(server)
        move = self.move(server)

        def changed(request: Any) -> None:
            self.write(server, b'late')

        self.lxd.before('PUT', '/1.0/instances/*/state', changed,
                        where={'action': 'stop'})
        move.whole()
        self.assertEqual([(False, 'Running'), (True, 'Stopped')],
                         self.pulls())
        self.assertEqual(b'late', self.read(self.other, server))

    def test_stopped_server_is_copied_once(self) -> None:
        server = self.make(power_on=False)
        self.record_pulls(server)
        self.move(server).whole(power_on=False)
        self.assertEqual([(False, 'Stopped')], self.pulls())

    def test_local_disks(self) -> None:
        server = self.make(config_drive='True')
        # What LXD says of a dir pool.
        self.lxd.fail_next('GET', '*/volumes/custom/*/state', 500,
                           'Not supported')
        self.move(server).whole()
        self.assertEqual([f'config-drive-{server.uuid}'],
                         self.other.lxd_volumes())


class OtherPoolTest(IncrementalTest):
    pools = ('btrfs', 'dir')


class BootFromVolumeTest(TwoHostsTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.volume = self.storage.volume(content='ext4')
        self.volume.disk.root = rootfs.READY
        self.info = self.described()

    def described(self) -> dict[str, Any]:
        return disks.described(disks.Mapping(
            self.volume, '/dev/sda', boot_index=0))

    def test_there_and_back(self) -> None:
        server = self.make()
        move = self.move(server)
        self.record_pulls(server)
        self.lxd.clear_requests()
        move.send()
        # No data goes from one LXD to the other.
        self.assertEqual([], [request for request in self.lxd.requests
                              if request.method == 'POST' and
                              (request.body or {}).get('migration')])
        self.assertEqual(set(), self.storage.left())
        move.info = self.described()
        move.finish()
        self.assertEqual(power_state.RUNNING, self.other.state(server))
        self.assertEqual(self.volume.id, self.there(server).config[
            'user.nova.root_volume'])
        self.assertNotIn('size', self.there(server).devices['root'])
        move.info = self.described()
        move.revert()
        self.assert_here(server)


class RefusalTest(TwoHostsTestCase):
    """The destination says no, and the server runs on."""

    def setUp(self) -> None:
        super().setUp()
        self.server = self.make()
        self.lxd.clear_requests()

    def tearDown(self) -> None:
        self.assertEqual(0, self.lxd.count('PUT', '/1.0/instances/*/state'))
        super().tearDown()

    def test_other_server(self) -> None:
        self.other_lxd.daemon.environment['server'] = 'incus'
        self.refused(self.server, 'this host runs incus, and not lxd')
        self.assert_here(self.server)

    def test_other_architecture(self) -> None:
        self.other_lxd.daemon.environment['architectures'] = ['aarch64']
        self.refused(self.server, 'cannot run x86_64')
        self.assert_here(self.server)

    def test_full(self) -> None:
        pool = self.other_lxd.daemon.store.pools['default']
        pool.used = pool.total - (100 << 20)
        self.refused(self.server, '100 MiB left')
        self.assert_here(self.server)

    def test_name_is_taken(self) -> None:
        self.other_lxd.api.must('POST', '/1.0/instances', {
            'name': self.server.name, 'source': {'type': 'none'},
            'devices': {'root': {'type': 'disk', 'path': '/',
                                 'pool': 'default'}}},
            params={'project': self.other.project})
        self.refused(self.server, f'the name {self.server.name}')
        self.assertIn(self.server.name, self.other.lxd_instances())

    def test_flavor(self) -> None:
        gpu = self.host.instance(extra_specs={'lxd:gpu': '10de:1db4'}).flavor
        self.refused(self.server, 'passthrough_devices', flavor=gpu)
        self.assert_here(self.server)

    def test_lxd_is_down(self) -> None:
        # The other host waits for it, for [lxd] request_timeout.
        CONF.set_override('rpc_response_timeout', 30)
        self.other_lxd.stop()
        self.refused(self.server, 'the log of nova-compute there has')
        self.assert_state(power_state.RUNNING, self.server)

    def test_driver_is_down(self) -> None:
        self.other.driver.cleanup_host(two_hosts.OTHER)
        CONF.set_override('rpc_response_timeout', 1)
        self.refused(self.server, f'host {two_hosts.OTHER} does not answer')
        self.assert_here(self.server)

    def test_other_version(self) -> None:
        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.peer.VERSION', '2.0'))
        self.refused(self.server, 'another version')
        self.assert_here(self.server)


class NoAddressTest(TwoHostsTestCase):
    """Without the option everything is as it was."""

    options: dict[str, Any] = {}
    other_options: dict[str, Any] = {'migration_address': None}

    def test_source(self) -> None:
        server = self.make()
        self.lxd.clear_requests()
        self.refused(server, 'migration_address is not set')
        self.assertEqual(0, self.lxd.count('PUT'))
        self.assert_here(server)

    def test_nothing_is_served(self) -> None:
        exchanges = messaging._drivers.impl_fake.FakeExchangeManager
        self.assertEqual([], [
            topic for exchange in exchanges._exchanges.values()
            for topic in exchange._server_queues if peer.TOPIC in topic])
        self.assertEqual({}, self.lxd.daemon.config)


class FaultTest(TwoHostsTestCase):
    """What fails on the way leaves the server on the source."""

    pools = ('dir', 'dir')

    def setUp(self) -> None:
        super().setUp()
        self.volume = self.storage.volume()
        self.info = disks.described(disks.Mapping(self.volume))
        self.server = self.make(config_drive='True')
        self.write(self.server, b'precious')

    def fails(self) -> None:
        self.assertRaises(exception.InstanceFaultRollback,
                          self.move(self.server).send)
        self.assert_here(self.server)
        self.assertEqual(b'precious', self.read(self.host, self.server))
        self.assertIn(f'volume-{self.volume.id}', self.devices(self.server))
        self.assertEqual(1, len(self.network.ports))
        self.assertNotIn('user.nova.migration', self.config(self.server))
        # And the next attempt works.
        self.move(self.server).send()

    def test_copy_ahead(self) -> None:
        fault = self.other_lxd.fail_operation('POST', '/1.0/instances',
                                              times=2)
        self.fails()
        self.assertEqual(2, fault.hits)

    def test_copy(self) -> None:
        seen = []

        def cut(request: Any) -> None:
            seen.append(request)
            if len(seen) == 2:
                # LXD has nobody to connect to any more.
                self.lxd.daemon.config['core.https_address'] = ''

        fault = self.other_lxd.before('POST', '/1.0/instances', cut,
                                      times=None)
        self.assertRaises(exception.InstanceFaultRollback,
                          self.move(self.server).send)
        fault.release()
        self.lxd.daemon.config['core.https_address'] = '192.0.2.1:8443'
        self.assert_here(self.server)
        self.move(self.server).send()

    def test_config_drive(self) -> None:
        self.other_lxd.fail_operation(
            'POST', '/1.0/storage-pools/*/volumes/custom', times=2)
        self.fails()

    def test_offer(self) -> None:
        self.lxd.fail_next('POST', f'/1.0/instances/{self.server.name}')
        self.fails()

    def test_completion(self) -> None:
        self.other_lxd.fail_next(
            'GET', '/1.0/storage-pools/*/volumes/custom/config-drive-*',
            404, 'Storage volume not found')
        self.fails()

    def test_mark(self) -> None:
        """The key could not be written, after everything else was done."""
        self.lxd.fail_operation(
            'PUT', f'/1.0/instances/{self.server.name}', after=True,
            where={'description': ''}, times=None)
        # Writing the keys of the rollback fails as well: nothing is lost.
        self.assertRaises(exception.InstanceFaultRollback,
                          self.move(self.server).send)
        self.lxd.daemon.faults.clear()
        self.driver.reboot(self.context, self.server, self.ports, 'HARD',
                           self.info)
        self.assert_here(self.server)

    def test_certificate(self) -> None:
        """Another server has taken the source's address."""
        trusted = self.lxd.daemon.certificate
        self.lxd.daemon.certificate = 'of somebody else'
        self.assertRaises(exception.InstanceFaultRollback,
                          self.move(self.server).send)
        self.lxd.daemon.certificate = trusted
        self.assert_here(self.server)

    def test_second_attempt(self) -> None:
        """LXD waits for ten seconds only, and hosts are busy."""
        fault = self.other_lxd.fail_operation('POST', '/1.0/instances')
        self.move(self.server).send()
        self.assertEqual(1, fault.hits)

    def test_late_discard(self) -> None:
        """A message of an earlier attempt deletes nothing."""
        move = self.move(self.server)
        move.send()
        receiver = self.other.driver._services.peer_server._receiver
        receiver.discard(self.context, self.server, move.record.id - 1)
        self.assertIn(self.server.name, self.other.lxd_instances())
        receiver.discard(self.context, self.server, move.record.id)
        receiver.discard(self.context, self.server, move.record.id)
        self.assertEqual({}, self.other.own())

    def test_volume_of_somebody_else(self) -> None:
        """A peer with an error gets nothing overwritten."""
        self.move(self.server).send()
        name = 'config-drive-of-another-server'
        receiver = self.other.driver._services.peer_server._receiver
        error = self.assertRaises(
            exception.MigrationError, receiver.pull_volume, self.context,
            self.server, self.server.migration_context.migration_id,
            {'name': name, 'refresh': False, 'config': {}, 'source': {}})
        self.assertIn('no volume of the server', str(error))

    def test_repeated_and_late_calls(self) -> None:
        move = self.move(self.server)
        move.send()
        receiver = self.other.driver._services.peer_server._receiver
        volumes = [f'config-drive-{self.server.uuid}']
        receiver.complete(self.context, self.server, move.record.id, volumes)
        for late in (move.record.id - 1, move.record.id + 1):
            self.assertRaises(
                exception.MigrationError, receiver.complete, self.context,
                self.server, late, volumes)
        move.info = disks.described(disks.Mapping(self.volume))
        move.finish()
        # The server is in use by now.
        self.assertRaises(
            exception.MigrationError, receiver.complete, self.context,
            self.server, move.record.id, volumes)
        self.assertRaises(
            exception.MigrationError, receiver.pull_instance, self.context,
            self.server, self.server.flavor, move.record.id,
            {'source': None, 'refresh': False, 'root_volume': None,
             'root_size': '', 'architecture': 'x86_64'})
        receiver.discard(self.context, self.server, move.record.id)
        self.assertEqual(power_state.RUNNING, self.other.state(self.server))


class EvacuateTest(TwoHostsTestCase):
    """A host comes back after its servers have been built elsewhere."""

    def test_leftovers(self) -> None:
        self.info = disks.described(ephemerals=[
            {'size': 1, 'device_name': '/dev/sdb', 'guest_format': None}])
        server = self.make(config_drive='True', ephemeral_gb=1)
        bystander = self.make(config_drive='True')
        self.assertFalse(self.other.driver.instance_on_disk(server))
        self.assertFalse(self.other.driver.instance_exists(server))
        self.other.spawn(server, self.host.image(),
                         block_device_info=self.info)
        server.host = two_hosts.OTHER
        self.host.restart_driver()
        self.assertIn(server.uuid, self.driver.list_instance_uuids())
        self.driver.destroy(self.context, server, self.ports, self.info)
        self.assertEqual([bystander.name], list(self.host.own()))
        for host, kept in ((self.host, bystander), (self.other, server)):
            self.assertEqual({f'config-drive-{kept.uuid}',
                              f'ephemeral-{kept.uuid}-0'},
                             set(host.lxd_volumes()))
        self.assertEqual(power_state.RUNNING, self.other.state(server))

    def test_while_it_was_on_its_way(self) -> None:
        """The source has died after the copy, and before Nova knew."""
        server = self.make()
        self.move(server).send()
        self.other.spawn(server, self.host.image())
        self.assertEqual([server.uuid],
                         self.other.driver.list_instance_uuids())
        self.driver.destroy(self.context, server, self.ports, self.info)
        self.assertEqual({}, self.host.own())
