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

"""CPUs of instances, and the NUMA topology for Nova."""

from __future__ import annotations

from nova import exception
from nova import objects
from nova.virt import hardware
from oslo_config import fixture as config_fixture
from oslotest import base

from nova_lxd_py import conf
from nova_lxd_py.virt.host import cpus
from nova_lxd_py.virt.host import numa
from tests.fixtures.fake_lxd import server

objects.register_all()

GIB = 1 << 30
KIB = 1 << 10


def big_host() -> dict:
    """Return two sockets and NUMA nodes with two cores of two threads each.

    Node 0 has CPUs 0-1 and 4-5, node 1 has 2-3 and 6-7.
    """
    found = server.resources(cpus=0)
    found['cpu']['total'] = 8
    found['cpu']['sockets'] = [
        {'socket': node, 'cores': [
            {'core': core, 'threads': [
                {'id': 2 * node + core + 4 * thread, 'numa_node': node,
                 'thread': thread, 'online': True} for thread in (0, 1)]}
            for core in (0, 1)]} for node in (0, 1)]
    found['memory'] = {
        'total': 16 * GIB, 'used': 2 * GIB, 'hugepages_size': 2 << 20,
        'hugepages_total': 2 * GIB, 'hugepages_used': 0, 'nodes': [
            {'numa_node': node, 'total': 8 * GIB, 'used': GIB,
             'hugepages_total': GIB, 'hugepages_used': 0}
            for node in (0, 1)]}
    return found


class CpuTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.cfg = self.useFixture(config_fixture.Config(conf.CONF))
        self.resources = big_host()

    def divide(self, shared: str | None, dedicated: str | None) -> None:
        self.cfg.config(group='compute', cpu_shared_set=shared,
                        cpu_dedicated_set=dedicated)

    def topology(self, huge_pages: bool = True) -> objects.NUMATopology:
        found = numa.topology(self.resources, cpus.configured(), huge_pages)
        assert found is not None
        # It is stored in the database.
        return objects.NUMATopology.obj_from_db_obj(found._to_json())

    @staticmethod
    def flavor(vcpus: int = 2, memory_mb: int = 512, **specs: str
               ) -> objects.Flavor:
        return objects.Flavor(
            name='f', vcpus=vcpus, memory_mb=memory_mb, root_gb=1, swap=0,
            extra_specs={f'hw:{key}': value for key, value in specs.items()})

    def fit(self, flavor: objects.Flavor,
            host: objects.NUMATopology | None = None,
            **properties: str) -> objects.InstanceNUMATopology | None:
        """Claim the CPUs for an instance as Nova does."""
        image = objects.ImageMeta(
            properties=objects.ImageMetaProps(**properties))
        wanted = hardware.numa_get_constraints(flavor, image)
        assert wanted is not None
        return hardware.numa_fit_instance_to_host(
            host or self.topology(), wanted, None)

    def confine(self, flavor: objects.Flavor,
                topology: objects.InstanceNUMATopology | None = None
                ) -> set[int] | None:
        found = cpus.cpuset(flavor, topology, cpus.configured(),
                            cpus.processors(self.resources['cpu']))
        return None if found is None else set(found)


