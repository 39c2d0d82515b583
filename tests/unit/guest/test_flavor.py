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

"""Conversion of flavors to LXD configuration."""

from __future__ import annotations

from nova import exception
from nova import objects
from oslo_config import fixture as config_fixture
from oslotest import base

from nova_lxd_py import conf
from nova_lxd_py.virt.guest import flavor as lxd_flavor
from nova_lxd_py.virt.lxd import server_kind
from tests.fixtures.fake_lxd import config_keys

objects.register_all()

#: All LXD keys that a flavor may set.
_KEYS = frozenset({
    'boot.autostart', 'environment.product_name', 'limits.cpu',
    'limits.cpu.allowance', 'limits.memory', 'limits.memory.swap',
    'limits.processes', 'security.devlxd', 'security.guestapi',
    'security.nesting', 'security.privileged', 'security.syscalls.deny'})


def make_flavor(**kwargs: object) -> objects.Flavor:
    values: dict[str, object] = {
        'name': 'm1.small', 'vcpus': 2, 'memory_mb': 512, 'root_gb': 5,
        'ephemeral_gb': 0, 'swap': 0, 'extra_specs': {}}
    return objects.Flavor(**{**values, **kwargs})


class FlavorTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.cfg = self.useFixture(config_fixture.Config(conf.CONF))
        self.cfg.config(group='lxd', storage_pool='default')
        self.options = conf.CONF.lxd

    def config(self, specs: dict[str, str] | None = None,
               sized_swap: bool = False, cpus: set[int] | None = None,
               kind: server_kind.ServerKind = server_kind.LXD,
               **kwargs: object) -> dict[str, str]:
        config = lxd_flavor.instance_config(
            make_flavor(extra_specs=specs or {}, **kwargs), self.options,
            lxd_flavor.Placement(
                cpus=None if cpus is None else frozenset(cpus),
                sized_swap=sized_swap, kind=kind))
        # LXD accepts it, and no flavor sets another key.
        if not sized_swap:
            config_keys.check(config, kind is server_kind.INCUS)
        self.assertLessEqual(set(config), _KEYS)
        return config

    def root(self, specs: dict[str, str] | None = None, **kwargs: object
             ) -> dict[str, str]:
        return lxd_flavor.root_device(
            make_flavor(extra_specs=specs or {}, **kwargs), self.options)

    def assert_refused(self, specs: dict[str, str], *words: str) -> None:
        error = self.assertRaises(exception.InvalidInput, self.config, specs)
        for word in words:
            self.assertIn(word, str(error))


