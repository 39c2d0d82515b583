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

"""Plugin for VIF type ``tap``: the mechanism driver's agent wires the port.

The agents of mechanism drivers such as Calico wait for a device with the
port's name to appear, and configure it.
"""

from __future__ import annotations

from nova.network import model
from nova import objects

from nova_lxd_py.virt.vif import veth


class TapPlugin(veth.VethPlugin):
    """Leaves the outer end to the mechanism driver's agent."""

    routed = True

    def connect(self, instance: objects.Instance, vif: model.VIF) -> None:
        """Do nothing: the agent notices the device."""

    def disconnect(self, instance: objects.Instance, vif: model.VIF) -> None:
        """Do nothing: the agent notices that the device is removed."""
