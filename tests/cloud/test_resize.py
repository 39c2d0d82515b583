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

"""Resize on the same host through the real API."""

from __future__ import annotations

from typing import Any

from openstack import exceptions

from tests.fixtures import cloud
from tests.fixtures import turns


class ResizeTest(cloud.CloudTestCase):

    def flavor(self, **fields: int) -> Any:
        values = {'vcpus': 1, 'ram': 256, 'disk': 2, **fields}
        flavor = self.admin.compute.create_flavor(
            name=self.unique('resize'), **values)
        self.addCleanup(self.admin.compute.delete_flavor, flavor.id)
        return flavor

    def resize(self, server: Any, flavor: Any) -> None:
        self.cloud.compute.resize_server(server.id, flavor.id)
        self.wait_status(server.id, 'VERIFY_RESIZE', 120)

    def limits(self, server: Any) -> tuple[str, str, str]:
        """Return CPUs and memory in the guest, and the quota of its disk."""
        found = self.host.instances_of(server.id)[0]
        return (self.execute(server, 'nproc'),
                found['config']['limits.memory'],
                found['devices']['root']['size'])

    def test_grow_confirm_and_revert_without_a_stop(self) -> None:
        small, large = self.flavor(), self.flavor(ram=512, disk=3)
        server = self.boot(flavor=small.name)
        began, before = self.started_at(server), self.limits(server)
        for _turn in range(2):
            self.resize(server, large)
            self.assertEqual(('1', '512MiB', '3GiB'), self.limits(server))
            self.cloud.compute.revert_server_resize(server.id)
            self.wait_status(server.id, 'ACTIVE')
            self.assertEqual(before, self.limits(server))
        self.resize(server, large)
        self.cloud.compute.confirm_server_resize(server.id)
        self.wait_status(server.id, 'ACTIVE')
        self.assertEqual(('1', '512MiB', '3GiB'), self.limits(server))
        self.assertEqual(began, self.started_at(server))
        self.wait_answer(self.floating_ip(server.id))
        ports = [port.id for port in self.ports(server.id)]
        self.delete(server.id)
        self.assert_gone(server.id, ports)

    def test_memory_shrinks_without_a_stop(self) -> None:
        large, small = self.flavor(ram=512), self.flavor(ram=128)
        server = self.boot(flavor=large.name)
        began = self.started_at(server)
        self.resize(server, small)
        self.assertEqual('128MiB', self.limits(server)[1])
        self.assertEqual(began, self.started_at(server))
        self.cloud.compute.confirm_server_resize(server.id)
        self.wait_status(server.id, 'ACTIVE')

    def test_stopped_server(self) -> None:
        server = self.boot(flavor=self.flavor().name)
        self.cloud.compute.stop_server(server.id)
        self.wait_status(server.id, 'SHUTOFF')
        self.resize(server, self.flavor(ram=512))
        self.cloud.compute.confirm_server_resize(server.id)
        self.wait_status(server.id, 'SHUTOFF')
        self.cloud.compute.start_server(server.id)
        self.wait_status(server.id, 'ACTIVE')
        self.assertEqual('512MiB', self.limits(server)[1])

    def test_smaller_root_disk_is_refused(self) -> None:
        server = self.boot(flavor=self.flavor(disk=3).name)
        began, before = self.started_at(server), self.limits(server)
        # Nova's API refuses it before it reaches the driver.
        self.assertRaises(
            exceptions.BadRequestException, self.cloud.compute.resize_server,
            server.id, self.flavor(disk=1).id)
        self.wait_status(server.id, 'ACTIVE')
        self.assertEqual(before, self.limits(server))
        self.assertEqual(began, self.started_at(server))

    def test_delete_while_resized(self) -> None:
        server = self.boot(flavor=self.flavor().name)
        self.resize(server, self.flavor(ram=512))
        ports = [port.id for port in self.ports(server.id)]
        self.delete(server.id)
        self.assert_gone(server.id, ports)

    @turns.alone
    def test_restart_of_nova_compute_while_resized(self) -> None:
        server = self.boot(flavor=self.flavor().name)
        before = self.limits(server)
        self.resize(server, self.flavor(ram=512))
        cloud.quickstart('restart', 'nova-compute')
        self.cloud.compute.revert_server_resize(server.id)
        self.wait_status(server.id, 'ACTIVE', 120)
        self.assertEqual(before, self.limits(server))
