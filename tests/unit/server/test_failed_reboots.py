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
"""Guests that reboot themselves, and that LXD cannot start again."""

from __future__ import annotations

import threading
from typing import Any

import fixtures
from nova.compute import power_state
from nova.compute import task_states
from nova.compute import vm_states
from nova import exception
from nova import objects
from nova.virt import event as virt_event

from nova_lxd_py.virt.lxd import errors
from tests.fixtures import fake_driver_host


class FailedRebootsTest(fake_driver_host.FakeDriverTestCase):

    def setUp(self) -> None:
        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.guest.events.RECONNECT_FIRST', 0.01))
        super().setUp()
        self.watcher = self.driver._services.watcher
        # Few guests are started again here.
        self.watcher._shutdown_delay = 0.05
        self.moved = self.lxd.daemon.interface_moved
        self.ports = self.host.ports()
        self.instance = self.host.spawn(network_info=self.ports)
        self.instance.info_cache = objects.InstanceInfoCache(
            network_info=self.ports)
        self.useFixture(fixtures.MonkeyPatch(
            'nova.objects.Instance.get_by_uuid', self.look_up))
        # The start is reported late.
        self.lxd.wait_for(self.reported)
        self.host.events.clear()

    def look_up(self, cls: Any, context: Any, uuid: str, **kwargs: Any
                ) -> objects.Instance:
        self.assertEqual(self.instance.uuid, uuid)
        return self.instance

    def lose_device(self) -> None:
        """The guest has renamed its device, so LXD does not find it."""
        self.lxd.daemon.interface_moved = None

    def reported(self) -> list[int]:
        return [event.transition for event in self.host.events]

    def assert_reported_as_stopped(self) -> None:
        self.lxd.wait_for(lambda: virt_event.EVENT_LIFECYCLE_STOPPED in
                          self.reported())
        self.assert_state(power_state.SHUTDOWN, self.instance)

    def test_reboot(self) -> None:
        self.lose_device()
        # The recovery waits for the lock.
        with self.driver._services.guests.changing(self.instance):
            self.lxd.guest_reboot(self.instance.name)
            self.assert_state(power_state.SHUTDOWN, self.instance)
        self.lxd.wait_for(self.reported)
        self.assertEqual([virt_event.EVENT_LIFECYCLE_STARTED],
                         self.reported())
        self.assert_state(power_state.RUNNING, self.instance)

    def test_shutdown(self) -> None:
        """Also after an earlier reboot."""
        self.watcher._shutdown_delay = 30
        self.lxd.guest_reboot(self.instance.name)
        self.lxd.wait_for(self.reported)
        self.watcher._shutdown_delay = 0.05
        self.host.events.clear()
        self.lose_device()
        self.lxd.guest_poweroff(self.instance.name)
        self.assert_reported_as_stopped()

    def test_nova_does_not_want_it_to_run(self) -> None:
        for changes in ({'task_state': task_states.POWERING_OFF},
                        {'vm_state': vm_states.STOPPED},
                        {'host': 'other'}):
            with self.subTest(changes=changes):
                self.lose_device()
                before = {name: getattr(self.instance, name)
                          for name in changes}
                for name, value in changes.items():
                    setattr(self.instance, name, value)
                self.lxd.guest_reboot(self.instance.name)
                self.assert_reported_as_stopped()
                for name, value in before.items():
                    setattr(self.instance, name, value)
                self.lxd.daemon.interface_moved = self.moved
                self.driver.power_on(self.context, self.instance, self.ports)
                self.lxd.wait_for(lambda: virt_event.EVENT_LIFECYCLE_STARTED in
                                  self.reported())
                self.host.events.clear()

    def test_database_is_away(self) -> None:
        self.lose_device()
        self.useFixture(fixtures.MonkeyPatch(
            'nova.objects.Instance.get_by_uuid',
            lambda *args, **kwargs: self._raise()))
        self.lxd.guest_reboot(self.instance.name)
        self.assert_reported_as_stopped()

    @staticmethod
    def _raise() -> None:
        raise exception.DBNotAllowed(binary='nova-compute')

    def test_reboot_while_nova_stops_it(self) -> None:
        self.lose_device()
        begun, recover = threading.Event(), self.watcher.on_failed_reboot
        self.watcher.on_failed_reboot = lambda uuid: (begun.set(),
                                                      recover(uuid))[1]
        with self.driver._services.guests.changing(self.instance):
            self.lxd.guest_reboot(self.instance.name)
            # The recovery waits for the lock.
            self.assertTrue(begun.wait(30))
            self.instance.vm_state = vm_states.STOPPED
        self.assert_reported_as_stopped()

    def test_log_is_not_shown(self) -> None:
        """Without the permission the rest works as before."""
        session = self.driver._services.session
        original = session.websocket

        def websocket(*path: str, params: Any, **kwargs: Any) -> Any:
            if 'logging' in params['type']:
                raise errors.PermissionDenied('not authorized', 403)
            return original(*path, params=params, **kwargs)

        self.useFixture(fixtures.MockPatchObject(
            session, 'websocket', websocket))
        first = self.watcher._channel
        self.lxd.close_websockets()
        self.lxd.wait_for(lambda: self.watcher._connected and
                          self.watcher._channel is not first)
        self.lose_device()
        self.lxd.guest_reboot(self.instance.name)
        self.assert_reported_as_stopped()
