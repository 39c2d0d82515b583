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

"""The driver on Incus: tests of other modules where the servers differ."""

from __future__ import annotations

from tests.fixtures import fake_driver_host


class GuestAPITest(fake_driver_host.FakeDriverTestCase):

    server = 'incus'
    options = {'devlxd': True}

    def test_key(self) -> None:
        config = self.config(self.host.spawn())
        self.assertEqual('true', config['security.guestapi'])
        self.assertNotIn('security.devlxd', config)


class TemplatesTest(fake_driver_host.FakeDriverTestCase):

    server = 'incus'

    def test_no_templates(self) -> None:
        """Incus mounts root disks idmapped: an own uid range costs nothing.
        """
        image = self.host.image()
        servers = [self.host.spawn(self.host.instance(image), image)
                   for _number in range(3)]
        self.assertEqual([], [name for name in self.host.lxd_instances()
                              if 'template' in name])
        self.assertNotEqual(
            self.config(servers[1])['volatile.idmap.base'],
            self.config(servers[2])['volatile.idmap.base'])
