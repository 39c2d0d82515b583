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

"""Conversion of flavors to LXD configuration and the root disk.

Pure functions of a flavor and of the ``[lxd]`` options. The only input from
tenants is a size of swap within the flavor's limit: image properties, metadata
and names never become LXD configuration. Extra specs are read by name and
type; an unknown key in the ``lxd:`` namespace is refused instead of ignored,
because a typing error must not leave an instance less isolated than its flavor
intends.

Errors are :class:`nova.exception.InvalidInput`, for which Nova does not
reschedule (another host would refuse the flavor as well) and shows the message
to the tenant.

To add a setting, write a function that takes a :class:`Request` and returns
LXD configuration, and add it to ``_FILTERS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from nova import exception
from oslo_config import cfg
from oslo_log import log as logging
from oslo_utils import strutils

from nova_lxd_py import extra_specs
from nova_lxd_py.virt.host import cpus
from nova_lxd_py.virt.host import passthrough
from nova_lxd_py.virt.lxd import server_kind

LOG = logging.getLogger(__name__)

#: Keys that LXD applies only when it starts the instance, and for which a
#: resize restarts it. security.syscalls.deny is not among them, because no
#: flavor changes it: an instance that was started by another version of the
#: driver gets it, but runs without it until its next start.
RESTART_KEYS = frozenset({
    'security.nesting', 'security.privileged', *server_kind.GUEST_API_KEYS})

#: Denies guests the ioctls of loop devices (``LOOP_*``, 0x4c00 to 0x4cff). A
#: volume that is a file on the host is attached as a loop device. Everyone who
#: can open one could detach it from its file, and the kernel would reuse it
#: for the next file, possibly another tenant's; or could change the file name
#: by which the driver finds it.
_NO_LOOP_CONTROL = 'ioctl errno 1 [1,0x4c00,SCMP_CMP_MASKED_EQ,0xffffff00]'

#: Denies guests to create btrfs subvolumes and snapshots
#: (``BTRFS_IOC_SNAP_CREATE``, ``_SUBVOL_CREATE``, ``_SNAP_CREATE_V2`` and
#: ``_SUBVOL_CREATE_V2``). The quota of a root or ephemeral disk on a btrfs
#: pool does not include them, so a guest could fill the pool. The error is
#: ENOTTY, that of another filesystem, at which systemd-tmpfiles makes plain
#: directories. The mask is there because the kernel ignores the upper half of
#: the argument.
_NO_SUBVOLUMES = '\n'.join(
    f'ioctl errno 25 [1,{request:#x},SCMP_CMP_MASKED_EQ,0xffffffff]'
    for request in (0x50009401, 0x5000940e, 0x50009417, 0x50009418))

#: The kernel's default ``cpu.shares``, which equals an allowance of 100 % in
#: LXD.
DEFAULT_SHARES = 1024
#: cgroup v2 limits weights to 10000; LXD uses its percentage as the weight.
MAX_SHARES = 10000 * DEFAULT_SHARES // 100
#: The kernel's default CPU bandwidth period in microseconds.
DEFAULT_PERIOD = 100_000

_INT64 = 2 ** 63 - 1

_Config = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Resources that the host assigns to an instance, and LXD's abilities.

    :ivar cpus: numbers of the CPUs that it runs on; None if LXD chooses.
    :ivar huge_pages: ``limits.hugepages.*``.
    :ivar sized_swap: whether LXD limits swap by size (API extension
        ``instance_memory_swap_bytes``).
    :ivar kind: how the server names configuration keys.
    """

    cpus: frozenset[int] | None = None
    huge_pages: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sized_swap: bool = False
    kind: server_kind.ServerKind = server_kind.LXD


@dataclasses.dataclass(frozen=True)
class Request:
    """Input of the filter functions.

    :ivar flavor: the :class:`nova.objects.Flavor`.
    :ivar options: the ``[lxd]`` option group.
    :ivar placement: resources that the host assigns.
    :ivar swap_mb: MiB of swap, if it differs from the flavor's.
    """

    flavor: Any
    options: cfg.ConfigOpts.GroupAttr
    placement: Placement
    swap_mb: int | None = None


# -- reading extra specs ----------------------------------------------------

