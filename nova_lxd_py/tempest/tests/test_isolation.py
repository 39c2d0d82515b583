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
from tempest.lib import decorators

from nova_lxd_py.tempest.tests import base

CONF = config.CONF


class IsolationTest(base.LXDScenarioTest):
    """User ids and nesting of servers."""

    def uid_range(self, server):
        _inside, outside, size = self.log_in(server).exec_command(
            'head -n 1 /proc/self/uid_map').split()
        return range(int(outside), int(outside) + int(size))

    @decorators.idempotent_id('a6b6f1c0-4f4b-4b9e-9d0c-0c6d36f7b003')
    def test_root_is_unprivileged_on_the_host(self):
        self.assertNotIn(0, self.uid_range(self.boot()))

    @decorators.idempotent_id('a6b6f1c0-4f4b-4b9e-9d0c-0c6d36f7b004')
    def test_servers_share_no_user_id(self):
        if not CONF.lxd.own_uid_ranges:
            raise self.skipException('[lxd] own_uid_ranges is false')
        flavor = self.create_flavor({'lxd:isolated': 'true'})
        first, second = sorted(
            (self.uid_range(self.boot(flavor=flavor)) for _ in range(2)),
            key=lambda ids: ids.start)
        self.assertLessEqual(first.stop, second.start)

    @decorators.idempotent_id('a6b6f1c0-4f4b-4b9e-9d0c-0c6d36f7b005')
    def test_nesting_follows_the_flavor(self):
        if not CONF.lxd.nesting:
            raise self.skipException('[lxd] nesting is false')
        # LXD mounts this with security.nesting only.
        command = 'test -d /dev/.lxc/proc && echo nested || echo plain'
        for word, wanted in (('true', 'nested'), ('false', 'plain')):
            flavor = self.create_flavor({'lxd:nested_allowed': word})
            found = self.log_in(self.boot(flavor=flavor)).exec_command(command)
            self.assertEqual(wanted, found.strip())
