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

"""Ports of containers on Open vSwitch, through restarts and failures."""

from __future__ import annotations

import os
import signal
import subprocess
import time

from nova_lxd_py.virt import privileged
from nova_lxd_py.virt.privileged import network
from nova_lxd_py.virt.vif import manager
from nova_lxd_py.virt.vif import ovs
from nova_lxd_py.virt.vif import veth
from tests.fixtures import lab

setUpModule = lab.set_up_module
tearDownModule = lab.tear_down_module


class PrivilegedDaemonTestCase(lab.VIFTestCase):
    """The privsep daemons, started as nova-compute starts them."""

    def setUp(self) -> None:
        super().setUp()
        for context in lab.PRIVILEGED:
            context.set_client_mode(True)
            self.addCleanup(context.stop)

    def test_plug_and_unplug(self) -> None:
        guest, other = self.make_guests()
        guest.plug()
        self.assertIsNotNone(privileged.network_context.channel)
        guest.stop()
        guest.unplug()
        guest.unplug()
        self.assertIs(veth.VethState.ABSENT, guest.pair.state())

    def test_refusals_arrive_as_they_are(self) -> None:
        self.assertRaises(ValueError, network.delete_device, 'eth0')
        self.assertRaises(FileNotFoundError, network.set_mtu,
                          'tap01234567-89', lab.MTU)


class LifeTestCase(lab.VIFTestCase):
    """Reboots and restarts of guest, LXD, nova-compute and Open vSwitch."""

    def test_traffic_and_identity(self) -> None:
        guest, other = self.make_guests()
        link = guest.run('ip link show eth0')
        self.assertIn(f'mtu {lab.MTU}', link)
        self.assertIn(guest.vif['address'], link)
        self.assertEqual(str(lab.MTU), veth.attribute(guest.pair.outer, 'mtu'))
        self.assertIn(guest.vif['id'],
                      lab.OVS.interface(guest.pair.outer, 'external_ids'))
        # The largest packet gets through unfragmented.
        guest.run(f'ping -c 1 -W 30 -s {lab.MTU - 28} {other.address}')
        self.assertFalse(veth.exists(guest.pair.inner))

    def test_host_has_no_address_on_port(self) -> None:
        guest, _other = self.make_guests()
        shown = subprocess.run(['ip', 'address', 'show', guest.pair.outer],
                               stdout=subprocess.PIPE, text=True, check=True)
        self.assertNotIn('inet', shown.stdout)

    def test_guest_reboots_itself(self) -> None:
        guest, other = self.make_guests()
        before, init = self.switch_view(guest), guest.init
        guest.order('reboot')
        deadline = time.monotonic() + 60
        while guest.init in (0, init):
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.1)
        self.assert_connected(guest, other)
        self.assertEqual(before, self.switch_view(guest))

    def test_restart(self) -> None:
        guest, other = self.make_guests()
        before = self.switch_view(guest)
        guest.restart()
        self.assert_connected(guest, other)
        self.assertEqual(before, self.switch_view(guest))

    def test_stop_and_start(self) -> None:
        guest, other = self.make_guests()
        before = self.switch_view(guest)
        guest.stop()
        self.assertIs(veth.VethState.ON_HOST, guest.pair.state())
        guest.plug(guest_stopped=True)
        guest.start()
        self.assert_connected(guest, other)
        self.assertEqual(before, self.switch_view(guest))

    def test_guest_powers_itself_off(self) -> None:
        guest, other = self.make_guests()
        before = self.switch_view(guest)
        guest.order('poweroff')
        lab.LXD.wait_for_status(guest.name, 'Stopped')
        guest.plug(guest_stopped=True)
        guest.start()
        self.assert_connected(guest, other)
        self.assertEqual(before, self.switch_view(guest))

    def test_lxd_restarts(self) -> None:
        guest, other = self.make_guests()
        before = self.switch_view(guest)
        for end in (lab.LXD.lxd.stop, lab.LXD.lxd.kill):
            end()
            lab.LXD.lxd.start()
            self.assert_connected(guest, other)
        guest.stop()
        guest.plug(guest_stopped=True)
        guest.start()
        self.assert_connected(guest, other)
        self.assertEqual(before, self.switch_view(guest))

    def test_guest_powers_itself_off_while_lxd_is_away(self) -> None:
        guest, other = self.make_guests()
        before, init = self.switch_view(guest), guest.init
        lab.LXD.lxd.stop()
        os.kill(init, signal.SIGKILL)
        time.sleep(1)
        lab.LXD.lxd.start()
        lab.LXD.wait_for_status(guest.name, 'Stopped')
        guest.plug(guest_stopped=True)
        guest.start()
        self.assert_connected(guest, other)
        self.assertEqual(before, self.switch_view(guest))

    def test_nova_compute_restarts(self) -> None:
        guest, other = self.make_guests()
        before, init = self.switch_view(guest), guest.init
        self.vifs = manager.VIFManager()
        for each in (guest, other):
            each.plug()
            each.plug()
        self.assert_connected(guest, other)
        self.assertEqual(before, self.switch_view(guest))
        self.assertEqual(init, guest.init)

    def test_open_vswitch_restarts(self) -> None:
        guest, other = self.make_guests()
        lab.OVS.stop_vswitchd()
        lab.OVS.start_vswitchd()
        self.assert_connected(guest, other)

    def test_open_vswitch_loses_its_port(self) -> None:
        guest, other = self.make_guests()
        lab.OVS.vsctl('del-port', lab.BRIDGE, guest.pair.outer)
        self.assertFalse(guest.reaches(other))
        guest.plug()
        self.assert_connected(guest, other)


