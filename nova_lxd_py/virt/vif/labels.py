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

"""Which instance the network devices of a port belong to.

Nova forgets the ports of an instance when it has released them in Neutron,
although their devices may still be on the host: for example after a deletion
that failed because LXD did not answer. The driver finds such ports by the
alias of their outer end (``ip link show``), which it sets when it plugs them,
and by the NICs of the LXD instance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import re

from nova.network import model
from nova import objects

_LABEL = re.compile(
    r'nova-lxd (?P<instance>[0-9a-f-]{36}) (?P<port>[0-9a-f-]{36}) '
    r'(?P<type>\w+) (?P<bridge>\S+)')
_NO_BRIDGE = '-'

#: Parent of a NIC that the driver has given to LXD.
_PARENT = re.compile('tin(?P<port>[0-9a-f]{8}-[0-9a-f]{2})')

#: Value of fields that removing a port does not need.
_UNKNOWN_ID = '00000000-0000-0000-0000-000000000000'
_UNKNOWN_MAC = '00:00:00:00:00:00'


def text(instance: objects.Instance, vif: model.VIF) -> str:
    """Return the alias for the outer end of a port.

    :param instance: the instance that the port is bound to.
    :param vif: the port.
    :returns: the ids of both, and the port's VIF type and bridge.
    """
    network = vif['network']
    return ' '.join((
        'nova-lxd', instance.uuid, vif['id'], str(vif['type']),
        (network and network['bridge']) or _NO_BRIDGE))


def owner(alias: str | None) -> str | None:
    """Return the UUID of the instance that a network device belongs to.

    :param alias: the device's alias.
    :returns: the UUID, or None if the device is not the driver's.
    """
    found = _LABEL.fullmatch(alias or '')
    return found['instance'] if found else None


def port(instance: objects.Instance, devname: str, alias: str | None
         ) -> model.VIF | None:
    """Return the port of a network device, if it is one of an instance.

    :param instance: the instance.
    :param devname: name of the network device.
    :param alias: its alias.
    :returns: the port, with all that is needed to unplug it, or None.
    """
    found = _LABEL.fullmatch(alias or '')
    if found is None or found['instance'] != instance.uuid:
        return None
    bridge = found['bridge']
    return _port(found['port'], devname, found['type'],
                 None if bridge == _NO_BRIDGE else bridge)


def ports_of_nics(devices: Mapping[str, Mapping[str, str]]
                  ) -> Iterator[model.VIF]:
    """List the ports that an LXD instance has as NICs.

    :param devices: the devices of the LXD instance.
    :returns: ports of which the id is known in part, and the VIF type is not.
    """
    for device in devices.values():
        found = _PARENT.fullmatch(device.get('parent', ''))
        if found and device.get('nictype') == 'physical':
            short = found['port']
            yield _port(f'{short}{_UNKNOWN_ID[len(short):]}', f'tap{short}',
                        model.VIF_TYPE_UNBOUND, None)


def _port(port: str, devname: str, kind: str, bridge: str | None
          ) -> model.VIF:
    return model.VIF(
        id=port, address=_UNKNOWN_MAC, devname=devname, type=kind, details={},
        active=False, network=model.Network(
            id=_UNKNOWN_ID, bridge=bridge, subnets=[]))
