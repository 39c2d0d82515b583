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

"""Rebuild through the real API."""

from __future__ import annotations

from typing import Any

from openstack import exceptions

from tests.fixtures import cloud
from tests.fixtures import turns


class RebuildTest(cloud.CloudTestCase):

    def rebuild(self, server: Any, image: str, status: str = 'ACTIVE',
                **arguments: Any) -> None:
        self.cloud.compute.rebuild_server(
            server.id, image=self.image_id(self.cloud, image), **arguments)
        self.wait_status(server.id, status, cloud.BOOT_TIMEOUT)

    def test_same_and_other_image(self) -> None:
        server = self.boot(metadata={'kept': 'yes'})
        address = self.floating_ip(server.id)
        ports = [port.id for port in self.ports(server.id)]
        self.execute(server, 'echo old > /root/old')
        fixed = self.fixed_ip(server)
        for image in (cloud.TINY, cloud.distribution(), cloud.TINY):
            self.rebuild(server, image)
            self.assertEqual('', self.execute(
                server, 'cat /root/old 2>/dev/null || true'))
            now = self.cloud.compute.get_server(server.id)
            self.assertEqual(
                (server.name, fixed, {'kept': 'yes'}),
                (now.name, self.fixed_ip(now), dict(now.metadata)))
            self.assertEqual(ports, [
                port.id for port in self.ports(server.id)])
            self.wait_answer(address)
        self.assertEqual(server.name, self.execute(server, 'hostname'))
        self.delete(server.id)
        self.assert_gone(server.id, ports)

    def test_stopped_server_stays_stopped(self) -> None:
        server = self.boot()
        self.cloud.compute.stop_server(server.id)
        self.wait_status(server.id, 'SHUTOFF')
        self.rebuild(server, cloud.TINY, 'SHUTOFF')
        self.cloud.compute.start_server(server.id)
        self.wait_status(server.id, 'ACTIVE')

    def test_image_too_large(self) -> None:
        """The rebuild is refused before anything of the server is lost."""
        flavor = self.admin.compute.create_flavor(
            name=self.unique('small'), vcpus=1, ram=128, disk=1)
        self.addCleanup(self.admin.compute.delete_flavor, flavor.id)
        image = self.cloud.image.create_image(
            self.unique('demanding'), disk_format='raw',
            container_format='bare', min_disk=2, data=b'x',
            allow_duplicates=True)
        self.addCleanup(self.cloud.image.delete_image, image.id)
        server = self.boot(flavor=flavor.name)
        self.execute(server, 'echo kept > /root/kept')
        try:
            self.cloud.compute.rebuild_server(server.id, image=image.id)
        except exceptions.BadRequestException:
            pass
        else:
            self.fail('An image that does not fit was accepted')
        self.assertEqual('kept', self.execute(server, 'cat /root/kept'))

    @turns.alone
    def test_restart_of_nova_compute_in_the_middle(self) -> None:
        server = self.boot(cloud.distribution(), 'lxd.small')
        ports = [port.id for port in self.ports(server.id)]
        self.cloud.compute.rebuild_server(
            server.id, image=self.image_id(self.cloud, cloud.distribution()))
        cloud.wait_for('its beginning', lambda: self.cloud.compute.get_server(
            server.id).status == 'REBUILD', 30, 0.05)
        cloud.quickstart('restart', 'nova-compute')

        def over() -> Any:
            found = self.cloud.compute.get_server(server.id)
            return found if found.task_state is None else None
        found = cloud.wait_for('the task to end', over, 120)
        if found.status != 'ACTIVE':
            # Nova does not resume an interrupted rebuild; the next one works.
            self.assertEqual('ERROR', found.status)
            self.cloud.compute.rebuild_server(
                server.id,
                image=self.image_id(self.cloud, cloud.distribution()))
            cloud.wait_for(
                'a rebuilt server', lambda: self.cloud.compute.get_server(
                    server.id).status == 'ACTIVE', 120)
        self.wait_answer(self.floating_ip(server.id))
        self.delete(server.id)
        self.assert_gone(server.id, ports)
