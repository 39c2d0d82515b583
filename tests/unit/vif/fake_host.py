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

"""What lies below the VIF plugins: a kernel and an Open vSwitch, in memory.

The plugins' own code runs unchanged on top. The kernel is imitated where the
code meets it, at pyroute2, at sysfs and at ``/proc``; Open vSwitch where the
code meets os-vif.
"""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
import pathlib
import shutil
from typing import Any
import uuid

import fixtures
from nova.network import model
from nova import objects
import os_vif
from oslo_privsep import priv_context
from pyroute2.netlink import exceptions as netlink_exceptions

from nova_lxd_py.virt import privileged
from nova_lxd_py.virt.vif import ovs
from nova_lxd_py.virt.vif import veth

MTU = 1442

# Nova's objects have no classes before that.
objects.register_all()


@dataclasses.dataclass
class Device:
    """A network device of the host."""

    name: str
    index: int
    mtu: int = 1500
    address: str | None = None
    peer: Any = None
    up: bool = False
    bridge: str | None = None
    tap: bool = False
    #: in a guest's namespace, where the host does not see it by name.
    away: bool = False
    checksum_offload: bool = True
    qdiscs: dict[str, dict[str, Any]] = dataclasses.field(
        default_factory=dict)
    filters: list[dict[str, Any]] = dataclasses.field(default_factory=list)


class FakeHost(fixtures.Fixture):
    """A host with a kernel and an Open vSwitch.

    :ivar devices: its network devices, by index.
    :ivar ports: ports of Open vSwitch: the index of the device that it
        listens to by the port's name.
    :ivar lacks: kinds of queueing disciplines that the kernel was built
        without.
    :ivar is_busy: how many times Open vSwitch is to miss that a port was
        deleted and made again.
    :ivar os_vif_error: what os-vif fails with, always.
    :ivar os_vif_plug_error: what os-vif fails to plug with.
    :ivar calls: names of the changes asked of the kernel and os-vif.
    """

    def _setUp(self) -> None:
        # Its objects have no classes before that.
        os_vif.initialize()
        self.devices: dict[int, Device] = {}
        self.ports: dict[str, int] = {}
        self.lacks: set[str] = set()
        self.is_busy = 0
        self.calls: list[str] = []
        self.os_vif_error: Exception | None = None
        self.os_vif_plug_error: Exception | None = None
        self._indices = itertools.count(10)
        directory = pathlib.Path(self.useFixture(fixtures.TempDir()).path)
        self.sysfs = directory / 'net'
        self.ipv6 = directory / 'ipv6'
        self.packet_sockets = directory / 'packet'
        self.sysfs.mkdir()
        self._show()
        for target, name, value in (
                (privileged.pyroute2, 'IPRoute', lambda: _Netlink(self)),
                (privileged.fcntl, 'ioctl', self._ioctl),
                (privileged, '_IPV6_SETTINGS', str(self.ipv6)),
                (veth, '_SYSFS', str(self.sysfs)),
                (veth, 'RETURN_TIMEOUT', 0.3),
                (ovs, '_PACKET_SOCKETS', str(self.packet_sockets)),
                (ovs, 'HEARING_TIMEOUT', 0.1),
                (os_vif, 'plug', self._os_vif_plug),
                (os_vif, 'unplug', self._os_vif_unplug)):
            self.useFixture(fixtures.MockPatchObject(target, name, value))
        self.useFixture(InProcess(privileged.context))

    # -- what tests do and see ----------------------------------------------

    def device(self, name: str) -> Device:
        """Return a device that the host sees, and must see."""
        found = self.find(name)
        if found is None:
            raise LookupError(name)
        return found

    def find(self, name: str) -> Device | None:
        """Find a device that the host sees."""
        for device in self.devices.values():
            if device.name == name and not device.away:
                return device
        return None

    def names(self) -> set[str]:
        """Name the devices that the host sees."""
        return {device.name for device in self.devices.values()
                if not device.away}

    def add(self, name: str, **attributes: Any) -> Device:
        """Give the host a device."""
        if self.find(name):
            raise netlink_exceptions.NetlinkError(errno.EEXIST)
        device = Device(name, next(self._indices), **attributes)
        self.devices[device.index] = device
        self._show()
        return device

    def remove(self, device: Device) -> None:
        """Take a device away, and the other end of a pair with it."""
        for each in (device, device.peer):
            if each is not None:
                self.devices.pop(each.index, None)
        self._show()

    def hand_over(self, name: str) -> Device:
        """Move a device into a guest, as LXD does at its start."""
        device = self.device(name)
        device.away = True
        self._show()
        return device

    def give_back(self, device: Device) -> None:
        """Move a device back to the host, as LXD does at a guest's end."""
        device.away = False
        self._show()

    # -- what the code meets ------------------------------------------------

    def _show(self) -> None:
        """Bring sysfs and /proc up to date."""
        shutil.rmtree(self.sysfs)
        self.sysfs.mkdir()
        for device in self.devices.values():
            if device.away:
                continue
            (self.ipv6 / device.name).mkdir(parents=True, exist_ok=True)
            folder = self.sysfs / device.name
            folder.mkdir()
            peer = device.peer or device
            for name, value in (('ifindex', device.index),
                                ('iflink', peer.index), ('mtu', device.mtu)):
                (folder / name).write_text(f'{value}\n')
            if device.tap:
                (folder / 'tun_flags').write_text('0x1002\n')
        lines = [f'0000000000000000 3 3 0003 {index} 1 0 0 1'
                 for index in self.ports.values()]
        self.packet_sockets.write_text('\n'.join(
            ['sk RefCnt Type Proto Iface R Rmem User Inode', *lines]) + '\n')

    def _os_vif_plug(self, vif: Any, instance_info: Any) -> None:
        self.calls.append('os_vif.plug')
        error = self.os_vif_plug_error or self.os_vif_error
        if error is not None:
            raise os_vif.exception.PlugException(vif=vif, err=error)
        device = self.find(vif.vif_name)
        if vif.vif_name not in self.ports and device is not None:
            self.ports[vif.vif_name] = device.index
        self._show()

    def _os_vif_unplug(self, vif: Any, instance_info: Any) -> None:
        self.calls.append('os_vif.unplug')
        if self.os_vif_error is not None:
            raise os_vif.exception.UnplugException(vif=vif,
                                                   err=self.os_vif_error)
        if self.is_busy and vif.vif_name in self.ports:
            # It will find a port of the same name, and not look further.
            self.is_busy -= 1
            self.ports[vif.vif_name] = -1
        else:
            self.ports.pop(vif.vif_name, None)
        device = self.find(vif.vif_name)
        if device is not None:
            self.remove(device)
        self._show()

    def _ioctl(self, descriptor: Any, request: int, argument: bytes) -> None:
        name = argument[:16].rstrip(b'\0').decode()
        device = self.find(name)
        if device is None:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        self.calls.append(f'ethtool {name}')
        device.checksum_offload = False


