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

"""Bandwidth limits of a flavor for each port of an instance.

``quota:vif_inbound_average``, ``_peak`` and ``_burst`` and the same with
``outbound``, with the meaning that they have for Nova's libvirt driver.
:mod:`nova_lxd_py.virt.vif.veth` enforces them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from nova_lxd_py.virt.guest import flavor as flavor_rules

# libvirt passes the values to tc with the units "kbps" and "kb".
_RATE_UNIT = 1000
_SIZE_UNIT = 1024

#: Default of ``burst``: what the average rate transfers in 50 ms, but at least
#: the size of one large TCP segment (GSO).
_DEFAULT_BURST_SECONDS = 0.05
_MINIMUM_BURST = 64 * 1024


@dataclasses.dataclass(frozen=True)
class Rate:
    """Bandwidth limit in one direction.

    :ivar average: average rate in bytes per second.
    :ivar peak: rate during a burst in bytes per second.
    :ivar burst: bytes that may be sent at the peak rate.
    """

    average: int
    peak: int
    burst: int


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bandwidth limits of a port; None means unlimited.

    :ivar inbound: limit of the traffic that the guest receives.
    :ivar outbound: limit of the traffic that the guest sends.
    """

    inbound: Rate | None = None
    outbound: Rate | None = None

    def __bool__(self) -> bool:
        return self.inbound is not None or self.outbound is not None


def limits(flavor: Any) -> Limits:
    """Return the bandwidth limits of a flavor.

    :param flavor: the :class:`nova.objects.Flavor`.
    :returns: the limits of each port.
    :raises nova.exception.InvalidInput: if an extra spec is invalid; the
        message names it.
    """
    quota = flavor_rules.vif_quota(flavor)
    return Limits(inbound=_rate(quota, 'inbound'),
                  outbound=_rate(quota, 'outbound'))


def _rate(quota: dict[str, int], direction: str) -> Rate | None:
    average = quota.get(f'{direction}_average', 0) * _RATE_UNIT
    if not average:
        return None
    burst = quota.get(f'{direction}_burst', 0) * _SIZE_UNIT
    return Rate(
        average=average,
        # A peak below the average would make the average unreachable.
        peak=max(quota.get(f'{direction}_peak', 0) * _RATE_UNIT, average),
        burst=burst or max(int(average * _DEFAULT_BURST_SECONDS),
                           _MINIMUM_BURST))