class FrozenTestCase(lab.VIFTestCase):
    """Nothing of the host answers for a guest that is frozen."""

    def link_view(self, guest: lab.Guest) -> tuple[str, ...]:
        """Return the state of the port that Neutron's agents and the guest
        see."""
        return (*self.switch_view(guest),
                lab.OVS.interface(guest.pair.outer, 'link_state'),
                lab.OVS.interface(guest.pair.outer, 'admin_state'),
                # The kernel is still checking a new IPv6 address.
                guest.run('while ip address | grep -q tentative; do sleep 0.1;'
                          ' done; cat /sys/class/net/eth0/carrier_changes; '
                          'ip address; ip route'))

    def assert_unreachable(self, guest: lab.Guest, other: lab.Guest) -> None:
        for _time in range(3):
            self.assertFalse(other.reaches(guest))

    def check(self, guest: lab.Guest, other: lab.Guest) -> None:
        before = self.link_view(guest)
        lab.LXD.set_state(guest.name, 'freeze')
        # This is why it is needed.
        other.run(f'ping -c 1 -W 30 {guest.address}')
        self.vifs.block(guest.instance)
        self.assert_unreachable(guest, other)
        # A new driver finds the ports on the host.
        self.vifs = manager.VIFManager()
        guest.plug()
        # Open vSwitch configures its ports again when one is added.
        third = lab.Guest(self, 3)
        third.plug()
        self.addCleanup(third.unplug)
        self.assert_unreachable(guest, other)
        self.vifs.unblock(guest.instance)
        lab.LXD.set_state(guest.name, 'unfreeze')
        self.assert_connected(guest, other)
        self.assertEqual(before, self.link_view(guest))

    def test_open_vswitch(self) -> None:
        self.check(*self.make_guests())

    def test_bandwidth_limits(self) -> None:
        self.check(*self.make_guests(
            **{'quota:vif_outbound_average': '1000'}))

    def test_qos_of_open_vswitch_is_kept(self) -> None:
        """ML2/OVS limits what a port receives with it."""
        guest, other = self.make_guests()
        lab.OVS.vsctl(
            '--id=@qos', 'create', 'QoS', 'type=linux-htb',
            'other-config:max-rate=1000000', '--', 'set', 'Port',
            guest.pair.outer, 'qos=@qos')
        self.addCleanup(lab.OVS.vsctl, '--all', 'destroy', 'QoS')
        self.addCleanup(lab.OVS.vsctl, 'clear', 'Port', guest.pair.outer,
                        'qos')
        before = self.qdiscs(guest)
        self.assertIn('htb', before)
        self.vifs.block(guest.instance)
        self.assertEqual(before, self.qdiscs(guest))
        self.vifs.unblock(guest.instance)
        self.assertEqual(before, self.qdiscs(guest))

    def qdiscs(self, guest: lab.Guest) -> str:
        return subprocess.run(
            ['tc', 'qdisc', 'show', 'dev', guest.pair.outer],
            stdout=subprocess.PIPE, text=True, check=True).stdout

    def test_open_vswitch_restarts(self) -> None:
        """It removes the block, which is no error at the thaw."""
        guest, other = self.make_guests()
        self.vifs.block(guest.instance)
        lab.OVS.stop_vswitchd()
        lab.OVS.start_vswitchd()
        self.vifs.unblock(guest.instance)
        self.assert_connected(guest, other)


