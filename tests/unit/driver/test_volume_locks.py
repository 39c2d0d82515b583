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

import fixtures
from nova import exception
from oslo_utils import units

from nova_lxd_py.virt.guest import events
from nova_lxd_py.virt.volume import usage
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


class ReconcileTest(volume_case.VolumeTestCase):
    """Volumes are reconciled, since LXD is back, while a server is changed."""

    def setUp(self) -> None:
        self.useFixture(fixtures.MockPatchObject(
            events, 'RECONNECT_FIRST', 0.02))
        super().setUp()

    def reconcile(self, *_request: Any) -> None:
        self.lxd.clear_requests()
        self.lxd.close_websockets()
        # One for the registry of guests, the next to reconcile.
        self.lxd.wait_for(
            lambda: self.lxd.count('GET', '/1.0/instances') > 1)
        # Without a lock it would get to work meanwhile.
        self.wait(0.3)

    def wait(self, seconds: float) -> None:
        """Wait until volumes are reconciled, or for so many seconds."""
        for thread in threading.enumerate():
            if thread.name == 'lxd-reconnect':
                thread.join(seconds)

    def test_volume_of_a_server_that_is_started(self) -> None:
        """The server's LXD instance does not have its device yet."""
        self.driver.power_off(self.server)
        self.lxd.before('PUT', f'/1.0/instances/{self.server.name}',
                        self.reconcile)
        self.driver.power_on(self.context, self.server, [], self.info())
        self.assertEqual([self.volume.id], list(self.given()))
        self.assertIsNotNone(self.storage.device_of(self.volume))

    def test_swap_that_is_under_way(self) -> None:
        """The note of it looks like that of an interrupted one."""
        connection, target = self.attach(), self.storage.volume()
        self.storage.before('block_copy.copy', self.reconcile)
        self.driver.swap_volume(self.context, connection, target.connection(),
                                self.server, volume_case.PATH, 0)
        self.wait(5)
        self.assertEqual([target.id], list(self.given()))
        self.assertIsNone(self.storage.device_of(self.volume))

    def test_note_of_a_volume_that_is_being_connected(self) -> None:
        """If nova-compute ends now, nothing else tells of the volume."""
        def connect() -> None:
            self.reconcile()
            notes.append(usage.KEY_ATTACHING in
                         self.config(self.server))
        notes: list[bool] = []
        self.storage.before('brick.connect', connect)
        self.attach()
        self.assertEqual([True], notes)
