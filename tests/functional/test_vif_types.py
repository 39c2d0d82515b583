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

"""VIF types and bandwidth limits, with containers and Open vSwitch."""

from __future__ import annotations

import os
import subprocess
import time

from nova.network import model

from nova_lxd_py.virt.privileged import network
from nova_lxd_py.virt.vif import veth
from tests.fixtures import container_host
from tests.fixtures import lab

try:
    from vif_plug_linux_bridge import privsep as privileged_bridge
except ImportError:
    privileged_bridge = None

#: How often a transfer may be slow.
ATTEMPTS = 5

setUpModule = lab.set_up_module
tearDownModule = lab.tear_down_module


class LimitsTestCase(lab.VIFTestCase):
    """Bandwidth limits of flavors are enforced."""

    def seconds_to_send(self, sender: lab.Guest, receiver: lab.Guest,
                        size: int) -> float:
        """Measure how long one guest takes to send bytes to another."""
        began = time.monotonic()
        sender.run(f'(echo {size}; head -c {size} /dev/zero) | busybox nc '
                   f'{receiver.address} {container_host.DISCARD}')
        return time.monotonic() - began

    def fastest(self, seconds: float, sender: lab.Guest,
                receiver: lab.Guest, size: int, pause: float = 0) -> float:
        """Repeat a transfer until it takes no longer than some seconds.

        A busy machine makes some transfers slower, but none faster than the
        limit.

        :param pause: seconds between attempts.
        :returns: the seconds of the fastest attempt.
        """
        took: list[float] = []
        while len(took) < ATTEMPTS and min(took, default=seconds) >= seconds:
            if took:
                time.sleep(pause)
            took.append(self.seconds_to_send(sender, receiver, size))
        return min(took)

    def assert_takes(self, seconds: float, sender: lab.Guest,
                     receiver: lab.Guest, size: int) -> None:
        """Check a limit: bits taken for bytes would make a factor of eight.

        No load of the machine makes a transfer faster than its limit.
        """
        took = self.fastest(2 * seconds, sender, receiver, size)
        self.assertTrue(0.75 * seconds < took < 3 * seconds,
                        f'{size} bytes took {took:.2f} s, not {seconds}')

    def assert_faster(self, seconds: float, sender: lab.Guest,
                      receiver: lab.Guest, size: int,
                      pause: float = 0) -> None:
        self.assertLess(
            self.fastest(seconds, sender, receiver, size, pause), seconds)

    def test_outbound(self) -> None:
        guest, other = self.make_guests(
            **{'quota:vif_outbound_average': '1000'})
        self.assert_takes(3, guest, other, 3_000_000)
        self.assert_faster(2, other, guest, 3_000_000)

    def test_inbound(self) -> None:
        guest, other = self.make_guests(
            **{'quota:vif_inbound_average': '1000'})
        self.assert_takes(3, other, guest, 3_000_000)
        self.assert_faster(2, guest, other, 3_000_000)

    def test_guest_cannot_remove_limits(self) -> None:
        guest, other = self.make_guests(
            **{'quota:vif_outbound_average': '1000'})
        guest.order('busybox tc qdisc del dev eth0 root')
        guest.order('ip link set eth0 down && ip link set eth0 up')
        self.assert_connected(guest, other)
        self.assert_takes(3, guest, other, 3_000_000)

    def test_limits_survive_restarts(self) -> None:
        guest, other = self.make_guests(
            **{'quota:vif_outbound_average': '1000'})
        before = self.switch_view(guest)
        guest.restart()
        self.assert_connected(guest, other)
        guest.stop()
        guest.plug(guest_stopped=True)
        guest.start()
        self.assert_connected(guest, other)
        lab.OVS.stop_vswitchd()
        lab.OVS.start_vswitchd()
        self.assert_connected(guest, other)
        self.assertEqual(before[3:], self.switch_view(guest)[3:])
        self.assert_takes(3, guest, other, 3_000_000)

    def test_new_flavor(self) -> None:
        guest, other = self.make_guests(
            **{'quota:vif_outbound_average': '1000'})
        guest.instance.flavor.extra_specs = {
            'quota:vif_outbound_average': '4000'}
        guest.plug()
        self.assert_takes(2, guest, other, 8_000_000)
        guest.instance.flavor.extra_specs = {}
        guest.plug()
        self.assert_faster(1.5, guest, other, 8_000_000)
        # The second pair is removed when no guest runs.
        self.assertTrue(guest.pair.is_limited)
        guest.stop()
        guest.plug(guest_stopped=True)
        self.assertFalse(guest.pair.is_limited)
        guest.start()
        self.assert_connected(guest, other)

    def test_burst(self) -> None:
        guest, other = self.make_guests(**{
            'quota:vif_outbound_average': '1000',
            'quota:vif_outbound_peak': '50000',
            'quota:vif_outbound_burst': '4096'})
        # After a pause the burst is available again.
        self.assert_faster(2, guest, other, 3_000_000, pause=5)
        self.assertGreater(self.seconds_to_send(guest, other, 8_000_000), 3)


