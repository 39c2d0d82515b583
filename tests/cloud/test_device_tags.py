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

"""Tags of devices, as guests read them."""

from __future__ import annotations

import json

from tests.fixtures import cloud


class DeviceTagsTest(cloud.CloudTestCase):

    def test_tags(self) -> None:
        private = self.cloud.network.find_network(
            'private', ignore_missing=False)
        server = self.boot(config_drive=True, networks=[
            {'uuid': private.id, 'tag': 'inside'}])
        address = self.floating_ip(server.id)
        first = self.ports(server.id)[0]

        def tags(text: str) -> dict[str, list[str]]:
            return {device['mac']: device['tags']
                    for device in json.loads(text)['devices']}

        def served() -> dict[str, list[str]]:
            return tags(self.ssh(
                address, 'wget -q -O - http://169.254.169.254/openstack/'
                'latest/meta_data.json', user='root'))

        wanted = {first.mac_address: ['inside']}
        self.assertEqual(wanted, served())
        self.assertEqual(wanted, tags(self.ssh(
            address, 'cat /config-drive/openstack/latest/meta_data.json',
            user='root')))

        # Without a gateway, or replies of the floating IP would go there.
        network = self.cloud.network.create_network(name=self.unique('side'))
        self.addCleanup(self.cloud.network.delete_network, network)
        self.cloud.network.create_subnet(
            network_id=network.id, ip_version=4, cidr='10.97.0.0/24',
            gateway_ip=None)
        # The server is deleted before its network.
        self.addCleanup(self.delete, server.id)
        second = self.cloud.compute.create_server_interface(
            server, net_id=network.id, tag='outside')
        wanted[second.mac_addr] = ['outside']
        # Nova caches what it serves.
        cloud.wait_for('both tags', lambda: served() == wanted, 40, 1)
        self.cloud.compute.delete_server_interface(second.port_id, server)
        del wanted[second.mac_addr]
        cloud.wait_for('the first one', lambda: served() == wanted, 60, 1)
