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

import errno
import threading
import types
from typing import Any

import fixtures
from nova.compute import manager as compute_manager
from nova import conf as nova_conf
from nova import exception
from nova import objects
from oslo_config import fixture as config_fixture
from oslotest import base
from pyroute2.netlink import exceptions as netlink_exceptions
from stevedore import extension

from nova_lxd_py.virt.vif import base as base_vif
from nova_lxd_py.virt.vif import bridge
from nova_lxd_py.virt.vif import manager
from nova_lxd_py.virt.vif import ovs
from nova_lxd_py.virt.vif import ovs_hybrid
from nova_lxd_py.virt.vif import tap
from nova_lxd_py.virt.vif import veth
from tests.fixtures import fake_host

CONF = nova_conf.CONF

ENTRY_POINTS = {'ovs': ovs.OVSPlugin, 'ovs_hybrid': ovs_hybrid.OVSHybridPlugin,
                'bridge': bridge.BridgePlugin, 'tap': tap.TapPlugin}


class ManagerTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.host = self.useFixture(fake_host.FakeHost())
        self.config = self.useFixture(config_fixture.Config(CONF))
        self.vifs = manager.VIFManager()
        self.instance = fake_host.make_instance()

    def refusal(self, vif: Any) -> str:
        error = self.assertRaises(exception.VirtualInterfacePlugException,
                                  self.vifs.plug, self.instance, [vif])
        self.assertRaises(exception.VirtualInterfacePlugException,
                          self.vifs.devices, [vif])
        self.assertEqual([], self.host.calls)
        return str(error)


class TypesTestCase(ManagerTestCase):

    def test_entry_points(self) -> None:
        self.assertEqual(sorted(ENTRY_POINTS), self.vifs.supported_types)
        loaded: Any = extension.ExtensionManager(manager.NAMESPACE)
        self.assertEqual(ENTRY_POINTS, {each.name: each.plugin
                                        for each in loaded})

    def test_plugin_that_cannot_be_loaded(self) -> None:
        entry_point = types.SimpleNamespace(name='x', value='a.b:C')
        log = self.useFixture(fixtures.FakeLogger())
        none = extension.ExtensionManager.make_test_instance([])

        def load(*_args: Any, on_load_failure_callback: Any, **_kwargs: Any
                 ) -> Any:
            on_load_failure_callback(None, entry_point, ImportError('a'))
            return none

        self.useFixture(fixtures.MonkeyPatch(
            'stevedore.extension.ExtensionManager', load))
        self.assertEqual([], manager.VIFManager().supported_types)
        self.assertIn('The VIF plugin x (a.b:C) could not be loaded: a. Ports '
                      'of this type will be refused.', log.output)

    def test_unbound(self) -> None:
        for kind in ('unbound', 'binding_failed'):
            vif = fake_host.make_vif(type=kind)
            message = self.refusal(vif)
            self.assertIn(vif['id'], message)
            self.assertIn('ovs', message)
            self.assertIn('not bound', message)

    def test_unknown(self) -> None:
        for kind in ('vhostuser', 'hostdev_physical', 'other', None):
            message = self.refusal(fake_host.make_vif(type=kind))
            self.assertIn('bridge, ovs, ovs_hybrid, tap', message)
            self.assertIn(str(kind), message)

    def test_other_kinds_of_nic(self) -> None:
        for kind in ('direct', 'macvtap', 'vdpa', 'baremetal'):
            message = self.refusal(fake_host.make_vif(vnic_type=kind))
            self.assertIn(kind, message)

    def test_hybrid(self) -> None:
        vif = fake_host.make_vif(details={'ovs_hybrid_plug': True,
                                          'ovs_create_tap': True})
        self.assertIsInstance(self.vifs._plugin(vif),
                              ovs_hybrid.OVSHybridPlugin)
        # os-vif creates the bridge and its link to the switch.
        self.host.add(f'qbr{vif["id"][:11]}')
        self.vifs.plug(self.instance, [vif])
        self.assertEqual(f'qbr{vif["id"][:11]}',
                         self.host.device(vif['devname']).bridge)
        self.assertFalse(self.host.device(vif['devname']).peer.bridge)


class DevicesTestCase(ManagerTestCase):

    def test_order(self) -> None:
        vifs = [fake_host.make_vif() for _ in range(3)]
        devices = self.vifs.devices(vifs)
        self.assertEqual([f'nic-{vif["id"][:11]}' for vif in vifs],
                         list(devices))
        self.assertEqual(['eth0', 'eth1', 'eth2'],
                         [device['name'] for device in devices.values()])

    def test_none(self) -> None:
        self.assertEqual({}, self.vifs.devices([]))


