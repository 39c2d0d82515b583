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

"""What a flavor means to LXD: configuration keys and the root disk.

Pure functions of a flavor and of the ``[lxd]`` options. Nothing here reads
what a tenant controls: image properties, metadata and names never become LXD
configuration. Extra specs are read by name and type; a key of the ``lxd:``
namespace that does not exist is refused rather than ignored, since a typing
mistake must not quietly leave a server less isolated than its flavor says.

Errors are :class:`nova.exception.InvalidInput`, for which Nova gives up
building at once (another host would refuse the flavor just the same) and
shows the tenant the message.

To add a setting, write a function that takes a :class:`Request` and returns
LXD configuration, name it in ``_FILTERS``, and add the keys it may set to
``MANAGED_KEYS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import enum
from typing import Any

from nova import exception
from oslo_config import cfg
from oslo_log import log as logging
from oslo_utils import strutils

from nova_lxd_py.virt.host import cpus
from nova_lxd_py.virt.host import numa
from nova_lxd_py.virt.host import passthrough

LOG = logging.getLogger(__name__)

SPEC_NESTED = 'lxd:nested_allowed'
SPEC_PRIVILEGED = 'lxd:privileged_allowed'
SPEC_ISOLATED = 'lxd:isolated'
SPEC_PROCESSES = 'lxd:max_processes'
SPEC_VOLUME_MODE = 'lxd:volume_mode'
SPEC_CONFIG_DRIVE_DEVICE = 'lxd:config_drive_device'

#: Every extra spec of the ``lxd:`` namespace that means something.
KNOWN_SPECS = frozenset({
    SPEC_NESTED, SPEC_PRIVILEGED, SPEC_ISOLATED, SPEC_PROCESSES,
    SPEC_VOLUME_MODE, SPEC_CONFIG_DRIVE_DEVICE, passthrough.SPEC_GPU,
    passthrough.SPEC_USB})

#: LXD keys that this module decides on. A resize removes those of them that
#: the new flavor does not set.
MANAGED_KEYS = frozenset({
    'boot.autostart', 'environment.product_name', 'limits.cpu',
    'limits.cpu.allowance', 'limits.memory', 'limits.memory.swap',
    'limits.processes', 'security.devlxd', 'security.nesting',
    'security.privileged', 'security.syscalls.deny',
    *(f'limits.hugepages.{size}' for size in numa.HUGE_PAGES.values())})

#: MANAGED_KEYS that LXD applies only when it starts the instance, and for
#: which a resize starts it anew. Not among them is security.syscalls.deny, on
#: which no flavor decides: a guest that another version of the driver has
#: started gets it, too, but runs on without it until its next start.
RESTART_KEYS = frozenset({
    'security.devlxd', 'security.nesting', 'security.privileged'})

#: Requests to loop devices (``LOOP_*``, 0x4c00 to 0x4cff) that guests may not
#: make. A volume that is a file on the host reaches its server as a loop
#: device. Everyone who can open one may take it off its file, and the kernel
#: then gives it to the next file, which can be another tenant's; or may change
#: the name by which the driver knows it.
_NO_LOOP_CONTROL = 'ioctl errno 1 [1,0x4c00,SCMP_CMP_MASKED_EQ,0xffffff00]'

#: ``cpu.shares`` that the kernel gives to everything by default; LXD's
#: allowance of 100 %.
DEFAULT_SHARES = 1024
#: cgroup v2 takes weights up to 10000, which LXD's percent become there.
MAX_SHARES = 10000 * DEFAULT_SHARES // 100
#: Microseconds of the kernel's usual CPU bandwidth period.
DEFAULT_PERIOD = 100_000

_INT64 = 2 ** 63 - 1

_Config = dict[str, str]


class Isolation(enum.StrEnum):
    """How far the user ids of a server are apart from those of others."""

    SERVER = 'server'
    PROJECT = 'project'
    OFF = 'off'
    #: Root in the server is root of the host.
    PRIVILEGED = 'privileged'


@dataclasses.dataclass(frozen=True)
class Placement:
    """What a host has set aside for a server, and how LXD can hold it.

    :ivar cpus: numbers of the CPUs that it runs on; None if LXD chooses.
    :ivar huge_pages: ``limits.hugepages.*``.
    :ivar sized_swap: whether LXD limits swap by size, the API extension
        ``instance_memory_swap_bytes``.
    """

    cpus: frozenset[int] | None = None
    huge_pages: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sized_swap: bool = False


@dataclasses.dataclass(frozen=True)
class Request:
    """What the filter functions work on.

    :ivar flavor: the :class:`nova.objects.Flavor`.
    :ivar options: the ``[lxd]`` option group.
    :ivar placement: what the host has set aside.
    :ivar swap_mb: MiB of swap, if not what the flavor says.
    """

    flavor: Any
    options: cfg.ConfigOpts.GroupAttr
    placement: Placement
    swap_mb: int | None = None


# -- reading extra specs ----------------------------------------------------

def check(flavor: Any) -> None:
    """See that a flavor can be had at all; :func:`instance_config` does too.

    :param flavor: the :class:`nova.objects.Flavor`.
    :raises nova.exception.InvalidInput: naming the extra spec to correct.
    """
    specs = flavor.extra_specs
    unknown = sorted(key for key in specs
                     if key.startswith('lxd:') and key not in KNOWN_SPECS)
    if unknown:
        raise exception.InvalidInput(reason=(
            f'flavor {flavor.name} has the unknown extra spec '
            f'{", ".join(unknown)}; those that exist are '
            f'{", ".join(sorted(KNOWN_SPECS))}'))
    for spec in (SPEC_NESTED, SPEC_PRIVILEGED, SPEC_ISOLATED,
                 SPEC_CONFIG_DRIVE_DEVICE):
        flag(flavor, spec)
    if flag(flavor, SPEC_PRIVILEGED) and flag(flavor, SPEC_ISOLATED):
        raise exception.InvalidInput(reason=(
            f'flavor {flavor.name} has both {SPEC_PRIVILEGED}=true and '
            f'{SPEC_ISOLATED}=true, but a privileged server has no user ids '
            f'of its own; remove one of them'))
    cpus.check(flavor)
    passthrough.check(flavor)
    disk_limits(flavor)
    vif_quota(flavor)


def flag(flavor: Any, spec: str) -> bool | None:
    """Read an extra spec that is true or false.

    :param flavor: the :class:`nova.objects.Flavor`.
    :param spec: its name.
    :returns: its value, None if it is not set.
    :raises nova.exception.InvalidInput: it is neither true nor false.
    """
    value = flavor.extra_specs.get(spec)
    if value is None:
        return None
    try:
        return strutils.bool_from_string(value, strict=True)
    except ValueError as exc:
        raise exception.InvalidInput(reason=(
            f'extra spec {spec} of flavor {flavor.name} is "{value}"; set it '
            f'to true or false')) from exc


def _integer(flavor: Any, spec: str, minimum: int = 0,
             maximum: int = _INT64) -> int | None:
    value = flavor.extra_specs.get(spec)
    if value is None:
        return None
    try:
        number = int(value)
    except ValueError:
        number = None
    if number is None or not minimum <= number <= maximum:
        bounds = (f'from {minimum} to {maximum}' if maximum != _INT64
                  else f'of at least {minimum}')
        raise exception.InvalidInput(reason=(
            f'extra spec {spec} of flavor {flavor.name} is "{value}"; set it '
            f'to a whole number {bounds}'))
    return number


# -- configuration keys -----------------------------------------------------

def instance_config(flavor: Any, options: cfg.ConfigOpts.GroupAttr,
                    placement: Placement | None = None,
                    swap_mb: int | None = None) -> _Config:
    """Put a flavor into LXD's words.

    :param flavor: the :class:`nova.objects.Flavor`.
    :param options: the ``[lxd]`` option group.
    :param placement: what the host has set aside for the server.
    :param swap_mb: MiB of swap that a tenant has chosen within what the
        flavor allows.
    :returns: LXD configuration keys, some of ``MANAGED_KEYS``. The uid range
        is not among them, see :func:`wants_isolation`.
    :raises nova.exception.InvalidInput: naming the extra spec to correct.
    """
    check(flavor)
    request = Request(flavor, options, placement or Placement(), swap_mb)
    config: _Config = {}
    for filter_ in _FILTERS:
        config.update(filter_(request))
    return config


def _base(request: Request) -> _Config:
    options = request.options
    devlxd = options.devlxd or options.cloud_init_keys
    return {
        # Nova decides what runs after a reboot of the host
        # (resume_guests_state_on_host_boot).
        'boot.autostart': 'false',
        # How cloud-init knows in a container that it is on OpenStack: there
        # is no DMI to ask, so it reads the environment of process 1.
        'environment.product_name': 'OpenStack Nova',
        'security.devlxd': _word(devlxd),
    }


def _cpu(request: Request) -> _Config:
    """Give as many CPUs as the flavor has vCPUs.

    Where the host has a set of CPUs for the server, it runs on these. If they
    are more than its vCPUs, which it shares with other servers then, it gets
    that much time of them. Otherwise LXD spreads the servers over the host's
    CPUs by itself. More vCPUs than the host has are left as they are:
    Placement never sends such a flavor (max_unit), and LXD gives all CPUs
    then.

    CPU time: ``quota:cpu_quota`` microseconds of each ``quota:cpu_period``
    for each vCPU are a ceiling, ``quota:cpu_shares`` a weight against other
    servers. LXD takes one of the two; a ceiling wins.
    """
    flavor, chosen = request.flavor, request.placement.cpus
    config = {'limits.cpu': (str(flavor.vcpus) if chosen is None
                             else cpus.lxd_set(chosen))}
    shares = _integer(flavor, 'quota:cpu_shares', 0, MAX_SHARES)
    period = _integer(flavor, 'quota:cpu_period', 0, 1_000_000)
    # Negative means unlimited, as Nova's description of it says.
    quota = _integer(flavor, 'quota:cpu_quota', -_INT64)
    if period and period < 1000:
        raise exception.InvalidInput(reason=(
            f'extra spec quota:cpu_period of flavor {flavor.name} is '
            f'"{period}"; set it to 1000 to 1000000 microseconds'))
    if quota is not None and 0 < quota < 1000:
        raise exception.InvalidInput(reason=(
            f'extra spec quota:cpu_quota of flavor {flavor.name} is '
            f'"{quota}"; set it to at least 1000 microseconds'))
    period = period or DEFAULT_PERIOD
    if chosen is not None and len(chosen) > flavor.vcpus:
        quota = min(quota, period) if quota and quota > 0 else period
    if quota is not None and quota > 0:
        config['limits.cpu.allowance'] = _bandwidth(
            quota * flavor.vcpus, period)
        if shares:
            LOG.warning(
                'Flavor %s has quota:cpu_shares, but also a ceiling of CPU '
                'time, from quota:cpu_quota or [compute] cpu_shared_set; LXD '
                'takes one of them, and the ceiling is used.', flavor.name)
    elif shares:
        percent = max(1, round(shares * 100 / DEFAULT_SHARES))
        config['limits.cpu.allowance'] = f'{percent}%'
    return config


def _bandwidth(quota: int, period: int) -> str:
    """Write a share of CPU time the way LXD takes it: in milliseconds.

    :param quota: microseconds of CPU time.
    :param period: microseconds in which they may be used.
    :returns: an allowance within 1 % of what was asked for, wherever whole
        milliseconds allow that.
    """
    share = quota / period
    milliseconds = max(1, round(period / 1000))
    if abs(round(share * milliseconds) - share * milliseconds) > (
            share * milliseconds / 100):
        # Too coarse: the longest period that the kernel takes.
        milliseconds = 1000
    return f'{max(1, round(share * milliseconds))}ms/{milliseconds}ms'


def _memory(request: Request) -> _Config:
    """Limit RAM, and swap to the flavor's ``swap``.

    LXD before sized swap only knows whether an instance should be kept from
    swapping.
    """
    flavor = request.flavor
    wanted = flavor.swap if request.swap_mb is None else request.swap_mb
    if not wanted:
        swap = 'false'
    elif request.placement.sized_swap:
        swap = f'{wanted}MiB'
    else:
        swap = 'true'
        LOG.info('Flavor %s has %d MiB of swap, which this LXD cannot hold '
                 'against a server: it may be swapped out, but its RAM and '
                 'swap together stay within its RAM.',
                 flavor.name, wanted)
    return {'limits.memory': f'{flavor.memory_mb}MiB',
            'limits.memory.swap': swap, **request.placement.huge_pages}


def _processes(request: Request) -> _Config:
    limit = _integer(request.flavor, SPEC_PROCESSES)
    if limit is None:
        limit = request.options.max_processes
    return {'limits.processes': str(limit)} if limit else {}


def _security(request: Request) -> _Config:
    """Write every security key, so that no default of LXD matters."""
    return {
        'security.nesting': _word(flag(request.flavor, SPEC_NESTED)),
        'security.privileged': _word(
            flag(request.flavor, SPEC_PRIVILEGED)),
        'security.syscalls.deny': _NO_LOOP_CONTROL,
    }


def _word(value: bool | None) -> str:
    return 'true' if value else 'false'


_FILTERS: tuple[Callable[[Request], _Config], ...] = (
    _base, _cpu, _memory, _processes, _security)


# -- uid ranges -------------------------------------------------------------

def wants_isolation(flavor: Any, mode: str, *, free_ranges: int,
                    shift_is_free: bool, can_clone: bool) -> Isolation:
    """Decide whose uid range a server gets.

    ``lxd:privileged_allowed`` and ``lxd:isolated`` of the flavor go before
    ``[lxd] idmap_isolation``. An explicit ``lxd:isolated=false`` asks for
    LXD's common range, for instance to share custom volumes.

    :param flavor: the :class:`nova.objects.Flavor`.
    :param mode: ``[lxd] idmap_isolation``.
    :param free_ranges: how many ranges of 65536 ids the host can give away,
        see :meth:`nova_lxd_py.virt.host.host.Host.idmap_capacity`.
    :param shift_is_free: whether LXD mounts root disks idmapped, so that an
        own range costs nothing.
    :param can_clone: whether servers can be cloned from a template that has
        been shifted once (``[lxd] fast_spawn`` on a fitting pool).
    :returns: the decision.
    :raises nova.exception.InvalidInput: the flavor contradicts itself.
    :raises nova.exception.ComputeResourcesUnavailable: it demands a range,
        which this host does not have; Nova tries another one.
    """
    check(flavor)
    if flag(flavor, SPEC_PRIVILEGED):
        return Isolation.PRIVILEGED
    wanted = flag(flavor, SPEC_ISOLATED)
    if wanted:
        if free_ranges < 1:
            raise exception.ComputeResourcesUnavailable(reason=(
                f'flavor {flavor.name} has {SPEC_ISOLATED}=true, but the host '
                f'has no user ids to spare for it; extend the line of root '
                f'in /etc/subuid and /etc/subgid'))
        return Isolation.SERVER
    if wanted is False or mode == Isolation.OFF or free_ranges < 1:
        return Isolation.OFF
    if mode == 'auto':
        if can_clone and not shift_is_free:
            return Isolation.PROJECT
        return Isolation.SERVER
    return Isolation(mode)


def isolation_config(isolation: Isolation) -> _Config:
    """Put a decision on the uid range into LXD's words.

    :param isolation: the decision.
    :returns: ``security.idmap.isolated``; which range a PROJECT has is for
        the caller to add (``security.idmap.base``).
    """
    return {'security.idmap.isolated': _word(
        isolation in (Isolation.SERVER, Isolation.PROJECT))}


# -- root disk --------------------------------------------------------------

def root_device(flavor: Any, options: cfg.ConfigOpts.GroupAttr
                ) -> dict[str, str]:
    """Describe the root disk.

    :param flavor: the :class:`nova.objects.Flavor`; a ``root_gb`` of 0 means
        a disk that only the pool limits.
    :param options: the ``[lxd]`` option group.
    :returns: LXD's ``disk`` device for ``/``.
    :raises nova.exception.InvalidInput: naming the extra spec to correct.
    """
    device = {'type': 'disk', 'path': '/', 'pool': options.storage_pool}
    if flavor.root_gb:
        device['size'] = f'{flavor.root_gb}GiB'
    device.update(disk_limits(flavor))
    return device


def disk_limits(flavor: Any) -> dict[str, str]:
    """Read ``quota:disk_{read,write,total}_{bytes,iops}_sec``.

    LXD limits each direction either in bytes or in requests a second. Where a
    flavor has both for a direction, bytes win and a warning is logged. A
    total holds for each direction by itself where LXD has no common limit;
    a limit of the direction goes before it.

    :param flavor: the :class:`nova.objects.Flavor`.
    :returns: ``limits.*`` for a LXD disk device.
    :raises nova.exception.InvalidInput: naming the extra spec to correct.
    """
    found = {way: _disk_limit(flavor, way)
             for way in ('read', 'write', 'total')}
    read = found['read'] or found['total']
    write = found['write'] or found['total']
    if read and read == write:
        return {'limits.max': read}
    limits = {}
    if read:
        limits['limits.read'] = read
    if write:
        limits['limits.write'] = write
    return limits


def _disk_limit(flavor: Any, way: str) -> str | None:
    size = _integer(flavor, f'quota:disk_{way}_bytes_sec')
    requests = _integer(flavor, f'quota:disk_{way}_iops_sec')
    if size and requests:
        LOG.warning(
            'Flavor %(flavor)s has both quota:disk_%(way)s_bytes_sec and '
            'quota:disk_%(way)s_iops_sec; LXD takes one of them, and the '
            'bytes are used.', {'flavor': flavor.name, 'way': way})
    if size:
        return f'{size}B'
    return f'{requests}iops' if requests else None


# -- network ----------------------------------------------------------------

def vif_quota(flavor: Any) -> dict[str, int]:
    """Read ``quota:vif_{inbound,outbound}_{average,peak,burst}``.

    In Nova's words *inbound* is what the server receives. Average and peak
    are kilobytes (1000 bytes) a second, burst is kibibytes.

    :param flavor: the :class:`nova.objects.Flavor`.
    :returns: those that are set and not 0, by names such as
        ``inbound_average``.
    :raises nova.exception.InvalidInput: naming the extra spec to correct.
    """
    quota = {}
    for way in ('inbound', 'outbound'):
        for kind in ('average', 'peak', 'burst'):
            value = _integer(flavor, f'quota:vif_{way}_{kind}')
            if value:
                quota[f'{way}_{kind}'] = value
        if f'{way}_average' not in quota and any(
                key.startswith(way) for key in quota):
            raise exception.InvalidInput(reason=(
                f'flavor {flavor.name} limits {way} traffic without '
                f'quota:vif_{way}_average; set that as well'))
    return quota
