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

"""Migrations that are refused or fail, through the drivers as Nova calls
them."""

from __future__ import annotations

from typing import Any

import fixtures
from nova.compute import power_state
from nova import exception
import oslo_messaging as messaging

from nova_lxd_py.virt import peer
from tests.fixtures import disks
from tests.fixtures import driver_host
from tests.fixtures import two_hosts
from tests.fixtures import two_hosts_case

GIB = 1 << 30
CONF = driver_host.CONF


class RefusalTest(two_hosts_case.TwoHostsTestCase):
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
        self.other_lxd.stop()
        with self.host.no_pauses():
            self.refused(self.server, 'the log of nova-compute there has')
        self.assert_state(power_state.RUNNING, self.server)

    def test_driver_is_down(self) -> None:
        self.other.driver.cleanup_host(two_hosts.OTHER)
        CONF.set_override('rpc_response_timeout', 0)
        self.refused(self.server, f'host {two_hosts.OTHER} does not answer')
        self.assert_here(self.server)

    def test_other_version(self) -> None:
        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.peer.VERSION', '2.0'))
        self.refused(self.server, 'another version')
        self.assert_here(self.server)


class NoAddressTest(two_hosts_case.TwoHostsTestCase):
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


class FaultTest(two_hosts_case.TwoHostsTestCase):
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

    def test_failed_discard(self) -> None:
        move = self.move(self.server)
        move.send()
        log = self.useFixture(fixtures.FakeLogger())
        self.other_lxd.fail_next('DELETE', '/1.0/instances/*')
        receiver = self.other.driver._services.peer_server._receiver
        self.assertRaises(exception.MigrationError, receiver.discard,
                          self.context, self.server, move.record.id)
        self.assertIn('LXD could not discard the server', log.output)

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
