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

"""Migrations between two real LXD daemons that are many, slow or cut off."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import signal
import subprocess
import threading
import time
import unittest

from nova.compute import power_state
from nova import exception
from nova import objects

from tests.fixtures import concurrent_calls
from tests.fixtures import disks
from tests.functional import test_migrate

CONF = test_migrate.CONF
NO_LXD = test_migrate.NO_LXD

#: ``[lxd] migration_progress_timeout``, in seconds.
PROGRESS_TIMEOUT = 10


class LimitsCase(test_migrate.MigrateTestCase):

    def during_copy(self, server: objects.Instance,
                    action: Callable[[], None]) -> threading.Thread:
        """Do something as soon as the other LXD receives the large file of a
        server."""
        def wait_and_act() -> None:
            deadline = time.monotonic() + 60
            while (not self.receives(server) and
                   time.monotonic() < deadline):
                time.sleep(0.02)
            action()

        thread = threading.Thread(target=wait_and_act)
        thread.start()
        return thread

    def receives(self, server: objects.Instance) -> bool:
        """Whether rsync writes the large file on the other host."""
        with contextlib.suppress(FileNotFoundError):
            return any(path.stat().st_size for path in self.root(
                self.other, server).glob('.large.*'))
        return False

    def rules(self, action: str) -> None:
        """Add or delete rules that drop all packets of the transfers."""
        port = self.lxds[0].api.must('GET', '/1.0')['config'][
            'core.https_address'].rpartition(':')[2]
        for match in ('--dport', '--sport'):
            subprocess.run(
                ['iptables', '--wait', action, 'INPUT', '--in-interface',
                 'lo', '--protocol', 'tcp', match, port, '--jump', 'DROP'],
                check=True)

    def fails(self, server: objects.Instance) -> None:
        """Check that a server comes back to where it was."""
        self.assertRaises(exception.InstanceFaultRollback,
                          self.move(server).send)
        server.task_state = None
        self.host.wait_for_state(server, power_state.RUNNING)

    def moves_later(self, server: objects.Instance) -> None:
        """Check that the next attempt moves a server."""
        slots = self.other.driver._services.peer_server._receiver._slots
        deadline = time.monotonic() + 300
        while ((self.other.own() or slots.is_busy_with(server)) and
               time.monotonic() < deadline):
            time.sleep(0.2)
        self.limit_rate('')
        # The default, which suits a busy machine.
        CONF.clear_override('migration_progress_timeout', 'lxd')
        self.move(server).whole()
        self.assert_runs(self.other, server)


@unittest.skipIf(NO_LXD, NO_LXD or '')
class BtrfsTest(LimitsCase):
    pools = ('btrfs', 'btrfs')

    def test_ten_at_once(self) -> None:
        self.info = disks.described(ephemerals=[
            {'size': 1, 'device_name': '/dev/sdb', 'guest_format': None}])
        servers = [self.make(ephemeral_gb=1) for _number in range(10)]
        for server in servers:
            self.host.run(server, 'sh', '-c', f'echo {server.uuid} > '
                          '/mnt/file; sync')
        moves = [self.move(server) for server in servers]
        with self.assertLogs('nova_lxd_py.virt.server.outgoing') as logs:
            self.assertEqual([None] * 10, concurrent_calls.run_all(
                [move.whole for move in moves]))
        # [lxd] max_concurrent_migrations is 4.
        self.assertIn('Waiting to go to host', str(logs.output))
        self.assertEqual([], self.host.driver.list_instance_uuids())
        self.assertEqual({server.uuid for server in servers},
                         set(self.other.driver.list_instance_uuids()))
        for server, move in zip(servers, moves):
            self.assertEqual(f'{server.uuid}\n', self.other.run(
                server, 'cat', '/mnt/file'))
            move.confirm()
        self.assertEqual({}, self.host.own())
        self.assertEqual([], self.host.lxd_volumes())


@unittest.skipIf(NO_LXD, NO_LXD or '')
class DirTest(LimitsCase):
    pools = ('dir', 'dir')

    def setUp(self) -> None:
        CONF.set_override('migration_progress_timeout', PROGRESS_TIMEOUT,
                          'lxd')
        self.addCleanup(CONF.clear_override, 'migration_progress_timeout',
                        'lxd')
        super().setUp()

    def limit_rate(self, rate: str) -> None:
        self.lxds[0].api.must('PATCH', '/1.0/storage-pools/default', {
            'config': {'rsync.bwlimit': rate}})

    def make_slow(self) -> objects.Instance:
        """Make a server whose transfer takes twenty seconds."""
        server = self.make()
        self.host.run(server, 'sh', '-c', 'dd if=/dev/urandom of=/large '
                      'bs=1M count=60; sync')
        self.limit_rate('3MiB')
        self.addCleanup(self.limit_rate, '')
        return server

    def test_rate_limit(self) -> None:
        """A slow transfer is no standstill."""
        server = self.make_slow()
        began = time.monotonic()
        self.move(server).whole()
        self.assertGreater(time.monotonic() - began, PROGRESS_TIMEOUT + 5)
        self.assert_runs(self.other, server)

    def test_network_fails(self) -> None:
        """LXD itself notices that before the driver."""
        server = self.make_slow()
        with contextlib.ExitStack() as undo:
            def cut() -> None:
                self.rules('--insert')
                undo.callback(self.rules, '--delete')

            began = time.monotonic()
            cutting = self.during_copy(server, cut)
            try:
                self.fails(server)
            finally:
                cutting.join()
            self.assertLess(time.monotonic() - began, 150)
        self.moves_later(server)

    def test_source_hangs(self) -> None:
        """The connection is there, but nothing comes."""
        server = self.make_slow()

        with self.assertLogs('nova_lxd_py.virt.server.migrate') as logs:
            def hang() -> None:
                """Hang until the driver notices."""
                process = self.lxds[0]._process
                deadline = time.monotonic() + 240
                process.send_signal(signal.SIGSTOP)
                while ('made no progress' not in str(logs.output) and
                       time.monotonic() < deadline):
                    time.sleep(0.5)
                process.send_signal(signal.SIGCONT)

            hanging = self.during_copy(server, hang)
            try:
                self.fails(server)
            finally:
                hanging.join()
        self.assertIn('the transfer of the root disk made no progress for '
                      f'{PROGRESS_TIMEOUT} seconds', str(logs.output))
        self.moves_later(server)