class ConfigTestCase(FlavorTestCase):

    def test_plain(self) -> None:
        self.assertEqual({
            'boot.autostart': 'false',
            'environment.product_name': 'OpenStack Nova',
            'limits.cpu': '2',
            'limits.memory': '512MiB',
            'limits.memory.swap': 'false',
            'security.devlxd': 'false',
            'security.nesting': 'false',
            'security.privileged': 'false',
            # No LOOP_* ioctl and no btrfs subvolume, even if the guest sets
            # bits that only seccomp sees.
            'security.syscalls.deny':
                'ioctl errno 1 [1,0x4c00,SCMP_CMP_MASKED_EQ,0xffffff00]\n'
                'ioctl errno 25 [1,0x50009401,SCMP_CMP_MASKED_EQ,0xffffffff]\n'
                'ioctl errno 25 [1,0x5000940e,SCMP_CMP_MASKED_EQ,0xffffffff]\n'
                'ioctl errno 25 [1,0x50009417,SCMP_CMP_MASKED_EQ,0xffffffff]\n'
                'ioctl errno 25 [1,0x50009418,SCMP_CMP_MASKED_EQ,0xffffffff]',
        }, self.config())

    def test_foreign_extra_specs(self) -> None:
        """Other namespaces belong to other drivers and the scheduler."""
        specs = {'hw:cpu_policy': 'shared', 'trait:CUSTOM_LXD_NESTING':
                 'required', 'quota:memory_limit': 'x', 'lxdx:foo': '1',
                 'security.privileged': 'true', 'raw.lxc': 'x'}
        self.assertEqual(self.config(), self.config(specs))

    def test_devlxd(self) -> None:
        self.cfg.config(group='lxd', devlxd=True)
        self.assertEqual('true', self.config()['security.devlxd'])

    def test_guest_api_of_incus(self) -> None:
        expected = self.config()
        expected['security.guestapi'] = expected.pop('security.devlxd')
        self.assertEqual(expected, self.config(kind=server_kind.INCUS))

    def test_devlxd_for_cloud_init(self) -> None:
        self.cfg.config(group='lxd', cloud_init_keys=True)
        self.assertEqual('true', self.config()['security.devlxd'])

    def test_booleans(self) -> None:
        for spec, key in (('lxd:nested_allowed', 'security.nesting'),
                          ('lxd:privileged_allowed', 'security.privileged')):
            for word in ('true', 'True', 'yes', '1', 'on'):
                self.assertEqual('true', self.config({spec: word})[key])
            for word in ('false', 'False', 'no', '0', 'off'):
                self.assertEqual('false', self.config({spec: word})[key])

    def test_not_booleans(self) -> None:
        for spec in ('lxd:nested_allowed', 'lxd:privileged_allowed',
                     'lxd:isolated'):
            for word in ('', 'maybe', 'allow', '2'):
                self.assert_refused({spec: word}, spec, 'm1.small', 'true or')

    def test_unknown_spec(self) -> None:
        """A typing error must not weaken isolation silently."""
        self.assert_refused({'lxd:isolate': 'true'}, 'lxd:isolate;',
                            'lxd:isolated', 'lxd:nested_allowed')
        self.assert_refused({'lxd:Nested_Allowed': 'true'})

    def test_contradiction(self) -> None:
        self.assert_refused({'lxd:privileged_allowed': 'true',
                             'lxd:isolated': 'true'}, 'remove one')
        self.config({'lxd:privileged_allowed': 'true',
                     'lxd:isolated': 'false'})

    def test_processes(self) -> None:
        self.assertNotIn('limits.processes', self.config())
        self.cfg.config(group='lxd', max_processes=500)
        self.assertEqual('500', self.config()['limits.processes'])
        self.assertEqual('70', self.config(
            {'lxd:max_processes': '70'})['limits.processes'])
        self.assertNotIn('limits.processes', self.config(
            {'lxd:max_processes': '0'}))
        for word in ('-1', 'x', '', '1.5'):
            self.assert_refused({'lxd:max_processes': word},
                                'lxd:max_processes', 'whole number')

    def test_own_cpus(self) -> None:
        config = self.config(cpus={1, 3})
        self.assertEqual('1,3', config['limits.cpu'])
        self.assertNotIn('limits.cpu.allowance', config)
        # LXD takes a single number for a count.
        self.assertEqual('1-1', self.config(cpus={1}, vcpus=1)['limits.cpu'])

    def test_shared_cpus(self) -> None:
        """On more CPUs than vCPUs, CPU time is limited to the vCPUs."""
        config = self.config(cpus={0, 1, 2, 3, 6})
        self.assertEqual('0-3,6', config['limits.cpu'])
        self.assertEqual('200ms/100ms', config['limits.cpu.allowance'])
        # On fewer CPUs it is not limited.
        self.assertNotIn('limits.cpu.allowance', self.config(cpus={0}))

    def test_quota_on_shared_cpus(self) -> None:
        def allowance(**quota: str) -> str:
            return self.config({f'quota:cpu_{key}': value for key, value in
                                quota.items()}, cpus={0, 1, 2, 3}
                               )['limits.cpu.allowance']
        self.assertEqual('100ms/100ms', allowance(quota='50000'))
        self.assertEqual('200ms/100ms', allowance(quota='-1'))
        # Not more than the flavor's vCPUs.
        self.assertEqual('200ms/100ms', allowance(quota='300000'))
        # A weight is ignored.
        self.assertEqual('200ms/100ms', allowance(shares='512'))

    def test_realtime_and_mixed_cpus(self) -> None:
        self.assert_refused({'hw:cpu_policy': 'mixed'}, 'hw:cpu_policy')
        self.assert_refused({'hw:cpu_realtime': 'yes'}, 'hw:cpu_realtime')
        self.config({'hw:cpu_realtime': 'no'})

    def test_bad_device(self) -> None:
        self.assert_refused({'lxd:gpu': 'all'}, 'lxd:gpu', '10de:1db4')

    def test_swap(self) -> None:
        self.assertEqual('true', self.config(swap=64)['limits.memory.swap'])
        self.assertEqual('64MiB', self.config(
            swap=64, sized_swap=True)['limits.memory.swap'])
        self.assertEqual('false', self.config(
            sized_swap=True)['limits.memory.swap'])

    def test_every_error_is_of_the_kind_that_aborts(self) -> None:
        """Nova does not reschedule an invalid flavor."""
        for specs in ({'lxd:x': '1'}, {'lxd:isolated': '?'},
                      {'lxd:max_processes': '?'}, {'quota:cpu_shares': '?'},
                      {'quota:cpu_quota': '?'}, {'quota:cpu_period': '?'},
                      {'quota:disk_read_bytes_sec': '?'},
                      {'quota:vif_inbound_average': '?'}):
            self.assert_refused(specs, *specs)


