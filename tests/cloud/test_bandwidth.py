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

"""What Neutron says of the bandwidth of ports."""

from __future__ import annotations

import subprocess
import time

from tests.cloud import cloud


class LimitTest(cloud.CloudTestCase):
    """OVN keeps the limits, with meters; the driver has no part in it."""

    #: Kilobits a second. TCP does not use all of it, since meters drop.
    LIMIT = 4000
    SIZE = 3 << 18

    def rate(self, address: str, outbound: bool) -> float:
        """Measure how fast a server sends, or receives.

        :returns: kilobits a second.
        """
        command = ['ssh', '-i', str(cloud.PREFIX / 'keys' / 'id_ed25519'),
                   '-o', 'BatchMode=yes', '-o', 'StrictHostKeyChecking=no',
                   '-o', 'UserKnownHostsFile=/dev/null',
                   '-o', 'LogLevel=ERROR', f'root@{address}']
        script = (f'echo; head -c {self.SIZE} /dev/zero' if outbound
                  else 'echo; wc -c')
        with subprocess.Popen([*command, script], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE) as client:
            assert client.stdin and client.stdout
            # Logging in takes its time and is not to count.
            self.assertEqual(b'\n', client.stdout.read(1))
            began = time.monotonic()
            if not outbound:
                client.stdin.write(bytes(self.SIZE))
            client.stdin.close()
            answer = client.stdout.read()
            taken = time.monotonic() - began
        self.assertEqual(self.SIZE, len(answer) if outbound else int(answer))
        return self.SIZE * 8 / 1000 / taken

    def test_both_directions(self) -> None:
        server = self.boot()
        address = self.floating_ip(server.id)
        self.ssh(address, 'true', user='root')
        port = self.ports(server.id)[0]
        policy = self.admin.network.create_qos_policy(
            name=self.unique('limit'), shared=True)
        self.addCleanup(self.admin.network.delete_qos_policy, policy.id)
        self.addCleanup(self.delete, server.id)
        for direction in ('egress', 'ingress'):
            self.admin.network.create_qos_bandwidth_limit_rule(
                policy, max_kbps=self.LIMIT, max_burst_kbps=400,
                direction=direction)
        self.assertGreater(self.rate(address, True), 1.3 * self.LIMIT)
        self.admin.network.update_port(port.id, qos_policy_id=policy.id)
        cloud.wait_for(
            'the limit', lambda: self.rate(address, True) < self.LIMIT * 1.1,
            30)
        self.assertLess(self.rate(address, False), self.LIMIT * 1.1)
        # It is the port's, whatever becomes of the guest.
        self.cloud.compute.reboot_server(server.id, 'HARD')
        self.wait_status(server.id, 'ACTIVE')
        self.ssh(address, 'true', user='root')
        self.assertLess(self.rate(address, True), self.LIMIT * 1.1)
        self.admin.network.update_port(port.id, qos_policy_id=None)
        cloud.wait_for(
            'the end of the limit',
            lambda: self.rate(address, True) > 1.3 * self.LIMIT, 30)
