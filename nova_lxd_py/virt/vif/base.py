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

"""How a Neutron port becomes a network device of a container.

One plugin per family of VIF types, see :mod:`nova_lxd_py.virt.vif.manager` for
how it is found. Third parties can add theirs under the stevedore namespace
``nova_lxd_py.vif``; the name of the entry point is the VIF type.
"""

from __future__ import annotations

import abc
from typing import Any

from nova.network import model
from nova import objects

from nova_lxd_py.virt.vif import qos


class VIFPlugin(abc.ABC):
    """What the driver asks of one family of VIF types.

    Every method is idempotent. What goes wrong is raised as it is: the
    manager makes a Nova exception of it.
    """

    #: Values of a port's ``binding:vnic_type`` that the plugin can serve.
    vnic_types: tuple[str, ...] = (model.VNIC_TYPE_NORMAL,)

    @abc.abstractmethod
    def plug(self, instance: objects.Instance, vif: model.VIF, *,
             limits: qos.Limits, guest_stopped: bool) -> None:
        """Make the host's side of a port, or repair what is missing of it.

        A guest that uses the port must not notice.

        :param instance: whose port it is.
        :param vif: the port.
        :param limits: bandwidth limits that the flavor asks for.
        :param guest_stopped: True says for sure that no guest runs now, so
            whatever a guest was using may be replaced.
        :raises Exception: if the port cannot be used afterwards.
        """

    @abc.abstractmethod
    def unplug(self, instance: objects.Instance, vif: model.VIF) -> None:
        """Remove every trace of a port from the host.

        :param instance: whose port it was.
        :param vif: the port; Neutron may have deleted it already.
        :raises Exception: if something was left behind.
        """

    @abc.abstractmethod
    def device(self, vif: model.VIF, guest_name: str) -> dict[str, str]:
        """Describe the port as an LXD device of ``type: nic``.

        :param vif: the port.
        :param guest_name: what the guest shall see it as, ``eth0`` for one.
        :returns: the device's configuration.
        """

    def owned_devices(self, vif: model.VIF) -> list[str]:
        """Name the devices of the host that belong to a plugged port.

        :returns: names, that of the device that carries the port's traffic
            (``devname``) first; for statistics and for finding left-overs.
        """
        return [devname(vif)]


def devname(vif: model.VIF) -> str:
    """Name the host's device of a port as Neutron and os-vif expect it.

    :returns: ``tap`` and the first 11 characters of the port's id, as a rule.
    """
    # What Nova falls back to, too, when it converts a port for os-vif.
    return vif.get('devname') or f'nic{vif["id"]}'[:model.NIC_NAME_LEN]


def mtu(vif: model.VIF) -> int:
    """Read the MTU of a port's network.

    :returns: bytes; 1500 if Neutron did not say.
    """
    network: Any = vif.get('network')
    return int((network.get_meta('mtu') if network else None) or 1500)
