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

"""Checks at start-up of nova-compute.

Each problem stops the service with one sentence that says what is wrong and
how to correct it, instead of failing the first instance. Nothing is changed on
the host, except that the driver's LXD project and Nova's instances directory
are created.
"""

from __future__ import annotations

from collections.abc import Callable
import os
import re
import shlex
import time
from typing import Any

from nova import exception
from oslo_log import log as logging

from nova_lxd_py.virt import exception_mapping
from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.host import cpus
from nova_lxd_py.virt.host import device_activation
from nova_lxd_py.virt.host import passthrough
from nova_lxd_py.virt.host import subordinate_ids
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import server_kind
from nova_lxd_py.virt.lxd import session as lxd
from nova_lxd_py.virt.metadata import config_drive_device

LOG = logging.getLogger(__name__)

#: API extensions that the driver requires. LXD 5.0.2 and Incus 6 have all of
#: them.
REQUIRED_EXTENSIONS: tuple[str, ...] = (
    'console',                      # console log
    'container_incremental_copy',   # cold migration
    'custom_volume_backup',         # config drives
    'etag',                         # concurrent changes
    'event_lifecycle',              # power states
    'id_map',                       # uid ranges
    'id_map_base',
    'image_create_aliases',         # image cache
    'instances',
    'projects',
    'resources',                    # inventory
    'storage',
)

#: Configuration key of an LXD project with the host of its nova-compute.
KEY_HOST = 'user.nova.host'

#: Required features of the driver's project, so that deleting images and
#: volumes cannot affect another project.
PROJECT_FEATURES = {'features.images': 'true', 'features.profiles': 'true',
                    'features.storage.volumes': 'true'}

#: Seconds between attempts to connect to LXD.
RETRY_DELAY = 1.0

#: Names that LXD accepts for instances, which are DNS host names.
_LXD_NAME = re.compile(r'[A-Za-z](?:[A-Za-z0-9-]*[A-Za-z0-9])?')
#: LXD takes 63 characters, the suffix of a snapshot's instance included.
_LONGEST_NAME = 63 - len(lxd_guest.LONGEST_SUFFIX)
#: Fields of an instance that a tenant cannot choose.
_NAME_FIELDS = frozenset({'id', 'uuid', 'project_id', 'user_id'})


def check(session: lxd.Session, conf: Any) -> None:
    """Run all checks, and connect to LXD.

    See :meth:`nova.virt.driver.ComputeDriver.init_host`.

    :param session: the LXD session; LXD need not answer yet.
    :param conf: the configuration, normally ``nova.conf.CONF``.
    :raises StartupError: if a check fails; the message says what to correct.
    """
    check_name_template(conf.instance_name_template)
    check_instances_path(conf.instances_path)
    check_console_command(conf.lxd.serial_console_command)
    check_config_drives(session, conf.lxd)

    def check_lxd() -> None:
        session.connect()
        check_extensions(session, conf.lxd)
        check_project(session, conf)
        check_pool(session, conf.lxd)
        check_cpus(session, conf)
        check_devices(session, conf.lxd)

    wait_for_lxd(session, conf.lxd.startup_timeout, check_lxd)
    report_uid_ranges(session, conf.lxd)
    report_device_activation(session)


# -- connection -------------------------------------------------------------

def connect(session: lxd.Session, timeout: float) -> None:
    """Connect to LXD, and wait for it if it is starting.

    :param session: the LXD session.
    :param timeout: seconds to wait for an LXD that does not answer.
    :raises StartupError: if LXD does not answer or refuses the connection.
    """
    wait_for_lxd(session, timeout, session.connect)


