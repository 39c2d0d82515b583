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
"""Many servers at once, with a real LXD."""

from __future__ import annotations

from concurrent import futures
import functools
import time
from typing import Any
import unittest

from nova import objects

from tests.fixtures import busybox_image
from tests.fixtures import concurrent_calls
from tests.fixtures import driver_host
from tests.fixtures import lxd_daemon

NO_LXD = lxd_daemon.missing()


@unittest.skipIf(NO_LXD, NO_LXD or '')
class BurstTest(unittest.TestCase):

    def setUp(self) -> None:
        daemon = lxd_daemon.LXDDaemon()
        daemon.setUp()
        self.addCleanup(daemon.cleanUp)
        self.daemon = daemon.lxd
        self.host = driver_host.DriverHost(self.daemon)
        self.host.setUp()
        self.addCleanup(self.host.cleanUp)
        self.image = self.host.image(busybox_image.unified())

    def servers(self, count: int) -> list[objects.Instance]:
        """Build servers, as many at a time as Nova does."""
        servers = [self.host.instance(self.image, memory_mb=32)
                   for _number in range(count)]
        with futures.ThreadPoolExecutor(10) as pool:
            return list(pool.map(
                lambda server: self.host.spawn(server, self.image), servers))

    def delete_all(self, servers: list[objects.Instance]) -> list[Any]:
        """Delete all servers at once, as Nova does.

        :returns: what each deletion has raised, or None.
        """
        return concurrent_calls.run_all([
            functools.partial(self.host.driver.destroy, self.host.context,
                              server, []) for server in servers])

    def assert_gone(self) -> None:
        self.assertEqual({}, self.host.own())
        self.assertEqual([], self.host.driver.list_instances())

    def test_sixty_deletions(self) -> None:
        self.assertEqual([None] * 60, self.delete_all(self.servers(60)))
        self.assert_gone()

    def test_restart_of_lxd_meanwhile(self) -> None:
        servers = self.servers(20)

        def restart() -> None:
            # Once the first guest has been stopped: LXD is deleting it, and
            # stopping others.
            deadline = time.monotonic() + 60
            while [entry['status'] for entry in self.host.own().values()
                   ] == ['Running'] * len(servers):
                self.assertLess(time.monotonic(), deadline)
                time.sleep(0.01)
            self.daemon.kill()
            self.daemon.start()

        with futures.ThreadPoolExecutor(1) as pool:
            restarted = pool.submit(restart)
            failed = self.delete_all(servers)
            restarted.result()
        self.assertEqual([None] * len(servers), failed)
        self.assert_gone()
