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

from __future__ import annotations

from unittest import mock

from nova.network import model
from nova.network import os_vif_util
import os_vif
from oslotest import base

from nova_lxd_py.virt.vif import bridge
from nova_lxd_py.virt.vif import ovs
from nova_lxd_py.virt.vif import ovs_hybrid
from nova_lxd_py.virt.vif import qos
from nova_lxd_py.virt.vif import tap
from nova_lxd_py.virt.vif import veth
from tests.fixtures import fake_host

LIMITS = qos.Limits(outbound=qos.Rate(1000, 2000, 65536))


class PluginTestCase(base.BaseTestCase):

    plugin_class: type[veth.VethPlugin] = ovs.OVSPlugin

    def setUp(self) -> None:
        super().setUp()
        self.host = self.useFixture(fake_host.FakeHost())
        self.plugin = self.plugin_class()
        self.instance = fake_host.make_instance()
        self.vif = fake_host.make_vif()
        self.pair = veth.VethPair(self.vif)

    def plug(self, limits: qos.Limits = qos.Limits(),
             guest_stopped: bool = False) -> None:
        self.plugin.plug(self.instance, self.vif, limits=limits,
                         guest_stopped=guest_stopped)

    def unplug(self) -> None:
        self.plugin.unplug(self.instance, self.vif)

    def changes(self) -> list[str]:
        """Return the calls of the kernel and os-vif since the last call."""
        calls, self.host.calls[:] = list(self.host.calls), []
        return calls


class PlugTestCase(PluginTestCase):

    def test_new_port(self) -> None:
        self.plug()
        self.assertEqual({self.pair.outer, self.pair.inner},
                         self.host.names())
        outer = self.host.device(self.pair.outer)
        self.assertEqual(outer.index, self.host.ports[self.pair.outer])
        self.assertEqual(fake_host.MTU, outer.mtu)
        self.assertEqual(fake_host.MTU, outer.peer.mtu)
        self.assertEqual(self.vif['address'], outer.peer.address)
        self.assertIs(veth.VethState.ON_HOST, self.pair.state())

    def test_names_fit_the_kernel(self) -> None:
        for name in self.pair.names:
            self.assertLess(len(name), 16)
        self.assertEqual(len(self.pair.names), len(set(self.pair.names)))

    def test_plug_again_changes_nothing(self) -> None:
        for guest_stopped in (False, True):
            self.plug()
            self.changes()
            self.plug(guest_stopped=guest_stopped)
            self.assertEqual(['os_vif.plug'], self.changes())

    def test_running_guest_is_left_alone(self) -> None:
        self.plug()
        self.host.hand_over(self.pair.inner)
        self.changes()
        self.plug()
        self.assertEqual(['os_vif.plug'], self.changes())
        self.assertIs(veth.VethState.IN_GUEST, self.pair.state())

    def test_guest_that_should_not_run(self) -> None:
        self.plug()
        lost = self.host.hand_over(self.pair.inner)
        self.plug(guest_stopped=True)
        self.assertIs(veth.VethState.ON_HOST, self.pair.state())
        self.assertNotIn(lost.index, self.host.devices)

    def test_guest_that_is_just_stopping(self) -> None:
        self.plug()
        inner = self.host.hand_over(self.pair.inner)
        self.changes()
        naps = iter([None, lambda: self.host.give_back(inner)])
        with mock.patch.object(veth.time, 'sleep',
                               side_effect=lambda _: (next(naps) or str)()):
            self.plug(guest_stopped=True)
        self.assertEqual(['os_vif.plug'], self.changes())
        self.assertIs(inner, self.host.device(self.pair.inner))

    def test_pair_is_gone(self) -> None:
        for guest_stopped in (False, True):
            self.plug()
            self.host.remove(self.host.device(self.pair.outer))
            self.plug(guest_stopped=guest_stopped)
            self.assertIs(veth.VethState.ON_HOST, self.pair.state())
            # The switch has opened the new device.
            self.assertEqual(self.host.device(self.pair.outer).index,
                             self.host.ports[self.pair.outer])

    def test_device_of_a_virtual_machine(self) -> None:
        self.host.add(self.pair.outer, tap=True)
        self.plug()
        self.assertIs(veth.VethState.ON_HOST, self.pair.state())

    def test_other_devices_with_our_names(self) -> None:
        self.host.add(self.pair.outer)
        self.host.add(self.pair.inner)
        self.assertIs(veth.VethState.BROKEN, self.pair.state())
        self.plug()
        self.assertIs(veth.VethState.ON_HOST, self.pair.state())

    def test_mtu_of_network_changes(self) -> None:
        self.plug()
        self.vif['network']['meta']['mtu'] = 1300
        self.plug()
        self.assertEqual({1300}, {device.mtu for device
                                  in self.host.devices.values()})

    def test_network_without_mtu(self) -> None:
        del self.vif['network']['meta']['mtu']
        self.assertEqual('1500', self.plugin.device(self.vif, 'eth0')['mtu'])

    def test_lxd_device(self) -> None:
        self.vif['address'] = self.vif['address'].upper()
        self.assertEqual(
            {'type': 'nic', 'nictype': 'physical', 'name': 'eth3',
             'parent': self.pair.inner, 'hwaddr': 'fa:16:3e:00:00:01',
             'mtu': str(fake_host.MTU)},
            self.plugin.device(self.vif, 'eth3'))