def check(flavor: Any) -> None:
    """Check that the driver supports a flavor.

    :func:`instance_config` checks this as well.

    :param flavor: the :class:`nova.objects.Flavor`.
    :raises nova.exception.InvalidInput: if it does not; the message names the
        extra spec to correct.
    """
    known = extra_specs.EXTRA_SPECS
    unknown = sorted(key for key in flavor.extra_specs
                     if key.startswith('lxd:') and key not in known)
    if unknown:
        raise exception.InvalidInput(reason=(
            f'flavor {flavor.name} has the unknown extra spec '
            f'{", ".join(unknown)}; supported are '
            f'{", ".join(sorted(known))}'))
    for name, spec in known.items():
        if spec.type is bool:
            flag(flavor, name)
    if (flag(flavor, extra_specs.PRIVILEGED) and
            flag(flavor, extra_specs.ISOLATED)):
        raise exception.InvalidInput(reason=(
            f'flavor {flavor.name} has both {extra_specs.PRIVILEGED}=true and '
            f'{extra_specs.ISOLATED}=true, but a privileged instance has no '
            f'user ids of its own; remove one of them'))
    cpus.check(flavor)
    passthrough.check(flavor)
    disk_limits(flavor)
    vif_quota(flavor)


def flag(flavor: Any, spec: str) -> bool | None:
    """Return the value of a boolean extra spec.

    :param flavor: the :class:`nova.objects.Flavor`.
    :param spec: name of the extra spec.
    :returns: its value, None if it is not set.
    :raises nova.exception.InvalidInput: if it is not a boolean.
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
    """Convert a flavor to LXD configuration.

    :param flavor: the :class:`nova.objects.Flavor`.
    :param options: the ``[lxd]`` option group.
    :param placement: resources that the host assigns to the instance.
    :param swap_mb: MiB of swap that a tenant has chosen within the flavor's
        limit.
    :returns: LXD configuration keys. The uid range is not included, see
        :mod:`.isolation`.
    :raises nova.exception.InvalidInput: if the flavor is not supported; the
        message names the extra spec to correct.
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
        # Nova decides which instances start after a reboot of the host
        # (resume_guests_state_on_host_boot).
        'boot.autostart': 'false',
        # cloud-init in a container detects OpenStack by this variable of
        # process 1, because there is no DMI.
        'environment.product_name': 'OpenStack Nova',
        request.placement.kind.guest_api_key: _lxd_bool(devlxd),
    }


def _cpu(request: Request) -> _Config:
    """Limit CPUs to the vCPUs of the flavor.

    If the host assigns a set of CPUs to the instance, it runs on these. If the
    set is larger than the number of vCPUs, it is shared with other instances,
    and the instance gets a CPU quota of its number of vCPUs. Otherwise LXD
    balances instances over the host's CPUs. A flavor with more vCPUs than the
    host has CPUs is not refused: Placement never allocates it (max_unit), and
    LXD would use all CPUs.

    ``quota:cpu_quota`` microseconds in each ``quota:cpu_period`` for each vCPU
    are a limit of CPU time, ``quota:cpu_shares`` a weight against other
    instances. LXD supports one of the two; the limit takes precedence.
    """
    flavor, chosen = request.flavor, request.placement.cpus
    config = {'limits.cpu': (str(flavor.vcpus) if chosen is None
                             else cpus.format_lxd_cpus(chosen))}
    shares = _integer(flavor, 'quota:cpu_shares', 0, MAX_SHARES)
    period = _integer(flavor, 'quota:cpu_period', 0, 1_000_000)
    # Negative means unlimited, as Nova documents it.
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
                'Flavor %s has quota:cpu_shares as well as a CPU quota from '
                'quota:cpu_quota or [compute] cpu_shared_set; LXD supports '
                'only one of them, and the quota is used.', flavor.name)
    elif shares:
        percent = max(1, round(shares * 100 / DEFAULT_SHARES))
        config['limits.cpu.allowance'] = f'{percent}%'
    return config


def _bandwidth(quota: int, period: int) -> str:
    """Convert a share of CPU time to LXD's milliseconds.

    :param quota: microseconds of CPU time.
    :param period: microseconds of the period.
    :returns: an allowance within 1 % of the requested share, if milliseconds
        allow that.
    """
    share = quota / period
    milliseconds = max(1, round(period / 1000))
    if abs(round(share * milliseconds) - share * milliseconds) > (
            share * milliseconds / 100):
        # Too coarse: use the kernel's longest period.
        milliseconds = 1000
    return f'{max(1, round(share * milliseconds))}ms/{milliseconds}ms'


