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

"""Diagnostics of a running server for administrators."""

from __future__ import annotations

from typing import Any

from tests.fixtures import cloud


class DiagnosticsTest(cloud.CloudTestCase):

    together = 2

    def setUp(self) -> None:
        super().setUp()
        self.server = self.boot()
        self.wait_answer(self.floating_ip(self.server.id))

    def ask(self, microversion: str) -> Any:
        return self.admin.compute.get(
            f'/servers/{self.server.id}/diagnostics',
            microversion=microversion)

    def read(self, microversion: str) -> dict[str, Any]:
        answer = self.ask(microversion)
        self.assertEqual(200, answer.status_code, answer.text)
        return answer.json()

    def test_running(self) -> None:
        flavor = self.cloud.compute.find_flavor(
            'lxd.tiny', ignore_missing=False)
        found = self.read('2.48')
        self.assertEqual(('running', 'lxd', flavor.vcpus, 1),
                         (found['state'], found['hypervisor'],
                          found['num_cpus'], found['num_nics']))
        self.assertLess(found['uptime'], 300)
        self.assertEqual(flavor.ram, found['memory_details']['maximum'])
        self.assertGreater(found['memory_details']['used'], 0)
        self.assertGreater(found['cpu_details'][0]['time'], 0)
        [port] = self.ports(self.server.id)
        [nic] = found['nic_details']
        self.assertEqual(port.mac_address, nic['mac_address'])
        self.assertGreater(nic['rx_octets'], 0)
        self.assertGreater(nic['tx_packets'], 0)
        plain = self.read('2.1')
        self.assertGreaterEqual(plain['eth0_rx'], nic['rx_octets'])
        self.assertEqual(flavor.ram * 1024, plain['memory'])

    def test_not_running(self) -> None:
        self.cloud.compute.stop_server(self.server)
        self.wait_status(self.server.id, 'SHUTOFF', 90)
        self.assertEqual(409, self.ask('2.48').status_code)
