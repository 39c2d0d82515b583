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

"""Ports of real containers on a real Open vSwitch.

Nothing is faked below the plugins: os-vif writes to an Open vSwitch of the
test's own with the userspace datapath, the kernel makes the devices, LXD takes
them, and what counts in the end is whether packets get through.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time
from typing import Any
import uuid

from nova import conf as nova_conf
from nova.network import model
from nova import objects
import os_vif
from oslotest import base
from vif_plug_ovs import privsep as os_vif_privsep

from nova_lxd_py.virt import privileged
from nova_lxd_py.virt.vif import manager
from nova_lxd_py.virt.vif import ovs
from nova_lxd_py.virt.vif import veth
from tests.functional import container_host
from tests.functional import ovs_daemon
from tests.functional import private_network

try:
    from vif_plug_linux_bridge import privsep as privileged_bridge
except ImportError:
    privileged_bridge = None

CONF = nova_conf.CONF

BRIDGE = 'br-int'
MTU = 1442

PRIVILEGED = (privileged.context, os_vif_privsep.vif_plug)

OVS = ovs_daemon.OVSDaemon(BRIDGE)
LXD = container_host.ContainerHost()

_STACK = contextlib.ExitStack()


def setUpModule() -> None:
    lacking = ovs_daemon.missing() or container_host.missing()
    if lacking is not None:
        raise base.BaseTestCase.skipException(lacking)
    objects.register_all()
    with contextlib.ExitStack() as stack:
        for fixture in (private_network.PrivateNetwork(), OVS, LXD):
            stack.enter_context(fixture)
        _configure()
        _STACK.push(stack.pop_all())


def tearDownModule() -> None:
    _STACK.close()


def _configure() -> None:
    # os-vif reads its options once in the life of a process.
    config = OVS.directory / 'nova.conf'
    helper = pathlib.Path(sys.executable).parent / 'privsep-helper'
    config.write_text(textwrap.dedent(f"""\
        [oslo_concurrency]
        lock_path = {OVS.directory}
        [os_vif_ovs]
        ovsdb_connection = {OVS.connection}
        [vif_plug_ovs_privileged]
        helper_command = {helper} --config-file {config}
        [nova_lxd_py_privileged]
        helper_command = {helper} --config-file {config}
        """))
    CONF([], project='nova', default_config_files=[str(config)])
    os_vif.initialize(reset=True)


def host_devices() -> set[str]:
    """Name the network devices of this host that look like a port's."""
    return {name for name in os.listdir('/sys/class/net')
            if name.startswith(('tap', 'tin', 'tso', 'tsi', 'q'))}


def make_vif(number: int) -> model.VIF:
    """Make a port as ML2/OVN binds it on a userspace Open vSwitch."""
    port = str(uuid.uuid4())
    network = model.Network(id=str(uuid.uuid4()), bridge=BRIDGE, label='net',
                            subnets=[], mtu=MTU)
    return model.VIF(
        id=port, address=f'fa:16:3e:00:00:{number:02x}', network=network,
        type=model.VIF_TYPE_OVS, devname=f'tap{port}'[:14], active=False,
        delegate_create=True, details={
            'port_filter': True, 'bridge_name': BRIDGE,
            'datapath_type': 'netdev', 'ovs_create_tap': True})


