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

"""Network devices of ports, created and configured as root.

This module is imported by the privileged daemon: it must not import nova.
"""

from __future__ import annotations

import array
from collections.abc import Iterator
import contextlib
import errno
import fcntl
import os
import re
import socket
import struct

from oslo_log import log as logging
import pyroute2
from pyroute2.netlink import exceptions as netlink_exceptions

from nova_lxd_py.virt import privileged

LOG = logging.getLogger(__name__)

#: Timeout of one change of a network device, in seconds. The kernel takes
#: milliseconds, or some hundred while it tears down many namespaces.
NETWORK_TIMEOUT = 30

# Ports are named by a prefix and the first 11 characters of their UUID.
_OUR_DEVICE = re.compile(r'(?:tap|nic|tin|tso|tsi)[0-9a-f]{8}-[0-9a-f]{2}')
_BRIDGE = re.compile(r'[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}')
# IFALIASZ in linux/if.h.
_ALIAS = re.compile(r'[ -~]{1,255}')
_MAC = re.compile(r'[0-9a-f]{2}(?::[0-9a-f]{2}){5}')

# From linux/if_ether.h and linux/pkt_sched.h; handles are major << 16 | minor.
_ETH_P_ALL = 0x0003
_INGRESS = 0xffff0000
_ROOT = 0x00010000

_IPV6_SETTINGS = '/proc/sys/net/ipv6/conf'

# From linux/sockios.h and linux/ethtool.h.
_SIOCETHTOOL = 0x8946
_ETHTOOL_STXCSUM = 0x17

#: The minimum MTU of IPv4 to the maximum MTU of a veth device.
_MTU_RANGE = range(68, 65536)


def _device(name: str) -> str:
    if not isinstance(name, str) or not _OUR_DEVICE.fullmatch(name):
        raise ValueError(f'{name!r} is not the name of a device of a port')
    return name


def _mac(address: str) -> str:
    if not isinstance(address, str) or not _MAC.fullmatch(address):
        raise ValueError(f'{address!r} is not a MAC address')
    return address


def _mtu(mtu: int) -> int:
    if mtu not in _MTU_RANGE:
        raise ValueError(f'{mtu!r} is not an MTU')
    return mtu


@contextlib.contextmanager
def _netlink() -> Iterator[pyroute2.IPRoute]:
    """Open a netlink socket; errors of the kernel are raised as OSError.

    It is used in the daemon only: pyroute2 runs an event loop, which does not
    work in an eventlet-patched nova-compute.
    """
    try:
        with pyroute2.IPRoute() as netlink:
            yield netlink
    except netlink_exceptions.NetlinkError as error:
        raise OSError(error.code, str(error.args[-1])) from error


@contextlib.contextmanager
def _tolerate(*codes: int) -> Iterator[None]:
    try:
        yield
    except netlink_exceptions.NetlinkError as error:
        if error.code not in codes:
            raise


def _find(netlink: pyroute2.IPRoute, name: str) -> int | None:
    found = netlink.link_lookup(ifname=name)
    return found[0] if found else None


def _index(netlink: pyroute2.IPRoute, name: str) -> int:
    index = _find(netlink, name)
    if index is None:
        raise FileNotFoundError(2, f'There is no network device {name}')
    return index


def _disable_ipv6(name: str) -> None:
    """Keep the host itself off the network of a port.

    Otherwise the host would assign a link-local address to the device, and be
    a neighbour on the tenant's network.
    """
    path = f'{_IPV6_SETTINGS}/{name}/disable_ipv6'
    # The path does not exist if the kernel has no IPv6.
    if os.path.exists(path):
        with open(path, 'w', encoding='ascii') as sysctl:
            sysctl.write('1')


