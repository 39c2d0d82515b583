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

from tempest import config
from tempest.lib.common.utils import test_utils
from tempest.lib import decorators

from nova_lxd_py.tempest.tests import base

CONF = config.CONF


class LeftoversTest(base.LXDScenarioTest):
    """A deleted server leaves no resources behind."""

    def delete(self, server):
        self.servers_client.delete_server(server['id'])
        deleted = test_utils.call_until_true(
            lambda: server['id'] not in {
                other['id'] for other in self.servers_client.list_servers(
                )['servers']}, CONF.compute.build_timeout, 1)
        self.assertTrue(deleted)

    @decorators.idempotent_id('a6b6f1c0-4f4b-4b9e-9d0c-0c6d36f7b011')
    def test_port_can_be_reused(self):
        network = self.get_tenant_network()
        port = self.create_port(network['id'])
        for _ in range(2):
            server = self.boot(networks=[{'port': port['id']}])
            self.delete(server)
            shown = self.ports_client.show_port(port['id'])['port']
            self.assertEqual('', shown['device_id'])

    @decorators.idempotent_id('a6b6f1c0-4f4b-4b9e-9d0c-0c6d36f7b012')
    def test_no_resources_stay_allocated(self):
        server = self.boot()
        client = self.os_admin.placement_client
        allocations = client.list_allocations(server['id'])['allocations']
        self.assertNotEqual({}, allocations)
        self.delete(server)
        deleted = test_utils.call_until_true(
            lambda: client.list_allocations(server['id'])[
                'allocations'] == {}, CONF.compute.build_timeout, 1)
        self.assertTrue(deleted)
