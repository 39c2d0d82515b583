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

"""Plugin for VIF type ``ovs`` with ``ovs_hybrid_plug``.

ML2/OVS binds ports this way with the firewall driver ``iptables_hybrid``,
whose rules need a Linux bridge (``qbr...``) for each port. os-vif creates that
bridge and its link to Open vSwitch.
"""

from __future__ import annotations

from nova.network import model
from nova import objects

from nova_lxd_py.virt.privileged import network
from nova_lxd_py.virt.vif import base
from nova_lxd_py.virt.vif import ovs


class OVSHybridPlugin(ovs.OVSPlugin):
    """Adds the outer end to the port's ``qbr`` bridge."""

    def connect(self, instance: objects.Instance, vif: model.VIF) -> None:
        super().connect(instance, vif)
        network.add_to_bridge(base.devname(vif),
                              ovs.to_os_vif(vif).bridge_name)

    def wait_until_open(self, vif: model.VIF) -> bool:
        # Open vSwitch opens the bridge's veth, which os-vif creates.
        return True
