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

"""Servers go on when the host's daemons start again."""

from __future__ import annotations

import os
import signal
import threading
import time

from tests.cloud import cloud

# Seconds without an answer that count as an interruption; a single attempt
# may be slow on a busy host.
LONGEST_SILENCE = 5


class Watch:
    """Asks a guest all the time, for the longest silence."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.silence = 0.0

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        heard = time.monotonic()
        while True:
            last = self._stop.is_set()
            if cloud.CloudTestCase.answers(self._address):
                heard = time.monotonic()
            self.silence = max(self.silence, time.monotonic() - heard)
            if last:
                return
            self._stop.wait(0.2)


class RestartTest(cloud.CloudTestCase):

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
        """States are right, and all that users do still works."""
        compute = self.cloud.compute
        self.assertEqual(
            'ACTIVE', compute.get_server(self.running.id).status)
        self.assertEqual(
            'SHUTOFF', compute.get_server(self.stopped.id).status)
        compute.start_server(self.stopped)
        self.wait_status(self.stopped.id, 'ACTIVE', 90)
        self.ssh(self.address, f'ping -c 3 -W 3 {self.fixed_ip(self.stopped)}',
                 user='root')
        # Events are heard again.
        self.try_ssh(self.address, 'poweroff', 'root', timeout=10)
        self.wait_status(self.running.id, 'SHUTOFF', 30)
        for server_id, ports in self.ports_of.items():
            self.delete(server_id)
            self.assert_gone(server_id, ports)

    def test_nova_compute(self) -> None:
        before = self.pid()
        with Watch(self.address) as watch:
            cloud.quickstart('restart', 'nova-compute')
            # Time for what it does at its start; orders wait for it anyway.
            time.sleep(10)
        self.assertEqual(before, self.pid())
        self.assertLess(watch.silence, LONGEST_SILENCE)
        self.check_afterwards()

    def test_lxd(self) -> None:
        self._test_lxd(signal.SIGTERM)

    def test_lxd_killed(self) -> None:
        self._test_lxd(signal.SIGKILL)

    def _test_lxd(self, how: signal.Signals) -> None:
        before = self.pid()
        daemon = int((cloud.PREFIX / 'run' / 'lxd.pid').read_text().split()[0])
        with Watch(self.address) as watch:
            if how == signal.SIGKILL:
                os.kill(daemon, how)
            cloud.quickstart('restart', 'lxd')
            time.sleep(8)
        self.assertEqual(before, self.pid())
        self.assertLess(watch.silence, LONGEST_SILENCE)
        self.check_afterwards()
