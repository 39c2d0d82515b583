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

"""Ports of paused and suspended servers, through the driver as Nova calls it.
"""

from __future__ import annotations

from collections.abc import Callable
import errno
from typing import Any

import fixtures
from nova.compute import power_state
from nova import exception
from nova import objects

from nova_lxd_py.virt.privileged import network
from tests.fixtures import fake_driver_host
from tests.fixtures.fake_lxd import fixture


class FrozenPortsTest(fake_driver_host.FakeDriverTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.ports = self.host.ports(2)
        self.server = self.spawn(self.ports)
        self.others = self.host.ports()
        self.spawn(self.others)

    def spawn(self, ports: Any, **fields: Any) -> objects.Instance:
        return self.host.spawn(self.host.instance(self.host.image(), **fields),
                               network_info=ports)

    def outer(self, *ports: Any) -> set[str]:
        return {port['devname'] for port in ports}

    def assert_blocked(self) -> None:
        """Check that packets to all ports of the server are dropped, and no
        others."""
        self.assertEqual(self.outer(*self.ports), self.network.blocked())

    def assert_open(self) -> None:
        self.assertEqual(set(), self.network.blocked())

    def pause(self) -> None:
        self.driver.pause(self.server)

    def suspend(self) -> None:
        self.driver.suspend(self.context, self.server)

    def before(self, action: str, check: Callable[[], None]) -> list[None]:
        """Check something before LXD carries out an action."""
        done: list[None] = []

        def called(_request: Any) -> None:
            check()
            done.append(None)

        self.lxd.before('PUT', f'/1.0/instances/{self.server.name}/state',
                        called, where={'action': action})
        return done

    def test_blocked_while_frozen(self) -> None:
        for freeze, thaw in (
                (self.pause, lambda: self.driver.unpause(self.server)),
                (self.suspend, lambda: self.driver.resume(
                    self.context, self.server, self.ports))):
            # The guest's processes never run without network.
            frozen = self.before('freeze', self.assert_open)
            for _time in range(2):
                freeze()
                self.assert_blocked()
            thawed = self.before('unfreeze', self.assert_open)
            for _time in range(2):
                thaw()
                self.assert_open()
            self.assertTrue(frozen and thawed)

    def test_nothing_is_left(self) -> None:
        driver, context, server = self.driver, self.context, self.server

        def off_and_on(timeout: int) -> None:
            driver.power_off(server, timeout=timeout, retry_interval=5)
            driver.power_on(context, server, self.ports)

        for freeze in (self.pause, self.suspend):
            for wake in (
                    lambda: driver.power_on(context, server, self.ports),
                    lambda: driver.reboot(context, server, self.ports, 'SOFT'),
                    lambda: driver.reboot(context, server, self.ports, 'HARD'),
                    lambda: off_and_on(0), lambda: off_and_on(10)):
                freeze()
                self.assert_blocked()
                wake()
                self.assert_open()
                self.assert_state(power_state.RUNNING, server)

    def test_guest_that_shuts_down_has_its_network(self) -> None:
        self.pause()
        thawed = self.before('unfreeze', self.assert_open)
        self.driver.power_off(self.server, timeout=10, retry_interval=5)
        self.assertTrue(thawed)

    def test_rescue(self) -> None:
        """Of a server that Nova has set to the state error."""
        self.pause()
        # The fake LXD mounts nothing, so the image has what would be there.
        image = self.host.image(fixture.unified_image(
            {'mnt': None, 'mnt/rescue': None, 'mnt/rescue/etc': None}))
        self.driver.rescue(self.context, self.server, self.ports, image, 'x',
                           None, None)
        self.assert_open()

    def test_delete(self) -> None:
        self.pause()
        self.driver.destroy(self.context, self.server, self.ports)
        self.assertEqual(self.outer(*self.others), self.network.names())
        self.assert_open()

    def test_limited_port(self) -> None:
        ports = self.host.ports()
        server = self.spawn(ports, extra_specs={
            'quota:vif_outbound_average': '1000'})
        self.driver.pause(server)
        self.assertEqual(self.outer(*ports), self.network.blocked())
        self.driver.unpause(server)
        self.assert_open()

    # -- restarts -----------------------------------------------------------

    def test_restart_of_nova_compute(self) -> None:
        self.pause()
        self.host.restart_driver()
        self.driver.plug_vifs(self.server, self.ports)
        self.assert_blocked()
        self.driver.unpause(self.server)
        self.assert_open()

    def test_host_reboots(self) -> None:
        self.suspend()
        for device in list(self.network.devices.values()):
            self.network.remove(device)
        self.network.ports.clear()
        self.lxd.guest_poweroff(self.server.name)
        self.driver.resume_state_on_host_boot(self.context, self.server,
                                              self.ports, None)
        self.assert_open()
        self.assert_state(power_state.RUNNING, self.server)

    def test_guest_ends_while_it_is_frozen(self) -> None:
        self.pause()
        self.lxd.guest_poweroff(self.server.name)
        self.driver.power_on(self.context, self.server, self.ports)
        self.assert_open()

    # -- not frozen by Nova -------------------------------------------------

    def quiesced(self) -> tuple[objects.Instance, objects.ImageMeta]:
        image = self.host.image(os_require_quiesce='yes')
        self.ports = self.host.ports()
        self.server = self.host.spawn(self.host.instance(image), image,
                                      network_info=self.ports)
        self.driver.quiesce(self.context, self.server, image)
        return self.server, image

    def test_quiesce_blocks_nothing(self) -> None:
        server, image = self.quiesced()
        self.assert_state(power_state.PAUSED, server)
        self.assert_open()
        self.driver.unquiesce(self.context, server, image)
        self.assert_open()

    def test_pause_of_a_quiesced_server(self) -> None:
        """Unquiesce thaws it."""
        for freeze in (self.pause, self.suspend):
            server, image = self.quiesced()
            freeze()
            self.driver.unquiesce(self.context, server, image)
            self.assert_state(power_state.RUNNING, server)
            self.assert_open()

    def test_guest_ends_before_it_is_suspended(self) -> None:
        self.before('freeze', lambda: self.lxd.guest_poweroff(
            self.server.name))
        self.suspend()
        self.assert_open()

    def test_freezing_fails(self) -> None:
        for freeze in (self.pause, self.suspend):
            self.lxd.fail_operation(
                'PUT', f'/1.0/instances/{self.server.name}/state',
                where={'action': 'freeze'})
            self.assertRaises(exception.NovaException, freeze)
            self.assert_open()
            self.assert_state(power_state.RUNNING, self.server)

    # -- ports change -------------------------------------------------------

    def test_attach_and_detach(self) -> None:
        self.pause()
        added, = self.host.ports()
        self.driver.attach_interface(self.context, self.server, None, added)
        gone = self.ports.pop(0)
        self.driver.detach_interface(self.context, self.server, gone)
        self.assert_blocked()
        self.driver.unpause(self.server)
        self.assert_open()
        self.assertEqual(self.outer(added, *self.ports, *self.others),
                         self.network.names())

    # -- the kernel fails ---------------------------------------------------

    def test_cannot_block(self) -> None:
        """The server is paused nevertheless, and the log says what happens."""
        first, second = sorted(self.ports, key=lambda port: port['devname'])
        network.set_limit(first['devname'], 1000, 1000, 4096)
        log = self.useFixture(fixtures.FakeLogger())
        self.pause()
        self.assert_state(power_state.PAUSED, self.server)
        self.assertIn(f'Port {first["id"]} of the frozen server still answers '
                      'pings', log.output)
        self.assertEqual(self.outer(second), self.network.blocked())
        self.driver.unpause(self.server)
        self.assert_open()
        self.assertIn('htb', self.network.device(first['devname']).qdiscs)

    def test_cannot_unblock(self) -> None:
        """It stays frozen, rather than run without network."""
        self.pause()
        with fixtures.MockPatchObject(network, 'unblock',
                                      side_effect=OSError(errno.EPERM, 'no')):
            for thaw in (lambda: self.driver.unpause(self.server),
                         lambda: self.driver.power_on(
                             self.context, self.server, self.ports)):
                self.assertRaises(exception.VirtualInterfacePlugException,
                                  thaw)
                self.assert_state(power_state.PAUSED, self.server)
            # It can be stopped and deleted.
            self.driver.power_off(self.server, timeout=10, retry_interval=5)
            self.assert_state(power_state.SHUTDOWN, self.server)
        self.driver.power_on(self.context, self.server, self.ports)
        self.assert_open()