@privileged.network_context.entrypoint_with_timeout(NETWORK_TIMEOUT)
def create_veth(outer: str, inner: str, mac: str | None, mtu: int,
                routed: bool) -> None:
    """Create a veth pair.

    The outer end is set up. The inner end stays down until LXD sets it up in
    the guest.

    :param outer: name of the end that stays on the host.
    :param inner: name of the end for the guest.
    :param mac: MAC address of the inner end; None for a random one.
    :param mtu: MTU of both ends, in bytes.
    :param routed: whether the host may use IPv6 on the outer end.
    :raises OSError: if the kernel refuses, for example with errno EEXIST if a
        device with one of the names exists.
    """
    peer = {'ifname': _device(inner), 'mtu': _mtu(mtu)}
    if mac is not None:
        peer['address'] = _mac(mac)
    with _netlink() as netlink:
        netlink.link('add', kind='veth', ifname=_device(outer), mtu=mtu,
                     peer=peer)
        # The inner end has a setting of its own in the guest's namespace.
        for name in (inner,) if routed else (inner, outer):
            _disable_ipv6(name)
        netlink.link('set', index=_index(netlink, outer), state='up')


@privileged.network_context.entrypoint_with_timeout(NETWORK_TIMEOUT)
def delete_device(name: str) -> bool:
    """Delete the device of a port, with its peer if it is a veth.

    :param name: name of the device.
    :returns: whether it existed.
    :raises OSError: if the kernel refuses.
    """
    with _netlink() as netlink:
        index = _find(netlink, _device(name))
        if index is None:
            return False
        try:
            netlink.link('del', index=index)
        except netlink_exceptions.NetlinkError:
            # The peer, or the namespace that it was in, may go concurrently.
            if _find(netlink, name) is not None:
                raise
            return False
        return True


@privileged.network_context.entrypoint_with_timeout(NETWORK_TIMEOUT)
def set_mtu(name: str, mtu: int) -> None:
    """Set the MTU of the device of a port.

    :param name: name of the device.
    :param mtu: MTU in bytes.
    :raises OSError: if there is no such device or the kernel refuses.
    """
    with _netlink() as netlink:
        netlink.link('set', index=_index(netlink, _device(name)),
                     mtu=_mtu(mtu))


@privileged.network_context.entrypoint_with_timeout(NETWORK_TIMEOUT)
def set_alias(name: str, alias: str) -> None:
    """Set the alias of the device of a port, a text that is shown with it.

    :param name: name of the device.
    :param alias: printable ASCII characters.
    :raises OSError: if there is no such device or the kernel refuses.
    """
    if not isinstance(alias, str) or not _ALIAS.fullmatch(alias):
        raise ValueError(f'{alias!r} is not an alias of a device')
    with _netlink() as netlink:
        netlink.link('set', index=_index(netlink, _device(name)),
                     ifalias=alias)


@privileged.network_context.entrypoint_with_timeout(NETWORK_TIMEOUT)
def add_to_bridge(name: str, bridge: str) -> None:
    """Add a device to a Linux bridge. Idempotent.

    :param name: name of the device.
    :param bridge: name of the bridge.
    :raises OSError: if either does not exist or the kernel refuses.
    """
    if not isinstance(bridge, str) or not _BRIDGE.fullmatch(bridge):
        raise ValueError(f'{bridge!r} is not the name of a bridge')
    with _netlink() as netlink:
        netlink.link('set', index=_index(netlink, _device(name)),
                     master=_index(netlink, bridge))


