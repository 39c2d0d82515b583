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

"""Migrations that wait for their turn, and those that make no progress."""

from __future__ import annotations

import itertools
import threading
import time
import types

import fixtures
from nova.compute import power_state
from nova import exception

from tests.fixtures import concurrent_calls
from tests.fixtures import driver_host
from tests.fixtures.fake_lxd import server as fake_server
from tests.fixtures import two_hosts_case


class SlotsTest(two_hosts_case.TwoHostsTestCase):
    """Only so many servers move at the same time."""

    options = {**two_hosts_case.TwoHostsTestCase.options,
               'max_concurrent_migrations': 1}

    def setUp(self) -> None:
        super().setUp()
        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.server.outgoing._TURN_POLL', 0.05))
        self.log = self.useFixture(fixtures.FakeLogger(level='INFO'))
        self.ports = []

    def test_source(self) -> None:
        servers = [self.make(), self.make(), self.make()]
        self.other_lxd.daemon.transfer_time = 0.5
        self.lxd.clear_requests()
        moves = [self.move(server) for server in servers]
        failed = concurrent_calls.run_all([move.send for move in moves])
        self.assertEqual([None] * 3, failed)
        self.assertEqual(2, self.log.output.count(
            'this host sends as many'))
        # Stops and transfers of one server before those of the next.
        order = [entry for entry in self.lxd.requests
                 if entry.method == 'PUT' and entry.path.endswith('/state') or
                 entry.method == 'POST' and entry.path.rpartition('/')[2] in {
                     server.name for server in servers}]
        names = [entry.path.split('/')[3] for entry in order]
        self.assertEqual(3, len(list(itertools.groupby(names))), names)

    def test_destination(self) -> None:
        server = self.make()
        move = self.move(server)
        slots = self.other.driver._services.peer_server._receiver._slots
        self.assertTrue(slots.take(move.record.id + 1000))
        sending = threading.Thread(target=move.send)
        sending.start()
        self.lxd.wait_for(lambda: 'Waiting to go' in self.log.output)
        time.sleep(0.2)
        self.assert_state(power_state.RUNNING, server)
        self.assertEqual({}, self.other.own())
        slots.release(move.record.id + 1000)
        sending.join()
        move.finish()
        self.assertEqual(power_state.RUNNING, self.other.state(server))
        # The slot is free again.
        self.assertTrue(slots.take(move.record.id + 1000))

    def test_failures_free_slots(self) -> None:
        server = self.make()
        for _attempt in range(2):
            fault = self.other_lxd.fail_operation('POST', '/1.0/instances',
                                                  times=2)
            self.assertRaises(exception.InstanceFaultRollback,
                              self.move(server).send)
            self.assertEqual(2, fault.hits)
            self.assert_here(server)
        self.move(server).whole()


class StallTest(two_hosts_case.TwoHostsTestCase):
    """A source that sends nothing is given up."""

    options = {**two_hosts_case.TwoHostsTestCase.options,
               'migration_progress_timeout': 1}

    def test_stalled(self) -> None:
        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.server.outgoing._POLL', 0.05))
        server = self.make()
        finished = threading.Event()
        self.addCleanup(finished.set)
        self.useFixture(fixtures.MonkeyPatch(
            'tests.fixtures.fake_lxd.migration.time',
            types.SimpleNamespace(sleep=lambda seconds: finished.wait(60))))
        self.refused(server, 'transfer of the root disk made no progress')
        self.assert_state(power_state.RUNNING, server)
        # The destination cannot stop its LXD.
        self.lxd.clear_requests()
        self.refused(server, 'has not finished an earlier transfer')
        self.assertEqual(0, self.lxd.count('PUT', '/1.0/instances/*/state'))
        finished.set()
        slots = self.other.driver._services.peer_server._receiver._slots
        self.other_lxd.wait_for(lambda: not slots.is_busy_with(server), 20)
        self.other_lxd.wait_for(lambda: not self.other.own(), 20)
        # A busy machine may take longer than that for a whole transfer.
        driver_host.CONF.set_override('migration_progress_timeout', 60, 'lxd')
        self.move(server).whole()
        self.assertEqual(power_state.RUNNING, self.other.state(server))

    def test_frozen_meanwhile(self) -> None:
        """As LXD does at the end of the copy of a running guest."""
        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.server.outgoing._POLL', 0.05))
        for lxd in (self.lxd, self.other_lxd):
            lxd.daemon.store.pools['default'].driver = 'dir'
        server = self.make()
        finished = threading.Event()
        self.addCleanup(finished.set)

        def hang(seconds: float) -> None:
            self.lxd.api.must(
                'PUT', f'/1.0/instances/{server.name}/state',
                {'action': 'freeze'}, params={'project': self.host.project})
            finished.wait(60)

        self.useFixture(fixtures.MonkeyPatch(
            'tests.fixtures.fake_lxd.migration.time',
            types.SimpleNamespace(sleep=hang)))
        self.refused(server, 'made no progress')
        self.assert_state(power_state.RUNNING, server)

    def test_slow(self) -> None:
        """As long as something comes, it is not given up."""
        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.server.outgoing._POLL', 0.05))
        server = self.make()
        numbers = itertools.count()
        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.lxd.migration.sent',
            lambda operation: (0, f'c1: {next(numbers)}MB')))
        # Longer than the timeout.
        self.other_lxd.daemon.transfer_time = 1.5
        self.move(server).whole()
        self.assertEqual(power_state.RUNNING, self.other.state(server))

    def test_source_restarts_meanwhile(self) -> None:
        """What has come until then is not taken for the whole."""
        log = self.useFixture(fixtures.FakeLogger(level='INFO'))
        server = self.make()
        environment = fake_server._ENVIRONMENT
        self.addCleanup(environment.update, server_pid=4711)
        self.useFixture(fixtures.MonkeyPatch(
            'tests.fixtures.fake_lxd.migration.time', types.SimpleNamespace(
                sleep=lambda seconds: environment.update(server_pid=4712))))
        self.move(server).whole()
        self.assertIn('LXD restarted during the transfer of the root disk',
                      log.output)
        self.assertEqual(power_state.RUNNING, self.other.state(server))
