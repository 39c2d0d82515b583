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

"""Ports of Open vSwitch without a bridge in between.

VIF type ``ovs`` as ML2/OVN binds it, and ML2/OVS unless its firewall driver is
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

#: Seconds for ovs-vswitchd to open a device; it takes some 20 ms when idle.
HEARING_TIMEOUT = 2
HEARING_ATTEMPTS = 3


def to_os_vif(vif: model.VIF) -> Any:
    """Convert a port for os-vif, which shall write the port and no device.

    By default os-vif leaves the port to the hypervisor, as libvirt makes it,
    and since Nova 34 it may make a tap device that a container has no use for
    under the very name that the pair needs.
    """
    converted = os_vif_util.nova_to_osvif_vif(vif)
    profile = converted.port_profile
    # Absent from older releases of os-vif.
    for field, value in (('create_port', True), ('create_tap', False)):
        if field in profile.fields:
            setattr(profile, field, value)
    return converted


class OVSPlugin(veth.VethPlugin):
    """The outer end is a port of the integration bridge."""

    def plug(self, instance: objects.Instance, vif: model.VIF, *,
             limits: qos.Limits, guest_stopped: bool) -> None:
        super().plug(instance, vif, limits=limits,
                     guest_stopped=guest_stopped)
        # While a guest has the port, nothing can be mended without harm.
        if (_datapath(vif) != NETDEV or
                veth.VethPair(vif).state() is not veth.VethState.ON_HOST):
            return
        for attempts_left in reversed(range(HEARING_ATTEMPTS)):
            if self.has_port(vif):
                return
            if attempts_left:
                LOG.info('Open vSwitch does not listen to %s; making the port '
                         'anew.', base.devname(vif), instance=instance)
                self.make(instance, vif, limits)
                self.connect(instance, vif)
        LOG.warning('Open vSwitch does not listen to network device '
                    '%(device)s of port %(port)s, so the server will have no '
                    'network. Is ovs-vswitchd running?',
                    {'device': base.devname(vif), 'port': vif['id']},
                    instance=instance)

    def connect(self, instance: objects.Instance, vif: model.VIF) -> None:
        os_vif.plug(to_os_vif(vif),
                    os_vif_util.nova_to_osvif_instance(instance))

    def disconnect(self, instance: objects.Instance, vif: model.VIF) -> None:
        os_vif.unplug(to_os_vif(vif),
                      os_vif_util.nova_to_osvif_instance(instance))

    def make(self, instance: objects.Instance, vif: model.VIF,
             limits: qos.Limits) -> None:
        super().make(instance, vif, limits)
        if _datapath(vif) == NETDEV:
            # The setting stays with the device when a guest takes it.
            network.disable_checksum_offload(veth.VethPair(vif).inner)

    def has_port(self, vif: model.VIF) -> bool:
        """Wait until a userspace Open vSwitch listens to the outer end.

        It reads a device through a packet socket, and does not open a new one
        for a device that was deleted and made again under the same name,
        unless it saw the port being deleted in between. os-vif does not wait
        for that, so a busy switch can miss it.

        :returns: whether it does.
        """
        index = veth.attribute(base.devname(vif), 'ifindex')
        deadline = time.monotonic() + HEARING_TIMEOUT
        while index not in _packet_socket_devices():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True


def _datapath(vif: model.VIF) -> str:
    return vif['details'].get(model.VIF_DETAILS_OVS_DATAPATH_TYPE, '')


def _packet_socket_devices() -> set[str]:
    """List the indices of devices that some process reads raw packets from."""
    with open(_PACKET_SOCKETS, encoding='ascii') as table:
        column = table.readline().split().index('Iface')
        return {line.split()[column] for line in table}