class OtherTypesTestCase(lab.VIFTestCase):
    """Ports that are not on Open vSwitch directly."""

    def test_hybrid(self) -> None:
        guest, other = lab.Guest(self, 1), lab.Guest(self, 2)
        guest.vif['details']['ovs_hybrid_plug'] = True
        for each in (guest, other):
            each.create()
            each.start()
        self.assert_connected(guest, other)
        port = guest.vif['id'][:11]
        self.assertEqual([guest.pair.outer, f'qvb{port}'], sorted(
            os.listdir(f'/sys/class/net/qbr{port}/brif'), reverse=True))
        self.assertIn(f'qvo{port}', lab.OVS.ports())
        before = veth.attribute(guest.pair.outer, 'ifindex')
        guest.restart()
        guest.plug()
        self.assert_connected(guest, other)
        guest.stop()
        guest.plug(guest_stopped=True)
        self.assertEqual(before, veth.attribute(guest.pair.outer, 'ifindex'))
        network.delete_device(guest.pair.outer)
        guest.plug(guest_stopped=True)
        guest.start()
        self.assert_connected(guest, other)

    def test_tap(self) -> None:
        guest = lab.Guest(self, 1)
        guest.vif.update(type=model.VIF_TYPE_TAP, details={})
        guest.create()
        # As Calico's agent does, for example.
        subprocess.run(['ip', 'address', 'add', '10.9.0.254/24', 'dev',
                        guest.pair.outer], check=True)
        guest.start()
        self.assert_reaches(guest, '10.9.0.254')
        guest.restart()
        self.assert_reaches(guest, '10.9.0.254')
        guest.plug()

    def assert_reaches(self, guest: lab.Guest, address: str) -> None:
        """Check that packets get through when init has set the address."""
        deadline = time.monotonic() + 60
        while guest.run(f'ping -c 1 -W 2 {address} >/dev/null 2>&1 && '
                        'echo yes || echo no').strip() != 'yes':
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.1)

    def test_bridge(self) -> None:
        """Ports of Linux bridges, which Nova supports up to release 33."""
        if privileged_bridge is None:
            self.skipTest('this os-vif has no plugin for Linux bridges')
        privileged_bridge.vif_plug.set_client_mode(False)
        self.addCleanup(privileged_bridge.vif_plug.set_client_mode, True)
        guest, other = lab.Guest(self, 1), lab.Guest(self, 2)
        for each in (guest, other):
            each.vif.update(type=model.VIF_TYPE_BRIDGE,
                            details={'port_filter': True})
            each.vif['network'].update(bridge='brqtest', meta={
                'mtu': lab.MTU, 'should_create_bridge': True})
            each.create()
            each.start()
        self.assert_connected(guest, other)
        guest.restart()
        guest.plug()
        self.assert_connected(guest, other)
        guest.stop()
        guest.plug(guest_stopped=True)
        guest.start()
        self.assert_connected(guest, other)
        self.assertEqual(2, len(os.listdir('/sys/class/net/brqtest/brif')))

    def test_rows_of_kernel_datapath(self) -> None:
        """os-vif writes QoS rows for it, also without the kernel module."""
        guest = lab.Guest(self, 1)
        guest.vif['network']['bridge'] = 'br-kernel'
        guest.vif['details'].update(bridge_name='br-kernel',
                                    datapath_type='system')
        self.addCleanup(lab.OVS.vsctl, 'del-br', 'br-kernel')
        before = lab.OVS.rows('QoS'), lab.OVS.rows('Port')
        guest.plug()
        self.assertEqual(before[0] + 1, lab.OVS.rows('QoS'))
        guest.plug()
        guest.unplug()
        # The bridge has a port, too.
        self.assertEqual((before[0], before[1] + 1),
                         (lab.OVS.rows('QoS'), lab.OVS.rows('Port')))

    def test_two_ports_in_order(self) -> None:
        guest = lab.Guest(self, 1)
        second = lab.make_vif(3)
        ports = [second, guest.vif]
        self.addCleanup(self.vifs.unplug, guest.instance, ports)
        self.vifs.plug(guest.instance, ports, guest_stopped=True)
        self.addCleanup(lab.LXD.delete, guest.name)
        lab.LXD.create(guest.name, '10.9.0.1/24', self.vifs.devices(ports))
        guest.start()
        self.assertIn(second['address'],
                      guest.run('ip link show eth0'))
        self.assertIn(guest.vif['address'],
                      guest.run('ip link show eth1'))