class Guest:
    """A container with one port, driven as the driver would."""

    def __init__(self, test: VIFTestCase, number: int,
                 **extra_specs: str) -> None:
        self.name = f'guest{number}'
        self.address = f'10.9.0.{number}'
        self.vif = make_vif(number)
        self.wire = veth.Wire(self.vif)
        self.instance = objects.Instance(
            id=number, uuid=str(uuid.uuid4()), project_id='p',
            flavor=objects.Flavor(name='f', extra_specs=extra_specs))
        self._test = test

    def plug(self, **arguments: Any) -> None:
        self._test.vifs.plug(self.instance, [self.vif], **arguments)

    def unplug(self) -> None:
        self._test.vifs.unplug(self.instance, [self.vif])

    def create(self) -> None:
        """Plug, and make the container, which does not run yet."""
        self._test.addCleanup(self.unplug)
        self.plug(guest_stopped=True)
        self._test.addCleanup(LXD.delete, self.name)
        LXD.create(self.name, f'{self.address}/24',
                   self._test.vifs.devices([self.vif]))

    def start(self) -> None:
        LXD.set_state(self.name, 'start')

    def stop(self) -> None:
        LXD.set_state(self.name, 'stop')

    def restart(self) -> None:
        LXD.set_state(self.name, 'restart')

    def run(self, command: str) -> str:
        return LXD.execute(self.name, command)

    def order(self, command: str) -> None:
        """Run a command that may end the guest before it returns."""
        with contextlib.suppress(RuntimeError):
            self.run(command)

    def reaches(self, other: Guest) -> bool:
        """Whether packets and a TCP connection get through to another."""
        script = (f'ping -c 1 -W 1 {other.address} > /dev/null && '
                  f'[ "$(echo hello | busybox nc -w 2 {other.address} '
                  f'{container_host.ECHO})" = hello ] && echo yes || echo no')
        return self.run(script).strip() == 'yes'

    @property
    def init(self) -> int:
        """The process id of the guest's init on the host, 0 if it is off."""
        return LXD.state(self.name)['pid']


class VIFTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        # In this process; the daemon has a test of its own.
        for context in PRIVILEGED:
            context.set_client_mode(False)
            self.addCleanup(context.set_client_mode, True)
        self.vifs = manager.VIFManager()
        before = host_devices(), set(OVS.ports()), OVS.rows('QoS')
        self.addCleanup(lambda: self.assertEqual(
            before, (host_devices(), set(OVS.ports()), OVS.rows('QoS'))))

    def make_guests(self, **extra_specs: str) -> tuple[Guest, Guest]:
        """Make two running guests, of which the first has the flavor."""
        guest, other = Guest(self, 1, **extra_specs), Guest(self, 2)
        for each in (guest, other):
            each.create()
            each.start()
        self.assert_connected(guest, other)
        return guest, other

    def assert_connected(self, guest: Guest, other: Guest) -> None:
        """Check that two guests reach each other, at once or soon."""
        deadline = time.monotonic() + 10
        while not (guest.reaches(other) and other.reaches(guest)):
            if time.monotonic() > deadline:
                self.fail(f'{guest.name} and {other.name} do not reach each '
                          'other')
            time.sleep(0.1)

    def switch_view(self, guest: Guest) -> tuple[str, ...]:
        """What Open vSwitch and the kernel know of a port's outer end."""
        outer = guest.wire.outer
        return (*(OVS.interface(outer, column) for column in
                  ('_uuid', 'ofport', 'external_ids')),
                veth.attribute(outer, 'ifindex') or 'gone')


class PrivilegedDaemonTestCase(VIFTestCase):
    """The daemons that act as root, started as nova-compute starts them."""

    def setUp(self) -> None:
        super().setUp()
        for context in PRIVILEGED:
            context.set_client_mode(True)
            self.addCleanup(context.stop)

    def test_plug_and_unplug(self) -> None:
        guest, other = self.make_guests()
        guest.plug()
        self.assertIsNotNone(privileged.context.channel)
        guest.stop()
        guest.unplug()
        guest.unplug()
        self.assertIs(veth.WireState.ABSENT, guest.wire.state())

    def test_refusals_arrive_as_they_are(self) -> None:
        self.assertRaises(ValueError, privileged.delete_device, 'eth0')
        self.assertRaises(FileNotFoundError, privileged.set_mtu,
                          'tap01234567-89', MTU)


