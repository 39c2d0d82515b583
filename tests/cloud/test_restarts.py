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

"""Servers keep running when the daemons of the host restart."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from typing import Any

from tests.fixtures import cloud


class Connection:
    """A connection to a guest on which it has to keep answering.

    As long as the connection works, the guest's port has not been replaced
    and its processes run. How long single answers take depends on the load of
    the host.
    """

    def __init__(self, address: str) -> None:
        self._address = address

    def __enter__(self) -> Connection:
        self._client = subprocess.Popen(
            ['ssh', '-i', str(cloud.PREFIX / 'keys' / 'id_ed25519'),
             '-o', 'BatchMode=yes', '-o', 'StrictHostKeyChecking=no',
             '-o', 'UserKnownHostsFile=/dev/null', '-o', 'LogLevel=ERROR',
             '-o', 'ServerAliveInterval=5', '-o', 'ServerAliveCountMax=12',
             f'root@{self._address}', 'cat'],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        return self

    def __exit__(self, *args: object) -> None:
        self._client.kill()
        self._client.communicate()

    def answers(self) -> bool:
        """Whether the guest still answers on the connection."""
        assert self._client.stdin and self._client.stdout
        try:
            self._client.stdin.write(b'x')
        except BrokenPipeError:
            return False
        return self._client.stdout.read(1) == b'x'


class RestartTest(cloud.CloudTestCase):

    alone = True

    def setUp(self) -> None:
        super().setUp()
        created = [self.create() for _ in range(2)]
        self.running, self.stopped = (self.wait_status(
            server.id, 'ACTIVE', cloud.BOOT_TIMEOUT) for server in created)
        self.cloud.compute.stop_server(self.stopped)
        self.address = self.floating_ip(self.running.id)
        self.ssh(self.address, 'true', user='root')
        self.wait_status(self.stopped.id, 'SHUTOFF', 90)
        self.ports_of = {
            server.id: [port.id for port in self.ports(server.id)]
            for server in created}

    def pid(self) -> int:
        name = self.host.name_of(self.running.id)
        return self.host.query(f'/1.0/instances/{name}/state'
                               f'?project={cloud.LXD_PROJECT}')['pid']

    def check_afterwards(self) -> None:
        """Check power states, and that operations still work."""
        compute = self.cloud.compute
        self.assertEqual(
            'ACTIVE', compute.get_server(self.running.id).status)
        self.assertEqual(
            'SHUTOFF', compute.get_server(self.stopped.id).status)
        compute.start_server(self.stopped)
        self.wait_status(self.stopped.id, 'ACTIVE', 90)
        # It is getting its address.
        ping = f'ping -c 3 -W 3 {self.fixed_ip(self.stopped)} || true'
        cloud.wait_for('all packets', lambda: '3 packets received' in self.ssh(
            self.address, ping, user='root'), 60)
        # The driver receives events again.
        self.try_ssh(self.address, 'poweroff', 'root', timeout=10)
        self.wait_status(self.running.id, 'SHUTOFF', 30)
        for server_id, ports in self.ports_of.items():
            self.delete(server_id)
            self.assert_gone(server_id, ports)

    def test_nova_compute(self) -> None:
        before = self.pid()
        with Connection(self.address) as connection:
            self.assertTrue(connection.answers())
            cloud.quickstart('restart', 'nova-compute')
            # Time for its start; requests wait for it anyway.
            time.sleep(10)
            self.assertTrue(connection.answers())
        self.assertEqual(before, self.pid())
        self.check_afterwards()

    def test_lxd(self) -> None:
        self._test_lxd(signal.SIGTERM)

    def test_lxd_killed(self) -> None:
        self._test_lxd(signal.SIGKILL)

    def _test_lxd(self, how: signal.Signals) -> None:
        before = self.pid()
        daemon = int((cloud.PREFIX / 'run' / 'lxd.pid').read_text().split()[0])
        with Connection(self.address) as connection:
            self.assertTrue(connection.answers())
            if how == signal.SIGKILL:
                os.kill(daemon, how)
            cloud.quickstart('restart', 'lxd')
            time.sleep(8)
            self.assertTrue(connection.answers())
        self.assertEqual(before, self.pid())
        self.check_afterwards()


class MiddleTest(cloud.CloudTestCase):
    """Restarts during an operation, after which nothing may be left."""

    alone = True

    def begin_boot(self) -> Any:
        server = self.create(cloud.distribution(), 'lxd.small')
        cloud.wait_for('its LXD instance', lambda: self.host.instances_of(
            server.id), cloud.BOOT_TIMEOUT, 0.02)
        return server

    def settled(self, server: Any) -> str:
        """Wait until the build has ended.

        :returns: the status of the server.
        """
        def over() -> Any:
            found = self.cloud.compute.get_server(server.id)
            return (found.status if found.task_state is None and
                    found.status in ('ACTIVE', 'ERROR') else None)
        return cloud.wait_for('its build to end', over, 180)

    def delete_for_good(self, server: Any) -> None:
        ports = [port.id for port in self.ports(server.id)]
        self.delete(server.id, timeout=120)
        self.assert_gone(server.id, ports)

    def test_nova_compute_while_it_boots(self) -> None:
        server = self.begin_boot()
        cloud.quickstart('restart', 'nova-compute')
        # Nova does not resume a build; the server goes to ERROR.
        self.settled(server)
        self.delete_for_good(server)

    def test_lxd_killed_while_it_boots(self) -> None:
        server = self.begin_boot()
        daemon = int((cloud.PREFIX / 'run' / 'lxd.pid').read_text().split()[0])
        os.kill(daemon, signal.SIGKILL)
        cloud.quickstart('restart', 'lxd')
        if self.settled(server) == 'ACTIVE':
            self.wait_answer(self.floating_ip(server.id))
        self.delete_for_good(server)
        # The host still works.
        self.boot()

    def test_nova_compute_while_it_is_deleted(self) -> None:
        server = self.boot()
        ports = [port.id for port in self.ports(server.id)]
        self.cloud.compute.delete_server(server.id)
        cloud.quickstart('restart', 'nova-compute')
        self.delete(server.id, timeout=120)
        self.assert_gone(server.id, ports)

    def test_nova_compute_while_it_stops(self) -> None:
        server = self.boot(cloud.distribution(), 'lxd.small')
        self.cloud.compute.stop_server(server.id)
        cloud.quickstart('restart', 'nova-compute')
        self.wait_status(server.id, 'SHUTOFF', 120)
        self.cloud.compute.start_server(server.id)
        self.wait_status(server.id, 'ACTIVE')

    def test_nova_compute_while_it_reboots(self) -> None:
        server = self.boot(cloud.distribution(), 'lxd.small')
        address = self.floating_ip(server.id)
        self.wait_answer(address)
        for kind in ('SOFT', 'HARD'):
            self.cloud.compute.reboot_server(server.id, kind)
            cloud.quickstart('restart', 'nova-compute')
            self.wait_status(server.id, 'ACTIVE', 120)
            self.wait_answer(address)
