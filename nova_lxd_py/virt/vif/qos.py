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

"""Bandwidth limits that a flavor sets on its servers' ports.

``quota:vif_inbound_average``, ``_peak`` and ``_burst`` and the same with
``outbound``, with the meaning that they have for Nova's libvirt driver. How
they are enforced is told in :mod:`nova_lxd_py.virt.vif.veth`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from nova_lxd_py.virt.guest import flavor as flavor_rules

# libvirt hands these numbers to tc with the units "kbps" and "kb".
_RATE_UNIT = 1000
_SIZE_UNIT = 1024

#: What may be sent at once without a ``burst`` in the flavor: as much as a
#: twentieth of a second brings, and no less than one large TCP segment.
_DEFAULT_BURST_SECONDS = 0.05
_MINIMUM_BURST = 64 * 1024


@dataclasses.dataclass(frozen=True)
class Rate:
    """A limit in one direction.

    :ivar average: bytes per second in the long run.
    :ivar peak: bytes per second while a burst lasts.
    :ivar burst: bytes that may be sent at the peak rate.
    """

    average: int
    peak: int
    burst: int


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits of a port; None where there is none.

    :ivar inbound: what the guest receives.
    :ivar outbound: what the guest sends.
    """

    inbound: Rate | None = None
    outbound: Rate | None = None

    def __bool__(self) -> bool:
        return self.inbound is not None or self.outbound is not None


def limits(flavor: Any) -> Limits:
    """Read the limits of a flavor.

    :param flavor: the :class:`nova.objects.Flavor`.
    :raises nova.exception.InvalidInput: naming the extra spec to correct.
    """
    quota = flavor_rules.vif_quota(flavor)
    return Limits(inbound=_rate(quota, 'inbound'),
                  outbound=_rate(quota, 'outbound'))


def _rate(quota: dict[str, int], way: str) -> Rate | None:
    average = quota.get(f'{way}_average', 0) * _RATE_UNIT
    if not average:
        return None
    burst = quota.get(f'{way}_burst', 0) * _SIZE_UNIT
    return Rate(
        average=average,
        # A peak below the average would make the average unreachable.
        peak=max(quota.get(f'{way}_peak', 0) * _RATE_UNIT, average),
        burst=burst or max(int(average * _DEFAULT_BURST_SECONDS),
                           _MINIMUM_BURST))
