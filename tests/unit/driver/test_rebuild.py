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

"""Rebuilding a server, through the driver in the order that Nova calls it.

The driver leaves it to Nova, which destroys the server and spawns it again
under the same uuid.
"""

from __future__ import annotations

from typing import Any

from nova.compute import power_state
from nova import exception
from nova import objects

from tests.fixtures import disks
from tests.fixtures import fake_driver_host
from tests.fixtures.fake_lxd import fixture


class RebuildTest(fake_driver_host.FakeDriverTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.ports = self.host.ports()
        self.volume = self.storage.volume()
        image = self.host.image()
        self.server = self.host.spawn(
            self.host.instance(image, config_drive='True'), image, self.ports,
            block_device_info=self.info(),
            injected_files=[('/etc/mine', b'old')])

    def info(self) -> dict[str, Any]:
        return disks.described(self.volume.mapping())

    def rebuild(self, image: objects.ImageMeta) -> None:
        info = self.info()
        self.driver.destroy(self.context, self.server, self.ports, info)
        self.server.image_ref = image.id
        self.host.spawn(self.server, image, self.ports,
                        block_device_info=self.info())

    def test_another_image(self) -> None:
        self.volume.disk.data = b'mine'
        self.rebuild(self.host.image(
            fixture.unified_image({'etc/issue': b'new'})))
        files = self.host.fake(self.server).files
        self.assertEqual(b'new', files.get('/etc/issue').content)
        self.assertNotIn('mine', files.children('/etc'))
        self.assertEqual(b'mine', self.volume.disk.data)
        self.assert_state(power_state.RUNNING, self.server)
        self.assertEqual([self.server.name], list(self.host.own()))
        self.assertEqual(1, len(self.host.lxd_volumes()))

    def test_image_is_gone(self) -> None:
        image = self.host.image()
        self.host.glance.delete(None, image.id)
        self.assertRaises(exception.ImageNotFound, self.rebuild, image)
        self.assert_nothing_left()
        # The next attempt does it.
        self.rebuild(self.host.image())
        self.assert_state(power_state.RUNNING, self.server)

    def test_evacuated_here(self) -> None:
        """Nova does not destroy on the host that is down."""
        other = self.host.instance(self.host.image())
        image = self.host.image()
        self.host.spawn(other, image, self.host.ports())
        self.assert_state(power_state.RUNNING, other)
        # Back on the old host: Nova destroys what it finds there.
        self.driver.destroy(self.context, self.server, self.ports,
                            self.info())
        self.assertEqual([other.uuid], self.driver.list_instance_uuids())
