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

"""Traits that the host reports to Placement, and scheduling by them."""

from __future__ import annotations

import re
from typing import Any

from tests.fixtures import cloud

#: CPU flags of the kernel, and the traits that they become.
_FLAGS = {'aes': 'HW_CPU_X86_AESNI', 'avx2': 'HW_CPU_X86_AVX2',
          'sse4_2': 'HW_CPU_X86_SSE42', 'asimd': 'HW_CPU_AARCH64_ASIMD'}

#: Containers cannot have this, so no host reports it.
_NEVER = 'HW_CPU_X86_VMX'

_VERSION = '1.17'


class SchedulingTest(cloud.CloudTestCase):

    # -- Placement

    def placement(self, method: str, path: str, **kwargs: Any) -> Any:
        return getattr(self.admin.placement, method)(
            path, microversion=_VERSION, **kwargs)

    def provider(self) -> str:
        [provider] = list(self.admin.placement.resource_providers())
        return provider.id

    def traits(self) -> set[str]:
        return set(self.placement(
            'get', f'/resource_providers/{self.provider()}/traits'
        ).json()['traits'])

    def new_trait(self) -> str:
        name = 'CUSTOM_' + re.sub(r'\W', '_', self.unique('t')).upper()
        self.placement('put', f'/traits/{name}')
        self.addCleanup(self.placement, 'delete', f'/traits/{name}')
        return name

    # -- servers

    def flavor(self, **specs: str) -> str:
        """Make a flavor that requires or forbids traits."""
        model = self.admin.compute.find_flavor('lxd.tiny',
                                               ignore_missing=False)
        made = self.admin.compute.create_flavor(
            name=self.unique('traits'), vcpus=model.vcpus, ram=model.ram,
            disk=model.disk)
        self.addCleanup(self.admin.compute.delete_flavor, made.id)
        self.admin.compute.create_flavor_extra_specs(made.id, specs)
        return made.name

    def requiring(self, *traits: str) -> str:
        return self.flavor(**{f'trait:{trait}': 'required'
                              for trait in traits})

    def assert_no_host(self, flavor: str, said: str = 'No valid host'
                       ) -> None:
        server = self.create(flavor=flavor)
        self.wait_status(server.id, 'ERROR')
        # The status is set a moment before the fault.
        fault = cloud.wait_for(
            'a reason', lambda: self.cloud.compute.get_server(server.id).fault,
            cloud.ACTION_TIMEOUT)
        self.assertRegex(fault['message'], said)
        self.assertEqual([], self.host.instances_of(server.id))

    # -- tests

    def test_cpu_traits_are_those_of_the_cpu(self) -> None:
        flags = set()
        with open('/proc/cpuinfo', encoding='utf-8') as stream:
            for line in stream:
                key, _colon, value = line.partition(':')
                if key.strip().lower() in ('flags', 'features'):
                    flags.update(value.split())
        traits = self.traits()
        for flag, trait in _FLAGS.items():
            self.assertEqual(flag in flags, trait in traits, trait)
        self.assertNotIn(_NEVER, traits)

    def test_traits_that_the_host_has(self) -> None:
        driver = self.host.query(f'/1.0/storage-pools/{cloud.POOL}')['driver']
        wanted = {f'CUSTOM_LXD_POOL_{driver.upper()}', 'CUSTOM_LXD_NESTING'}
        traits = self.traits()
        self.assertLessEqual(wanted, traits)
        wanted.update(sorted(trait for trait in traits
                             if trait.startswith('HW_CPU_'))[:3])
        for _ in range(2):
            self.boot(flavor=self.requiring(*wanted))

    def test_trait_that_the_host_lacks(self) -> None:
        self.assert_no_host(self.requiring(_NEVER))
        self.assert_no_host(self.requiring('CUSTOM_LXD_NESTING',
                                           self.new_trait()))

    def test_trait_that_is_forbidden(self) -> None:
        self.assert_no_host(self.flavor(
            **{'trait:CUSTOM_LXD_NESTING': 'forbidden'}))
        self.boot(flavor=self.flavor(**{f'trait:{_NEVER}': 'forbidden'}))

    def test_trait_of_the_operator(self) -> None:
        """A trait that an operator sets is used, and the driver keeps it."""
        trait, path = self.new_trait(), (
            f'/resource_providers/{self.provider()}/traits')
        flavor = self.requiring(trait)
        self.assert_no_host(flavor)
        self.change(path, {trait}, set())
        self.addCleanup(self.change, path, set(), {trait})
        self.boot(flavor=flavor)
        # nova-compute has updated the resource provider meanwhile.
        self.assertIn(trait, self.traits())
        self.boot(flavor=flavor)

    def change(self, path: str, more: set[str], less: set[str]) -> None:
        """Change traits by hand; try again if nova-compute comes between."""
        def changed() -> bool:
            found = self.placement('get', path).json()
            found['traits'] = sorted({*found['traits'], *more} - less)
            return self.placement('put', path, json=found).status_code == 200
        cloud.wait_for('the change of the traits', changed, 10)

    def test_dedicated_cpus_without_any(self) -> None:
        """A host without dedicated CPUs does not dedicate its shared ones."""
        inventory = self.placement(
            'get', f'/resource_providers/{self.provider()}/inventories'
        ).json()['inventories']
        if 'PCPU' in inventory:
            self.skipTest('This host has dedicated CPUs')
        self.assert_no_host(self.flavor(**{'hw:cpu_policy': 'dedicated'}),
                            'No valid host|Exceeded')