class _Netlink:
    """A connection to the kernel with the methods of IPRoute in use."""

    def __init__(self, host: FakeHost) -> None:
        self._host = host

    def __enter__(self) -> _Netlink:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def link_lookup(self, ifname: str) -> list[int]:
        device = self._host.find(ifname)
        return [] if device is None else [device.index]

    def link(self, command: str, **arguments: Any) -> None:
        getattr(self, f'_link_{command}')(**arguments)
        self._host._show()

    def _link_add(self, kind: str, ifname: str, mtu: int,
                  peer: dict[str, Any]) -> None:
        assert kind == 'veth'
        for name in (ifname, peer['ifname']):
            if self._host.find(name):
                raise netlink_exceptions.NetlinkError(errno.EEXIST)
        self._host.calls.append(f'create {ifname}')
        outer = self._host.add(ifname, mtu=mtu)
        outer.peer = self._host.add(peer['ifname'], mtu=peer['mtu'],
                                    address=peer.get('address'), peer=outer)

    def _link_del(self, index: int) -> None:
        if index not in self._host.devices:
            raise netlink_exceptions.NetlinkError(errno.ENODEV)
        self._host.calls.append(f'delete {self._host.devices[index].name}')
        self._host.remove(self._host.devices[index])

    def _link_set(self, index: int, state: str | None = None,
                  mtu: int | None = None, master: int | None = None,
                  txqlen: int | None = None) -> None:
        device = self._host.devices[index]
        self._host.calls.append(f'set {device.name}')
        if state is not None:
            device.up = state == 'up'
        if mtu is not None:
            device.mtu = mtu
        if master is not None:
            device.bridge = self._host.devices[master].name

    def get_filters(self, index: int, parent: int) -> list[dict[str, Any]]:
        return self._host.devices[index].filters

    def tc(self, command: str, kind: str, index: int, *_position: int,
           **arguments: Any) -> None:
        device = self._host.devices[index]
        if kind in self._host.lacks:
            raise netlink_exceptions.NetlinkError(errno.ENOENT)
        if command == 'add':
            if kind in device.qdiscs:
                raise netlink_exceptions.NetlinkError(errno.EEXIST)
            device.qdiscs[kind] = {}
        elif command == 'replace-class':
            device.qdiscs[kind] = arguments
        elif command == 'add-filter':
            device.filters.append(arguments)
        elif command == 'del':
            if device.qdiscs.pop(kind, None) is None:
                raise netlink_exceptions.NetlinkError(errno.ENOENT)
        else:
            raise AssertionError(command)


class InProcess(fixtures.Fixture):
    """Have functions of a privileged context run without its daemon."""

    def __init__(self, context: priv_context.PrivContext) -> None:
        super().__init__()
        self._context = context

    def _setUp(self) -> None:
        self.useFixture(fixtures.MockPatchObject(self._context, 'client_mode',
                                                 False))


def make_vif(**changes: Any) -> model.VIF:
    """Make a port as ML2/OVN binds it on a userspace Open vSwitch."""
    port = str(uuid.uuid4())
    network = model.Network(id=str(uuid.uuid4()), bridge='br-int', label='net',
                            subnets=[], mtu=MTU)
    return model.VIF(**{
        'id': port, 'address': 'fa:16:3e:00:00:01', 'network': network,
        'type': model.VIF_TYPE_OVS, 'devname': f'tap{port}'[:14],
        'active': False, 'delegate_create': True,
        'details': {'port_filter': True, 'bridge_name': 'br-int',
                    'datapath_type': 'netdev', 'ovs_create_tap': True},
        **changes})


def make_instance(**extra_specs: str) -> objects.Instance:
    """Make an instance whose flavor has extra specs."""
    return objects.Instance(
        id=1, uuid=str(uuid.uuid4()), project_id='p', vm_state='building',
        task_state='spawning',
        flavor=objects.Flavor(name='small', extra_specs=extra_specs))
