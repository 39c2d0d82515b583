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

"""Dedicated CPUs with a real LXD and Nova's own NUMA fitting.

They need two CPUs: the last one is dedicated, the others are shared.
"""

from __future__ import annotations

import unittest

from nova.compute import provider_tree
from nova import exception
from nova.network import model as network_model
from nova import objects

from tests.fixtures import cpu_case
from tests.fixtures import lxd_daemon
from tests.fixtures import resize_case

NO_LXD = lxd_daemon.missing()
CPUS = cpu_case.CPUS
TOO_FEW = 'needs two CPUs' if len(CPUS) < 2 else None

DEDICATED = {'hw:cpu_policy': 'dedicated'}
NODE_UUID = '5f6e1b3a-0000-4000-8000-000000000001'


@unittest.skipIf(NO_LXD or TOO_FEW, NO_LXD or TOO_FEW or '')
class PinningTest(cpu_case.CpuTestCase):

    def test_own_and_shared(self) -> None:
        pinned, shared = self.server(DEDICATED), self.server()
        self.assert_on(pinned, self.own)
        self.assert_on(shared, self.common)

    def test_nobody_else_gets_it(self) -> None:
        self.server(DEDICATED)
        self.assertRaises(exception.ComputeResourcesUnavailable, self.server,
                          DEDICATED)

    def test_reboots(self) -> None:
        server = self.server(DEDICATED)
        for kind in ('SOFT', 'HARD'):
            self.driver.reboot(self.host.context, server, [], kind)
            self.assert_on(server, self.own)
        self.driver.power_off(server)
        self.driver.power_on(self.host.context, server, [])
        self.assert_on(server, self.own)

    def test_hard_reboot_repairs(self) -> None:
        server = self.server(DEDICATED)
        api, path = self.host.lxd.api, f'/1.0/instances/{server.name}'
        api.must('PATCH', path, {'config': {'limits.cpu': str(len(CPUS))}},
                 params={'project': self.host.project})
        self.driver.reboot(self.host.context, server, [], 'HARD')
        self.assert_on(server, self.own)

    def test_rescue(self) -> None:
        server = self.server(
            DEDICATED, info_cache=objects.InstanceInfoCache(
                network_info=network_model.NetworkInfo()))
        self.driver.rescue(self.host.context, server, [], self.host.image(),
                           'x', None, [])
        rescued = self.host.lxd_instances()[server.name + '-rescue']
        cpu = CPUS[-1]
        self.assertEqual(f'{cpu}-{cpu}', rescued['config']['limits.cpu'])
        self.driver.unrescue(self.host.context, server)
        self.assert_on(server, self.own)

    def test_resize_to_dedicated_and_back(self) -> None:
        server = self.server()
        before = self.config(server)
        for _ in range(2):
            with self.running_on(server):
                self.resize(server, extra_specs=DEDICATED)
                self.assert_on(server, self.own)
                self.revert(server)
                self.claims.clear()
                self.assert_on(server, self.common)
            self.assertEqual(before, self.config(server))
        with self.running_on(server):
            self.resize(server, extra_specs=DEDICATED)
            self.confirm(server)
            self.assert_on(server, self.own)
            self.assertNotIn('limits.cpu.allowance', self.config(server))

    def test_resize_to_shared_and_back(self) -> None:
        server = self.server(DEDICATED)
        with self.running_on(server):
            self.resize(server, extra_specs={}, vcpus=2)
            self.assert_on(server, self.common)
            self.revert(server)
            self.assert_on(server, self.own)

    def test_resize_while_stopped(self) -> None:
        server = self.server()
        self.driver.power_off(server)
        self.resize(server, extra_specs=DEDICATED, power_on=False)
        self.confirm(server)
        self.driver.power_on(self.host.context, server, [])
        self.assert_on(server, self.own)

    def test_resize_to_what_cannot_be(self) -> None:
        server = self.server()
        flavor = self.flavor(server)
        flavor.extra_specs = {'hw:cpu_realtime': 'yes'}
        with self.running_on(server):
            server.new_flavor = flavor
            with self.assertRaises(exception.InstanceFaultRollback) as caught:
                self.driver.migrate_disk_and_power_off(
                    self.host.context, server, resize_case.ADDRESS, flavor,
                    [], None, 20, 10)
            self.assertIn('hw:cpu_realtime', str(caught.exception))
            self.assert_on(server, self.common)

    def test_mixed(self) -> None:
        image = self.host.image()
        server = self.host.instance(image, {
            'hw:cpu_policy': 'mixed', 'hw:cpu_dedicated_mask': '0'})
        with self.assertRaises(exception.InvalidInput) as caught:
            self.host.spawn(server, image)
        self.assertIn('use dedicated or shared', str(caught.exception))
        self.assertEqual({}, self.host.lxd_instances())

    # -- the host -----------------------------------------------------------

    def start_again(self, *servers: objects.Instance) -> None:
        self.host.instances = list(servers)
        self.host.restart_driver()
        self.driver = self.host.driver
        self.driver.process_instances_at_startup(
            self.host.context, objects.InstanceList(objects=list(servers)))

    def test_restart(self) -> None:
        """Restarts of nova-compute and LXD do not repin instances."""
        pinned, shared = self.server(DEDICATED), self.server()
        with self.running_on(pinned), self.running_on(shared):
            self.start_again(pinned, shared)
            self.assert_on(pinned, self.own)
            self.assert_on(shared, self.common)

    def test_sets_that_change(self) -> None:
        self.divide(set(), set())
        server = self.server(vcpus=len(CPUS))
        self.assert_on(server, set(CPUS))
        with self.running_on(server):
            self.divide(self.common, self.own)
            self.start_again(server)
            self.assert_on(server, self.common)
            self.divide(set(), set())
            self.start_again(server)
            self.assert_on(server, set(CPUS))

    def test_cpu_that_a_server_owns_is_taken_away(self) -> None:
        server = self.server(DEDICATED)
        self.divide(self.own, self.common)
        with self.assertRaises(exception.InvalidConfiguration) as caught:
            self.start_again(server)
        self.assertIn(server.uuid, str(caught.exception))
        self.assert_on(server, self.own)

    def test_cpus_that_the_host_does_not_have(self) -> None:
        self.divide(self.common, {4097})
        with self.assertRaises(exception.InvalidConfiguration) as caught:
            self.host.start_driver()
        self.assertIn('CPU 4097', str(caught.exception))

    def test_inventory(self) -> None:
        tree = provider_tree.ProviderTree()
        tree.new_root('x', NODE_UUID)
        for _ in range(2):
            self.driver.update_provider_tree(tree, 'x')
            inventory = tree.data('x').inventory
            self.assertEqual(len(self.common), inventory['VCPU']['total'])
            self.assertEqual(1, inventory['PCPU']['total'])
            self.assertEqual(1.0, inventory['PCPU']['allocation_ratio'])


@unittest.skipIf(NO_LXD or TOO_FEW, NO_LXD or TOO_FEW or '')
class SharedSetTest(cpu_case.CpuTestCase):
    """With more shared CPUs than vCPUs, an instance has a CPU quota."""

    def setUp(self) -> None:
        super().setUp()
        self.divide(set(CPUS), set())

    def test_cpu_quota(self) -> None:
        server = self.server(vcpus=1)
        self.assert_on(server, set(CPUS))
        self.assertEqual(1, self.cpu_quota(server))
        self.driver.reboot(self.host.context, server, [], 'HARD')
        self.assertEqual(1, self.cpu_quota(server))

    def test_cpu_quota_follows_a_resize(self) -> None:
        server = self.server(vcpus=1)
        with self.running_on(server):
            self.resize(server, vcpus=len(CPUS))
            self.assertIsNone(self.cpu_quota(server))
            self.revert(server)
            self.assertEqual(1, self.cpu_quota(server))

    def test_quota(self) -> None:
        server = self.server({'quota:cpu_quota': '50000'}, vcpus=1)
        self.assertEqual(0.5, self.cpu_quota(server))