class UnplugTestCase(PluginTestCase):

    def test_removes_all_devices(self) -> None:
        for limits in (qos.Limits(), LIMITS):
            self.plug(limits)
            self.unplug()
            self.assertEqual(set(), self.host.names())
            self.assertEqual({}, self.host.ports)

    def test_again_and_without_plug(self) -> None:
        self.unplug()
        self.plug()
        self.unplug()
        self.unplug()

    def test_switch_does_not_answer(self) -> None:
        self.plug()
        self.host.os_vif_error = RuntimeError('no answer')
        self.assertRaises(os_vif.exception.UnplugException, self.unplug)
        # The devices are removed nevertheless.
        self.assertEqual(set(), self.host.names())

    def test_half_of_a_limited_port(self) -> None:
        self.plug(LIMITS)
        self.host.remove(self.host.device(self.pair.outer))
        self.unplug()
        self.assertEqual(set(), self.host.names())


class LimitsTestCase(PluginTestCase):

    def rate(self, name: str) -> int | None:
        return self.host.device(name).qdiscs.get('htb', {}).get('rate')

    def test_limited_port(self) -> None:
        self.plug(LIMITS)
        self.assertEqual(set(self.pair.names), self.host.names())
        self.assertIs(veth.VethState.ON_HOST, self.pair.state())
        self.assertEqual(1000, self.rate(self.pair.outer_mate))
        self.assertIsNone(self.rate(self.pair.inner_mate))
        self.assertEqual(
            {self.vif['address'], None},
            {device.address for device in self.host.devices.values()})

    def test_rate_changes_under_a_running_guest(self) -> None:
        self.plug(LIMITS)
        self.host.hand_over(self.pair.inner)
        self.assertIs(veth.VethState.IN_GUEST, self.pair.state())
        self.plug(qos.Limits(inbound=qos.Rate(3000, 3000, 65536)))
        self.assertIsNone(self.rate(self.pair.outer_mate))
        self.assertEqual(3000, self.rate(self.pair.inner_mate))
        self.plug(qos.Limits())
        self.assertIsNone(self.rate(self.pair.inner_mate))
        self.assertIs(veth.VethState.IN_GUEST, self.pair.state())

    def test_limits_come_and_go_with_the_guest_stopped(self) -> None:
        self.plug()
        self.plug(LIMITS, guest_stopped=True)
        self.assertTrue(self.pair.is_limited)
        self.plug(guest_stopped=True)
        self.assertFalse(self.pair.is_limited)
        self.assertEqual({self.pair.outer, self.pair.inner},
                         self.host.names())

    def test_limits_come_under_a_running_guest(self) -> None:
        self.plug()
        self.host.hand_over(self.pair.inner)
        self.changes()
        self.plug(LIMITS)
        self.assertEqual(['os_vif.plug'], self.changes())

    def test_inner_pair_is_gone(self) -> None:
        self.plug(LIMITS)
        self.host.remove(self.host.device(self.pair.inner))
        self.assertIs(veth.VethState.BROKEN, self.pair.state())
        self.plug(LIMITS)
        self.assertIs(veth.VethState.ON_HOST, self.pair.state())

    def test_crash_in_the_middle(self) -> None:
        """The devices exist, but without queueing disciplines."""
        self.plug(LIMITS)
        for device in self.host.devices.values():
            device.qdiscs.clear()
            device.filters.clear()
        self.plug(LIMITS)
        self.assertEqual(1000, self.rate(self.pair.outer_mate))
        self.assertEqual(
            2, sum(len(device.filters)
                   for device in self.host.devices.values()))

    def test_kernel_cannot(self) -> None:
        for kind in ('htb', 'ingress', 'u32'):
            self.host.lacks = {kind}
            self.plug(LIMITS)
            self.assertEqual({self.pair.outer, self.pair.inner},
                             self.host.names())
            self.assertIs(veth.VethState.ON_HOST, self.pair.state())
            self.unplug()


