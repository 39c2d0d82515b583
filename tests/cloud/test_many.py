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

"""Fifty servers, created and deleted at the same time."""

from __future__ import annotations

from typing import Any

import openstack

from tests.fixtures import cloud

#: Nova's quota is ten servers for each project.
PER_PROJECT, PROJECTS = 10, 5
#: Seconds for all of them.
TIMEOUT = 600


class ManyTest(cloud.CloudTestCase):

    alone = True

    def flavor(self) -> str:
        """Create a flavor without CPU allocations, for hosts with few CPUs."""
        name = self.unique('many')
        flavor = self.admin.compute.create_flavor(
            name=name, vcpus=1, ram=64, disk=1)
        self.addCleanup(self.admin.compute.delete_flavor, flavor)
        self.admin.compute.create_flavor_extra_specs(
            flavor, {'resources:VCPU': '0'})
        return name

    def project(self) -> tuple[Any, Any]:
        """Return a connection to a new project with a network of its own."""
        identity = self.admin.identity
        project = identity.create_project(
            name=self.unique('many'), domain_id='default')
        self.addCleanup(identity.delete_project, project)
        user = identity.find_user('demo', ignore_missing=False)
        role = identity.find_role('member', ignore_missing=False)
        identity.assign_project_role_to_user(project, user, role)
        config = openstack.config.OpenStackConfig(
            config_files=[str(cloud.PREFIX / 'clouds.yaml')],
            load_envvars=False)
        connection = openstack.connection.Connection(config=config.get_one(
            cloud=cloud.USER_CLOUD, project_name=project.name))
        network = connection.network.create_network(name='many')
        # Neutron gives each project a security group of its own.
        self.addCleanup(self._remove_groups, project.id)
        self.addCleanup(connection.network.delete_network, network)
        connection.network.create_subnet(
            network_id=network.id, ip_version=4, cidr='10.99.0.0/24')
        return connection, network

    def _remove_groups(self, project_id: str) -> None:
        for group in self.admin.network.security_groups(
                project_id=project_id):
            self.admin.network.delete_security_group(group)

    def test_together(self) -> None:
        flavor = self.flavor()
        created = []
        for connection, network in [self.project() for _ in range(PROJECTS)]:
            self.create(flavor=flavor, key_name=None, cloud=connection,
                        networks=[{'uuid': network.id}],
                        min_count=PER_PROJECT, max_count=PER_PROJECT)
            servers = list(connection.compute.servers())
            self.assertEqual(PER_PROJECT, len(servers))
            for server in servers:
                self.addCleanup(self.delete, server.id, connection)
                created.append((connection, server))
        ports = {}
        for connection, server in created:
            self.wait_status(server.id, 'ACTIVE', TIMEOUT, connection)
            ports[server.id] = [
                port.id for port in
                connection.network.ports(device_id=server.id)]
        instances = {server.id: self.host.instances_of(server.id)
                     for _, server in created}
        self.assertEqual([1] * len(created),
                         [len(found) for found in instances.values()])
        self.assertEqual({'Running'}, {
            found[0]['status'] for found in instances.values()})
        for connection, server in created:
            connection.compute.delete_server(server.id)
        for connection, server in created:
            self.delete(server.id, connection, TIMEOUT)
        for _, server in created:
            self.assert_gone(server.id, ports[server.id])
