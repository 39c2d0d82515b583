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

import os
import pathlib
import time
from typing import Any
import unittest

from nova.compute import provider_tree
from nova import exception
from nova.network import model as network_model
from nova import objects
from nova.virt import hardware

from tests.fixtures import driver_host
from tests.fixtures import lxd_daemon
from tests.functional import test_resize

NO_LXD = lxd_daemon.missing()
CPUS = sorted(os.sched_getaffinity(0))
TOO_FEW = 'needs two CPUs' if len(CPUS) < 2 else None

CONF = driver_host.CONF
DEDICATED = {'hw:cpu_policy': 'dedicated'}
NODE_UUID = '5f6e1b3a-0000-4000-8000-000000000001'


def numbers(text: str) -> set[int]:
    """Read a set of CPUs as the kernel writes it."""
    return hardware.parse_cpu_spec(text.strip())


class CpuTestCase(test_resize.ResizeTestCase):

    def setUp(self) -> None:
        self.own, self.common = {CPUS[-1]}, set(CPUS[:-1])
        self.divide(self.common, self.own)
        self.claims: list[objects.InstanceNUMATopology] = []
        super().setUp()

    def divide(self, shared: set[int], dedicated: set[int]) -> None:
        for option, cpus in (('cpu_shared_set', shared),
                             ('cpu_dedicated_set', dedicated)):
            CONF.set_override(option, hardware.format_cpu_spec(cpus) or None,
                              'compute')
            self.addCleanup(CONF.clear_override, option, 'compute')

    # -- Nova's resource tracker --------------------------------------------

    def fitted(self, flavor: objects.Flavor
               ) -> objects.InstanceNUMATopology | None:
        wanted = hardware.numa_get_constraints(
            flavor, objects.ImageMeta(properties=objects.ImageMetaProps()))
        host = objects.NUMATopology.obj_from_db_obj(
            self.host.driver.get_available_resource('x')['numa_topology'])
        for claimed in self.claims:
            host = hardware.numa_usage_from_instance_numa(host, claimed)
        found = hardware.numa_fit_instance_to_host(host, wanted, None)
        if wanted is not None:
            if found is None:
                raise exception.ComputeResourcesUnavailable(reason='claim')
            self.claims.append(found)
        return found

    def server(self, extra_specs: dict[str, str] | None = None,
               **fields: Any) -> objects.Instance:
        image = self.host.image()
        server = self.host.instance(image, extra_specs, **fields)
        server.numa_topology = self.fitted(server.flavor)
        return self.host.spawn(server, image)

    # -- the guest ----------------------------------------------------------

    def allowed(self, server: objects.Instance) -> set[int]:
        """Return the CPUs that the kernel allows the guest."""
        text = self.host.run(server, 'grep', 'Cpus_allowed_list',
                             '/proc/self/status')
        return numbers(text.partition(':')[2])

    def assert_on(self, server: objects.Instance, cpus: set[int]) -> None:
        # LXD applies a CPU set a moment after the request.
        deadline = time.monotonic() + 30
        while self.allowed(server) != cpus and time.monotonic() < deadline:
            time.sleep(0.05)
        self.assertEqual(cpus, self.allowed(server))
        self.assertEqual(f'{len(cpus)}\n', self.host.run(server, 'nproc'))
        # Init, from which all other processes inherit it.
        with open(f'/proc/{self.pid(server)}/status') as stream:
            [line] = [line for line in stream if 'Cpus_allowed_list' in line]
        self.assertEqual(cpus, numbers(line.partition(':')[2]))

    def cpu_quota(self, server: objects.Instance) -> float | None:
        """Return the CPU quota of the guest in CPUs, None for unlimited."""
        with open(f'/proc/{self.pid(server)}/cgroup') as stream:
            groups = [line.strip().split(':', 2)[1:] for line in stream]
        for controllers, group in groups:
            # The guest has groups of its own below the one that LXD limits.
            directory = pathlib.Path('/'.join(group.split('/')[:2]))
            if 'cpu' in controllers.split(','):
                found = pathlib.Path('/sys/fs/cgroup/cpu',
                                     *directory.parts[1:])
                quota, period = (
                    int((found / f'cpu.cfs_{kind}_us').read_text())
                    for kind in ('quota', 'period'))
                return None if quota < 0 else quota / period
            limit = pathlib.Path('/sys/fs/cgroup', *directory.parts[1:],
                                 'cpu.max')
            if not controllers and limit.exists():
                words = limit.read_text().split()
                return (None if words[0] == 'max' else
                        int(words[0]) / int(words[1]))
        raise AssertionError(f'no cgroup with a CPU quota: {groups}')


@unittest.skipIf(NO_LXD or TOO_FEW, NO_LXD or TOO_FEW or '')
class PinningTest(CpuTestCase):

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
                    self.host.context, server, test_resize.ADDRESS, flavor,
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
class SharedSetTest(CpuTestCase):
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