class ForgottenTestCase(lab.VIFTestCase):
    """Ports that Nova has released in Neutron are removed all the same."""

    def assert_unplugged(self, guest: lab.Guest) -> None:
        self.assertIs(veth.VethState.ABSENT, guest.pair.state())
        self.assertNotIn(guest.pair.outer, lab.OVS.ports())

    def test_found_on_the_host(self) -> None:
        guest, other = self.make_guests()
        guest.stop()
        self.vifs.unplug_all(guest.instance, [], {})
        self.assert_unplugged(guest)
        self.assertIs(veth.VethState.IN_GUEST, other.pair.state())
        self.assertIn(other.pair.outer, lab.OVS.ports())

    def test_found_in_lxd(self) -> None:
        """Open vSwitch's database has kept the port of a lost device."""
        guest, other = self.make_guests()
        guest.stop()
        network.delete_device(guest.pair.outer)
        self.assertIn(guest.pair.outer, lab.OVS.ports())
        self.vifs.unplug_all(guest.instance, [],
                             self.vifs.devices([guest.vif]))
        self.assert_unplugged(guest)
        self.assertIn(other.pair.outer, lab.OVS.ports())


class LossTestCase(lab.VIFTestCase):
    """A port whose devices were lost works again after the next start."""

    def monitor(self, guest: lab.Guest) -> int:
        """Find liblxc's monitor process of a guest."""
        with open(f'/proc/{guest.init}/status', encoding='ascii') as status:
            for line in status:
                if line.startswith('PPid:'):
                    return int(line.split()[1])
        self.fail('init has no parent')

    def test_monitor_killed(self) -> None:
        guest, other = self.make_guests()
        os.kill(self.monitor(guest), signal.SIGKILL)
        lab.LXD.wait_for_status(guest.name, 'Stopped')
        self.assert_restartable(guest, other)

    def test_held_by_a_guest_unknown_to_lxd(self) -> None:
        """The monitor was killed, and the guest still runs."""
        guest, other = self.make_guests()
        guest.stop()
        with subprocess.Popen(['unshare', '--net', 'sleep', '600']) as holder:
            self.addCleanup(holder.kill)
            namespace = f'/proc/{holder.pid}/ns/net'
            while os.readlink(namespace) == os.readlink('/proc/self/ns/net'):
                time.sleep(0.05)
            subprocess.run(['ip', 'link', 'set', guest.pair.inner, 'netns',
                            str(holder.pid)], check=True)
            # A restart of nova-compute leaves it alone, a start replaces it.
            guest.plug()
            self.assertIs(veth.VethState.IN_GUEST, guest.pair.state())
            self.assert_restartable(guest, other)
            holder.kill()

    def test_host_reboots(self) -> None:
        """Only Open vSwitch's database survives a reboot."""
        guest, other = self.make_guests()
        for each in (guest, other):
            each.stop()
        lab.OVS.stop_vswitchd()
        for each in (guest, other):
            network.delete_device(each.pair.outer)
        lab.OVS.start_vswitchd()
        for each in (guest, other):
            each.plug(guest_stopped=True)
            each.start()
        self.assert_connected(guest, other)

    def test_device_deleted_while_stopped(self) -> None:
        guest, other = self.make_guests()
        guest.stop()
        network.delete_device(guest.pair.outer)
        self.assert_restartable(guest, other)

    def test_tap_in_the_way(self) -> None:
        guest, other = lab.Guest(self, 1), lab.Guest(self, 2)
        subprocess.run(['ip', 'tuntap', 'add', guest.pair.outer, 'mode',
                        'tap'], check=True)
        self.assertIs(veth.VethState.BROKEN, guest.pair.state())
        for each in (guest, other):
            each.create()
            each.start()
        self.assert_connected(guest, other)

    def test_busy_switch_misses_the_change(self) -> None:
        """Recreate a device so fast that the switch does not notice."""
        guest, other = self.make_guests()
        guest.stop()
        with lab.OVS.busy():
            network.delete_device(guest.pair.outer)
            network.create_veth(guest.pair.outer, guest.pair.inner,
                                guest.vif['address'], lab.MTU, False)
        self.assertIs(veth.VethState.ON_HOST, guest.pair.state())
        self.assertFalse(ovs.OVSPlugin().wait_until_open(guest.vif))
        self.assert_restartable(guest, other)

    def assert_restartable(self, guest: lab.Guest, other: lab.Guest) -> None:
        guest.plug(guest_stopped=True)
        self.assertIs(veth.VethState.ON_HOST, guest.pair.state())
        guest.start()
        self.assert_connected(guest, other)