class CPUTestCase(FlavorTestCase):

    def allowance(self, **specs: object) -> str | None:
        vcpus = specs.pop('vcpus', 1)
        return self.config({f'quota:cpu_{key}': str(value)
                            for key, value in specs.items()},
                           vcpus=vcpus).get('limits.cpu.allowance')

    def test_none(self) -> None:
        self.assertIsNone(self.allowance())
        self.assertIsNone(self.allowance(shares=0))
        self.assertIsNone(self.allowance(period=50000))
        self.assertIsNone(self.allowance(quota=0))
        self.assertIsNone(self.allowance(quota=-1))
        self.assertIsNone(self.allowance(period=0))

    def test_shares(self) -> None:
        self.assertEqual('100%', self.allowance(shares=1024))
        self.assertEqual('200%', self.allowance(shares=2048))
        self.assertEqual('50%', self.allowance(shares=512))
        self.assertEqual('1%', self.allowance(shares=2))

    def test_quota_is_for_each_vcpu(self) -> None:
        self.assertEqual('50ms/100ms', self.allowance(quota=50000))
        self.assertEqual('200ms/100ms', self.allowance(quota=50000, vcpus=4))

    def test_period(self) -> None:
        self.assertEqual('5ms/10ms', self.allowance(quota=5000, period=10000))
        self.assertEqual('1ms/1ms', self.allowance(quota=1000, period=1000))
        self.assertEqual('1000ms/1000ms',
                         self.allowance(quota=1000000, period=1000000))

    def test_fractions_of_milliseconds(self) -> None:
        """LXD uses milliseconds; the share is preserved."""
        self.assertEqual('600ms/1000ms',
                         self.allowance(quota=1500, period=2500))
        self.assertEqual('700ms/1000ms',
                         self.allowance(quota=1400, period=2000))

    def test_tiny(self) -> None:
        self.assertEqual('1ms/1000ms',
                         self.allowance(quota=1000, period=1000000))

    def test_both(self) -> None:
        self.assertEqual('50ms/100ms',
                         self.allowance(quota=50000, shares=2048))
        self.assertEqual('200%', self.allowance(quota=-1, shares=2048))

    def test_out_of_range(self) -> None:
        for specs in ({'quota:cpu_shares': '-1'},
                      {'quota:cpu_shares': '200000'},
                      {'quota:cpu_period': '999'},
                      {'quota:cpu_period': '1000001'},
                      {'quota:cpu_quota': '999'}):
            self.assert_refused(specs, *specs)


class DiskTestCase(FlavorTestCase):

    def test_plain(self) -> None:
        self.assertEqual({'type': 'disk', 'path': '/', 'pool': 'default',
                          'size': '5GiB'}, self.root())

    def test_unlimited(self) -> None:
        self.assertNotIn('size', self.root(root_gb=0))

    def limits(self, **specs: int) -> dict[str, str]:
        return lxd_flavor.disk_limits(make_flavor(extra_specs={
            f'quota:disk_{key}_sec': str(value)
            for key, value in specs.items()}))

    def test_limits(self) -> None:
        self.assertEqual({}, self.limits())
        self.assertEqual({}, self.limits(read_bytes=0))
        self.assertEqual({'limits.read': '1000B'},
                         self.limits(read_bytes=1000))
        self.assertEqual({'limits.write': '20iops'},
                         self.limits(write_iops=20))
        self.assertEqual({'limits.max': '20iops'}, self.limits(total_iops=20))
        self.assertEqual({'limits.read': '1B', 'limits.write': '2B'},
                         self.limits(read_bytes=1, write_bytes=2))

    def test_bytes_win(self) -> None:
        self.assertEqual({'limits.read': '1000B'},
                         self.limits(read_bytes=1000, read_iops=20))

    def test_direction_goes_before_total(self) -> None:
        """In LXD, the total would replace both."""
        self.assertEqual({'limits.read': '5B', 'limits.write': '9B'},
                         self.limits(read_bytes=5, total_bytes=9))

    def test_root_has_limits(self) -> None:
        self.assertEqual('7iops', self.root(
            {'quota:disk_total_iops_sec': '7'})['limits.max'])


class VIFTestCase(FlavorTestCase):

    def quota(self, **specs: object) -> dict[str, int]:
        return lxd_flavor.vif_quota(make_flavor(extra_specs={
            f'quota:vif_{key}': str(value) for key, value in specs.items()}))

    def test_quota(self) -> None:
        self.assertEqual({}, self.quota())
        self.assertEqual({}, self.quota(inbound_average=0))
        self.assertEqual(
            {'inbound_average': 10, 'inbound_burst': 30,
             'outbound_average': 5},
            self.quota(inbound_average=10, inbound_burst=30,
                       outbound_average=5))

    def test_burst_alone(self) -> None:
        self.assertRaises(exception.InvalidInput, self.quota, inbound_peak=1)
        self.assertRaises(exception.InvalidInput, self.quota,
                          inbound_average=1, outbound_burst=1)
