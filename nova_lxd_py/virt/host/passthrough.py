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

"""GPUs and USB devices of the host that flavors give to servers.

Two people have to agree: who makes flavors names devices in ``lxd:gpu`` and
``lxd:usb``, and the operator of a host lists in ``[lxd] passthrough_devices``
what may be given away there. Tenants have a say in neither. All servers on a
host whose flavors name a device share it.

A device is named by what is the same on every host: the hexadecimal ids of its
vendor and product, as ``lspci -nn`` and ``lsusb`` show them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import re
from typing import Any

from nova import exception

SPEC_GPU = 'lxd:gpu'
SPEC_USB = 'lxd:usb'

_SPECS = {'gpu': SPEC_GPU, 'usb': SPEC_USB}
_ID = re.compile(r'[0-9a-f]{4}:[0-9a-f]{4}')

#: Names of such devices begin so, and no others.
DEVICE_PREFIX = 'passthrough-'


def check(flavor: Any) -> None:
    """See that a flavor's devices are named as they should be.

    :param flavor: the :class:`nova.objects.Flavor`.
    :raises nova.exception.InvalidInput: naming the extra spec to correct.
    """
    for kind in _SPECS:
        _wanted(flavor, kind)


def devices(flavor: Any, allowed: Iterable[str]
            ) -> dict[str, dict[str, str]]:
    """Describe the devices of the host that a server gets.

    :param flavor: its :class:`nova.objects.Flavor`.
    :param allowed: ``[lxd] passthrough_devices``.
    :returns: LXD devices by name.
    :raises nova.exception.InvalidInput: naming the extra spec to correct.
    :raises nova.exception.ComputeResourcesUnavailable: this host does not
        give such a device away; Nova tries another one.
    """
    permitted = set(parse(allowed))
    found = {}
    for kind, spec in _SPECS.items():
        for ids in _wanted(flavor, kind):
            if (kind, ids) not in permitted:
                raise exception.ComputeResourcesUnavailable(reason=(
                    f'flavor {flavor.name} has {spec}={ids}, and [lxd] '
                    f'passthrough_devices of the host does not list '
                    f'{kind}:{ids}'))
            vendor, _colon, product = ids.partition(':')
            device = {'type': kind, 'vendorid': vendor, 'productid': product}
            if kind == 'usb':
                # A server without it must not start as if it had it.
                device['required'] = 'true'
            found[f'{DEVICE_PREFIX}{kind}-{vendor}-{product}'] = device
    return found


def parse(allowed: Iterable[str]) -> list[tuple[str, str]]:
    """Read ``[lxd] passthrough_devices``.

    :param allowed: such as ``gpu:10de:1db4``.
    :returns: kinds and ids, such as ``('gpu', '10de:1db4')``.
    :raises nova.exception.InvalidInput: naming what is no device.
    """
    found = []
    for text in allowed:
        kind, _colon, ids = text.strip().lower().partition(':')
        if kind not in _SPECS or not _ID.fullmatch(ids):
            raise exception.InvalidInput(reason=(
                f'"{text}" names no device; write gpu:<vendor>:<product> or '
                f'usb:<vendor>:<product>, with four hexadecimal digits each'))
        found.append((kind, ids))
    return found


def present(resources: Mapping[str, Any], allowed: Iterable[str]
            ) -> list[tuple[str, str]]:
    """Find which of the devices that may be given away a host has.

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
    """Read the devices of one kind that a flavor names."""
    spec = _SPECS[kind]
    value = flavor.extra_specs.get(spec)
    if value is None:
        return []
    found = [word.strip().lower() for word in value.split(',')]
    for ids in found:
        if not _ID.fullmatch(ids):
            raise exception.InvalidInput(reason=(
                f'extra spec {spec} of flavor {flavor.name} is "{value}"; set '
                f'it to <vendor>:<product> in hexadecimal, such as '
                f'10de:1db4, or to several of these with commas between'))
    return found
