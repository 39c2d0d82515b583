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
``outbound``, with the meaning they have for Nova's libvirt driver: seen from
the guest, average and peak in KiB/s, burst in KiB. How they are enforced is
told in :mod:`nova_lxd_py.virt.vif.veth`.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses

from nova import exception
from nova.i18n import _

KIB = 1024

#: Largest value of an extra spec, in KiB or KiB/s: 4 TiB/s.
_MAXIMUM = 2 ** 32 - 1

#: What may be sent at once without a ``burst`` in the flavor: as much as a
#: twentieth of a second brings, and no less than one large TCP segment.
_DEFAULT_BURST_SECONDS = 0.05
_MINIMUM_BURST = 64 * KIB


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


def limits(extra_specs: Mapping[str, str]) -> Limits:
    """Read the limits from a flavor.

    :param extra_specs: the flavor's.
    :raises nova.exception.InvalidInput: if a value is not a positive number,
        if ``peak`` or ``burst`` stand without ``average``, or if ``peak`` is
        below ``average``.
    """
    return Limits(inbound=_rate(extra_specs, 'inbound'),
                  outbound=_rate(extra_specs, 'outbound'))


def _rate(extra_specs: Mapping[str, str], direction: str) -> Rate | None:
    prefix = f'quota:vif_{direction}_'
    average, peak, burst = (_number(extra_specs, prefix + name)
                            for name in ('average', 'peak', 'burst'))
    if average is None:
        for name, value in (('peak', peak), ('burst', burst)):
            if value is not None:
                raise exception.InvalidInput(reason=_(
                    'The flavor has %(key)s, which needs %(average)s') % {
                        'key': prefix + name, 'average': prefix + 'average'})
        return None
    average *= KIB
    if peak is not None and peak * KIB < average:
        raise exception.InvalidInput(reason=_(
            'The flavor has a %(peak)s below its %(average)s') % {
                'peak': prefix + 'peak', 'average': prefix + 'average'})
    if burst is None:
        size = max(int(average * _DEFAULT_BURST_SECONDS), _MINIMUM_BURST)
    else:
        size = burst * KIB
    return Rate(average=average, burst=size,
                peak=average if peak is None else peak * KIB)


def _number(extra_specs: Mapping[str, str], key: str) -> int | None:
    text = extra_specs.get(key)
    if text is None:
        return None
    # int() would take "1_000" and " 5 ", too.
    if not str(text).isascii() or not str(text).isdigit() or not (
            0 < int(text) <= _MAXIMUM):
        raise exception.InvalidInput(reason=_(
            'The flavor has %(key)s=%(value)s, which is not a whole number '
            'between 1 and %(maximum)d') % {
                'key': key, 'value': text, 'maximum': _MAXIMUM})
    return int(text)
