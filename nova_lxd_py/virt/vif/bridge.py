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

"""Plugin for VIF type ``bridge``: ports on a Linux bridge.

Neutron had a Linux bridge mechanism driver until release 25, and Nova 34
refuses such ports before they reach the virt driver, so this is for Nova 31 to
33. os-vif creates the bridge; the plugin adds the port's device to it without
waiting for the polling interval of Neutron's agent.
"""

from __future__ import annotations

from nova.network import model
from nova.network import os_vif_util
from nova import objects
import os_vif

from nova_lxd_py.virt.privileged import network
from nova_lxd_py.virt.vif import base
from nova_lxd_py.virt.vif import veth


class BridgePlugin(veth.VethPlugin):
    """Adds the outer end to the network's bridge."""

    def connect(self, instance: objects.Instance, vif: model.VIF) -> None:
        converted = os_vif_util.nova_to_osvif_vif(vif)
        os_vif.plug(converted, os_vif_util.nova_to_osvif_instance(instance))
        network.add_to_bridge(base.devname(vif), converted.bridge_name)

    def disconnect(self, instance: objects.Instance, vif: model.VIF) -> None:
        os_vif.unplug(os_vif_util.nova_to_osvif_vif(vif),
                      os_vif_util.nova_to_osvif_instance(instance))