class LifeTestCase(VIFTestCase):
    """What a guest and its host go through."""

    def test_traffic_and_identity(self) -> None:
        guest, other = self.make_guests()
        link = guest.run('ip link show eth0')
        self.assertIn(f'mtu {MTU}', link)
        self.assertIn(guest.vif['address'], link)
        self.assertEqual(str(MTU), veth.attribute(guest.wire.outer, 'mtu'))
        self.assertIn(guest.vif['id'],
                      OVS.interface(guest.wire.outer, 'external_ids'))
        # The largest packet gets through unfragmented.
        guest.run(f'ping -c 1 -W 2 -s {MTU - 28} {other.address}')
        self.assertFalse(veth.exists(guest.wire.inner))

    def test_host_has_no_address_on_port(self) -> None:
        guest, _other = self.make_guests()
        shown = subprocess.run(['ip', 'address', 'show', guest.wire.outer],
                               stdout=subprocess.PIPE, text=True, check=True)
        self.assertNotIn('inet', shown.stdout)

    def test_guest_reboots_itself(self) -> None:
        guest, other = self.make_guests()
        before, init = self.switch_view(guest), guest.init
        guest.order('reboot')
        deadline = time.monotonic() + 20
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
        self.assertIs(veth.WireState.ON_HOST, guest.wire.state())
        guest.plug(guest_stopped=True)
        guest.start()
        self.assert_connected(guest, other)
        self.assertEqual(before, self.switch_view(guest))

    def test_guest_powers_itself_off(self) -> None:
        guest, other = self.make_guests()
        before = self.switch_view(guest)
        guest.order('poweroff')
        LXD.wait_for_status(guest.name, 'Stopped')
        guest.plug(guest_stopped=True)
        guest.start()
        self.assert_connected(guest, other)
        self.assertEqual(before, self.switch_view(guest))

    def test_lxd_restarts(self) -> None:
        guest, other = self.make_guests()
        before = self.switch_view(guest)
        for end in (LXD.lxd.stop, LXD.lxd.kill):
            end()
            LXD.lxd.start()
            self.assert_connected(guest, other)
        guest.stop()
        guest.plug(guest_stopped=True)
        guest.start()
        self.assert_connected(guest, other)
        self.assertEqual(before, self.switch_view(guest))

    def test_guest_powers_itself_off_while_lxd_is_away(self) -> None:
        guest, other = self.make_guests()
        before, init = self.switch_view(guest), guest.init
        LXD.lxd.stop()
        os.kill(init, signal.SIGKILL)
        time.sleep(1)
        LXD.lxd.start()
        LXD.wait_for_status(guest.name, 'Stopped')
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
        OVS.stop_vswitchd()
        OVS.start_vswitchd()
        self.assert_connected(guest, other)

    def test_open_vswitch_loses_its_port(self) -> None:
        guest, other = self.make_guests()
        OVS.vsctl('del-port', BRIDGE, guest.wire.outer)
        self.assertFalse(guest.reaches(other))
        guest.plug()
        self.assert_connected(guest, other)