def wait_for_lxd(session: lxd.Session, timeout: float,
                 step: Callable[[], None]) -> None:
    """Call a function until LXD answers all of its requests.

    An LXD that is starting may not listen yet, may close connections, or may
    answer later than ``[lxd] request_timeout`` while it starts instances.

    :param session: the LXD session.
    :param timeout: seconds to wait for LXD.
    :param step: the function, which may be called repeatedly.
    :raises StartupError: if LXD does not answer in time, or an answer shows
        that waiting longer is useless.
    """
    deadline = time.monotonic() + timeout
    waiting = False
    while True:
        try:
            step()
            return
        except (errors.Unreachable, errors.DeadlineExceeded) as exc:
            if time.monotonic() >= deadline:
                waited = (f' (after {timeout:.0f} seconds, [lxd] '
                          f'startup_timeout)' if timeout else '')
                raise exception_mapping.StartupError(
                    f'LXD at {session.endpoint} cannot be used: {exc}'
                    f'{waited}') from exc
            if not waiting:
                LOG.warning('LXD does not answer yet; waiting for up to %d '
                            'seconds ([lxd] startup_timeout): %s', timeout,
                            exc)
                waiting = True
            time.sleep(min(RETRY_DELAY,
                           max(0.0, deadline - time.monotonic())))
        except errors.PermissionDenied as exc:
            raise exception_mapping.StartupError(
                f'LXD at {session.endpoint} denies nova-compute access that '
                f'it needs: {exc}') from exc
        except errors.LXDError as exc:
            raise exception_mapping.StartupError(
                f'LXD at {session.endpoint} cannot be used: {exc}') from exc


def check_extensions(session: lxd.Session, options: Any) -> None:
    """Check that LXD has the API extensions that the driver requires.

    :param session: the connected LXD session.
    :param options: the ``[lxd]`` option group.
    :raises StartupError: if some are missing; the message names them.
    """
    required = REQUIRED_EXTENSIONS
    if options.cloud_init_keys:
        required = (*required, 'cloud_init')
    missing = [name for name in required if not session.has_extension(name)]
    if missing:
        raise exception_mapping.StartupError(
            f'{server_kind.version(session.server)} lacks the API extension '
            f'{", ".join(missing)}, which the driver needs; install LXD 5.0.2 '
            f'or later, or Incus 6')


# -- project ----------------------------------------------------------------

def check_project(session: lxd.Session, conf: Any) -> None:
    """Check the driver's LXD project; create it if allowed.

    :param session: the connected LXD session.
    :param conf: the configuration, normally ``nova.conf.CONF``.
    :raises StartupError: if the project cannot be used.
    """
    name = conf.lxd.project
    if name == 'default':
        raise exception_mapping.StartupError(
            f'[lxd] project is "{name}", which contains instances of the '
            'operator; set it to a project of its own')
    try:
        project, etag = session.get_with_etag('projects', name)
    except errors.NotFound:
        _create_project(session, conf, name)
        return
    config = project['config']
    for feature, wanted in PROJECT_FEATURES.items():
        if config.get(feature) != wanted:
            raise exception_mapping.StartupError(
                f'The LXD project {name} has no {feature.partition(".")[2]} '
                f'of its own; set {feature}={wanted} on it, or choose '
                f'another [lxd] project')
    owner = config.get(KEY_HOST)
    if owner == conf.host:
        return
    if owner:
        raise exception_mapping.StartupError(
            f'The LXD project {name} belongs to the nova-compute service of '
            f'host {owner}, and this is host {conf.host}; set another [lxd] '
            f'project, or, if the host was renamed, run '
            f'"{session.kind.client} project set {name} '
            f'{KEY_HOST}={conf.host}"')
    _claim_project(session, name, project, etag, conf.host)


def _create_project(session: lxd.Session, conf: Any, name: str) -> None:
    if not conf.lxd.create_project:
        raise exception_mapping.StartupError(
            f'The LXD project {name} does not exist, and [lxd] create_project '
            f'is disabled; create the project, or enable the option')
    config = {**PROJECT_FEATURES, KEY_HOST: conf.host}
    if session.has_extension('projects_networks'):
        # Instances do not use LXD's networks.
        config['features.networks'] = 'false'
    try:
        session.post('projects', body={
            'name': name, 'config': config,
            'description': f'Instances of OpenStack Nova on {conf.host}'})
    except (errors.AlreadyExists, errors.PermissionDenied,
            errors.InvalidRequest) as exc:
        # It may exist already, hidden from a restricted certificate.
        raise exception_mapping.StartupError(
            f'nova-compute cannot see the LXD project {name}, and may not '
            f'create it: {exc}') from exc
    LOG.info('Created the LXD project %s', name)


