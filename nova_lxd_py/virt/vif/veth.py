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

"""The devices that carry a port, and live as long as the port.

A pair of veth devices: the outer end bears the port's name and stays with the
switch; the inner end is handed to LXD as a ``physical`` NIC, moves into the
guest at start and comes back at stop. So a guest may reboot, stop and start,
and LXD may restart, without the switch seeing anything.

Where the flavor limits the bandwidth there are two pairs, joined on the host::

    switch  outer ---- outer mate <--redirect--> inner mate ---- inner  guest
                       (HTB: what                (HTB: what
                        the guest sends)          it receives)

The limits sit on the mates because they would hold nowhere else. The guest's
root can remove what is on the inner end; Open vSwitch removes what it finds on
the ingress of its ports; and its userspace datapath takes packets from a
device before any policing on that device.
"""

from __future__ import annotations

import abc
import enum
import errno
import os
import time

from nova.network import model
from nova import objects
from oslo_log import log as logging
from oslo_utils import excutils

from nova_lxd_py.virt.privileged import network
from nova_lxd_py.virt.vif import base
from nova_lxd_py.virt.vif import qos

LOG = logging.getLogger(__name__)

#: Seconds that LXD may take to bring a NIC back after it has reported the
#: guest as stopped.
RETURN_TIMEOUT = 5

# How the kernel says that it was built without what is asked for.
_NO_TRAFFIC_CONTROL = (errno.ENOENT, errno.EOPNOTSUPP)

_SYSFS = '/sys/class/net'


class VethState(enum.Enum):
    """Where the devices of a port are, and what that means.

    :cvar ABSENT: There are none.
    :cvar ON_HOST: No guest has the inner end; the next start takes it.
    :cvar IN_GUEST: A guest has it. It is alive, for the kernel deletes both
        ends of a pair together. The guest need not be one that LXD knows of:
        if liblxc's monitor process was killed, the guest goes on without it.
        Only who knows that no guest should be running can tell.
    :cvar BROKEN: Something is missing, or another device bears a name of
        ours. A guest, if there is one, has no network.
    """

    ABSENT = 'absent'
    ON_HOST = 'on the host'
    IN_GUEST = 'held by a guest that LXD does not know of'
    BROKEN = 'broken'


def exists(name: str) -> bool:
    """Say whether the host has a network device of that name."""
    return os.path.exists(f'{_SYSFS}/{name}')


def attribute(name: str, key: str) -> str | None:
    """Read an attribute of a network device from sysfs; needs no root.

    :returns: the value, or None if there is no such device.
    """
    try:
        with open(f'{_SYSFS}/{name}/{key}', encoding='ascii') as file:
            return file.read().strip()
    except OSError:
        return None


def is_pair(one: str, other: str) -> bool:
    """Say whether two devices are the ends of one veth pair on this host."""
    # "iflink" of a veth is the index of its peer.
    return (attribute(one, 'iflink') == attribute(other, 'ifindex') and
            attribute(other, 'iflink') == attribute(one, 'ifindex') and
            exists(one))


class VethPair:
    """The devices of one port.

    :ivar outer: name of the end that stays with the switch.
    :ivar inner: name of the end for the guest, while it is on the host.
    """

    def __init__(self, vif: model.VIF) -> None:
        self.outer = base.devname(vif)
        # Names of devices have 15 characters at most, hence not the whole id.
        tail = vif['id'][:11]
        self.inner = f'tin{tail}'
        self.outer_mate = f'tso{tail}'
        self.inner_mate = f'tsi{tail}'
        self._address = vif['address'].lower()
        self._mtu = base.mtu(vif)

    @property
    def names(self) -> list[str]:
        """All names that devices of the port can have on the host."""
        return [self.outer, self.outer_mate, self.inner_mate, self.inner]

    @property
    def is_limited(self) -> bool:
        """Whether the port has the devices that bandwidth limits need."""
        return exists(self.outer_mate) and exists(self.inner_mate)

    def state(self) -> VethState:
        """Find out where the devices are."""
        if not any(map(exists, self.names)):
            return VethState.ABSENT
        # os-vif makes a tap device of this name for virtual machines.
        if not exists(self.outer) or exists(f'{self.outer}/tun_flags'):
            return VethState.BROKEN
        mate = self.outer
        if exists(self.outer_mate) or exists(self.inner_mate):
            mate = self.inner_mate
            if not is_pair(self.outer, self.outer_mate) or not exists(mate):
                return VethState.BROKEN
        if not exists(self.inner):
            return VethState.IN_GUEST
        if is_pair(mate, self.inner):
            return VethState.ON_HOST
        return VethState.BROKEN

    def settled_state(self) -> VethState:
        """Find out where the devices are, after a guest has stopped.

        LXD may say that the guest is stopped before its NIC is back.
        """
        deadline = time.monotonic() + RETURN_TIMEOUT
        while self.state() is VethState.IN_GUEST:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return self.state()

    def make(self, limits: qos.Limits, routed: bool) -> None:
        """Make the devices, of which none may exist.

        :param limits: decides whether there are one or two pairs.
        :param routed: whether the host itself may use IPv6 on the outer end.
        :raises OSError: if the kernel refuses.
        """
        if limits:
            # No device of the host must bear the guest's address but its own.
            network.create_veth(self.outer, self.outer_mate, None,
                                self._mtu, routed)
            network.create_veth(self.inner_mate, self.inner, self._address,
                                self._mtu, False)
        else:
            network.create_veth(self.outer, self.inner, self._address,
                                self._mtu, routed)

    def set_limits(self, limits: qos.Limits) -> None:
        """Set the bandwidth limits of a port that has devices for them.

        :raises OSError: if the kernel refuses or lacks what is needed.
        """
        network.join(self.outer_mate, self.inner_mate)
        for name, rate in ((self.outer_mate, limits.outbound),
                           (self.inner_mate, limits.inbound)):
            if rate is None:
                network.remove_limit(name)
            else:
                network.set_limit(name, rate.average, rate.peak, rate.burst)

    def update_mtu(self) -> None:
        """Follow a change of the network's MTU, as far as the host goes."""
        for name in self.names:
            if attribute(name, 'mtu') not in (None, str(self._mtu)):
                network.set_mtu(name, self._mtu)

    def remove(self) -> None:
        """Remove what there is of the devices."""
        for name in self.names:
            if exists(name):
                network.delete_device(name)