class LossTestCase(VIFTestCase):
    """A port whose devices were lost works again from the next start."""

    def monitor(self, guest: Guest) -> int:
        """Find the process of liblxc that watches over a guest."""
        with open(f'/proc/{guest.init}/status', encoding='ascii') as status:
            for line in status:
                if line.startswith('PPid:'):
                    return int(line.split()[1])
        self.fail('init has no parent')

    def test_monitor_killed(self) -> None:
        guest, other = self.make_guests()
        os.kill(self.monitor(guest), signal.SIGKILL)
        LXD.wait_for_status(guest.name, 'Stopped')
        self.assert_restartable(guest, other)

    def test_held_by_a_guest_that_lxd_forgot(self) -> None:
        """The monitor is gone and the guest survived it."""
        guest, other = self.make_guests()
        guest.stop()
        with subprocess.Popen(['unshare', '--net', 'sleep', '600']) as holder:
            self.addCleanup(holder.kill)
            time.sleep(0.5)
            subprocess.run(['ip', 'link', 'set', guest.wire.inner, 'netns',
                            str(holder.pid)], check=True)
            # A restart of nova-compute leaves it alone, a start takes over.
            guest.plug()
            self.assertIs(veth.WireState.IN_GUEST, guest.wire.state())
            self.assert_restartable(guest, other)
            holder.kill()

    def test_host_reboots(self) -> None:
        """Nothing is left but Open vSwitch's database."""
        guest, other = self.make_guests()
        for each in (guest, other):
            each.stop()
        OVS.stop_vswitchd()
        for each in (guest, other):
            privileged.delete_device(each.wire.outer)
        OVS.start_vswitchd()
        for each in (guest, other):
            each.plug(guest_stopped=True)
            each.start()
        self.assert_connected(guest, other)

    def test_device_deleted_while_stopped(self) -> None:
        guest, other = self.make_guests()
        guest.stop()
        privileged.delete_device(guest.wire.outer)
        self.assert_restartable(guest, other)

    def test_tap_in_the_way(self) -> None:
        guest, other = Guest(self, 1), Guest(self, 2)
        subprocess.run(['ip', 'tuntap', 'add', guest.wire.outer, 'mode',
                        'tap'], check=True)
        self.assertIs(veth.WireState.BROKEN, guest.wire.state())
        for each in (guest, other):
            each.create()
            each.start()
        self.assert_connected(guest, other)

    def test_busy_switch_misses_the_change(self) -> None:
        """Make a device anew in one go, as it looks to a busy switch."""
        guest, other = self.make_guests()
        guest.stop()
        privileged.delete_device(guest.wire.outer)
        privileged.create_veth(guest.wire.outer, guest.wire.inner,
                               guest.vif['address'], MTU, False)
        time.sleep(0.5)
        self.assertIs(veth.WireState.ON_HOST, guest.wire.state())
        self.assertFalse(ovs.OVSPlugin().hears(guest.vif))
        self.assert_restartable(guest, other)

    def assert_restartable(self, guest: Guest, other: Guest) -> None:
        guest.plug(guest_stopped=True)
        self.assertIs(veth.WireState.ON_HOST, guest.wire.state())
        guest.start()
        self.assert_connected(guest, other)


class LimitsTestCase(VIFTestCase):
    """Bandwidth limits of flavors hold, and do no harm."""

    def seconds_to_send(self, sender: Guest, receiver: Guest,
                        size: int) -> float:
        """Measure how long one guest takes to send bytes to another."""
        began = time.monotonic()
        sender.run(f'(echo {size}; head -c {size} /dev/zero) | busybox nc '
                   f'{receiver.address} {container_host.DISCARD}')
        return time.monotonic() - began

    def assert_takes(self, seconds: float, sender: Guest, receiver: Guest,
                     size: int) -> None:
        took = self.seconds_to_send(sender, receiver, size)
        self.assertLess(abs(took - seconds), 0.25 * seconds,
                        f'{size} bytes took {took:.2f} s, not {seconds}')

    def test_outbound(self) -> None:
        guest, other = self.make_guests(
            **{'quota:vif_outbound_average': '1000'})
        self.assert_takes(3, guest, other, 3_000_000)
        self.assertLess(self.seconds_to_send(other, guest, 3_000_000), 2)

    def test_inbound(self) -> None:
        guest, other = self.make_guests(
            **{'quota:vif_inbound_average': '1000'})
        self.assert_takes(3, other, guest, 3_000_000)
        self.assertLess(self.seconds_to_send(guest, other, 3_000_000), 2)

    def test_guest_cannot_lift_them(self) -> None:
        guest, other = self.make_guests(
            **{'quota:vif_outbound_average': '1000'})
        guest.order('busybox tc qdisc del dev eth0 root')
        guest.order('ip link set eth0 down && ip link set eth0 up')
        self.assert_connected(guest, other)
        self.assert_takes(3, guest, other, 3_000_000)

    def test_life_with_limits(self) -> None:
        guest, other = self.make_guests(
            **{'quota:vif_outbound_average': '1000'})
        before = self.switch_view(guest)
        guest.restart()
        self.assert_connected(guest, other)
        guest.stop()
        guest.plug(guest_stopped=True)
        guest.start()
        self.assert_connected(guest, other)
        OVS.stop_vswitchd()
        OVS.start_vswitchd()
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
        self.assertLess(self.seconds_to_send(guest, other, 8_000_000), 1.5)
        # The devices that limits need go when no guest can notice.
        self.assertTrue(guest.wire.is_limited)
        guest.stop()
        guest.plug(guest_stopped=True)
        self.assertFalse(guest.wire.is_limited)
        guest.start()
        self.assert_connected(guest, other)

    def test_burst(self) -> None:
        guest, other = self.make_guests(**{
            'quota:vif_outbound_average': '1000',
            'quota:vif_outbound_peak': '50000',
            'quota:vif_outbound_burst': '4096'})
        self.assertLess(self.seconds_to_send(guest, other, 3_000_000), 2)
        self.assertGreater(self.seconds_to_send(guest, other, 8_000_000), 3)


