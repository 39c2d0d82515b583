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

from tempest.common import waiters
from tempest import config
from tempest.lib import decorators
from tempest.lib import exceptions

from nova_lxd_py.tempest.tests import base

CONF = config.CONF


class NoDowntimeTest(base.LXDScenarioTest):
    """Operations that must not interrupt the guest."""

    @classmethod
    def skip_checks(cls):
        super().skip_checks()
        if not (CONF.compute_feature_enabled.resize and
                CONF.compute_feature_enabled.snapshot):
            raise cls.skipException('[compute-feature-enabled] resize or '
                                    'snapshot is false')

    @decorators.idempotent_id('a6b6f1c0-4f4b-4b9e-9d0c-0c6d36f7b006')
    def test_snapshot(self):
        server = self.boot()
        guest = self.log_in(server)
        self.start_ticking(guest)
        self.create_server_snapshot(server)
        self.assertLess(self.longest_pause(guest), CONF.lxd.longest_pause)

    @decorators.idempotent_id('a6b6f1c0-4f4b-4b9e-9d0c-0c6d36f7b007')
    def test_resize_on_the_same_host(self):
        server = self.boot(flavor=self.create_flavor(vcpus=1, ram=256))
        guest = self.log_in(server)
        self.start_ticking(guest)
        host = self.get_host_for_server(server['id'])
        self.servers_client.resize_server(
            server['id'], self.create_flavor(vcpus=2, ram=512))
        waiters.wait_for_server_status(self.servers_client, server['id'],
                                       'VERIFY_RESIZE')
        if self.get_host_for_server(server['id']) != host:
            raise self.skipException('The server was resized to another host')
        self.assertEqual('2', guest.exec_command('nproc').strip())
        self.servers_client.confirm_resize_server(server['id'])
        waiters.wait_for_server_status(self.servers_client, server['id'],
                                       'ACTIVE')
        self.assertLess(self.longest_pause(guest), CONF.lxd.longest_pause)

    @decorators.idempotent_id('a6b6f1c0-4f4b-4b9e-9d0c-0c6d36f7b008')
    def test_disk_never_shrinks(self):
        server = self.boot(flavor=self.create_flavor(disk=3))
        guest = self.log_in(server)
        self.start_ticking(guest)
        try:
            self.servers_client.resize_server(
                server['id'], self.create_flavor(disk=2))
        except exceptions.BadRequest:
            pass
        else:
            waiters.wait_for_server_status(self.servers_client, server['id'],
                                           'ACTIVE')
        self.assertLess(self.longest_pause(guest), CONF.lxd.longest_pause)
