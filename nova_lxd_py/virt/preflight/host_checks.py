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

"""Checks of the host: CPU sets, devices, directories and programs."""

from __future__ import annotations

import os
import shlex
from typing import Any

from nova import exception
from oslo_log import log as logging

from nova_lxd_py.virt import exception_mapping
from nova_lxd_py.virt.host import cpus
from nova_lxd_py.virt.host import device_activation
from nova_lxd_py.virt.host import kernel_limits
from nova_lxd_py.virt.host import passthrough
from nova_lxd_py.virt.host import server_host
from nova_lxd_py.virt.host import subordinate_ids
from nova_lxd_py.virt.lxd import session as lxd
from nova_lxd_py.virt.metadata import config_drive_device

LOG = logging.getLogger(__name__)


def check_cpus(session: lxd.Session, conf: Any) -> None:
    """Check the host's CPU sets.

    :param session: the connected LXD session.
    :param conf: the configuration, normally ``nova.conf.CONF``.
    :raises StartupError: if they are inconsistent, or CPUs do not exist.
    """
    if conf.vcpu_pin_set:
        raise exception_mapping.StartupError(
            '[DEFAULT] vcpu_pin_set is set, which this driver does not '
            'support; use [compute] cpu_shared_set and cpu_dedicated_set')
    try:
        sets = cpus.configured()
    except exception.Invalid as exc:
        raise exception_mapping.StartupError(
            f'[compute] cpu_shared_set or cpu_dedicated_set is invalid: '
            f'{exc.format_message()}') from exc
    if sets.shared is None:
        return
    if conf.reserved_host_cpus:
        raise exception_mapping.StartupError(
            '[DEFAULT] reserved_host_cpus is set as well as [compute] '
            'cpu_shared_set or cpu_dedicated_set; exclude the CPUs for the '
            'host from these sets, and unset reserved_host_cpus')
    common = sets.shared & sets.dedicated
    if common:
        raise exception_mapping.StartupError(
            f'CPU {cpus.format_cpus(common)} is both in [compute] '
            f'cpu_shared_set and in cpu_dedicated_set; remove it from one of '
            f'them')
    present = {each.number for each in cpus.processors(
        session.get('resources')['cpu'])}
    for option, numbers in (('cpu_shared_set', sets.shared),
                            ('cpu_dedicated_set', sets.dedicated)):
        missing = numbers - present
        if missing:
            raise exception_mapping.StartupError(
                f'[compute] {option} has CPU {cpus.format_cpus(missing)}, '
                f'which does not exist or is offline; the host has '
                f'{cpus.format_cpus(present) or "none that LXD reports"}')


def check_devices(session: lxd.Session, options: Any) -> None:
    """Check the devices that may be passed through.

    :param session: the connected LXD session.
    :param options: the ``[lxd]`` option group.
    :raises StartupError: if an item of the option is not a device.
    """
    try:
        listed = passthrough.parse(options.passthrough_devices)
    except exception.InvalidInput as exc:
        raise exception_mapping.StartupError(
            f'[lxd] passthrough_devices: {exc.kwargs["reason"]}') from exc
    if not listed:
        return
    present = passthrough.present(session.get('resources'),
                                  options.passthrough_devices)
    for kind, ids in listed:
        if (kind, ids) not in present:
            LOG.warning('Host does not have the %(kind)s device %(ids)s in '
                        '[lxd] passthrough_devices; instances whose flavor '
                        'requests it cannot start',
                        {'kind': kind, 'ids': ids})


def check_instances_path(path: str) -> None:
    """Ensure that Nova's instances directory exists.

    :param path: ``[DEFAULT] instances_path``.
    :raises StartupError: if it cannot be created.
    """
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as exc:
        raise exception_mapping.StartupError(
            f'[DEFAULT] instances_path is {path}, which nova-compute cannot '
            f'create: {exc.strerror}') from exc


