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

"""Inventory, traits and statistics of the host."""

from __future__ import annotations

import io
import json
import os
import re
import tempfile
from typing import Any
from unittest import mock

from nova.compute import provider_tree
from nova import objects
from nova.virt import driver
from oslo_config import fixture as config_fixture
from oslotest import base

from nova_lxd_py import conf
from nova_lxd_py.virt.host import host as lxd_host
from nova_lxd_py.virt.host import numa
from nova_lxd_py.virt.host import subordinate_ids
from nova_lxd_py.virt.host import traits as host_traits
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import session
from tests.fixtures import fake_lxd
from tests.fixtures.fake_lxd import server
from tests.fixtures.fake_lxd import state

objects.register_all()

NODE = 'node-1'
NODE_UUID = '5f6e1b3a-0000-4000-8000-000000000001'
GIB = 1 << 30


class HostTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.lxd = self.useFixture(fake_lxd.FakeLXD(project='nova'))
        self.cfg = self.useFixture(config_fixture.Config(conf.CONF))
        self.cfg.config(host=NODE)
        self.cfg.config(group='lxd', endpoint=self.lxd.endpoint)
        self.host = self.make_host()

    def make_host(self) -> lxd_host.Host:
        self.session = session.Session(conf.CONF.lxd)
        self.session.connect()
        return lxd_host.Host(self.session)


