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

"""Stop, start and reboot, by Nova's API and by the guest."""

from __future__ import annotations

from typing import Any

from tests.fixtures import cloud

# Seconds in which a guest's own poweroff has to show. Nova's API learns of it
# by an event, not by the periodic task (ten minutes).
NOTICE_TIMEOUT = 20


class PowerTest(cloud.CloudTestCase):

    together = 6

    def setUp(self) -> None:
        super().setUp()
        self.server = self.boot()
        self.address = self.floating_ip(self.server.id)
        self.guest('touch /kept')

    def guest(self, command: str) -> str:
        return self.ssh(self.address, command, user='root')

    def boot_id(self) -> str:
        """Return a string that changes with each boot of the guest."""
        name = self.host.name_of(self.server.id)
        state = self.host.query(
            f'/1.0/instances/{name}/state?project={cloud.LXD_PROJECT}')
        return str(state['pid'])

    def lxd_status(self) -> str:
        return self.host.instances_of(self.server.id)[0]['status']

    def wait(self, status: str, timeout: float = cloud.ACTION_TIMEOUT) -> Any:
        return self.wait_status(self.server.id, status, timeout)

    def works(self) -> None:
        self.guest('ls /kept')
        self.guest('timeout 5 wget -q -O /dev/null http://169.254.169.254/')

    def test_stop_and_start(self) -> None:
        self.cloud.compute.stop_server(self.server)
        self.wait('SHUTOFF', 90)
        self.assertEqual('Stopped', self.lxd_status())
        self.assertFalse(self.answers(self.address))
        self.cloud.compute.start_server(self.server)
        self.wait('ACTIVE')
        self.works()

    def test_soft_reboot(self) -> None:
        before = self.boot_id()
        self.cloud.compute.reboot_server(self.server, 'SOFT')
        self.wait_reboot(before, 150)
        self.works()

    def test_hard_reboot(self) -> None:
        before = self.boot_id()
        self.cloud.compute.reboot_server(self.server, 'HARD')
        self.wait_reboot(before, cloud.ACTION_TIMEOUT)
        self.works()

    def wait_reboot(self, before: str, timeout: float) -> None:
        cloud.wait_for('a new first process',
                       lambda: self.boot_id() not in (before, '0'), timeout)
        self.wait('ACTIVE', timeout)

    def test_guests_own_poweroff(self) -> None:
        self.try_ssh(self.address, 'poweroff', 'root', timeout=10)
        server = self.wait('SHUTOFF', NOTICE_TIMEOUT)
        self.assertEqual(4, server.power_state)
        self.cloud.compute.start_server(self.server)
        self.wait('ACTIVE')
        self.works()

    def test_guests_own_reboot(self) -> None:
        before = self.boot_id()
        seen = set()

        def rebooted() -> bool:
            seen.add(self.cloud.compute.get_server(self.server.id).status)
            return self.boot_id() not in (before, '0')

        self.try_ssh(self.address, 'reboot', 'root', timeout=10)
        cloud.wait_for('the reboot', rebooted, cloud.ACTION_TIMEOUT)
        self.works()
        seen.add(self.cloud.compute.get_server(self.server.id).status)
        self.assertEqual({'ACTIVE'}, seen)

    def test_pause_and_suspend(self) -> None:
        compute = self.cloud.compute
        self.admin.compute.pause_server(self.server)
        self.wait('PAUSED')
        self.assertEqual('Frozen', self.lxd_status())
        self.admin.compute.unpause_server(self.server)
        self.wait('ACTIVE')
        self.works()
        compute.suspend_server(self.server)
        self.wait('SUSPENDED')
        compute.resume_server(self.server)
        self.wait('ACTIVE')
        self.works()