class PlugTestCase(ManagerTestCase):

    def test_plug_and_unplug(self) -> None:
        vifs = [fake_host.make_vif() for _ in range(3)]
        self.vifs.plug(self.instance, vifs)
        self.assertEqual({vif['devname'] for vif in vifs},
                         set(self.host.ports))
        self.vifs.unplug(self.instance, vifs)
        self.assertEqual(set(), self.host.names())
        self.assertEqual({}, self.host.ports)

    def test_nothing(self) -> None:
        self.vifs.plug(self.instance, [])
        self.vifs.unplug(self.instance, [])
        self.vifs.unplug(self.instance, None)

    def test_any_error_is_a_plug_exception(self) -> None:
        """Any other exception would end a starting nova-compute."""
        secret = 'tcp:10.1.2.3:6640 refused'
        for error in (RuntimeError(secret), OSError(secret),
                      ValueError(secret)):
            self.host.os_vif_error = error
            vif = fake_host.make_vif()
            raised = self.assertRaises(
                exception.VirtualInterfacePlugException, self.vifs.plug,
                self.instance, [vif])
            self.assertIn(vif['id'], str(raised))
            self.assertNotIn('10.1.2.3', str(raised))

    def test_new_port_that_cannot_be_plugged_leaves_nothing(self) -> None:
        self.host.os_vif_plug_error = RuntimeError('no bridge')
        self.assertRaises(exception.VirtualInterfacePlugException,
                          self.vifs.plug, self.instance,
                          [fake_host.make_vif()])
        self.assertEqual(set(), self.host.names())
        self.assertIn('os_vif.plug', self.host.calls)

    def test_old_port_that_cannot_be_plugged_stays(self) -> None:
        vif = fake_host.make_vif()
        self.vifs.plug(self.instance, [vif])
        before = self.host.names()
        self.host.os_vif_error = RuntimeError('no answer')
        self.assertRaises(exception.VirtualInterfacePlugException,
                          self.vifs.plug, self.instance, [vif])
        self.assertEqual(before, self.host.names())

    def test_wrong_flavor(self) -> None:
        instance = fake_host.make_instance(
            **{'quota:vif_inbound_average': 'x'})
        self.assertRaises(exception.VirtualInterfacePlugException,
                          self.vifs.plug, instance, [fake_host.make_vif()])

    def test_unplug_goes_on_after_an_error(self) -> None:
        good, bad = fake_host.make_vif(), fake_host.make_vif(type='other')
        self.vifs.plug(self.instance, [good])
        self.vifs.unplug(self.instance, [bad, good])
        self.assertEqual(set(), self.host.names())
        self.vifs.plug(self.instance, [good])
        self.host.os_vif_error = RuntimeError('no answer')
        self.vifs.unplug(self.instance, [good])
        self.assertEqual(set(), self.host.names())

    def test_unplug_of_a_port_that_was_unbound_meanwhile(self) -> None:
        vif = fake_host.make_vif()
        self.vifs.plug(self.instance, [vif])
        vif['type'] = 'unbound'
        vif['network']['bridge'] = None
        self.vifs.unplug(self.instance, [vif])
        self.assertEqual(set(), self.host.names())
        self.assertEqual({}, self.host.ports)
        self.assertEqual('unbound', vif['type'])

    def test_limits_of_the_flavor(self) -> None:
        self.instance = fake_host.make_instance(
            **{'quota:vif_inbound_average': '10'})
        vif = fake_host.make_vif()
        self.vifs.plug(self.instance, [vif])
        self.assertTrue(veth.VethPair(vif).is_limited)


