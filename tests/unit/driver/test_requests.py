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

"""Requests to LXD for one server, whatever the number of the others."""

from __future__ import annotations

from collections.abc import Callable
import re
from typing import Any

from nova import objects

from tests.fixtures import disks
from tests.fixtures import fake_driver_host

#: Lists whose length grows with the number of servers.
LISTS = ('/1.0/instances', '/1.0/images', '/1.0/images/aliases',
         '/1.0/storage-pools/default/volumes/custom')
OTHERS = 4


class RequestsTest(fake_driver_host.FakeDriverTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.image = self.host.image()
        self.info = disks.described(ephemerals=[
            {'size': 1, 'device_name': '/dev/sdb', 'guest_format': None},
            {'size': 1, 'device_name': '/dev/sdc', 'guest_format': None}])
        self.servers = 0
        # The image, its template and the uid range of the project.
        for _time in range(3):
            self.spawn(self.instance())

    def instance(self) -> objects.Instance:
        return self.host.instance(self.image, ephemeral_gb=1,
                                  config_drive='True')

    def spawn(self, server: objects.Instance) -> None:
        self.servers += 1
        self.host.spawn(server, self.image, self.host.ports(1),
                        block_device_info=self.info)

    def requests(self, server: objects.Instance,
                 action: Callable[[], Any]) -> list[str]:
        """Return the requests of an action, without what is different by
        chance."""
        # The thread that follows events asks on its own account.
        self.driver._services.watcher.stop()
        with self.lxd.recording() as recorded:
            action()
        self.assertEqual([], [
            str(entry) for entry in recorded
            if entry.method == 'GET' and entry.path in LISTS])
        return [re.sub(r'/operations/[^/]+/', '/operations/ID/', str(entry)
                       .replace(server.name, 'NAME')
                       .replace(server.uuid, 'UUID')) for entry in recorded]

    def of_actions(self) -> dict[str, list[str]]:
        """Return the requests of actions on a new server, by the action."""
        server, second = self.instance(), self.instance()

        def cycle() -> None:
            self.driver.power_off(server)
            self.driver.power_on(self.context, server, self.host.ports(1),
                                 self.info)
            self.driver.reboot(self.context, server, self.host.ports(1),
                               'HARD', self.info)

        found = {'spawn': self.requests(server, lambda: self.spawn(server)),
                 'power': self.requests(server, cycle)}
        self.spawn(second)
        found['destroy'] = self.requests(
            second, lambda: self.driver.destroy(
                self.context, second, self.host.ports(1), self.info))
        return found

    def test_other_servers(self) -> None:
        """Actions on one server make the same requests when there are many
        others."""
        found = self.of_actions()
        for _number in range(OTHERS):
            self.spawn(self.instance())
        self.assertEqual(found, self.of_actions())
        self.assertEqual(2, sum(
            request.startswith('DELETE /1.0/storage-pools/default/volumes/'
                               'custom/ephemeral-')
            for request in found['destroy']))
        # Three to find the disks, and two to delete each; one for the config
        # drive.
        self.assertLessEqual(len(found['destroy']), 13)

    def deletion(self, server: objects.Instance) -> list[str]:
        return self.requests(server, lambda: self.driver.destroy(
            self.context, server, self.host.ports(1), disks.described()))

    def test_plain_deletion(self) -> None:
        """One more than a script makes that stops and deletes it."""
        server = self.host.spawn(self.host.instance(self.image), self.image,
                                 self.host.ports(1))
        self.assertEqual([
            'GET /1.0/instances/NAME',
            'PUT /1.0/instances/NAME/state',
            'GET /1.0/operations/ID/wait',
            'DELETE /1.0/instances/NAME',
            'GET /1.0/operations/ID/wait',
        ], self.deletion(server))

    def test_deletion_of_a_stopped_server(self) -> None:
        server = self.host.spawn(self.host.instance(self.image), self.image,
                                 self.host.ports(1))
        self.driver.power_off(server)
        self.assertEqual([
            'GET /1.0/instances/NAME',
            'DELETE /1.0/instances/NAME',
            'GET /1.0/operations/ID/wait',
        ], self.deletion(server))
