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

"""Room for hundreds of idle servers in the quickstart cloud."""

from __future__ import annotations

import ipaddress

from tests.fixtures import cloud

FLAVOR = 'lxd.nano'
SERVERS = 300


class DensityTest(cloud.CloudTestCase):

    def test_quotas(self) -> None:
        compute = self.cloud.compute.get_quota_set(
            self.cloud.current_project_id)
        network = self.admin.network.get_quota(self.cloud.current_project_id)
        self.assertEqual({-1}, {compute.instances, compute.cores, compute.ram,
                                network.ports})

    def test_quotas_of_volumes(self) -> None:
        if not list(self.admin.identity.services(type='block-storage')):
            self.skipTest('This cloud has no Cinder')
        volumes = self.admin.block_storage.get_quota_set(
            self.cloud.current_project_id)
        self.assertEqual({-1}, {volumes.volumes, volumes.gigabytes})

    def test_resources(self) -> None:
        """The host has the resources of hundreds of small servers."""
        flavor = self.cloud.compute.find_flavor(FLAVOR, ignore_missing=False)
        [provider] = list(self.admin.placement.resource_providers())
        inventories = self.admin.placement.get(
            f'/resource_providers/{provider.id}/inventories'
        ).json()['inventories']
        for resource, amount in (('VCPU', flavor.vcpus),
                                 ('MEMORY_MB', flavor.ram),
                                 ('DISK_GB', flavor.disk)):
            inventory = inventories[resource]
            room = ((inventory['total'] - inventory['reserved']) *
                    inventory['allocation_ratio'])
            self.assertGreater(room / amount, SERVERS, resource)

    def test_addresses(self) -> None:
        subnet = self.cloud.network.find_subnet('private-subnet',
                                                ignore_missing=False)
        self.assertGreater(
            ipaddress.ip_network(subnet.cidr).num_addresses, 10 * SERVERS)

    def test_smallest_flavor(self) -> None:
        """A distribution runs in it, and answers."""
        server = self.boot(cloud.distribution(), FLAVOR)
        address = self.floating_ip(server.id)
        self.wait_answer(address)
        self.assertIn('MemTotal:', self.ssh(address, 'cat /proc/meminfo'))