class UserspaceSwitchTestCase(PluginTestCase):
    """OVS's userspace datapath, which reads devices by packet sockets."""

    def test_checksums(self) -> None:
        for limits in (qos.Limits(), LIMITS):
            self.plug(limits, guest_stopped=True)
            self.assertFalse(
                self.host.device(self.pair.inner).checksum_offload)

    def test_kernel_without_limits_keeps_checksums_right(self) -> None:
        self.host.lacks = {'htb'}
        self.plug(LIMITS)
        self.assertFalse(self.host.device(self.pair.inner).checksum_offload)

    def test_kernel_datapath(self) -> None:
        self.vif['details']['datapath_type'] = 'system'
        self.plug()
        self.assertTrue(self.host.device(self.pair.inner).checksum_offload)

    def test_switch_misses_that_the_port_was_recreated(self) -> None:
        self.plug()
        self.host.remove(self.host.device(self.pair.outer))
        self.host.is_busy = 2
        self.plug()
        self.assertEqual(self.host.device(self.pair.outer).index,
                         self.host.ports[self.pair.outer])

    def test_switch_never_opens_the_port(self) -> None:
        self.plug()
        self.host.remove(self.host.device(self.pair.outer))
        self.host.is_busy = 10
        # Only a warning: ovs-vswitchd may be started later.
        self.plug()
        self.assertIs(veth.VethState.ON_HOST, self.pair.state())

    def test_unopened_port_of_a_running_guest(self) -> None:
        self.plug()
        self.host.hand_over(self.pair.inner)
        self.host.ports[self.pair.outer] = -1
        self.changes()
        self.plug()
        self.assertEqual(['os_vif.plug'], self.changes())


class OSVIFTestCase(base.BaseTestCase):

    def test_creates_port_but_no_tap(self) -> None:
        profile = ovs.to_os_vif(fake_host.make_vif()).port_profile
        self.assertTrue(profile.create_port)
        self.assertFalse('create_tap' in profile.fields and profile.create_tap)
        self.assertEqual('netdev', profile.datapath_type)

    def test_release_of_os_vif_without_create_tap(self) -> None:
        profile = ovs.to_os_vif(fake_host.make_vif()).port_profile
        kept = {name: field for name, field in profile.fields.items()
                if name != 'create_tap'}
        with mock.patch.object(type(profile), 'fields', kept):
            profile = ovs.to_os_vif(fake_host.make_vif()).port_profile
        self.assertTrue(profile.create_port)

    def test_name_is_that_of_the_device(self) -> None:
        vif = fake_host.make_vif()
        self.assertEqual(veth.VethPair(vif).outer, ovs.to_os_vif(vif).vif_name)
        vif['devname'] = None
        self.assertEqual(veth.VethPair(vif).outer, ovs.to_os_vif(vif).vif_name)


class TapTestCase(PluginTestCase):

    plugin_class = tap.TapPlugin

    def test_plug_and_unplug(self) -> None:
        self.vif['type'] = 'tap'
        self.plug()
        self.plug(guest_stopped=True)
        self.assertIs(veth.VethState.ON_HOST, self.pair.state())
        self.unplug()
        self.assertEqual(set(), self.host.names())
        self.assertNotIn('os_vif.plug', self.changes())


class BridgeCases:
    """Tests of ports that are added to a Linux bridge."""

    def test_there_and_gone(self) -> None:
        for _time in range(2):
            self.plug()
            self.assertEqual(self.bridge,
                             self.host.device(self.pair.outer).bridge)
            self.assertIsNone(self.host.device(self.pair.inner).bridge)
        self.unplug()
        self.assertEqual({self.bridge}, self.host.names())
        self.unplug()

    def test_bridge_is_missing(self) -> None:
        self.host.remove(self.host.device(self.bridge))
        self.assertRaises(OSError, self.plug)
        self.assertEqual(set(), self.host.names())

    def test_os_vif_fails(self) -> None:
        self.host.os_vif_plug_error = RuntimeError('no')
        self.assertRaises(os_vif.exception.PlugException, self.plug)
        self.assertEqual({self.bridge}, self.host.names())


class BridgeTestCase(BridgeCases, PluginTestCase):
    """The bridge of the network."""

    plugin_class = bridge.BridgePlugin
    bridge = 'brq5f6e1b3a-00'

    def setUp(self) -> None:
        if not hasattr(os_vif_util, '_nova_to_osvif_vif_bridge'):
            self.skipTest('this Nova has no ports of Linux bridges')
        super().setUp()
        self.vif['type'] = model.VIF_TYPE_BRIDGE
        self.vif['network']['bridge'] = self.bridge
        self.vif['details'] = {'port_filter': True}
        self.host.add(self.bridge)


class HybridTestCase(BridgeCases, PluginTestCase):
    """A bridge for firewall rules, between the port and Open vSwitch."""

    plugin_class = ovs_hybrid.OVSHybridPlugin

    def setUp(self) -> None:
        super().setUp()
        self.vif['details'] = {'port_filter': True, 'ovs_hybrid_plug': True}
        self.bridge = f'qbr{self.vif["id"]}'[:14]
        self.host.add(self.bridge)

    def test_nobody_waits_for_the_switch(self) -> None:
        """It opens the bridge's device, not the port's."""
        self.host.is_busy = 99
        self.plug()
        self.host.packet_sockets.write_text('')
        self.assertTrue(self.plugin.wait_until_open(self.vif))
