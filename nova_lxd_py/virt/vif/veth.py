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

"""Veth pairs of ports, which exist as long as the port is plugged.

The outer end has the port's name and stays in the switch. The inner end is
given to LXD as a ``physical`` NIC: it moves into the guest's network namespace
at start and back at stop. So a guest may reboot, stop and start, and LXD may
restart, and the switch port does not change.

With bandwidth limits in the flavor there are two pairs, joined on the host::

    switch  outer ---- outer mate <--redirect--> inner mate ---- inner  guest
                       (HTB: what                (HTB: what
                        the guest sends)          it receives)

The queueing disciplines are on the mates because they would not work on the
other ends: the guest's root can remove them from the inner end; Open vSwitch
removes ingress policing from its ports; and its userspace datapath receives
packets from a device before that device's policing.
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
from nova_lxd_py.virt.vif import labels
from nova_lxd_py.virt.vif import qos

LOG = logging.getLogger(__name__)

#: Seconds to wait for LXD to move a NIC back to the host after it has reported
#: the guest as stopped.
RETURN_TIMEOUT = 5

# Errors of a kernel that lacks a queueing discipline, classifier or action.
_NO_TRAFFIC_CONTROL = (errno.ENOENT, errno.EOPNOTSUPP)

_SYSFS = '/sys/class/net'


class VethState(enum.Enum):
    """State of a port's network devices.

    :cvar ABSENT: No device exists.
    :cvar ON_HOST: All devices exist, and the inner end is on the host.
    :cvar IN_GUEST: The inner end is in a guest. It must exist, since the
        kernel deletes both ends of a pair together. LXD need not know that
        guest: if liblxc's monitor process was killed, the container runs on
        without it. Only a caller that knows that no guest should be running
        can recognise this.
    :cvar BROKEN: A device is missing, or a device of another kind has its
        name. A guest that uses the port has no network.
    """

    ABSENT = 'absent'
    ON_HOST = 'on the host'
    IN_GUEST = 'held by a guest'
    BROKEN = 'broken'


def exists(name: str) -> bool:
    """Return whether the host has a network device of that name."""
    return os.path.exists(f'{_SYSFS}/{name}')


def names() -> list[str]:
    """List the network devices of the host."""
    return sorted(os.listdir(_SYSFS))


def attribute(name: str, key: str) -> str | None:
    """Read an attribute of a network device from sysfs; needs no root.

    :param name: name of the network device.
    :param key: name of the attribute.
    :returns: the value, or None if the device does not exist.
    """
    try:
        with open(f'{_SYSFS}/{name}/{key}', encoding='ascii') as file:
            return file.read().strip()
    except OSError:
        return None


def is_pair(one: str, other: str) -> bool:
    """Return whether two devices are the ends of one veth pair."""
    # "iflink" of a veth is the index of its peer.
    return (attribute(one, 'iflink') == attribute(other, 'ifindex') and
            attribute(other, 'iflink') == attribute(one, 'ifindex') and
            exists(one))


class VethPair:
    """The veth pair of a port, or its two pairs with bandwidth limits.

    :param vif: the port.
    :ivar outer: name of the end in the switch.
    :ivar inner: name of the guest's end, while it is on the host.
    """

    def __init__(self, vif: model.VIF) -> None:
        self.outer = base.devname(vif)
        # Names of network devices have 15 characters at most.
        suffix = vif['id'][:11]
        self.inner = f'tin{suffix}'
        self.outer_mate = f'tso{suffix}'
        self.inner_mate = f'tsi{suffix}'
        self._address = vif['address'].lower()
        self._mtu = base.mtu(vif)

    @property
    def names(self) -> list[str]:
        """All names that devices of the port may have on the host."""
        return [self.outer, self.outer_mate, self.inner_mate, self.inner]

    @property
    def is_limited(self) -> bool:
        """Whether the port has the second pair, for bandwidth limits."""
        return exists(self.outer_mate) and exists(self.inner_mate)

    def state(self) -> VethState:
        """Return the state of the devices."""
        if not any(map(exists, self.names)):
            return VethState.ABSENT
        # os-vif creates a tap device of this name for virtual machines.
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

    def state_after_stop(self) -> VethState:
        """Return the state of the devices when the guest has been stopped.

        LXD may report the guest as stopped before its NIC is back on the host,
        so this waits for it, at most RETURN_TIMEOUT.
        """
        deadline = time.monotonic() + RETURN_TIMEOUT
        while self.state() is VethState.IN_GUEST:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return self.state()

    def create(self, limits: qos.Limits, routed: bool, label: str) -> None:
        """Create the devices, of which none may exist.

        :param limits: bandwidth limits; if there are any, two pairs are made.
        :param routed: whether the host itself may use IPv6 on the outer end.
        :param label: alias of the outer end, see :mod:`.labels`.
        :raises OSError: if the kernel refuses.
        """
        if limits:
            # Only the inner end has the port's MAC address.
            network.create_veth(self.outer, self.outer_mate, None,
                                self._mtu, routed)
            network.create_veth(self.inner_mate, self.inner, self._address,
                                self._mtu, False)
        else:
            network.create_veth(self.outer, self.inner, self._address,
                                self._mtu, routed)
        self.set_label(label)

    def set_limits(self, limits: qos.Limits) -> None:
        """Set the bandwidth limits of a port that has two pairs.

        :param limits: the limits.
        :raises OSError: if the kernel refuses, or lacks traffic control
            modules.
        """
        network.join(self.outer_mate, self.inner_mate)
        for name, rate in ((self.outer_mate, limits.outbound),
                           (self.inner_mate, limits.inbound)):
            if rate is None:
                network.remove_limit(name)
            else:
                network.set_limit(name, rate.average, rate.peak, rate.burst)

    def update_mtu(self) -> None:
        """Set the network's MTU on the devices that are on the host."""
        for name in self.names:
            if attribute(name, 'mtu') not in (None, str(self._mtu)):
                network.set_mtu(name, self._mtu)

    def set_label(self, label: str) -> None:
        """Set the alias of the outer end.

        :param label: the alias, see :mod:`.labels`.
        """
        if attribute(self.outer, 'ifalias') != label:
            network.set_alias(self.outer, label)

    def block(self) -> None:
        """Drop all packets to the guest, which is frozen. Idempotent.

        The guest does not notice it. Its addresses are answered for by the
        host's kernel otherwise, whether its processes run or not.

        :raises OSError: if the kernel refuses.
        """
        network.block(self.outer)

    def unblock(self) -> None:
        """Undo :meth:`block`. Idempotent.

        :raises OSError: if the kernel refuses.
        """
        network.unblock(self.outer)

    def remove(self) -> None:
        """Delete the devices that exist on the host."""
        for name in self.names:
            if exists(name):
                network.delete_device(name)


