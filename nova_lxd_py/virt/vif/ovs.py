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

"""Plugin for VIF type ``ovs``: ports on Open vSwitch's integration bridge.

ML2/OVN binds ports this way, and ML2/OVS unless its firewall driver is
``iptables_hybrid``. os-vif writes the port to Open vSwitch's database.
"""

from __future__ import annotations

import time
from typing import Any

from nova.network import model
from nova.network import os_vif_util
from nova import objects
import os_vif
from oslo_log import log as logging

from nova_lxd_py.virt.privileged import network
from nova_lxd_py.virt.vif import base
from nova_lxd_py.virt.vif import qos
from nova_lxd_py.virt.vif import veth

LOG = logging.getLogger(__name__)

_PACKET_SOCKETS = '/proc/net/packet'

NETDEV = model.VIF_DETAILS_OVS_DATAPATH_NETDEV

#: Seconds to wait for ovs-vswitchd to open a device; it takes some 20 ms when
#: idle.
OPEN_TIMEOUT = 2
OPEN_ATTEMPTS = 3


def to_os_vif(vif: model.VIF) -> Any:
    """Convert a port for os-vif, so that it creates the OVS port only.

    By default os-vif expects the hypervisor to create the port, as libvirt
    does, and since Nova 34 it may create a tap device, whose name is the one
    that the veth pair needs.

    :param vif: the port.
    :returns: os-vif's object of the port.
    """
    converted = os_vif_util.nova_to_osvif_vif(vif)
    profile = converted.port_profile
    # Absent from older releases of os-vif.
    for field, value in (('create_port', True), ('create_tap', False)):
        if field in profile.fields:
            setattr(profile, field, value)
    return converted


class OVSPlugin(veth.VethPlugin):
    """Adds the outer end to the integration bridge."""

    def plug(self, instance: objects.Instance, vif: model.VIF, *,
             limits: qos.Limits, guest_stopped: bool) -> None:
        super().plug(instance, vif, limits=limits,
                     guest_stopped=guest_stopped)
        # Recreating a port that a guest uses would interrupt its traffic.
        if (_datapath(vif) != NETDEV or
                veth.VethPair(vif).state() is not veth.VethState.ON_HOST):
            return
        for attempts_left in reversed(range(OPEN_ATTEMPTS)):
            if self.wait_until_open(vif):
                return
            if attempts_left:
                LOG.info('Open vSwitch has not opened %s, recreating the port',
                         base.devname(vif), instance=instance)
                self.create_devices(instance, vif, limits)
                self.connect(instance, vif)
        LOG.warning('Open vSwitch has not opened network device %(device)s of '
                    'port %(port)s, so the port will carry no traffic; check '
                    'that ovs-vswitchd is running',
                    {'device': base.devname(vif), 'port': vif['id']},
                    instance=instance)

    def connect(self, instance: objects.Instance, vif: model.VIF) -> None:
        os_vif.plug(to_os_vif(vif),
                    os_vif_util.nova_to_osvif_instance(instance))

    def disconnect(self, instance: objects.Instance, vif: model.VIF) -> None:
        os_vif.unplug(to_os_vif(vif),
                      os_vif_util.nova_to_osvif_instance(instance))

    def create_devices(self, instance: objects.Instance, vif: model.VIF,
                       limits: qos.Limits) -> None:
        super().create_devices(instance, vif, limits)
        if _datapath(vif) == NETDEV:
            # The setting is kept when the device moves to another network
            # namespace.
            network.disable_checksum_offload(veth.VethPair(vif).inner)

    def wait_until_open(self, vif: model.VIF) -> bool:
        """Wait until the userspace datapath has opened the outer end.

        The datapath reads a device through a packet socket. It does not open
        a new socket for a device that was deleted and recreated with the same
        name, unless it noticed that the port was deleted in between. os-vif
        does not wait for that, so a busy ovs-vswitchd can miss it.

        :param vif: the port.
        :returns: False if it has not been opened within OPEN_TIMEOUT.
        """
        index = veth.attribute(base.devname(vif), 'ifindex')
        deadline = time.monotonic() + OPEN_TIMEOUT
        while index not in _packet_socket_devices():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True


def _datapath(vif: model.VIF) -> str:
    return vif['details'].get(model.VIF_DETAILS_OVS_DATAPATH_TYPE, '')


def _packet_socket_devices() -> set[str]:
    """List the interface indices that have a packet socket (packet(7))."""
    with open(_PACKET_SOCKETS, encoding='ascii') as table:
        column = table.readline().split().index('Iface')
        return {line.split()[column] for line in table}