def _claim_project(session: lxd.Session, name: str, project: dict[str, Any],
                   etag: str, host: str) -> None:
    """Mark a project that an operator has created as the driver's."""
    body = {'description': project.get('description', ''),
            'config': {**project['config'], KEY_HOST: host}}
    try:
        session.put('projects', name, body=body, etag=etag)
    except errors.PermissionDenied:
        LOG.warning('LXD project %s cannot be marked as used by this '
                    'nova-compute, which may not change it; ensure that no '
                    'other nova-compute uses the project', name)
        return
    LOG.info('Marked the LXD project %s as used by this nova-compute', name)


# -- storage ----------------------------------------------------------------

def check_pool(session: lxd.Session, options: Any) -> None:
    """Check that the storage pool exists and is usable.

    :param session: the connected LXD session.
    :param options: the ``[lxd]`` option group.
    :raises StartupError: if it does not exist or is not usable.
    """
    name = options.storage_pool
    try:
        pool = session.get('storage-pools', name)
    except errors.NotFound as exc:
        pools = [url.rpartition('/')[2]
                 for url in session.get('storage-pools')]
        remedy = (f'set [lxd] storage_pool to an existing one: '
                  f'{", ".join(sorted(pools))}' if pools else
                  f'create it with "{session.kind.client} storage create"')
        raise exception_mapping.StartupError(
            f'LXD has no storage pool {name}; {remedy}') from exc
    status = pool.get('status', 'Created')
    if status != 'Created':
        raise exception_mapping.StartupError(
            f'The storage pool {name} of LXD is {status.lower()}; repair it, '
            f'or set another [lxd] storage_pool')
    if pool['driver'] == 'dir':
        LOG.warning('Storage pool %s has the driver dir: the whole image is '
                    'copied for every instance, and the root disk size of '
                    'flavors is not enforced', name)


# -- CPUs and devices -------------------------------------------------------

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


# -- directories and programs -----------------------------------------------

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


# -- names ------------------------------------------------------------------

def check_name_template(template: str) -> None:
    """Check that instances get unique names that LXD accepts.

    Nova formats the template with the id of the instance, or with its fields
    if it contains ``%(field)s``.

    :param template: ``[DEFAULT] instance_name_template``.
    :raises StartupError: if it produces other names.
    """
    fields = set(re.findall(r'%\((\w*)\)', template))
    foreign = sorted(fields - _NAME_FIELDS)
    if foreign:
        raise exception_mapping.StartupError(
            f'[DEFAULT] instance_name_template is "{template}", but instance '
            f'names can contain only the fields '
            f'{", ".join(sorted(_NAME_FIELDS))}, not {", ".join(foreign)}')
    names = [_render(template, number, uuid) for number, uuid in _SAMPLES]
    for name in names:
        if len(name) > _LONGEST_NAME or not _LXD_NAME.fullmatch(name):
            raise exception_mapping.StartupError(
                f'[DEFAULT] instance_name_template is "{template}", which '
                f'produces names such as "{name}"; LXD accepts at most '
                f'{_LONGEST_NAME} letters, digits and dashes, beginning with '
                f'a letter and not ending with a dash')
    if len(set(names)) < len(names):
        raise exception_mapping.StartupError(
            f'[DEFAULT] instance_name_template is "{template}", which '
            f'produces the same name for several instances; use the default, '
            f'or uuid')


#: Sample instances: the smallest and largest id, and UUIDs that begin and end
#: with digits and letters.
_SAMPLES = (
    (1, '00000000-0000-4000-8000-000000000001'),
    (2, 'ffffffff-ffff-4fff-bfff-ffffffffffff'),
    (2 ** 31 - 1, '9a9a9a9a-9a9a-4a9a-9a9a-9a9a9a9a9a9f'),
)


def _render(template: str, number: int, uuid: str) -> str:
    """Render a name as :attr:`nova.objects.Instance.name` does."""
    try:
        return template % number
    except (TypeError, ValueError):
        pass
    # Ids of Keystone have 32 digits; those of LDAP users have 64.
    values = {'id': number, 'uuid': uuid, 'project_id': '0' * 31 + 'f',
              'user_id': '0' * 63 + 'f'}
    try:
        return template % values
    except (KeyError, TypeError, ValueError):
        return uuid


# -- uid ranges -------------------------------------------------------------

def report_uid_ranges(session: lxd.Session, options: Any) -> None:
    """Log the number of uid ranges for instances.

    :param session: the open session.
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


# -- volumes ----------------------------------------------------------------

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