class VethPlugin(base.VIFPlugin):
    """Base class of plugins whose ports are veth pairs.

    Subclasses connect the outer end to the network.
    """

    #: Whether the host routes to the outer end instead of bridging it.
    routed = False

    @abc.abstractmethod
    def connect(self, instance: objects.Instance, vif: model.VIF) -> None:
        """Add the outer end to the switch. Idempotent.

        :param instance: the instance that the port is bound to.
        :param vif: the port.
        """

    @abc.abstractmethod
    def disconnect(self, instance: objects.Instance, vif: model.VIF) -> None:
        """Remove the outer end from the switch. Idempotent.

        :param instance: the instance that the port was bound to.
        :param vif: the port.
        """

    def plug(self, instance: objects.Instance, vif: model.VIF, *,
             limits: qos.Limits, guest_stopped: bool) -> None:
        pair = VethPair(vif)
        state = pair.state_after_stop() if guest_stopped else pair.state()
        if self._must_recreate(pair, state, limits, guest_stopped):
            if state is not VethState.ABSENT:
                LOG.info('Recreating the network device of port %(port)s, '
                         'which was %(state)s',
                         {'port': vif['id'], 'state': state.value},
                         instance=instance)
            self._create_and_connect(instance, vif, limits)
            return
        if guest_stopped:
            # The guest may have been frozen when it was stopped.
            pair.unblock()
        pair.update_mtu()
        pair.set_label(labels.text(instance, vif))
        if pair.is_limited:
            pair.set_limits(limits)
        elif limits:
            LOG.warning('Bandwidth limits of port %s will be set at the next '
                        'hard reboot of the server', vif['id'],
                        instance=instance)
        self.connect(instance, vif)

    def _create_and_connect(self, instance: objects.Instance, vif: model.VIF,
                            limits: qos.Limits) -> None:
        """Create and connect the port's devices; leave none on failure."""
        try:
            self.create_devices(instance, vif, limits)
            self.connect(instance, vif)
        except Exception:
            with excutils.save_and_reraise_exception():
                try:
                    self.unplug(instance, vif)
                except Exception as error:
                    LOG.warning('Port %(port)s could not be unplugged after '
                                'it could not be plugged: %(error)s',
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

    def create_devices(self, instance: objects.Instance, vif: model.VIF,
                       limits: qos.Limits) -> None:
        """Create the port's devices, replacing existing ones.

        The switch's port is removed as well, for the reason given in
        :meth:`.ovs.OVSPlugin.wait_until_open`.

        :param instance: the instance that the port is bound to.
        :param vif: the port.
        :param limits: bandwidth limits of the flavor.
        :raises Exception: if the devices cannot be created.
        """
        self.unplug(instance, vif)
        pair, label = VethPair(vif), labels.text(instance, vif)
        pair.create(limits, self.routed, label)
        if not limits:
            return
        try:
            pair.set_limits(limits)
        except OSError as error:
            if error.errno not in _NO_TRAFFIC_CONTROL:
                raise
            LOG.warning('Port %(port)s gets no bandwidth limits: they need '
                        'the queueing disciplines HTB and ingress, cls_u32 '
                        'and act_mirred, and the kernel of this host lacks '
                        'some of these (%(error)s)',
                        {'port': vif['id'], 'error': error}, instance=instance)
            pair.remove()
            pair.create(qos.Limits(), self.routed, label)

    @staticmethod
    def _must_recreate(pair: VethPair, state: VethState, limits: qos.Limits,
                       guest_stopped: bool) -> bool:
        """Return whether the devices of a port must be replaced."""
        if state in (VethState.ABSENT, VethState.BROKEN):
            return True
        # With guest_stopped, a guest unknown to LXD may hold the device, or
        # one that is to lose it (VIFManager.recreate).
        return guest_stopped and (state is VethState.IN_GUEST or
                                  bool(limits) != pair.is_limited)
