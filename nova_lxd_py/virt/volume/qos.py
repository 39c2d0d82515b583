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

"""Front-end QoS specs of volume types, as limits of the kernel.

Cinder passes them with the connection of a volume (specs with ``_per_gb`` by
the size of the volume), and Nova's libvirt driver applies the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
import re
from typing import Any

from nova import exception
from nova import objects
from oslo_log import log as logging

from nova_lxd_py.virt.guest import volume_limits
from nova_lxd_py.virt.volume import connections
from nova_lxd_py.virt.volume import lxd_devices

LOG = logging.getLogger(__name__)

#: Names of limits in ``io.max`` of cgroup v2, by the ends of specs' names.
_UNITS = {'bytes_sec': 'bps', 'iops_sec': 'iops'}
#: Specs that libvirt applies, and control groups have nothing for.
_UNSUPPORTED = {'size_iops_sec', *(
    f'{way}_{unit}_max' for way in ('read', 'write', 'total')
    for unit in _UNITS)}

#: The kernel keeps numbers of requests in 32 bits.
_MOST_REQUESTS = 2 ** 32 - 1
_NUMBER = re.compile(r'[0-9]{1,18}')


def check(instance: objects.Instance, connection_info: Mapping[str, Any]
          ) -> None:
    """Validate the QoS specs of a volume, before the host is connected to it.

    :param instance: the instance that is to have it.
    :param connection_info: Cinder's description of the connection.
    :raises nova.exception.VolumeAttachFailed: if a limit is not a number;
        libvirt refuses such a disk, too.
    """
    limits(connection_info)
    ignored = _UNSUPPORTED & set(_specs(connection_info))
    if ignored:
        LOG.warning('Ignoring QoS specs %(specs)s of volume %(volume)s, which '
                    'the kernel does not support',
                    {'specs': ', '.join(sorted(ignored)),
                     'volume': connections.volume_id(connection_info)},
                    instance=instance)


def limits(connection_info: Mapping[str, Any]) -> str:
    """Convert the QoS specs of a volume.

    The kernel has no limit for both directions together, so a total limits
    each of them, unless the direction has a lower limit of its own.

    :param connection_info: Cinder's description of the connection.
    :returns: limits per second as in ``io.max``: ``rbps`` and ``wbps`` in
        bytes, ``riops`` and ``wiops`` in requests; empty without limits.
    :raises nova.exception.VolumeAttachFailed: if a limit is not a number.
    """
    found = []
    for name, unit in _UNITS.items():
        most = _MOST_REQUESTS if unit == 'iops' else None
        for way in ('read', 'write'):
            values = [number for number in (
                _number(connection_info, f'{way}_{name}'),
                _number(connection_info, f'total_{name}'), most) if number]
            if values and values != [most]:
                found.append(f'{way[0]}{unit}={min(values)}')
    return ' '.join(found)


def add(changes: lxd_devices.GuestChanges, connection_info: Mapping[str, Any]
        ) -> None:
    """Add the limits of a volume to what the LXD instance needs for it.

    :param changes: LXD's keys or device for the volume, which are changed.
    :param connection_info: Cinder's description of the connection.
    """
    found = limits(connection_info)
    for device in changes.devices.values():
        if found:
            device[volume_limits.KEY_LIMITS] = found
    if changes.config:
        # LXD removes an empty key.
        changes.config[volume_limits.KEY_ROOT_LIMITS] = found


def _specs(connection_info: Mapping[str, Any]) -> Mapping[str, Any]:
    return connection_info['data'].get('qos_specs') or {}


def _number(connection_info: Mapping[str, Any], name: str) -> int:
    """Return the value of a spec, 0 (no limit) if it is not set."""
    text = str(_specs(connection_info).get(name, 0))
    if not _NUMBER.fullmatch(text):
        raise exception.VolumeAttachFailed(
            volume_id=connections.volume_id(connection_info),
            reason=f'the QoS spec {name} of its type is "{text}", which is '
                   'not a number')
    return int(text)
