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

"""An index of the host's network devices by instance.

The devices' aliases say it (:mod:`.labels`), but to read those of all devices
for each instance would take the longer the more instances there are. So they
are all read once, and devices that are plugged later are noted.
"""

from __future__ import annotations

import threading

from nova.network import model
from nova import objects

from nova_lxd_py.virt.vif import base
from nova_lxd_py.virt.vif import labels
from nova_lxd_py.virt.vif import veth


class PortIndex:
    """Knows where to look for the ports that an instance has on this host."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_complete = False
        #: Names of network devices by the UUID of their instance.
        self._names: dict[str, set[str]] = {}

    def note(self, instance: objects.Instance, vif: model.VIF) -> None:
        """Note that a port may have a network device on the host from now on.

        :param instance: the instance that the port is bound to.
        :param vif: the port.
        """
        with self._lock:
            self._names.setdefault(instance.uuid, set()).add(
                base.devname(vif))

    def ports(self, instance: objects.Instance) -> list[model.VIF]:
        """List the ports of an instance that have a network device here, also
        those that Nova does not know any more.

        :param instance: the instance.
        """
        with self._lock:
            self._complete()
            found = {}
            for name in sorted(self._names.pop(instance.uuid, ())):
                vif = labels.port(instance, name,
                                  veth.attribute(name, 'ifalias'))
                if vif is not None:
                    found[name] = vif
            if found:
                self._names[instance.uuid] = set(found)
        return list(found.values())

    def _complete(self) -> None:
        """Read the aliases of all devices, the first time; the lock is held.
        """
        if self._is_complete:
            return
        for name in veth.names():
            owner = labels.owner(veth.attribute(name, 'ifalias'))
            if owner is not None:
                self._names.setdefault(owner, set()).add(name)
        self._is_complete = True