class WaitTestCase(ManagerTestCase):
    """Waiting for Neutron, with Nova's own event code."""

    def setUp(self) -> None:
        super().setUp()
        self.events = compute_manager.InstanceEvents()
        self.virtapi = compute_manager.ComputeVirtAPI(
            types.SimpleNamespace(instance_events=self.events,
                                  reportclient=None))
        self.config.config(vif_plugging_timeout=5)
        self.vif = fake_host.make_vif()

    def send(self, vif: Any, status: str = 'completed') -> bool:
        """Process an event as Nova does when Neutron sends one.

        :returns: whether a waiter was registered for it.
        """
        event = objects.InstanceExternalEvent(
            name='network-vif-plugged', tag=vif['id'], status=status,
            instance_uuid=self.instance.uuid)
        waiter = self.events.pop_instance_event(self.instance, event)
        if waiter is None:
            return False
        # An eventlet event before Nova 34.
        (waiter.set if hasattr(waiter, 'set') else waiter.send)(event)
        return True

    def plugged(self, *vifs: Any) -> Any:
        return self.vifs.plugged(self.virtapi, self.instance, vifs)

    def test_event_comes_while_the_block_runs(self) -> None:
        with self.plugged(self.vif):
            self.assertIn(self.vif['devname'], self.host.ports)
            self.assertTrue(self.send(self.vif))

    def test_event_comes_later(self) -> None:
        timer = threading.Timer(0.2, self.send, [self.vif])
        self.addCleanup(timer.join)
        with self.plugged(self.vif):
            timer.start()
        self.assertFalse(timer.is_alive() and self.send(self.vif))

    def test_event_comes_during_the_plug(self) -> None:
        plug = self.vifs.plug

        def plug_and_send(*arguments: Any, **keywords: Any) -> None:
            plug(*arguments, **keywords)
            self.assertTrue(self.send(self.vif))

        self.useFixture(fixtures.MockPatchObject(self.vifs, 'plug',
                                                 plug_and_send))
        with self.plugged(self.vif):
            pass

    def test_active_ports_are_not_waited_for(self) -> None:
        vif = fake_host.make_vif(active=True)
        with self.plugged(vif):
            self.assertFalse(self.send(vif))
        self.assertIn(vif['devname'], self.host.ports)

    def test_no_timeout_means_no_waiting(self) -> None:
        self.config.config(vif_plugging_timeout=0)
        with self.plugged(self.vif):
            self.assertFalse(self.send(self.vif))

    def test_nothing_comes(self) -> None:
        self.config.config(vif_plugging_timeout=1)
        ran = []

        def use() -> None:
            with self.plugged(self.vif):
                ran.append(True)

        self.assertRaises(exception.VirtualInterfaceCreateException, use)
        self.config.config(vif_plugging_is_fatal=False)
        use()
        self.assertEqual([True, True], ran)
        # The caller has to unplug.
        self.assertIn(self.vif['devname'], self.host.ports)

    def test_neutron_fails(self) -> None:
        def use() -> None:
            with self.plugged(self.vif):
                self.send(self.vif, 'failed')

        self.assertRaises(exception.VirtualInterfaceCreateException, use)
        self.config.config(vif_plugging_is_fatal=False)
        use()

    def test_plug_fails(self) -> None:
        self.host.os_vif_error = RuntimeError('no answer')

        def use() -> None:
            with self.plugged(self.vif):
                self.host.calls.append('entered')

        self.assertRaises(exception.VirtualInterfacePlugException, use)
        self.assertNotIn('entered', self.host.calls)

    def test_block_fails(self) -> None:
        def use() -> None:
            with self.plugged(self.vif):
                raise KeyError('x')

        self.assertRaises(KeyError, use)

    def test_device_left_by_an_earlier_build(self) -> None:
        self.vifs.plug(self.instance, [self.vif])
        self.host.hand_over(veth.VethPair(self.vif).inner)
        with self.plugged(self.vif):
            self.send(self.vif)
        self.assertIs(veth.VethState.ON_HOST, veth.VethPair(self.vif).state())


class UnplugAllTestCase(ManagerTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.vif = fake_host.make_vif()

    def unplug_all(self) -> None:
        self.vifs.unplug_all(self.instance, [], {})

    def test_port_that_nova_has_forgotten(self) -> None:
        self.unplug_all()
        self.vifs.plug(self.instance, [self.vif])
        self.unplug_all()
        self.assertEqual(set(), self.host.names())

    def test_port_that_an_earlier_process_has_plugged(self) -> None:
        self.vifs.plug(self.instance, [self.vif])
        self.vifs = manager.VIFManager()
        self.unplug_all()
        self.assertEqual(set(), self.host.names())

    def test_port_that_could_be_neither_plugged_nor_unplugged(self) -> None:
        self.unplug_all()
        self.host.os_vif_plug_error = OSError('no answer')
        with (fixtures.MonkeyPatch('os_vif.unplug', lambda *args: None),
              fixtures.MonkeyPatch('tests.fixtures.fake_host._Netlink.'
                                   '_link_del', self.refuse)):
            self.assertRaises(exception.VirtualInterfacePlugException,
                              self.vifs.plug, self.instance, [self.vif])
        self.assertIn(base_vif.devname(self.vif), self.host.names())
        self.unplug_all()
        self.assertEqual(set(), self.host.names())

    @staticmethod
    def refuse(netlink: Any, index: int) -> None:
        raise netlink_exceptions.NetlinkError(errno.EBUSY)

    def test_port_that_another_instance_has_now(self) -> None:
        self.vifs.plug(self.instance, [self.vif])
        other = fake_host.make_instance()
        self.vifs.plug(other, [self.vif])
        self.unplug_all()
        self.assertIn(base_vif.devname(self.vif), self.host.names())
        self.instance = other
        self.unplug_all()
        self.assertEqual(set(), self.host.names())

    def test_reads_no_aliases_of_other_instances(self) -> None:
        """Except once, those of an earlier process."""
        others = [fake_host.make_vif() for _ in range(5)]
        self.vifs.plug(fake_host.make_instance(), others)
        self.unplug_all()
        self.vifs.plug(fake_host.make_instance(), [fake_host.make_vif()])
        self.vifs.plug(self.instance, [self.vif])
        read: list[str] = []
        attribute = veth.attribute

        def recorded(name: str, key: str) -> str | None:
            if key == 'ifalias':
                read.append(name)
            return attribute(name, key)

        with fixtures.MonkeyPatch(
                'nova_lxd_py.virt.vif.veth.attribute', recorded):
            self.unplug_all()
        self.assertEqual({base_vif.devname(self.vif)}, set(read))
        self.assertEqual(12, len(self.host.names()))

    def test_nothing_is_remembered_of_ports_that_are_gone(self) -> None:
        self.vifs.plug(self.instance, [self.vif])
        self.unplug_all()
        self.assertEqual({}, self.vifs._index._names)
