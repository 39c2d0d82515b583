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

"""Dedicated CPUs for servers, with Nova's scheduler and claims.

For each test the last CPU of the host is dedicated ([compute]
cpu_dedicated_set), and the others are shared.
"""

from __future__ import annotations

import os
from typing import Any

from nova.virt import hardware

from tests.fixtures import cloud

CONF = cloud.PREFIX / 'etc' / 'nova' / 'nova-compute.conf'
CPUS = sorted(os.sched_getaffinity(0))


class PinningTest(cloud.CloudTestCase):

    alone = True

    def setUp(self) -> None:
        super().setUp()
        if len(CPUS) < 2:
            self.skipTest('Needs two CPUs')
        self.own, self.common = {CPUS[-1]}, set(CPUS[:-1])
        # It is there before the host's CPUs are divided.
        self.old = self.boot()
        self.assertEqual({1}, {len(self.allowed(self.old))})
        self.plain = self.flavor()
        self.pinned = self.flavor(**{'hw:cpu_policy': 'dedicated'})
        before = CONF.read_bytes()
        self.addCleanup(self.wait_inventory, False)
        self.addCleanup(self.restart)
        self.addCleanup(CONF.write_bytes, before)
        with CONF.open('a') as file:
            file.write(
                f'[compute]\n'
                f'cpu_shared_set = {hardware.format_cpu_spec(self.common)}\n'
                f'cpu_dedicated_set = {hardware.format_cpu_spec(self.own)}\n')
        self.restart()
        self.wait_inventory(True)
        # Servers are deleted before what they use.
        self.addCleanup(self.delete, self.old.id)

    @staticmethod
    def restart() -> None:
        cloud.quickstart('restart', 'nova-compute')

    def wait_inventory(self, divided: bool) -> None:
        """Wait until nova-compute has reported its CPUs to Placement."""
        [provider] = list(self.admin.placement.resource_providers())

        def reported() -> bool:
            inventory = self.admin.placement.get(
                f'/resource_providers/{provider.id}/inventories'
            ).json()['inventories']
            return ('PCPU' in inventory) == divided
        cloud.wait_for('the inventory of CPUs', reported, cloud.BOOT_TIMEOUT)

    def flavor(self, **specs: str) -> str:
        model = self.admin.compute.find_flavor('lxd.tiny',
                                               ignore_missing=False)
        made = self.admin.compute.create_flavor(
            name=self.unique('cpu'), vcpus=1, ram=model.ram, disk=model.disk)
        self.addCleanup(self.admin.compute.delete_flavor, made.id)
        if specs:
            self.admin.compute.create_flavor_extra_specs(made.id, specs)
        return made.name

    def allowed(self, server: Any) -> set[int]:
        text = self.execute(server,
                            'grep Cpus_allowed_list /proc/self/status')
        return hardware.parse_cpu_spec(text.partition(':')[2].strip())

    def assert_on(self, server: Any, cpus: set[int]) -> None:
        try:
            cloud.wait_for('the CPUs', lambda: self.allowed(server) == cpus,
                           10)
        except AssertionError:
            self.assertEqual(cpus, self.allowed(server))

    def assert_no_host(self) -> None:
        server = self.create(flavor=self.pinned)
        self.wait_status(server.id, 'ERROR')
        self.assertEqual([], self.host.instances_of(server.id))
        self.delete(server.id)

    def test_own_and_shared(self) -> None:
        self.assert_on(self.old, self.common)
        pinned = self.boot(flavor=self.pinned)
        shared = self.boot(flavor=self.plain)
        self.assert_on(pinned, self.own)
        self.assert_on(shared, self.common)
        self.assert_no_host()
        started = self.started_at(pinned)
        self.restart()
        # CPUs in use are not assigned twice, whichever server restarts.
        self.assert_no_host()
        self.assert_on(pinned, self.own)
        self.assertEqual(started, self.started_at(pinned))
        self.cloud.compute.reboot_server(pinned.id, 'HARD')
        self.wait_status(pinned.id, 'ACTIVE')
        self.assert_on(pinned, self.own)
        self.delete(pinned.id)
        self.assert_on(self.boot(flavor=self.pinned), self.own)

    def resize(self, server: Any, flavor: str) -> None:
        self.cloud.compute.resize_server(
            server.id, self.cloud.compute.find_flavor(flavor).id)
        self.wait_status(server.id, 'VERIFY_RESIZE')

    def test_resize(self) -> None:
        server = self.boot(flavor=self.plain)
        started = self.started_at(server)
        for _ in range(2):
            self.resize(server, self.pinned)
            self.assert_on(server, self.own)
            self.cloud.compute.revert_server_resize(server.id)
            self.wait_status(server.id, 'ACTIVE')
            self.assert_on(server, self.common)
        for flavor, cpus in ((self.pinned, self.own),
                             (self.plain, self.common)):
            self.resize(server, flavor)
            self.cloud.compute.confirm_server_resize(server.id)
            self.wait_status(server.id, 'ACTIVE')
            self.assert_on(server, cpus)
        self.assertEqual(started, self.started_at(server))
        # The CPU is free again.
        self.assert_on(self.boot(flavor=self.pinned), self.own)
