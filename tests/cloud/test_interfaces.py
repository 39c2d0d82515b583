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

"""Network interfaces are attached to and detached from running servers."""

from __future__ import annotations

from tests.fixtures import cloud


class InterfaceTest(cloud.CloudTestCase):

    def side_network(self) -> str:
        """Create a network without a gateway, whose default route would take
        the replies of the floating IP away from the first port.
        """
        network = self.cloud.network.create_network(name=self.unique('side'))
        self.addCleanup(self.cloud.network.delete_network, network)
        self.cloud.network.create_subnet(
            network_id=network.id, ip_version=4, cidr='10.98.0.0/24',
            gateway_ip=None)
        return network.id

    def test_attach_and_detach(self) -> None:
        side = self.side_network()
        server = self.boot()
        address = self.floating_ip(server.id)
        self.ssh(address, 'true', user='root')
        first = self.ports(server.id)[0]
        created = self.cloud.compute.create_server_interface(
            server, net_id=side)
        second = self.cloud.network.get_port(created.port_id)

        def macs() -> list[str]:
            return self.ssh(address, 'cat /sys/class/net/eth*/address',
                            user='root').split()

        cloud.wait_for('the second interface',
                       lambda: second.mac_address in macs(), 30)
        self.assertEqual({first.mac_address, second.mac_address},
                         set(macs()))
        cloud.wait_for(
            'an active port', lambda: self.cloud.network.get_port(
                second.id).status == 'ACTIVE', 30)

        # It is the same interface after a restart.
        self.cloud.compute.reboot_server(server, 'HARD')
        cloud.wait_for('the reboot', lambda: self.cloud.compute.get_server(
            server.id).task_state is not None, 20, 0.1)
        self.wait_status(server.id, 'ACTIVE', 90)
        self.assertEqual([first.mac_address, second.mac_address], macs())
        fixed = second.fixed_ips[0]['ip_address']
        self.assertIn(fixed, self.ssh(
            address, 'ip -4 address show dev eth1', user='root'))

        self.cloud.compute.delete_server_interface(created.port_id, server)
        cloud.wait_for('the second interface to be removed',
                       lambda: macs() == [first.mac_address], 30)
        cloud.wait_for(
            'its device on the host to be removed',
            lambda: not self.host.left_of('none', [second.id]), 30)
        ports = [first.id, second.id]
        self.delete(server.id)
        self.assert_gone(server.id, ports)