class TopologyTestCase(CpuTestCase):

    def test_undivided(self) -> None:
        first, second = self.topology().cells
        self.assertEqual((0, 1), (first.id, second.id))
        self.assertEqual({0, 1, 4, 5}, first.cpuset)
        self.assertEqual(set(), first.pcpuset)
        self.assertEqual([{2, 6}, {3, 7}], second.siblings)
        self.assertEqual(1, second.socket)
        self.assertEqual(8192, first.memory)

    def test_divided(self) -> None:
        self.divide('0,4', '2-3,6')
        first, second = self.topology().cells
        self.assertEqual(({0, 4}, set()), (first.cpuset, first.pcpuset))
        self.assertEqual((set(), {2, 3, 6}), (second.cpuset, second.pcpuset))
        # CPUs that the host keeps are not siblings.
        self.assertEqual([{0, 4}], first.siblings)
        self.assertEqual([{2, 6}, {3}], second.siblings)

    def test_offline(self) -> None:
        thread = self.resources['cpu']['sockets'][0]['cores'][0]['threads'][1]
        thread['online'] = False
        self.assertEqual({0, 1, 5}, self.topology().cells[0].cpuset)
        self.assertEqual([{0}, {1, 5}], self.topology().cells[0].siblings)

    def test_pages(self) -> None:
        small, huge = self.topology().cells[0].mempages
        self.assertEqual(numa.small_page_kb(), small.size_kb)
        self.assertEqual(7 * GIB // KIB, small.total_kb)
        self.assertEqual((2048, 512), (huge.size_kb, huge.total))

    def test_reserved_pages(self) -> None:
        self.cfg.config(reserved_huge_pages=[
            {'node': '0', 'size': '2048', 'count': '64'}])
        self.assertEqual(64, self.topology().cells[0].mempages[1].reserved)
        self.assertEqual(0, self.topology().cells[1].mempages[1].reserved)

    def test_pages_that_lxd_cannot_limit(self) -> None:
        for cell in self.topology(huge_pages=False).cells:
            self.assertEqual(1, len(cell.mempages))

    def test_without_numa(self) -> None:
        self.resources = server.resources()
        self.resources['memory']['nodes'] = None
        [cell] = self.topology().cells
        self.assertEqual({0, 1, 2, 3}, cell.cpuset)
        self.assertEqual(16384, cell.memory)

    def test_memory_without_cpus(self) -> None:
        self.resources['memory']['nodes'].append(
            {'numa_node': 7, 'total': GIB, 'hugepages_total': 0})
        self.assertEqual(set(), self.topology().cells[2].cpuset)

    def test_unknown(self) -> None:
        self.resources['cpu'] = {'sockets': None, 'total': 4}
        self.assertIsNone(numa.topology(self.resources, cpus.configured(),
                                        True))


class FittingTestCase(CpuTestCase):
    """Nova's code assigns CPUs of it, which are passed to LXD."""

    def test_dedicated(self) -> None:
        self.divide('0,4', '2-3,6-7')
        flavor = self.flavor(cpu_policy='dedicated')
        fitted = self.fit(flavor)
        chosen = self.confine(flavor, fitted)
        assert chosen is not None
        self.assertEqual(2, len(chosen))
        self.assertLessEqual(chosen, {2, 3, 6, 7})

    def test_nobody_else_gets_them(self) -> None:
        self.divide('0', '1-4')
        host, seen = self.topology(), set()
        flavor = self.flavor(vcpus=1, cpu_policy='dedicated')
        for _ in range(4):
            fitted = self.fit(flavor, host)
            chosen = self.confine(flavor, fitted)
            assert chosen is not None
            self.assertFalse(seen & chosen)
            seen |= chosen
            host = hardware.numa_usage_from_instance_numa(host, fitted)
        self.assertEqual({1, 2, 3, 4}, seen)
        self.assertIsNone(self.fit(flavor, host))

    def test_by_the_image(self) -> None:
        self.divide('0', '2-3')
        flavor = self.flavor()
        self.assertEqual({2, 3}, self.confine(flavor, self.fit(
            flavor, hw_cpu_policy='dedicated')))

    def test_whole_cores(self) -> None:
        self.divide('0', '2-3,6-7')
        flavor = self.flavor(cpu_policy='dedicated',
                             cpu_thread_policy='require')
        self.assertIn(self.confine(flavor, self.fit(flavor)),
                      ({2, 6}, {3, 7}))

    def test_shared(self) -> None:
        self.assertIsNone(self.confine(self.flavor()))
        self.divide('0,4', '2')
        self.assertEqual({0, 4}, self.confine(self.flavor()))

    def test_shared_only(self) -> None:
        self.divide('0-3', None)
        self.assertEqual({0, 1, 2, 3}, self.confine(self.flavor()))

    def test_dedicated_only(self) -> None:
        self.divide(None, '0-3')
        self.assertRaises(exception.ComputeResourcesUnavailable, self.confine,
                          self.flavor())

    def test_node_of_the_memory(self) -> None:
        """hw:numa_nodes without dedicated CPUs."""
        flavor = self.flavor(numa_nodes='1')
        self.assertIn(self.confine(flavor, self.fit(flavor)),
                      ({0, 1, 4, 5}, {2, 3, 6, 7}))
        self.divide('0-3', None)
        self.assertIn(self.confine(flavor, self.fit(flavor)),
                      ({0, 1}, {2, 3}))
        flavor = self.flavor(numa_nodes='2')
        self.assertEqual({0, 1, 2, 3}, self.confine(flavor, self.fit(flavor)))

    def test_node_without_shared_cpus(self) -> None:
        flavor = self.flavor(numa_nodes='2')
        fitted = self.fit(flavor)
        self.divide(None, '0-7')
        self.assertRaises(exception.ComputeResourcesUnavailable, self.confine,
                          flavor, fitted)

    def test_mixed_by_the_image(self) -> None:
        self.divide('0-1', '4-5')
        flavor = self.flavor(cpu_dedicated_mask='0')
        fitted = self.fit(flavor, hw_cpu_policy='mixed')
        error = self.assertRaises(exception.InvalidInput, self.confine,
                                  flavor, fitted)
        self.assertIn('use dedicated or shared', str(error))

    def test_emulator(self) -> None:
        self.divide(None, '0-7')
        flavor = self.flavor(cpu_policy='dedicated',
                             emulator_threads_policy='isolate')
        error = self.assertRaises(exception.InvalidInput, self.confine,
                                  flavor, self.fit(flavor))
        self.assertIn('hw:emulator_threads_policy', str(error))

    def test_set_that_has_shrunk(self) -> None:
        self.divide(None, '2-3')
        flavor = self.flavor(cpu_policy='dedicated')
        fitted = self.fit(flavor)
        self.divide(None, '2')
        error = self.assertRaises(exception.ComputeResourcesUnavailable,
                                  self.confine, flavor, fitted)
        self.assertIn('CPU 3', str(error))

    def test_not_claimed(self) -> None:
        flavor = self.flavor(cpu_policy='dedicated')
        self.assertRaises(exception.ComputeResourcesUnavailable, self.confine,
                          flavor)
        wanted = hardware.numa_get_constraints(
            flavor, objects.ImageMeta(properties=objects.ImageMetaProps()))
        self.assertRaises(exception.ComputeResourcesUnavailable, self.confine,
                          flavor, wanted)

    def test_words(self) -> None:
        self.assertEqual('0-2,5', cpus.format_lxd_cpus({5, 0, 1, 2}))
        self.assertEqual('7-7', cpus.format_lxd_cpus({7}))


class HugePageTestCase(CpuTestCase):

    def limits(self, flavor: objects.Flavor, fitted: object = None,
               available: bool = True) -> dict[str, str]:
        return numa.huge_page_limits(flavor, fitted, available)

    def test_none_wanted(self) -> None:
        self.assertEqual({}, self.limits(self.flavor()))
        small = self.flavor(mem_page_size='small')
        self.assertEqual({}, self.limits(small, self.fit(small)))

    def test_large(self) -> None:
        flavor = self.flavor(mem_page_size='large')
        self.assertEqual({'limits.hugepages.2MB': '512MiB'},
                         self.limits(flavor, self.fit(flavor)))

    def test_who_asks_for_none_gets_none(self) -> None:
        plain, large = self.flavor(), self.flavor(mem_page_size='large')
        self.assertEqual(
            {'limits.hugepages.2MB': '0MiB'},
            numa.huge_page_limits(plain, None, True, 2048))
        self.assertEqual(
            {'limits.hugepages.2MB': '512MiB'},
            numa.huge_page_limits(large, self.fit(large), True, 2048))
        self.assertEqual({}, numa.huge_page_limits(plain, None, False, 2048))

    def test_on_two_nodes(self) -> None:
        flavor = self.flavor(mem_page_size='2048', numa_nodes='2')
        self.assertEqual({'limits.hugepages.2MB': '512MiB'},
                         self.limits(flavor, self.fit(flavor)))

    def test_not_enough(self) -> None:
        self.assertIsNone(self.fit(self.flavor(
            memory_mb=2048, mem_page_size='2048')))

    def test_host_without(self) -> None:
        flavor = self.flavor(mem_page_size='large')
        self.assertIsNone(self.fit(flavor, self.topology(huge_pages=False)))
        self.assertRaises(exception.ComputeResourcesUnavailable, self.limits,
                          flavor, self.fit(flavor), available=False)

    def test_size_that_lxd_does_not_know(self) -> None:
        flavor = self.flavor(mem_page_size='large')
        fitted = self.fit(flavor)
        assert fitted is not None
        fitted.cells[0].pagesize = 512 * 1024
        error = self.assertRaises(exception.InvalidInput, self.limits, flavor,
                                  fitted)
        self.assertIn('hw:mem_page_size', str(error))