@privileged.network_context.entrypoint_with_timeout(NETWORK_TIMEOUT)
def disable_checksum_offload(name: str) -> None:
    """Disable transmit checksum offload (``ethtool -K tx off``).

    The userspace datapath of Open vSwitch takes packets off a device
    unchanged. A veth leaves the checksum to a network card, which these
    packets never pass, so that all TCP and UDP packets would arrive damaged.
    The setting is kept when the device moves into the guest's namespace.

    :param name: name of the device.
    :raises OSError: if there is no such device or the kernel refuses.
    """
    # struct ethtool_value {cmd, data}, by address in struct ifreq.
    value = array.array('B', struct.pack('II', _ETHTOOL_STXCSUM, 0))
    request = struct.pack('16sP', _device(name).encode('ascii'),
                          value.buffer_info()[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCETHTOOL, request)


@privileged.network_context.entrypoint_with_timeout(NETWORK_TIMEOUT)
def join(one: str, other: str) -> None:
    """Redirect packets received on each of two devices to the other one.

    Both are set up. Idempotent.

    :param one: name of a device.
    :param other: name of the other device.
    :raises OSError: if either does not exist or the kernel refuses; with errno
        ENOENT if it lacks the ingress qdisc, ``cls_u32`` or ``act_mirred``.
    """
    pair = _device(one), _device(other)
    with _netlink() as netlink:
        indices = [_index(netlink, name) for name in pair]
        for index, target in (indices, reversed(indices)):
            netlink.link('set', index=index, state='up')
            if netlink.get_filters(index, parent=_INGRESS):
                continue
            with _tolerate(errno.EEXIST):
                netlink.tc('add', 'ingress', index, _INGRESS)
            netlink.tc('add-filter', 'u32', index, parent=_INGRESS, prio=1,
                       protocol=_ETH_P_ALL, target=0x10000, keys=['0x0/0x0+0'],
                       action={'kind': 'mirred', 'direction': 'egress',
                               'action': 'redirect', 'ifindex': target})


@privileged.network_context.entrypoint_with_timeout(NETWORK_TIMEOUT)
def set_limit(name: str, rate: int, peak: int, burst: int) -> None:
    """Limit the transmit rate of a device; replaces an earlier limit.

    :param name: name of the device.
    :param rate: average rate in bytes per second.
    :param peak: rate during a burst, in bytes per second.
    :param burst: bytes that may be sent at the peak rate.
    :raises OSError: if there is no such device or the kernel refuses; with
        errno ENOENT if it lacks HTB.
    """
    for number in (rate, peak, burst):
        if not isinstance(number, int) or not 0 < number < 2 ** 63:
            raise ValueError(f'{number!r} is neither a rate nor a size')
    with _netlink() as netlink:
        index = _index(netlink, _device(name))
        # A queue of a tenth of a second at the average rate.
        netlink.link('set', index=index,
                     txqlen=min(max(rate // 10 // 1500, 20), 1000))
        # An HTB qdisc cannot be replaced, but its class can.
        with _tolerate(errno.EEXIST):
            netlink.tc('add', 'htb', index, handle=_ROOT, default=1)
        netlink.tc('replace-class', 'htb', index, handle=_ROOT + 1,
                   parent=_ROOT, rate=rate, ceil=peak, burst=burst,
                   cburst=min(burst, max(peak // 100, 65536)), quantum=60000)


@privileged.network_context.entrypoint_with_timeout(NETWORK_TIMEOUT)
def remove_limit(name: str) -> None:
    """Remove the limit of :func:`set_limit`, if there is one.

    :param name: name of the device.
    :raises OSError: if there is no such device or the kernel refuses.
    """
    with _netlink() as netlink:
        index = _index(netlink, _device(name))
        # EINVAL and ENOENT: there is no limit.
        with _tolerate(errno.ENOENT, errno.EINVAL):
            netlink.tc('del', 'htb', index, handle=_ROOT)


@privileged.network_context.entrypoint_with_timeout(NETWORK_TIMEOUT)
def block(name: str) -> None:
    """Drop all packets that the host sends to a device. Idempotent.

    The qdisc ``blackhole`` is part of every kernel that has qdiscs. The other
    end of a veth pair keeps its carrier.

    :param name: name of the device.
    :raises OSError: if there is no such device or the kernel refuses; with
        errno EEXIST if the device has a root qdisc of something else.
    """
    with _netlink() as netlink:
        index = _index(netlink, _device(name))
        try:
            netlink.tc('add', 'blackhole', index, handle=_ROOT)
        except netlink_exceptions.NetlinkError:
            if 'blackhole' not in [qdisc.get_attr('TCA_KIND') for qdisc
                                   in netlink.get_qdiscs(index)]:
                raise


@privileged.network_context.entrypoint_with_timeout(NETWORK_TIMEOUT)
def unblock(name: str) -> None:
    """Undo :func:`block`. Idempotent; other qdiscs are kept.

    :param name: name of the device, which need not exist.
    :raises OSError: if the kernel refuses.
    """
    with _netlink() as netlink:
        index = _find(netlink, _device(name))
        # EINVAL and ENOENT: it is not blocked. EOPNOTSUPP: the kernel has no
        # qdiscs.
        with _tolerate(errno.ENOENT, errno.EINVAL, errno.EOPNOTSUPP):
            if index is not None:
                netlink.tc('del', 'blackhole', index, handle=_ROOT)
