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

"""Bandwidth of Neutron's ports: limits and guarantees."""

from __future__ import annotations

import contextlib
import subprocess
import time
from typing import Any

from tests.fixtures import cloud

_OVS = {'OVS_RUNDIR': str(cloud.PREFIX / 'run' / 'ovs')}
_BRIDGE = 'br-ex'
_EGRESS = 'NET_BW_EGR_KILOBIT_PER_SEC'


class LimitTest(cloud.CloudTestCase):
    """OVN enforces the limits with meters; the driver has no part in it."""

    alone = True
    #: Kilobits a second. TCP does not reach it, since meters drop packets.
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
            # The time of the login does not count.
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
        cloud.wait_for(
            'a transfer without limit',
            lambda: self.rate(address, True) > 1.3 * self.LIMIT, 60)
        self.admin.network.update_port(port.id, qos_policy_id=policy.id)
        cloud.wait_for(
            'the limit', lambda: self.rate(address, True) < self.LIMIT * 1.1,
            30)
        self.assertLess(self.rate(address, False), self.LIMIT * 1.1)
        # The limit belongs to the port and survives a reboot of the guest.
        self.cloud.compute.reboot_server(server.id, 'HARD')
        self.wait_status(server.id, 'ACTIVE')
        self.ssh(address, 'true', user='root')
        self.assertLess(self.rate(address, True), self.LIMIT * 1.1)
        self.admin.network.update_port(port.id, qos_policy_id=None)
        cloud.wait_for(
            'the limit to be removed',
            lambda: self.rate(address, True) > 1.3 * self.LIMIT, 30)


class GuaranteeTest(cloud.CloudTestCase):
    """Neutron reports bandwidth to Placement, and Nova allocates it."""

    alone = True
    TOTAL, WANTED = 10000, 6000

    def setUp(self) -> None:
        super().setUp()
        [self.root] = self.providers()
        before = self.options()
        # nova-compute caches the nested resource providers for minutes, and
        # builds nothing while its cache has one that is gone.
        self.addCleanup(cloud.quickstart, 'restart', 'nova-compute')
        # From the start the chassis says this only where the bandwidth of
        # the bridge is known.
        self.addCleanup(self.remove_providers)
        self.addCleanup(self.set_options, before)
        self.set_options(
            f'{before},resource_provider_bandwidths='
            f'{_BRIDGE}:{self.TOTAL}:{self.TOTAL},'
            f'resource_provider_hypervisors={_BRIDGE}:{self.root["name"]}')
        self.device = cloud.wait_for(
            'the provider of bandwidth', self.find_device, 30)['uuid']

    # -- Open vSwitch and Placement

    @staticmethod
    def options() -> str:
        return cloud.run('ovs-vsctl', '--timeout=30', 'get', 'Open_vSwitch',
                         '.', 'external-ids:ovn-cms-options',
                         env=_OVS).stdout.strip().strip('"')

    @staticmethod
    def set_options(value: str) -> None:
        cloud.run('ovs-vsctl', '--timeout=30', 'set', 'Open_vSwitch', '.',
                  f'external-ids:ovn-cms-options="{value}"', env=_OVS)

    def placement(self, method: str, path: str) -> Any:
        answer = getattr(self.admin.placement, method)(
            path, microversion='1.28')
        return answer.json() if answer.content else {}

    def providers(self) -> list[dict[str, Any]]:
        return self.placement('get', '/resource_providers')[
            'resource_providers']

    def inventory(self, provider: str) -> dict[str, Any]:
        return self.placement(
            'get', f'/resource_providers/{provider}/inventories'
        )['inventories']

    def find_device(self) -> dict[str, Any]:
        for provider in self.providers():
            if (provider['name'].endswith(f':{_BRIDGE}') and
                    _EGRESS in self.inventory(provider['uuid'])):
                return provider
        return {}

    def remove_providers(self) -> None:
        """Remove resource providers that Neutron leaves, children first."""
        def removed() -> bool:
            for provider in self.providers():
                if provider['uuid'] != self.root['uuid']:
                    with contextlib.suppress(Exception):
                        self.placement(
                            'delete',
                            f'/resource_providers/{provider["uuid"]}')
            return len(self.providers()) == 1
        cloud.wait_for('the providers to be removed', removed, 30)

    # -- ports

    def port(self, policy: Any) -> str:
        public = self.admin.network.find_network('public',
                                                 ignore_missing=False)
        made = self.admin.network.create_port(
            network_id=public.id, qos_policy_id=policy.id)
        self.addCleanup(self.admin.network.delete_port, made.id)
        return made.id

    def server(self, port: str) -> Any:
        return self.create(cloud=self.admin, key_name=None,
                           networks=[{'port': port}])

    def claimed(self, server: Any) -> int:
        found = self.placement('get', f'/allocations/{server.id}')[
            'allocations'].get(self.device, {'resources': {}})
        return found['resources'].get(_EGRESS, 0)

    def test_claimed(self) -> None:
        policy = self.admin.network.create_qos_policy(
            name=self.unique('guarantee'))
        self.addCleanup(self.admin.network.delete_qos_policy, policy.id)
        self.admin.network.create_qos_minimum_bandwidth_rule(
            policy, min_kbps=self.WANTED, direction='egress')
        first = self.server(self.port(policy))
        self.wait_status(first.id, 'ACTIVE', cloud.BOOT_TIMEOUT, self.admin)
        self.assertEqual(self.WANTED, self.claimed(first))
        # There is not enough left for another one.
        port = self.port(policy)
        second = self.server(port)
        self.wait_status(second.id, 'ERROR', cloud=self.admin)
        self.assertEqual([], self.host.instances_of(second.id))
        self.delete(second.id, self.admin)
        # The driver updates the host's inventory and leaves the rest alone.
        before = self.inventory(self.device)
        cloud.quickstart('restart', 'nova-compute')
        self.admin.compute.reboot_server(first.id, 'HARD')
        self.wait_status(first.id, 'ACTIVE', cloud=self.admin)
        self.assertEqual(before, self.inventory(self.device))
        self.assertEqual(self.WANTED, self.claimed(first))
        self.delete(first.id, self.admin)
        self.assertEqual(0, self.claimed(first))
        third = self.server(port)
        self.wait_status(third.id, 'ACTIVE', cloud.BOOT_TIMEOUT, self.admin)
        self.assertEqual(self.WANTED, self.claimed(third))