class ResourceTestCase(HostTestCase):

    def test_node_name(self) -> None:
        self.assertEqual(NODE, self.host.nodename)

    def test_resources(self) -> None:
        pool = self.lxd.daemon.store.pools['default']
        pool.total, pool.used = 100 * GIB + 5, 3 * GIB + 1
        found = self.host.available_resource(NODE)
        self.assertEqual(NODE, found['hypervisor_hostname'])
        self.assertEqual('lxd', found['hypervisor_type'])
        self.assertEqual(5000002, found['hypervisor_version'])
        self.assertEqual([('x86_64', 'lxd', 'exe'), ('i686', 'lxd', 'exe')],
                         found['supported_instances'])
        self.assertEqual(4, found['vcpus'])
        self.assertEqual(100, found['local_gb'])
        self.assertEqual(4, found['local_gb_used'])
        self.assertEqual(97, found['disk_available_least'])
        [cell] = objects.NUMATopology.obj_from_db_obj(
            found['numa_topology']).cells
        self.assertEqual(({0, 1, 2, 3}, set()), (cell.cpuset, cell.pcpuset))
        self.assertGreater(found['memory_mb'], found['memory_mb_used'])
        info = json.loads(found['cpu_info'])
        self.assertEqual('x86_64', info['arch'])
        self.assertEqual('AuthenticAMD', info['vendor'])
        self.assertEqual('AMD EPYC', info['model'])
        self.assertEqual({'sockets': 1, 'cores': 4, 'threads': 1},
                         info['topology'])

    def test_memory_in_use(self) -> None:
        """In MiB, without what the kernel can drop."""
        text = ('MemTotal: 8388608 kB\nMemFree: 1024 kB\n'
                'MemAvailable: 6291456 kB\n')

        def opened(path: str, **kwargs: Any) -> Any:
            return (io.StringIO(text) if path == '/proc/meminfo'
                    else open(path, **kwargs))
        with mock.patch.object(lxd_host, 'open', opened, create=True):
            found = self.host.available_resource(NODE)
        self.assertEqual((8192, 2048),
                         (found['memory_mb'], found['memory_mb_used']))

    def test_nova_can_store_it(self) -> None:
        node = objects.ComputeNode()
        node.update_from_virt_driver(self.host.available_resource(NODE))
        self.assertEqual(4, node.vcpus)
        self.assertEqual('lxd', node.supported_hv_specs[0].hv_type)

    def test_requests_are_few(self) -> None:
        self.host.available_resource(NODE)
        for number in range(50):
            name = f'c{number}'
            self.lxd.daemon.store.instances['nova', name] = state.Instance(
                name, 'nova', {}, {}, [])
        with self.lxd.recording() as requests:
            self.host.available_resource(NODE)
        self.assertEqual(2, len(requests))

    def test_missing_pool(self) -> None:
        self.cfg.config(group='lxd', storage_pool='nope')
        self.assertRaises(errors.LXDError, self.host.available_resource, NODE)

    def test_cpus_that_are_off(self) -> None:
        cores = self.lxd.daemon.resources['cpu']['sockets'][0]['cores']
        cores[0]['threads'][0]['online'] = False
        self.assertEqual(3, self.host.available_resource(NODE)['vcpus'])

    def test_cpu_sets(self) -> None:
        self.cfg.config(group='compute', cpu_shared_set='0',
                        cpu_dedicated_set='2-3')
        found = self.host.available_resource(NODE)
        self.assertEqual(1, found['vcpus'])
        [cell] = objects.NUMATopology.obj_from_db_obj(
            found['numa_topology']).cells
        self.assertEqual(({0}, {2, 3}), (cell.cpuset, cell.pcpuset))

    def test_huge_pages(self) -> None:
        self.assertEqual(numa.can_limit_huge_pages(),
                         self.host.has_huge_pages())
        self.lxd.daemon.extensions.remove('limits_hugepages')
        self.assertFalse(self.make_host().has_huge_pages())

    def test_no_topology(self) -> None:
        """LXD on unusual hosts knows only the number of CPUs."""
        self.lxd.daemon.resources['cpu'] = {
            'architecture': 'x86_64', 'sockets': None, 'total': 3}
        found = self.host.available_resource(NODE)
        self.assertEqual(3, found['vcpus'])
        self.assertIsNone(found['numa_topology'])
        self.host.traits()

    def test_architecture_nova_does_not_know(self) -> None:
        self.lxd.daemon.environment['architectures'] = [
            'aarch64', 'armv8l', 'armv7l', 'arm64']
        self.assertEqual(['aarch64', 'armv7l'],
                         self.make_host().architectures())

    def test_versions(self) -> None:
        for text, number in (
                ('5.0.2', 5000002), ('5.21.3 LTS', 5021003), ('6.1', 6001000),
                ('6', 6000000), ('6.0.4', 6000004), ('git', 0)):
            self.assertEqual(number, lxd_host.version_number(text))

    def test_uptime(self) -> None:
        self.assertRegex(self.host.uptime(), re.compile(
            r'^ \d\d:\d\d:\d\d up .+,  0 users,  load average: '
            r'[\d.]+, [\d.]+, [\d.]+$'))

    def test_uptime_words(self) -> None:
        for seconds, words in ((59, '0 min'), (3599, '59 min'),
                               (3600, ' 1:00'), (86399, '23:59'),
                               (86400, '1 day, 0 min'),
                               (2 * 86400 + 36060, '2 days, 10:01')):
            self.assertEqual(words, lxd_host._span(seconds))

    def test_cpu_stats(self) -> None:
        stats = self.host.cpu_stats()
        self.assertEqual(2000, stats['frequency'])
        self.assertEqual({'kernel', 'idle', 'user', 'iowait', 'frequency'},
                         set(stats))

    def test_pool(self) -> None:
        self.assertEqual('btrfs', self.host.pool_driver())
        self.lxd.daemon.store.pools['default'].driver = 'dir'
        self.assertEqual('dir', self.make_host().pool_driver())


class RemoteTestCase(base.BaseTestCase):
    """Remote LXD: nothing of the local machine is reported."""

    def setUp(self) -> None:
        super().setUp()
        self.cfg = self.useFixture(config_fixture.Config(conf.CONF))
        self.cfg.config(group='lxd', endpoint='https://lxd.example:8443')
        self.host = lxd_host.Host(session.Session(conf.CONF.lxd))

    def test_nothing_local(self) -> None:
        self.assertRaises(NotImplementedError, self.host.uptime)
        self.assertRaises(NotImplementedError, self.host.cpu_stats)
        self.assertIsNone(self.host.idmap_capacity())
        self.assertEqual(frozenset(), self.host._cpu_features())

    def test_memory_is_that_of_lxd(self) -> None:
        self.host._resources = server.resources(memory=8 * GIB)
        self.assertEqual((8 * GIB, 2 * GIB), self.host._memory())


