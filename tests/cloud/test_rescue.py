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
"""Rescue through the real API."""

from __future__ import annotations

from typing import Any

from tests.fixtures import cloud
from tests.fixtures import turns


class RescueTest(cloud.CloudTestCase):

    together = 6

    def execute(self, server: Any, script: str, suffix: str = '') -> str:
        """Run a shell script in a server's container, or the rescue one."""
        return self.host.execute(self.host.name_of(server.id) + suffix,
                                 script).strip()

    def rescue(self, server: Any, **arguments: Any) -> None:
        self.cloud.compute.rescue_server(server.id, **arguments)
        self.wait_status(server.id, 'RESCUE', cloud.BOOT_TIMEOUT)

    def unrescue(self, server: Any) -> None:
        self.cloud.compute.unrescue_server(server.id)
        self.wait_status(server.id, 'ACTIVE')

    def test_there_and_back_twice(self) -> None:
        server = self.boot()
        address = self.floating_ip(server.id)
        self.wait_answer(address)
        self.execute(server, 'echo mine > /root/mine; chown 7:8 /root/mine')
        for turn in ('first', 'second'):
            self.rescue(server)
            self.wait_answer(address)
            self.assertEqual('mine', self.execute(
                server, 'cat /mnt/rescue/root/mine', '-rescue'))
            self.assertEqual('7 8', self.execute(
                server, "stat -c '%u %g' /mnt/rescue/root/mine", '-rescue'))
            self.execute(server, f'echo {turn} > /mnt/rescue/root/{turn}',
                         '-rescue')
            self.unrescue(server)
            self.wait_answer(address)
            self.assertEqual(turn, self.execute(server, f'cat /root/{turn}'))
            self.assertEqual(1, len(self.host.instances_of(server.id)))

    def test_given_image(self) -> None:
        server = self.boot()
        image = self.cloud.image.find_image(cloud.distribution())
        self.rescue(server, image_ref=image.id)
        self.assertIn(f'ID={cloud.distribution()}', self.execute(
            server, 'cat /etc/os-release', '-rescue'))
        self.unrescue(server)
        self.assertNotIn(f'ID={cloud.distribution()}', self.execute(
            server, 'cat /etc/os-release || true'))

    def test_console_while_rescued(self) -> None:
        server = self.boot()
        self.rescue(server)
        # Nova's API does not reboot a rescued server, but its guest can.
        self.assertIn('output', self.cloud.compute.get_server_console_output(
            server.id))
        self.execute(server, 'ls /mnt/rescue/etc', '-rescue')
        self.unrescue(server)

    def test_stopped_server(self) -> None:
        server = self.boot()
        self.cloud.compute.stop_server(server.id)
        self.wait_status(server.id, 'SHUTOFF')
        self.rescue(server)
        self.unrescue(server)

    def test_delete_while_rescued(self) -> None:
        server = self.boot()
        ports = [port.id for port in self.ports(server.id)]
        self.rescue(server)
        self.delete(server.id)
        self.assert_gone(server.id, ports)

    @turns.alone
    def test_restart_of_nova_compute_while_rescued(self) -> None:
        server = self.boot()
        self.rescue(server)
        cloud.quickstart('restart', 'nova-compute')
        self.assertEqual(2, len(self.host.instances_of(server.id)))
        self.unrescue(server)
        self.assertEqual(1, len(self.host.instances_of(server.id)))