def _memory(request: Request) -> _Config:
    """Limit RAM to the flavor's memory, and swap to its ``swap``.

    LXD without sized swap can only enable or disable swapping for an instance.
    """
    flavor = request.flavor
    wanted = flavor.swap if request.swap_mb is None else request.swap_mb
    if not wanted:
        swap = 'false'
    elif request.placement.sized_swap:
        swap = f'{wanted}MiB'
    else:
        swap = 'true'
        LOG.info('Flavor %s has %d MiB of swap, which this LXD cannot limit '
                 'by size: instances may be swapped out, but their RAM and '
                 'swap together are limited to their RAM.',
                 flavor.name, wanted)
    return {'limits.memory': f'{flavor.memory_mb}MiB',
            'limits.memory.swap': swap, **request.placement.huge_pages}


def _processes(request: Request) -> _Config:
    limit = _integer(request.flavor, extra_specs.PROCESSES,
                     maximum=extra_specs.MAX_PROCESSES)
    if limit is None:
        limit = request.options.max_processes
    return {'limits.processes': str(limit)} if limit else {}


def _security(request: Request) -> _Config:
    """Set every security key explicitly, independent of LXD's defaults."""
    return {
        'security.nesting': _lxd_bool(
            flag(request.flavor, extra_specs.NESTED)),
        'security.privileged': _lxd_bool(
            flag(request.flavor, extra_specs.PRIVILEGED)),
        'security.syscalls.deny': f'{_NO_LOOP_CONTROL}\n{_NO_SUBVOLUMES}',
    }


def _lxd_bool(value: bool | None) -> str:
    return 'true' if value else 'false'


_FILTERS: tuple[Callable[[Request], _Config], ...] = (
    _base, _cpu, _memory, _processes, _security)


# -- root disk --------------------------------------------------------------

def root_device(flavor: Any, options: cfg.ConfigOpts.GroupAttr
                ) -> dict[str, str]:
    """Return the LXD device of the root disk.

    :param flavor: the :class:`nova.objects.Flavor`; a ``root_gb`` of 0 means
        that the disk is limited only by the pool.
    :param options: the ``[lxd]`` option group.
    :returns: LXD's ``disk`` device for ``/``.
    :raises nova.exception.InvalidInput: if a disk limit is invalid; the
        message names the extra spec to correct.
    """
    device = {'type': 'disk', 'path': '/', 'pool': options.storage_pool}
    if flavor.root_gb:
        device['size'] = f'{flavor.root_gb}GiB'
    device.update(disk_limits(flavor))
    return device


def disk_limits(flavor: Any) -> dict[str, str]:
    """Convert ``quota:disk_{read,write,total}_{bytes,iops}_sec``.

    LXD limits each direction either in bytes or in requests per second. If a
    flavor has both for a direction, bytes take precedence and a warning is
    logged. A total applies to each direction separately unless it is LXD's
    common limit; a limit of the direction takes precedence.

    :param flavor: the :class:`nova.objects.Flavor`.
    :returns: ``limits.*`` of an LXD disk device.
    :raises nova.exception.InvalidInput: if a limit is invalid; the message
        names the extra spec to correct.
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
            'quota:disk_%(way)s_iops_sec; LXD supports only one of them, and '
            'the limit in bytes is used.',
            {'flavor': flavor.name, 'way': way})
    if size:
        return f'{size}B'
    return f'{requests}iops' if requests else None


# -- network ----------------------------------------------------------------

def vif_quota(flavor: Any) -> dict[str, int]:
    """Return ``quota:vif_{inbound,outbound}_{average,peak,burst}``.

    As in Nova, *inbound* is what the instance receives. Average and peak are
    kilobytes (1000 bytes) per second, burst is kibibytes.

    :param flavor: the :class:`nova.objects.Flavor`.
    :returns: those that are set and not 0, by names such as
        ``inbound_average``.
    :raises nova.exception.InvalidInput: if a limit is invalid; the message
        names the extra spec to correct.
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
