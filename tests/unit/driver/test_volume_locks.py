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


"""Other requests for a volume or its server while it is attached."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import threading
from typing import Any

from nova import exception
from oslo_utils import units

from tests.fixtures import volume_case


class LockTest(volume_case.VolumeTestCase):

    connect = 'brick.connect'

    def while_attaching(self, act: Callable[[Any], None]) -> None:
        """Have another server use a volume while it is being attached."""
        other = self.host.spawn(power_on=False)
        seen: list[int] = []

        def run() -> None:
            with contextlib.suppress(exception.NovaException):
                act(other)
        second = threading.Thread(target=run)

        def pause() -> None:
            before = len(self.storage.calls)
            second.start()
            # Without a lock it would get to work meanwhile.
            second.join(0.3)
            seen.append(len(self.storage.calls) - before)
        self.storage.before(self.connect, pause)
        self.attach()
        second.join(10)
        self.assertEqual([0], seen)
        self.assertEqual([self.volume.id], list(self.given()))
        self.assertIsNotNone(self.storage.device_of(self.volume))

    def test_detached_from_another_server_meanwhile(self) -> None:
        self.while_attaching(lambda other: self.detach(
            self.volume.connection(), other))

    def test_another_volume_of_the_server_is_detached_meanwhile(self
                                                                ) -> None:
        second = self.storage.volume()
        connection = self.attach(second, path='/dev/vdc')
        self.while_attaching(lambda other: self.detach(
            connection, path='/dev/vdc'))

    def test_extended_for_another_server_meanwhile(self) -> None:
        self.while_attaching(lambda other: self.driver.extend_volume(
            self.context, self.volume.connection(), other, 2 * units.Gi))

    def test_another_server_is_started_with_it_meanwhile(self) -> None:
        self.while_attaching(lambda other: self.driver.power_on(
            self.context, other, [], self.info()))