class VethPlugin(base.VIFPlugin):
    """A VIF type whose ports are wires.

    Subclasses say how the outer end meets the rest of the network.
    """

    #: Whether the host routes to the outer end instead of switching.
    routed = False

    @abc.abstractmethod
    def connect(self, instance: objects.Instance, vif: model.VIF) -> None:
        """Attach the outer end to the switch; again is no change."""

    @abc.abstractmethod
    def disconnect(self, instance: objects.Instance, vif: model.VIF) -> None:
        """Detach the outer end from the switch, be it there or not."""

    def plug(self, instance: objects.Instance, vif: model.VIF, *,
             limits: qos.Limits, guest_stopped: bool) -> None:
        wire = VethPair(vif)
        state = wire.settled_state() if guest_stopped else wire.state()
        if self._is_useless(wire, state, limits, guest_stopped):
            if state is not VethState.ABSENT:
                LOG.info('Making the network device of port %(port)s anew; '
                         'it was %(state)s.',
                         {'port': vif['id'], 'state': state.value},
                         instance=instance)
            self._make_and_connect(instance, vif, limits)
            return
        wire.update_mtu()
        if wire.is_limited:
            wire.set_limits(limits)
        elif limits:
            LOG.warning('The bandwidth limits of port %s take effect at the '
                        'next hard reboot of the server.', vif['id'],
                        instance=instance)
        self.connect(instance, vif)

    def _make_and_connect(self, instance: objects.Instance, vif: model.VIF,
                          limits: qos.Limits) -> None:
        """Make the port's devices and attach them, or leave none."""
        try:
            self.make(instance, vif, limits)
            self.connect(instance, vif)
        except Exception:
            with excutils.save_and_reraise_exception():
                try:
                    self.unplug(instance, vif)
                except Exception as error:
                    LOG.warning('Nor could port %(port)s be taken back: '
                                '%(error)s',
                                {'port': vif['id'], 'error': error},
                                instance=instance)

    def unplug(self, instance: objects.Instance, vif: model.VIF) -> None:
        try:
            self.disconnect(instance, vif)
        finally:
            VethPair(vif).remove()

    def device(self, vif: model.VIF, guest_name: str) -> dict[str, str]:
        return {
            'type': 'nic',
            'nictype': 'physical',
            'parent': VethPair(vif).inner,
            'name': guest_name,
            'hwaddr': vif['address'].lower(),
            'mtu': str(base.mtu(vif)),
        }

    def owned_devices(self, vif: model.VIF) -> list[str]:
        return VethPair(vif).names

    def make(self, instance: objects.Instance, vif: model.VIF,
             limits: qos.Limits) -> None:
        """Make the port's devices, with what there was before removed.

        That includes the switch's port: see :meth:`.ovs.OVSPlugin.has_port`.

        :raises Exception: if that is not possible.
        """
        self.unplug(instance, vif)
        wire = VethPair(vif)
        wire.make(limits, self.routed)
        if not limits:
            return
        try:
            wire.set_limits(limits)
        except OSError as error:
            if error.errno not in _NO_TRAFFIC_CONTROL:
                raise
            LOG.warning('Port %(port)s goes without the bandwidth limits of '
                        'its flavor: they need the queueing disciplines HTB '
                        'and ingress, cls_u32 and act_mirred, and the kernel '
                        'of this host lacks some of these (%(error)s).',
                        {'port': vif['id'], 'error': error}, instance=instance)
            wire.remove()
            wire.make(qos.Limits(), self.routed)

    @staticmethod
    def _is_useless(wire: VethPair, state: VethState, limits: qos.Limits,
                    guest_stopped: bool) -> bool:
        """Say whether what there is of a port's devices must be replaced."""
        if state in (VethState.ABSENT, VethState.BROKEN):
            return True
        # No guest can be using it, or none that Nova knows of.
        return guest_stopped and (state is VethState.IN_GUEST or
                                  bool(limits) != wire.is_limited)
