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

"""What the tests of ports have in common.

Nothing is faked below the plugins: os-vif writes to an Open vSwitch of the
test's own with the userspace datapath, the kernel makes the devices, LXD takes
them, and what counts in the end is whether packets get through.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
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
from vif_plug_ovs.ovsdb import impl_idl
from vif_plug_ovs import privsep as os_vif_privsep

from nova_lxd_py.virt import privileged
from nova_lxd_py.virt.vif import manager
from nova_lxd_py.virt.vif import veth
from tests.functional import container_host
from tests.functional import ovs_daemon
from tests.functional import private_network

CONF = nova_conf.CONF

BRIDGE = 'br-int'
MTU = 1442

PRIVILEGED = (privileged.context, os_vif_privsep.vif_plug)

OVS = ovs_daemon.OVSDaemon(BRIDGE)
LXD = container_host.ContainerHost()

_STACK = contextlib.ExitStack()


def set_up_module() -> None:
    lacking = ovs_daemon.missing() or container_host.missing()
    if lacking is not None:
        raise base.BaseTestCase.skipException(lacking)
    objects.register_all()
    with contextlib.ExitStack() as stack:
        for fixture in (private_network.PrivateNetwork(), OVS, LXD):
            stack.enter_context(fixture)
        _configure()
        stack.callback(_disconnect)
        _STACK.push(stack.pop_all())


def tear_down_module() -> None:
    _STACK.close()


def _configure() -> None:
    # os-vif reads its options when it loads its plugins.
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


def _disconnect() -> None:
    # One connection serves os-vif for the life of a process, otherwise.
    connection = impl_idl.NeutronOvsdbIdl._ovsdb_connection
    if connection is not None:
        connection.stop(timeout=5)
    impl_idl.NeutronOvsdbIdl._ovsdb_connection = None


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
        # While it reboots LXD says -1.
        return max(LXD.state(self.name)['pid'], 0)


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
