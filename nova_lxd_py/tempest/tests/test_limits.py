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

from tempest.lib import decorators

from nova_lxd_py.tempest.tests import base


class LimitsTest(base.LXDScenarioTest):
    """The guest has the resources of its flavor, and no more."""

    @decorators.idempotent_id('a6b6f1c0-4f4b-4b9e-9d0c-0c6d36f7b001')
    def test_guest_sees_its_flavor(self):
        server = self.boot(flavor=self.create_flavor(vcpus=1, ram=384, disk=3))
        guest = self.log_in(server)
        self.assertEqual('1', guest.exec_command('nproc').strip())
        memory = guest.exec_command("free -m | awk '/^Mem/ { print $2 }'")
        self.assertAlmostEqual(384, int(memory), delta=1)
        size, used = guest.exec_command(
            "df -m / | awk 'NR == 2 { print $2, $3 }'").split()
        self.assertLess(int(used), int(size))
        # Storage drivers without quotas show the size of the pool.
        self.assertGreaterEqual(int(size), 0.9 * 3 * 1024)

    @decorators.idempotent_id('a6b6f1c0-4f4b-4b9e-9d0c-0c6d36f7b002')
    def test_memory_is_limited(self):
        server = self.boot(flavor=self.create_flavor(ram=256))
        guest = self.log_in(server)
        # The OOM killer ends a process that exceeds the limit.
        outcome = guest.exec_command(
            "python3 -c 'x = bytearray(1 << 30)' > /dev/null 2>&1 "
            "&& echo enough || echo limited")
        self.assertEqual('limited', outcome.strip())
