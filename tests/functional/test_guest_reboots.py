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

"""Guests that reboot by themselves, many at once, on a real LXD."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any
import unittest

from nova.compute import power_state
from nova.virt import event as virt_event

from tests.fixtures import driver_host
from tests.fixtures import lxd_daemon

NO_LXD = lxd_daemon.missing()

GUESTS = 20


@unittest.skipIf(NO_LXD, NO_LXD or '')
class GuestRebootsTest(unittest.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.host = driver_host.DriverHost()
        self.host.setUp()
        self.addCleanup(self.host.cleanUp)

    def started(self) -> dict[str, Any]:
        """Return the process IDs of the init processes by instance."""
        api, found = self.host.lxd.api, {}
        for server in self.servers:
            state = api.must('GET', f'/1.0/instances/{server.name}/state',
                             params={'project': self.host.project})
            if state['status'] == 'Running':
                found[server.name] = state['pid']
        return found

    def reboot(self, server: Any) -> None:
        # The command may be killed before it returns.
        with contextlib.suppress(AssertionError):
            self.host.run(server, 'reboot')

    def test_all_run_again_and_none_is_reported_as_stopped(self) -> None:
        image = self.host.image()
        self.servers = [self.host.spawn(self.host.instance(image), image)
                        for _number in range(GUESTS)]
        self.host.record(*self.servers)
        for server in self.servers:
            self.host.wait_for_init(server)
        before = self.started()
        self.assertEqual(GUESTS, len(before))
        del self.host.events[:]
        threads = [threading.Thread(target=self.reboot, args=(server,))
                   for server in self.servers]
        start = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        while True:
            now = self.started()
            if len(now) == GUESTS and not set(
                    now.values()) & set(before.values()):
                break
            self.assertLess(time.monotonic() - start, 300, now)
            time.sleep(1)
        # Until the last delayed event has been sent.
        time.sleep(self.host.driver._services.session.options
                   .guest_shutdown_delay + 1)
        stopped = [event for event in self.host.events if event.transition ==
                   virt_event.EVENT_LIFECYCLE_STOPPED]
        self.assertEqual([], stopped)
        for server in self.servers:
            self.assertEqual(power_state.RUNNING, self.host.state(server))
