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

"""Interface of VIF plugins, which connect Neutron ports to containers.

There is one plugin for each VIF type, loaded by
:mod:`nova_lxd_py.virt.vif.manager`. Third parties can add plugins under the
stevedore namespace ``nova_lxd_py.vif``; the name of the entry point is the VIF
type.
"""

from __future__ import annotations

import abc
from typing import Any

from nova.network import model
from nova import objects

from nova_lxd_py.virt.vif import qos


class VIFPlugin(abc.ABC):
    """Base class of VIF plugins.

    Every method must be idempotent. Plugins may raise any exception: the
    manager converts it to a Nova exception.
    """

    #: Values of a port's ``binding:vnic_type`` that the plugin supports.
    vnic_types: tuple[str, ...] = (model.VNIC_TYPE_NORMAL,)

    @abc.abstractmethod
    def plug(self, instance: objects.Instance, vif: model.VIF, *,
             limits: qos.Limits, guest_stopped: bool) -> None:
        """Create the host's network devices of a port, or repair them.

        The traffic of a guest that uses the port must not be interrupted.

        :param instance: the instance that the port is bound to.
        :param vif: the port.
        :param limits: bandwidth limits of the flavor.
        :param guest_stopped: True if devices which a guest holds may be
            replaced, since no guest of the instance runs as far as LXD knows,
            or since the port is being detached.
        :raises Exception: if the port cannot be used.
        """

    @abc.abstractmethod
    def unplug(self, instance: objects.Instance, vif: model.VIF) -> None:
        """Remove a port and its network devices from the host.

        :param instance: the instance that the port was bound to.
        :param vif: the port; Neutron may have deleted it already.
        :raises Exception: if something is left behind.
        """

    @abc.abstractmethod
    def device(self, vif: model.VIF, guest_name: str) -> dict[str, str]:
        """Return the LXD device of a port, of ``type: nic``.

        :param vif: the port.
        :param guest_name: name of the network device in the guest, for
            example ``eth0``.
        :returns: configuration of the LXD device.
        """


def devname(vif: model.VIF) -> str:
    """Return the name of a port's network device on the host.

    :param vif: the port.
    :returns: the name that Neutron and os-vif expect, normally ``tap`` and
        the first 11 characters of the port's id.
    """
    # nova.network.os_vif_util has the same fallback.
    return vif.get('devname') or f'nic{vif["id"]}'[:model.NIC_NAME_LEN]


def mtu(vif: model.VIF) -> int:
    """Return the MTU of a port's network.

    :param vif: the port.
    :returns: bytes; 1500 if the network has no MTU set.
    """
    network: Any = vif.get('network')
    return int((network.get_meta('mtu') if network else None) or 1500)