def check_console_command(command: str) -> None:
    """Check the syntax of the command for serial consoles.

    :param command: ``[lxd] serial_console_command``.
    :raises StartupError: if it is empty, or quoted wrongly.
    """
    try:
        words = shlex.split(command)
    except ValueError as exc:
        raise exception_mapping.StartupError(
            f'[lxd] serial_console_command is "{command}", which is quoted '
            f'wrongly: {exc}') from exc
    if not words:
        raise exception_mapping.StartupError(
            '[lxd] serial_console_command is empty; set it to a program in '
            'the guest, such as "login"')


def check_config_drives(session: lxd.Session, options: Any) -> None:
    """Check the requirements of config drives as block devices.

    :param session: the LXD session; LXD need not answer.
    :param options: the ``[lxd]`` option group.
    :raises StartupError: if a requirement is missing.
    """
    if not options.config_drive_device:
        return
    reason = config_drive_device.missing_requirement(session.is_local)
    if reason:
        raise exception_mapping.StartupError(
            f'[lxd] config_drive_device is enabled, but {reason}')


def report_uid_ranges(session: lxd.Session, options: Any) -> None:
    """Log the number of uid ranges for instances.

    :param session: the connected LXD session.
    :param options: the ``[lxd]`` option group.
    """
    if options.idmap_isolation == 'off':
        LOG.info('Instances share one range of host uids, because [lxd] '
                 'idmap_isolation is off')
        return
    if not session.is_local:
        return
    ranges = subordinate_ids.capacity(session.endpoint)
    if ranges < 1:
        LOG.warning(
            'Root has fewer than %d subordinate ids in /etc/subuid or '
            '/etc/subgid; instances cannot have their own ranges of host uids '
            'and are less isolated from each other. Extend both files and '
            'restart LXD, or set [lxd] idmap_isolation to off.',
            2 * subordinate_ids.RANGE)
        return
    LOG.info('Host has %d ranges of host uids for instances; extend '
             '/etc/subuid and /etc/subgid for more', ranges)


def report_kernel_limits(session: lxd.Session, options: Any) -> None:
    """Log the limits of the kernel that are too low for hundreds of servers.

    :param session: the connected LXD session.
    :param options: the ``[lxd]`` option group.
    """
    if not session.is_local:
        return
    environment = session.server.get('environment', {})
    for shortage in kernel_limits.shortages(
            shared_range=options.idmap_isolation != 'server',
            server_pid=environment.get('server_pid')):
        limit = shortage.limit
        LOG.warning('Kernel limit %(name)s is %(value)d, which allows '
                    '%(servers)s; it applies to %(scope)s. Set it to '
                    '%(recommended)d. See "Many instances on a host" in the '
                    'operations guide.',
                    {'name': limit.name, 'value': shortage.value,
                     'servers': ('any number of idle servers'
                                 if shortage.servers is None else
                                 f'about {shortage.servers} servers'),
                     'scope': limit.scope,
                     'recommended': limit.recommended})


def report_device_activation(session: lxd.Session) -> None:
    """Log whether the host would activate what tenants write on volumes.

    :param session: the connected LXD session.
    """
    missing = device_activation.missing_settings() if session.is_local else ()
    if missing:
        LOG.warning('Host may activate LVM, MD or btrfs signatures that '
                    'tenants write on volumes; it lacks %s. See "Volumes and '
                    "the host's udev\" in the security guide.",
                    ', '.join(missing))


def report_server(session: lxd.Session) -> None:
    """Log what LXD lacks on this host: programs and security fixes.

    :param session: the connected LXD session.
    """
    # The snap has programs and versions of its own.
    if not session.is_local or session.endpoint.startswith('/var/snap/'):
        return
    missing = server_host.missing_programs()
    if missing:
        LOG.warning('Host lacks the package %s: %s cannot unpack images that '
                    'are compressed with it, and snapshots are compressed '
                    'with gzip, which takes longer', ', '.join(missing),
                    session.kind.product)
    outdated = server_host.outdated_package(session.server)
    if outdated is not None:
        LOG.warning('Package %s %s lacks security fixes; install %s or later',
                    *outdated)
