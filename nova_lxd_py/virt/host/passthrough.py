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

"""GPUs and USB devices of the host that are passed through to instances.

Both the administrator who creates flavors and the operator of the host have to
allow it: the flavor names devices in the extra specs ``lxd:gpu`` and
``lxd:usb``, and the host lists them in ``[lxd] passthrough_devices``. Tenants
cannot influence either. All instances on a host whose flavors name a device
share it.

A device is named by what is the same on every host: the hexadecimal ids of its
vendor and product, as ``lspci -nn`` and ``lsusb`` show them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import re
from typing import Any

from nova import exception

from nova_lxd_py import extra_specs

_SPECS = {'gpu': extra_specs.GPU, 'usb': extra_specs.USB}
_ID = re.compile(extra_specs.DEVICE)

#: Prefix of the names of LXD devices for these, and for no others.
DEVICE_PREFIX = 'passthrough-'


def check(flavor: Any) -> None:
    """Check the syntax of a flavor's device requests.

    :param flavor: the :class:`nova.objects.Flavor`.
    :raises nova.exception.InvalidInput: if it is wrong; the message names the
        extra spec to correct.
    """
    for kind in _SPECS:
        _wanted(flavor, kind)


def devices(flavor: Any, allowed: Iterable[str]
            ) -> dict[str, dict[str, str]]:
    """Return the LXD devices for the device requests of a flavor.

    :param flavor: the :class:`nova.objects.Flavor`.
    :param allowed: ``[lxd] passthrough_devices``.
    :returns: LXD devices by name.
    :raises nova.exception.InvalidInput: if the syntax is wrong; the message
        names the extra spec to correct.
    :raises nova.exception.ComputeResourcesUnavailable: if this host does not
        allow the device; Nova reschedules.
    """
    permitted = set(parse(allowed))
    found = {}
    for kind, spec in _SPECS.items():
        for ids in _wanted(flavor, kind):
            if (kind, ids) not in permitted:
                raise exception.ComputeResourcesUnavailable(reason=(
                    f'flavor {flavor.name} has {spec}={ids}, but [lxd] '
                    f'passthrough_devices of the host does not list '
                    f'{kind}:{ids}'))
            vendor, _colon, product = ids.partition(':')
            device = {'type': kind, 'vendorid': vendor, 'productid': product}
            if kind == 'usb':
                # Otherwise LXD starts the instance without the device.
                device['required'] = 'true'
            found[f'{DEVICE_PREFIX}{kind}-{vendor}-{product}'] = device
    return found


def parse(allowed: Iterable[str]) -> list[tuple[str, str]]:
    """Parse ``[lxd] passthrough_devices``.

    :param allowed: such as ``gpu:10de:1db4``.
    :returns: kinds and ids, such as ``('gpu', '10de:1db4')``.
    :raises nova.exception.InvalidInput: if an item is not a device.
    """
    found = []
    for text in allowed:
        kind, _colon, ids = text.strip().lower().partition(':')
        if kind not in _SPECS or not _ID.fullmatch(ids):
            raise exception.InvalidInput(reason=(
                f'"{text}" is not a device; use gpu:<vendor>:<product> or '
                f'usb:<vendor>:<product> with four hexadecimal digits each'))
        found.append((kind, ids))
    return found


def present(resources: Mapping[str, Any], allowed: Iterable[str]
            ) -> list[tuple[str, str]]:
    """Return the allowed devices that the host has.

    :param resources: LXD's resources.
    :param allowed: ``[lxd] passthrough_devices``.
    :returns: kinds and ids.
    """
    cards = (resources.get('gpu') or {}).get('cards') or ()
    plugged = (resources.get('usb') or {}).get('devices') or ()
    there = {(kind, f'{each.get("vendor_id", "")}:'
                    f'{each.get("product_id", "")}'.lower())
             for kind, each in [*(('gpu', card) for card in cards),
                                *(('usb', device) for device in plugged)]}
    return [each for each in parse(allowed) if each in there]


def _wanted(flavor: Any, kind: str) -> list[str]:
    """Return the ids of the devices of one kind that a flavor requests."""
    spec = _SPECS[kind]
    value = flavor.extra_specs.get(spec)
    if value is None:
        return []
    if not re.fullmatch(extra_specs.DEVICES, value):
        raise exception.InvalidInput(reason=(
            f'extra spec {spec} of flavor {flavor.name} is "{value}"; set it '
            f'to <vendor>:<product> in hexadecimal, such as 10de:1db4, or to '
            f'a comma-separated list of these'))
    return _ID.findall(value.lower())
