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

"""Attaching and detaching ports, through the driver as Nova calls it."""

from __future__ import annotations

from nova.compute import power_state
from nova import exception

from tests.fixtures import fake_driver_host


class InterfacesTest(fake_driver_host.FakeDriverTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.first, self.second, self.third = self.host.ports(3)
        self.server = self.host.spawn(network_info=[self.first])

    def attach(self, port: object) -> None:
        self.driver.attach_interface(self.context, self.server, None, port)

    def detach(self, port: object) -> None:
        self.driver.detach_interface(self.context, self.server, port)

    def nics(self) -> dict[str, str]:
        """Ports that the guest has, by the name that it sees."""
        return {device['name']: device['hwaddr'] for device
                in self.devices(self.server).values()
                if device['type'] == 'nic'}

    def assert_on_host(self, *ports: object) -> None:
        """Check which ports the host has anything of."""
        wanted = {port['id'][:11] for port in ports}
        self.assertEqual(wanted, {device.name[3:] for device in
                                  self.network.devices.values()})
        self.assertEqual(wanted, {name[3:] for name in self.network.ports})

    def test_hot(self) -> None:
        for _time in range(2):
            self.attach(self.second)
        self.assertEqual({'eth0': self.first['address'],
                          'eth1': self.second['address']}, self.nics())
        self.assert_on_host(self.first, self.second)
        # The inner ends are in the guest.
        self.assertEqual({'tap'}, {name[:3] for name in self.network.names()})
        for _time in range(2):
            self.detach(self.second)
        self.assertEqual({'eth0': self.first['address']}, self.nics())
        self.assert_on_host(self.first)
        self.assert_state(power_state.RUNNING, self.server)

    def test_cold(self) -> None:
        self.driver.power_off(self.server)
        self.attach(self.second)
        self.driver.power_on(self.context, self.server,
                             [self.first, self.second])
        self.assertEqual(2, len(self.nics()))
        self.driver.power_off(self.server)
        self.detach(self.second)
        self.assert_on_host(self.first)

    def test_names_are_used_again(self) -> None:
        self.attach(self.second)
        self.detach(self.first)
        self.attach(self.third)
        self.assertEqual({'eth0': self.third['address'],
                          'eth1': self.second['address']}, self.nics())

    def test_lxd_refuses(self) -> None:
        self.lxd.fail_operation(
            'PUT', f'/1.0/instances/{self.server.name}')
        self.assertRaises(exception.NovaException, self.attach, self.second)
        self.assertEqual(['eth0'], list(self.nics()))
        self.assert_on_host(self.first)
        self.attach(self.second)
        self.lxd.fail_operation(
            'PUT', f'/1.0/instances/{self.server.name}')
        self.assertRaises(exception.NovaException, self.detach, self.second)
        # The guest uses it still, so it stays.
        self.assert_on_host(self.first, self.second)
        self.detach(self.second)
        self.assert_on_host(self.first)

    def test_open_vswitch_fails(self) -> None:
        self.network.os_vif_plug_error = OSError('ovsdb is gone')
        self.assertRaises(exception.VirtualInterfacePlugException,
                          self.attach, self.second)
        self.assertEqual(['eth0'], list(self.nics()))

    def test_port_of_no_host(self) -> None:
        self.second['type'] = 'binding_failed'
        self.assertRaises(exception.VirtualInterfacePlugException,
                          self.attach, self.second)
        self.assertEqual(['eth0'], list(self.nics()))

    def test_server_is_gone(self) -> None:
        self.driver.destroy(self.context, self.server, [self.first])
        self.detach(self.first)
        self.assertRaises(exception.InstanceNotFound, self.attach,
                          self.second)
        self.assert_nothing_left()

    def test_lxd_is_gone(self) -> None:
        self.attach(self.second)
        with self.host.lxd_down():
            for call in (self.attach, self.detach):
                self.assertRaises(exception.HypervisorUnavailable, call,
                                  self.second)
        self.detach(self.second)
        self.assert_on_host(self.first)

    def test_plug_and_unplug(self) -> None:
        """The calls of Nova at its start and around a migration."""
        for _time in range(2):
            self.driver.plug_vifs(self.server, [self.first, self.second])
        self.assert_on_host(self.first, self.second)
        self.driver.unplug_vifs(self.server, [self.second])
        self.assert_on_host(self.first)

    def test_tap(self) -> None:
        [port] = self.host.ports(type='tap', details={})
        self.attach(port)
        self.assertEqual(2, len(self.nics()))
        self.detach(port)
        self.assert_on_host(self.first)