class PlacementTestCase(HostTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.tree = provider_tree.ProviderTree()
        self.tree.new_root(NODE, NODE_UUID)
        self.tree.new_child('nic', NODE_UUID)

    def update(self, reserved_disk_gb: int = 0) -> provider_tree.ProviderData:
        ratios = driver.ComputeDriver._get_allocation_ratios(
            self.tree.data(NODE).inventory)
        self.host.update_provider_tree(self.tree, NODE, ratios,
                                       reserved_disk_gb)
        return self.tree.data(NODE)

    def test_inventory(self) -> None:
        self.cfg.config(reserved_host_cpus=1, cpu_allocation_ratio=8.0)
        found = self.update(reserved_disk_gb=2).inventory
        self.assertEqual({
            'total': 4, 'reserved': 1, 'min_unit': 1, 'max_unit': 4,
            'step_size': 1, 'allocation_ratio': 8.0}, found['VCPU'])
        self.assertEqual({
            'total': 100, 'reserved': 2, 'min_unit': 1, 'max_unit': 100,
            'step_size': 1, 'allocation_ratio': 1.0}, found['DISK_GB'])
        self.assertEqual(512, found['MEMORY_MB']['reserved'])

    def test_cpu_sets(self) -> None:
        self.cfg.config(cpu_allocation_ratio=8.0)
        self.cfg.config(group='compute', cpu_shared_set='0-1',
                        cpu_dedicated_set='2')
        found = self.update().inventory
        self.assertEqual((2, 8.0), (found['VCPU']['total'],
                                    found['VCPU']['allocation_ratio']))
        self.assertEqual({
            'total': 1, 'reserved': 0, 'min_unit': 1, 'max_unit': 1,
            'step_size': 1, 'allocation_ratio': 1.0}, found['PCPU'])
        # And the reverse.
        self.cfg.config(group='compute', cpu_shared_set=None,
                        cpu_dedicated_set=None)
        found = self.update().inventory
        self.assertEqual(4, found['VCPU']['total'])
        self.assertNotIn('PCPU', found)

    def test_dedicated_cpus_only(self) -> None:
        self.cfg.config(group='compute', cpu_dedicated_set='0-3')
        found = self.update().inventory
        self.assertEqual(4, found['PCPU']['total'])
        self.assertNotIn('VCPU', found)

    def test_devices(self) -> None:
        self.lxd.daemon.resources['gpu']['cards'] = [
            {'vendor_id': '10de', 'product_id': '1db4'}]
        self.assertNotIn('CUSTOM_LXD_GPU_10DE_1DB4', self.update().traits)
        self.cfg.config(group='lxd', passthrough_devices=[
            'gpu:10de:1db4', 'usb:0403:6001'])
        self.assertIn('CUSTOM_LXD_GPU_10DE_1DB4', self.update().traits)
        self.assertNotIn('CUSTOM_LXD_USB_0403_6001', self.update().traits)
        self.cfg.config(group='lxd', passthrough_devices=[])
        self.assertNotIn('CUSTOM_LXD_GPU_10DE_1DB4', self.update().traits)

    def test_ratio_set_in_placement_stays(self) -> None:
        self.update()
        inventory = self.tree.data(NODE).inventory
        inventory['VCPU']['allocation_ratio'] = 2.5
        self.tree.update_inventory(NODE, inventory)
        self.assertEqual(2.5, self.update().inventory['VCPU'][
            'allocation_ratio'])

    def test_foreign_inventory_stays(self) -> None:
        self.tree.update_inventory(NODE, {'CUSTOM_LICENCE': {'total': 3}})
        self.tree.update_inventory('nic', {'SRIOV_NET_VF': {'total': 3}})
        self.assertEqual(3, self.update().inventory['CUSTOM_LICENCE']['total'])
        self.assertEqual(3, self.tree.data('nic').inventory['SRIOV_NET_VF'][
            'total'])

    def test_nothing_there(self) -> None:
        """Placement does not accept a total of 0."""
        self.lxd.daemon.store.pools['default'].total = GIB - 1
        self.assertEqual({'VCPU', 'MEMORY_MB'}, set(self.update().inventory))

    def test_more_reserved_than_there_is(self) -> None:
        self.assertEqual(100, self.update(500).inventory['DISK_GB'][
            'reserved'])

    def test_requests_are_few(self) -> None:
        self.update()
        with self.lxd.recording() as requests:
            self.update()
        self.assertEqual(
            ['/1.0/storage-pools/default/resources'],
            [request.path for request in requests])

    def test_traits(self) -> None:
        self.assertLessEqual({
            'HW_ARCH_X86_64', 'HW_ARCH_I686', 'CUSTOM_LXD_SERVER_LXD',
            'CUSTOM_LXD_POOL_BTRFS', 'CUSTOM_LXD_KERNEL_SECCOMP_LISTENER',
            'CUSTOM_LXD_KERNEL_IDMAPPED_MOUNTS', 'CUSTOM_LXD_NESTING',
            'CUSTOM_LXD_PRIVILEGED'}, self.update().traits)
        self.assertNotIn('CUSTOM_LXD_KERNEL_SHIFTFS', self.update().traits)

    def test_traits_that_no_longer_hold(self) -> None:
        self.tree.add_traits(
            NODE, 'CUSTOM_LXD_POOL_ZFS', 'CUSTOM_LXD_SERVER_INCUS',
            'HW_CPU_X86_XOP', 'HW_ARCH_S390X', 'CUSTOM_LXD_KERNEL_SHIFTFS')
        self.lxd.daemon.resources['cpu']['sockets'][0]['vendor'] = 'x'
        self.host._features = frozenset({'avx'})
        traits = self.update().traits
        self.assertIn('HW_CPU_X86_AVX', traits)
        self.assertFalse({
            'CUSTOM_LXD_POOL_ZFS', 'CUSTOM_LXD_SERVER_INCUS',
            'HW_CPU_X86_XOP', 'HW_ARCH_S390X',
            'CUSTOM_LXD_KERNEL_SHIFTFS'} & traits)

    def test_foreign_traits_stay(self) -> None:
        foreign = {'CUSTOM_RACK_7', 'CUSTOM_LXD_BY_OPERATOR', 'COMPUTE_NODE',
                   'OWNER_NOVA', 'HW_CPU_X86_VMX', 'HW_NIC_OFFLOAD_TSO'}
        self.tree.add_traits(NODE, *foreign)
        self.assertLessEqual(foreign, self.update().traits)

    def test_hyperthreading(self) -> None:
        self.assertNotIn('HW_CPU_HYPERTHREADING', self.host.traits())
        core = self.lxd.daemon.resources['cpu']['sockets'][0]['cores'][0]
        core['threads'] = core['threads'] * 2
        self.assertIn('HW_CPU_HYPERTHREADING', self.make_host().traits())

    def test_incus(self) -> None:
        self.lxd.daemon.environment['server'] = 'incus'
        self.assertIn('CUSTOM_LXD_SERVER_INCUS', self.make_host().traits())

    def test_restricted_project(self) -> None:
        config = self.lxd.daemon.store.projects['nova'].config
        config['restricted'] = 'true'
        traits = self.make_host().traits()
        self.assertNotIn('CUSTOM_LXD_NESTING', traits)
        self.assertNotIn('CUSTOM_LXD_PRIVILEGED', traits)
        config['restricted.containers.nesting'] = 'allow'
        traits = self.make_host().traits()
        self.assertIn('CUSTOM_LXD_NESTING', traits)
        self.assertNotIn('CUSTOM_LXD_PRIVILEGED', traits)

    def test_project_that_may_not_be_read(self) -> None:
        self.lxd.fail_next('GET', '/1.0/projects/nova', 403, 'Forbidden')
        self.assertIn('CUSTOM_LXD_NESTING', self.host.traits())

    def test_isolation_off(self) -> None:
        self.cfg.config(group='lxd', idmap_isolation='off')
        self.assertNotIn('CUSTOM_LXD_ISOLATED_IDMAP', self.host.traits())

    def test_every_trait_is_the_drivers_to_remove(self) -> None:
        traits = self.host.traits()
        self.assertEqual(traits, host_traits.owned(traits))


class TraitsTestCase(base.BaseTestCase):

    def features(self, text: str) -> frozenset[str]:
        with tempfile.NamedTemporaryFile('w') as stream:
            stream.write(text)
            stream.flush()
            return host_traits.local_cpu_features(stream.name)

    def test_x86(self) -> None:
        features = self.features(
            'processor\t: 0\nflags\t\t: sse sse4_1 pni aes avx512_vnni '
            'sha_ni svm vmx sgx ssbd ibpb nonsense 3dnow\n\nflags: x\n')
        self.assertEqual({
            'HW_CPU_X86_SSE', 'HW_CPU_X86_SSE41', 'HW_CPU_X86_SSE3',
            'HW_CPU_X86_AESNI', 'HW_CPU_X86_AVX512VNNI', 'HW_CPU_X86_SHA',
            'HW_CPU_X86_AMD_SSBD', 'HW_CPU_X86_AMD_IBPB', 'HW_CPU_X86_3DNOW'},
            host_traits.from_cpu_features(['x86_64', 'i686'], features,
                                          'AuthenticAMD'))
        self.assertIn('HW_CPU_X86_INTEL_SSBD', host_traits.from_cpu_features(
            ['x86_64'], features, 'GenuineIntel'))

    def test_aarch64(self) -> None:
        features = self.features('Features\t: fp asimd aes sve cpuid\n')
        self.assertEqual({
            'HW_CPU_AARCH64_FP', 'HW_CPU_AARCH64_ASIMD', 'HW_CPU_AARCH64_AES',
            'HW_CPU_AARCH64_SVE', 'HW_CPU_AARCH64_CPUID'},
            host_traits.from_cpu_features(['aarch64'], features, 'ARM'))

    def test_power(self) -> None:
        features = self.features(
            'processor : 0\ncpu\t\t: POWER9 (raw), altivec supported\n')
        self.assertEqual({'HW_CPU_PPC64LE_POWER9'},
                         host_traits.from_cpu_features(
                             ['ppc64le'], features, ''))

    def test_others(self) -> None:
        self.assertEqual(frozenset(), self.features('vendor_id: IBM/S390\n'))
        self.assertEqual(frozenset(), host_traits.from_cpu_features(
            ['s390x'], {'x'}, ''))
        self.assertEqual('', host_traits.architecture('riscv64'))
        self.assertEqual('HW_ARCH_ARMV7', host_traits.architecture('armv7l'))

    def test_words(self) -> None:
        self.assertEqual('CUSTOM_LXD_POOL_CEPH_OBJECT',
                         host_traits.pool('ceph-object'))


class IdmapTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.directory = tempfile.TemporaryDirectory()
        self.addCleanup(self.directory.cleanup)

    def capacity(self, uids: str | None, gids: str | None = None,
                 endpoint: str = '/var/lib/lxd/unix.socket') -> int:
        paths = []
        for name, text in (('uid', uids), ('gid', uids if gids is None
                                           else gids)):
            path = os.path.join(self.directory.name, name)
            paths.append(path)
            if text is not None:
                with open(path, 'w') as stream:
                    stream.write(text)
        return subordinate_ids.capacity(endpoint, (paths[0], paths[1]))

    def test_sizes(self) -> None:
        for size, ranges in ((0, 0), (65536, 0), (131071, 0), (131072, 1),
                             (10000001, 151), (1000000000, 15257)):
            self.assertEqual(ranges, self.capacity(f'root:100000:{size}\n'))

    def test_smaller_of_both(self) -> None:
        self.assertEqual(1, self.capacity('root:1:655360', 'root:1:131072'))

    def test_first_entry_of_root(self) -> None:
        self.assertEqual(1, self.capacity(
            '# comment\nlxd:1:655360\nroot:x:y\nbroken\nroot:1:131072 # x\n'
            'root:9:655360\n'))

    def test_no_entry(self) -> None:
        self.assertEqual(0, self.capacity('lxd:1:655360\n'))

    def test_no_files(self) -> None:
        self.assertEqual(15257, self.capacity(None))

    def test_snap(self) -> None:
        self.assertEqual(15257, self.capacity(
            'root:1:2', endpoint='/var/snap/lxd/common/lxd/unix.socket'))
