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
"""The project of a campaign: networks, quotas and its end."""

from __future__ import annotations

from collections.abc import Callable
import threading
import time
from typing import Any, TypeVar

from keystoneauth1 import exceptions as keystone_exceptions
import openstack
from openstack import connection
from openstack import exceptions
from oslo_utils import timeutils

from tests.fixtures import cloud

T = TypeVar('T')

#: Seconds in which APIs answer again after the end of a daemon.
API_TIMEOUT = 120 * cloud.PATIENCE
#: Seconds for what one operation starts.
TIMEOUT = 120 * cloud.PATIENCE
#: Seconds for what Cinder or Glance do.
VOLUME_TIMEOUT = 60 * cloud.PATIENCE
#: Seconds in which everything of one kind is deleted at the end.
END_TIMEOUT = 240 * cloud.PATIENCE


class Failed(Exception):
    """An operation did not do what it should."""


class Stuck(Failed):
    """An operation did not end in time."""


def patiently(call: Callable[[], T], timeout: float = API_TIMEOUT) -> T:
    """Call an API again while the cloud itself is at fault.

    :raises openstack.exceptions.HttpException: if the request is at fault.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            return call()
        except (exceptions.SDKException,
                keystone_exceptions.ClientException, OSError) as error:
            status = getattr(error, 'status_code', None) or getattr(
                error, 'http_status', None)
            if ((status and 400 <= status < 500 and status != 401) or
                    time.monotonic() > deadline):
                raise
            time.sleep(1)


class Project:
    """A project for one campaign; each thread has its own connections."""

    def __init__(self, servers: int) -> None:
        self._local = threading.local()
        #: How many volumes had to be reset at the end.
        self.resets = 0
        #: How many allocations were left of resizes.
        self.allocations = 0
        self._migrations: set[str] = set()
        self.admin = cloud.connect(cloud.ADMIN_CLOUD)
        identity = self.admin.identity
        self.name = cloud.CloudTestCase.unique('campaign')
        self.project = identity.create_project(
            name=self.name, domain_id='default')
        identity.assign_project_role_to_user(
            self.project, identity.find_user('demo', ignore_missing=False),
            identity.find_role('member', ignore_missing=False))
        self._set_quotas(servers)
        network = self.api.network
        self.network = network.create_network(name='campaign')
        network.create_subnet(network_id=self.network.id, ip_version=4,
                              cidr='10.97.0.0/24')
        # It leads nowhere, so that it takes no answers away from the other.
        self.side = network.create_network(name='side')
        network.create_subnet(network_id=self.side.id, ip_version=4,
                              cidr='10.98.0.0/24', gateway_ip=None)
        group = next(iter(network.security_groups(name='default')))
        network.create_security_group_rule(
            security_group_id=group.id, direction='ingress', protocol='tcp')
        self.flavors = [
            self.admin.compute.create_flavor(
                name=f'{self.name}-{ram}', vcpus=1, ram=ram, disk=2)
            for ram in (128, 256)]
        for flavor in self.flavors:
            # Small hosts have too few CPUs for so many servers.
            self.admin.compute.create_flavor_extra_specs(
                flavor, {'resources:VCPU': '0'})

    def _set_quotas(self, servers: int) -> None:
        self.admin.compute.update_quota_set(
            self.project.id, instances=servers + 5, cores=100,
            ram=100 * 1024)
        self.admin.block_storage.update_quota_set(
            self.project.id, volumes=200, snapshots=200, gigabytes=1000)

    @property
    def api(self) -> connection.Connection:
        """This thread's connection as a user of the project."""
        if not hasattr(self._local, 'api'):
            config = openstack.config.OpenStackConfig(
                config_files=[str(cloud.PREFIX / 'clouds.yaml')],
                load_envvars=False)
            self._local.api = connection.Connection(config=config.get_one(
                cloud=cloud.USER_CLOUD, project_name=self.name))
        return self._local.api

    @property
    def operator(self) -> connection.Connection:
        """This thread's connection as an administrator."""
        if not hasattr(self._local, 'operator'):
            self._local.operator = cloud.connect(cloud.ADMIN_CLOUD)
        return self._local.operator

    # -- the end

    def delete(self) -> list[str]:
        """Delete everything in the project, and the project.

        :returns: what could not be deleted.
        """
        left = self._delete_servers()
        self._delete_allocations()
        left += self._delete_each(
            'image', lambda: self.api.image.images(
                visibility='private', owner=self.project.id),
            self.api.image.delete_image)
        storage = self.api.block_storage
        left += self._delete_each(
            'snapshot', storage.snapshots, storage.delete_snapshot)
        left += self._delete_each(
            'volume', storage.volumes, self._delete_volume)
        network = self.api.network
        left += self._delete_each(
            'port', lambda: (port for port in network.ports(
                project_id=self.project.id)
                if not port.device_owner.startswith('network:')),
            network.delete_port)
        for network_id in (self.network.id, self.side.id):
            patiently(lambda id=network_id: network.delete_network(id))
        for flavor in self.flavors:
            patiently(lambda flavor=flavor:
                      self.operator.compute.delete_flavor(flavor))
        for group in list(self.operator.network.security_groups(
                project_id=self.project.id)):
            self.operator.network.delete_security_group(group)
        self.operator.identity.delete_project(self.project)
        return left

    def _delete_volume(self, identifier: str) -> None:
        """Delete a volume, also one that a fault has left reserved."""
        volume = self.api.block_storage.get_volume(identifier)
        if volume.status in ('reserved', 'attaching', 'detaching') or (
                volume.status == 'creating' and
                timeutils.is_older_than(volume.created_at, VOLUME_TIMEOUT)):
            # No server is left to which it could belong, or that waits for it.
            self.operator.block_storage.reset_volume_status(
                identifier, 'available', 'detached')
            self.resets += 1
        self.api.block_storage.delete_volume(identifier)

    def _delete_servers(self) -> list[str]:
        return self._delete_each(
            'server', lambda: self.api.compute.servers(details=True),
            self.api.compute.delete_server)

    def note_migrations(self, server: str) -> None:
        """Remember the migrations of a server whose resize was interrupted.

        Nova deletes the allocations of the server, and does not list the
        migrations of a deleted one.
        """
        def listed() -> list[dict[str, Any]]:
            answer = self.operator.compute.get(
                '/os-migrations', microversion='2.59',
                params={'instance_uuid': server})
            exceptions.raise_from_response(answer)
            return answer.json()['migrations']

        self._migrations.update(
            migration['uuid'] for migration in patiently(listed))

    def _delete_allocations(self) -> None:
        """Delete the allocations that interrupted resizes have left."""
        placement = self.operator.placement
        for migration in self._migrations:
            path = f'/allocations/{migration}'
            if placement.get(path).json()['allocations']:
                exceptions.raise_from_response(placement.delete(path))
                self.allocations += 1

    def _delete_each(self, kind: str, find: Callable[[], Any],
                     delete: Callable[[str], Any]) -> list[str]:
        """Delete all of a kind, again and again until none is there."""
        deadline = time.monotonic() + END_TIMEOUT
        while True:
            found = patiently(lambda: list(find()))
            if not found:
                return []
            if time.monotonic() > deadline:
                return [f'{kind} {one.id} ({one.status}) cannot be deleted'
                        for one in found]
            for one in found:
                try:
                    delete(one.id)
                except exceptions.SDKException:
                    # In the middle of something else, or gone.
                    continue
            time.sleep(2)