class OtherTypesTestCase(VIFTestCase):
    """Ports that do not sit on Open vSwitch directly."""

    def test_hybrid(self) -> None:
        guest, other = Guest(self, 1), Guest(self, 2)
        guest.vif['details']['ovs_hybrid_plug'] = True
        for each in (guest, other):
            each.create()
            each.start()
        self.assert_connected(guest, other)
        port = guest.vif['id'][:11]
        self.assertEqual([guest.wire.outer, f'qvb{port}'], sorted(
            os.listdir(f'/sys/class/net/qbr{port}/brif'), reverse=True))
        self.assertIn(f'qvo{port}', OVS.ports())
        before = veth.attribute(guest.wire.outer, 'ifindex')
        guest.restart()
        guest.plug()
        self.assert_connected(guest, other)
        guest.stop()
        guest.plug(guest_stopped=True)
        self.assertEqual(before, veth.attribute(guest.wire.outer, 'ifindex'))
        privileged.delete_device(guest.wire.outer)
        guest.plug(guest_stopped=True)
        guest.start()
        self.assert_connected(guest, other)

    def test_tap(self) -> None:
        guest = Guest(self, 1)
        guest.vif.update(type=model.VIF_TYPE_TAP, details={})
        guest.create()
        # What Calico's agent would do, for one.
        subprocess.run(['ip', 'address', 'add', '10.9.0.254/24', 'dev',
                        guest.wire.outer], check=True)
        guest.start()
        guest.run('ping -c 1 -W 2 10.9.0.254')
        guest.restart()
        guest.run('ping -c 1 -W 2 10.9.0.254')
        guest.plug()

    def test_bridge(self) -> None:
        """Ports of Linux bridges, which Nova knows up to release 33."""
        if privileged_bridge is None:
            self.skipTest('this os-vif has no plugin for Linux bridges')
        privileged_bridge.vif_plug.set_client_mode(False)
        self.addCleanup(privileged_bridge.vif_plug.set_client_mode, True)
        guest, other = Guest(self, 1), Guest(self, 2)
        for each in (guest, other):
            each.vif.update(type=model.VIF_TYPE_BRIDGE,
                            details={'port_filter': True})
            each.vif['network'].update(bridge='brqtest', meta={
                'mtu': MTU, 'should_create_bridge': True})
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
        """os-vif writes more there; without the module only that happens."""
        guest = Guest(self, 1)
        guest.vif['network']['bridge'] = 'br-kernel'
        guest.vif['details'].update(bridge_name='br-kernel',
                                    datapath_type='system')
        self.addCleanup(OVS.vsctl, 'del-br', 'br-kernel')
        before = OVS.rows('QoS'), OVS.rows('Port')
        guest.plug()
        self.assertEqual(before[0] + 1, OVS.rows('QoS'))
        guest.plug()
        guest.unplug()
        # The bridge has a port, too.
        self.assertEqual((before[0], before[1] + 1),
                         (OVS.rows('QoS'), OVS.rows('Port')))

    def test_two_ports_in_order(self) -> None:
        guest = Guest(self, 1)
        second = make_vif(3)
        ports = [second, guest.vif]
        self.addCleanup(self.vifs.unplug, guest.instance, ports)
        self.vifs.plug(guest.instance, ports, guest_stopped=True)
        self.addCleanup(LXD.delete, guest.name)
        LXD.create(guest.name, '10.9.0.1/24', self.vifs.devices(ports))
        guest.start()
        self.assertIn(second['address'],
                      guest.run('ip link show eth0'))
        self.assertIn(guest.vif['address'],
                      guest.run('ip link show eth1'))
