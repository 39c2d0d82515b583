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

"""What must be right before nova-compute takes servers.

Each thing that is wrong stops the service with one sentence that says what,
and what to do about it, instead of failing the first server that meets it.
Nothing is changed on the host but the driver's own LXD project and Nova's
instances folder.
"""

from __future__ import annotations

import os
import re
import shlex
import time
from typing import Any

from nova import exception
from oslo_log import log as logging

from nova_lxd_py.virt import exception_mapping
from nova_lxd_py.virt.host import cpus
from nova_lxd_py.virt.host import passthrough
from nova_lxd_py.virt.host import subordinate_ids
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import session as lxd
from nova_lxd_py.virt.metadata import config_drive_device

LOG = logging.getLogger(__name__)

#: API extensions that the driver cannot do without. Each is in LXD 5.0.2 and
#: in Incus 6.
REQUIRED_EXTENSIONS: tuple[str, ...] = (
    'console',                      # console log
    'container_incremental_copy',   # cold migration
    'custom_volume_backup',         # config drives
    'etag',                         # changes that collide
    'event_lifecycle',              # power states
    'id_map',                       # uid ranges
    'id_map_base',
    'image_create_aliases',         # image cache
    'instances',
    'projects',
    'resources',                    # inventory
    'storage',
)

#: Marks an LXD project as that of one nova-compute.
KEY_HOST = 'user.nova.host'

#: What the driver's project must have of its own, so that clearing away
#: images and volumes cannot touch another project's.
PROJECT_FEATURES = {'features.images': 'true', 'features.profiles': 'true',
                    'features.storage.volumes': 'true'}

#: Seconds between attempts while LXD is still coming up.
RETRY_DELAY = 1.0

#: Names that LXD takes for instances: those of a host in DNS.
_LXD_NAME = re.compile(r'[A-Za-z](?:[A-Za-z0-9-]*[A-Za-z0-9])?')
#: LXD takes 63 characters; a rescue instance is named with 7 more.
_LONGEST_NAME = 63 - len('-rescue')
#: Fields of a server that say nothing a tenant chose.
_NAME_FIELDS = frozenset({'id', 'uuid', 'project_id', 'user_id'})


def check(session: lxd.Session, conf: Any) -> None:
    """Check everything, and connect to LXD on the way.

    See :meth:`nova.virt.driver.ComputeDriver.init_host`.

    :param session: the way to LXD; it need not answer yet.
    :param conf: the configuration, normally ``nova.conf.CONF``.
    :raises StartupError: saying what is wrong and what to do.
    """
    check_name_template(conf.instance_name_template)
    check_instances_path(conf.instances_path)
    check_console_command(conf.lxd.serial_console_command)
    check_config_drives(session, conf.lxd)
    connect(session, conf.lxd.startup_timeout)
    try:
        check_extensions(session, conf.lxd)
        check_project(session, conf)
        check_pool(session, conf.lxd)
        check_cpus(session, conf)
        check_devices(session, conf.lxd)
    except errors.PermissionDenied as exc:
        raise exception_mapping.StartupError(
            f'LXD at {session.endpoint} keeps from nova-compute what it '
            f'needs: {exc}') from exc
    except errors.LXDError as exc:
        raise exception_mapping.StartupError(
            f'LXD at {session.endpoint} cannot be used: {exc}') from exc
    report_uid_ranges(session, conf.lxd)


# -- connection -------------------------------------------------------------

def connect(session: lxd.Session, timeout: float) -> None:
    """Open the session, with patience for an LXD that is coming up.

    :param session: the way to LXD.
    :param timeout: seconds to wait for an LXD that does not answer.
    :raises StartupError: saying what is wrong and what to do.
    """
    deadline = time.monotonic() + timeout
    waiting = False
    while True:
        try:
            session.connect()
            return
        except (errors.Unreachable, errors.DeadlineExceeded) as exc:
            if time.monotonic() >= deadline:
                waited = (f' (after {timeout:.0f} seconds, [lxd] '
                          f'startup_timeout)' if timeout else '')
                raise exception_mapping.StartupError(
                    f'{exc}{waited}') from exc
            if not waiting:
                LOG.info('Waiting up to %d seconds for LXD: %s', timeout, exc)
                waiting = True
            time.sleep(min(RETRY_DELAY,
                           max(0.0, deadline - time.monotonic())))
        except errors.LXDError as exc:
            raise exception_mapping.StartupError(
                str(exc)) from exc


def check_extensions(session: lxd.Session, options: Any) -> None:
    """See that LXD can do what the driver asks of it.

    :param session: the open session.
    :param options: the ``[lxd]`` option group.
    :raises StartupError: naming what is missing.
    """
    required = REQUIRED_EXTENSIONS
    if options.cloud_init_keys:
        required = (*required, 'cloud_init')
    missing = [name for name in required if not session.has_extension(name)]
    if missing:
        version = session.server.get('environment', {}).get(
            'server_version', 'of an unknown version')
        raise exception_mapping.StartupError(
            f'LXD {version} lacks the API extension {", ".join(missing)}, '
            f'which the driver needs; install LXD 5.0.2 or later, or Incus 6')


# -- project ----------------------------------------------------------------

def check_project(session: lxd.Session, conf: Any) -> None:
    """See that the driver has a project of its own; create it if it may.

    :param session: the open session.
    :param conf: the configuration, normally ``nova.conf.CONF``.
    :raises StartupError: saying what is wrong and what to do.
    """
    name = conf.lxd.project
    if name == 'default':
        raise exception_mapping.StartupError(
            f'[lxd] project is "{name}", where instances of the operator '
            'live; give the driver a project of its own')
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
            f'The LXD project {name} belongs to the nova-compute of host '
            f'{owner}, and this is {conf.host}; give each its own [lxd] '
            f'project, or, if the host was renamed, run "lxc project set '
            f'{name} {KEY_HOST}={conf.host}"')
    _claim_project(session, name, project, etag, conf.host)


def _create_project(session: lxd.Session, conf: Any, name: str) -> None:
    if not conf.lxd.create_project:
        raise exception_mapping.StartupError(
            f'There is no LXD project {name}, and [lxd] create_project is '
            f'off; create it, or switch that on')
    config = {**PROJECT_FEATURES, KEY_HOST: conf.host}
    if session.has_extension('projects_networks'):
        # Servers have no networks of LXD's.
        config['features.networks'] = 'false'
    try:
        session.post('projects', body={
            'name': name, 'config': config,
            'description': f'Servers of OpenStack Nova on {conf.host}'})
    except (errors.AlreadyExists, errors.PermissionDenied,
            errors.InvalidRequest) as exc:
        # It may exist already, hidden from a restricted certificate.
        raise exception_mapping.StartupError(
            f'nova-compute sees no LXD project {name} and may not create it: '
            f'{exc}') from exc
    LOG.info('Created the LXD project %s', name)


def _claim_project(session: lxd.Session, name: str, project: dict[str, Any],
                   etag: str, host: str) -> None:
    """Take over a project that an operator made for the driver."""
    body = {'description': project.get('description', ''),
            'config': {**project['config'], KEY_HOST: host}}
    try:
        session.put('projects', name, body=body, etag=etag)
    except errors.PermissionDenied:
        LOG.warning('nova-compute may not mark the LXD project %s as its own; '
                    'see to it that no other nova-compute uses it', name)
        return
    LOG.info('Took over the LXD project %s', name)


# -- storage ----------------------------------------------------------------

def check_pool(session: lxd.Session, options: Any) -> None:
    """See that the storage pool is there and in order.

    :param session: the open session.
    :param options: the ``[lxd]`` option group.
    :raises StartupError: saying what is wrong and what to do.
    """
    name = options.storage_pool
    try:
        pool = session.get('storage-pools', name)
    except errors.NotFound as exc:
        pools = [url.rpartition('/')[2]
                 for url in session.get('storage-pools')]
        remedy = (f'set [lxd] storage_pool to one that exists: '
                  f'{", ".join(sorted(pools))}' if pools else
                  'create it with "lxc storage create"')
        raise exception_mapping.StartupError(
            f'LXD has no storage pool {name}; {remedy}') from exc
    status = pool.get('status', 'Created')
    if status != 'Created':
        raise exception_mapping.StartupError(
            f'The storage pool {name} of LXD is {status.lower()}; repair it, '
            f'or set another [lxd] storage_pool')
    if pool['driver'] == 'dir':
        LOG.warning('The storage pool %s is of type dir: it copies the whole '
                    'image for every server, and the root disk size of '
                    'flavors is not enforced', name)


# -- CPUs and devices -------------------------------------------------------

def check_cpus(session: lxd.Session, conf: Any) -> None:
    """See that the CPUs that the operator sets aside are there.

    :param session: the open session.
    :param conf: the configuration, normally ``nova.conf.CONF``.
    :raises StartupError: saying what is wrong and what to do.
    """
    if conf.vcpu_pin_set:
        raise exception_mapping.StartupError(
            '[DEFAULT] vcpu_pin_set is set, which this driver does not know; '
            'use [compute] cpu_shared_set and cpu_dedicated_set instead')
    try:
        sets = cpus.configured()
    except exception.Invalid as exc:
        raise exception_mapping.StartupError(
            f'[compute] cpu_shared_set or cpu_dedicated_set cannot be read: '
            f'{exc.format_message()}') from exc
    if sets.shared is None:
        return
    if conf.reserved_host_cpus:
        raise exception_mapping.StartupError(
            '[DEFAULT] reserved_host_cpus is set as well as [compute] '
            'cpu_shared_set or cpu_dedicated_set; leave the CPUs that the '
            'host is to keep out of these, and unset reserved_host_cpus')
    common = sets.shared & sets.dedicated
    if common:
        raise exception_mapping.StartupError(
            f'CPU {cpus.listed(common)} is both in [compute] cpu_shared_set '
            f'and in cpu_dedicated_set; take it out of one of them')
    present = {each.number for each in cpus.processors(
        session.get('resources')['cpu'])}
    for option, numbers in (('cpu_shared_set', sets.shared),
                            ('cpu_dedicated_set', sets.dedicated)):
        missing = numbers - present
        if missing:
            raise exception_mapping.StartupError(
                f'[compute] {option} has CPU {cpus.listed(missing)}, which '
                f'the host does not have or which is offline; it has '
                f'{cpus.listed(present) or "none that LXD can tell apart"}')


def check_devices(session: lxd.Session, options: Any) -> None:
    """See that the devices that may be given to servers are named rightly.

    :param session: the open session.
    :param options: the ``[lxd]`` option group.
    :raises StartupError: saying what is wrong and what to do.
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
            LOG.warning('The host has no %(kind)s %(ids)s, which [lxd] '
                        'passthrough_devices lists; servers of flavors with '
                        'it cannot start', {'kind': kind, 'ids': ids})


# -- folders ----------------------------------------------------------------

def check_instances_path(path: str) -> None:
    """See that Nova's folder for what it keeps of instances is there.

    :param path: ``[DEFAULT] instances_path``.
    :raises StartupError: it is not, and cannot be made.
    """
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as exc:
        raise exception_mapping.StartupError(
            f'[DEFAULT] instances_path is {path}, which nova-compute cannot '
            f'create: {exc.strerror}') from exc


def check_console_command(command: str) -> None:
    """See that what serial consoles are to run can be told apart into words.

    :param command: ``[lxd] serial_console_command``.
    :raises StartupError: it cannot.
    """
    try:
        words = shlex.split(command)
    except ValueError as exc:
        raise exception_mapping.StartupError(
            f'[lxd] serial_console_command is "{command}", whose quoting is '
            f'wrong: {exc}') from exc
    if not words:
        raise exception_mapping.StartupError(
            '[lxd] serial_console_command is empty; name a program in the '
            'guest such as "login"')


def check_config_drives(session: lxd.Session, options: Any) -> None:
    """See that config drives can be what they are to be.

    :param session: the way to LXD; it need not answer.
    :param options: the ``[lxd]`` option group.
    :raises StartupError: they cannot.
    """
    if not options.config_drive_device:
        return
    reason = config_drive_device.missing_requirement(session.is_local)
    if reason:
        raise exception_mapping.StartupError(
            f'[lxd] config_drive_device is on, but {reason}')


# -- names ------------------------------------------------------------------

def check_name_template(template: str) -> None:
    """See that every server gets a name of its own that LXD takes.

    Nova fills the template with the server's number, or with its fields where
    it has ``%(field)s``.

    :param template: ``[DEFAULT] instance_name_template``.
    :raises StartupError: saying what is wrong with it.
    """
    fields = set(re.findall(r'%\((\w*)\)', template))
    foreign = sorted(fields - _NAME_FIELDS)
    if foreign:
        raise exception_mapping.StartupError(
            f'[DEFAULT] instance_name_template is "{template}", but names in '
            f'LXD can be made only of {", ".join(sorted(_NAME_FIELDS))}, not '
            f'of {", ".join(foreign)}')
    names = [_render(template, number, uuid) for number, uuid in _SAMPLES]
    for name in names:
        if len(name) > _LONGEST_NAME or not _LXD_NAME.fullmatch(name):
            raise exception_mapping.StartupError(
                f'[DEFAULT] instance_name_template is "{template}", which '
                f'makes names such as "{name}"; LXD takes at most '
                f'{_LONGEST_NAME} letters, digits and dashes, with a letter '
                f'in front and no dash at the end')
    if len(set(names)) < len(names):
        raise exception_mapping.StartupError(
            f'[DEFAULT] instance_name_template is "{template}", which gives '
            f'several servers the same name; use the default, or uuid')


#: Servers at the ends of what there can be: the smallest and largest number,
#: identifiers that begin and end with digits and letters.
_SAMPLES = (
    (1, '00000000-0000-4000-8000-000000000001'),
    (2, 'ffffffff-ffff-4fff-bfff-ffffffffffff'),
    (2 ** 31 - 1, '9a9a9a9a-9a9a-4a9a-9a9a-9a9a9a9a9a9f'),
)


def _render(template: str, number: int, uuid: str) -> str:
    """Make a name as :attr:`nova.objects.Instance.name` does."""
    try:
        return template % number
    except (TypeError, ValueError):
        pass
    # Keystone's own ids have 32 digits; those of LDAP users have 64.
    values = {'id': number, 'uuid': uuid, 'project_id': '0' * 31 + 'f',
              'user_id': '0' * 63 + 'f'}
    try:
        return template % values
    except (KeyError, TypeError, ValueError):
        return uuid


# -- uid ranges -------------------------------------------------------------

def report_uid_ranges(session: lxd.Session, options: Any) -> None:
    """Log how many servers can have a uid range of their own.

    :param session: the open session.
    :param options: the ``[lxd]`` option group.
    """
    if options.idmap_isolation == 'off':
        LOG.info('Servers share one range of user ids, as [lxd] '
                 'idmap_isolation says')
        return
    if not session.is_local:
        return
    ranges = subordinate_ids.capacity(session.endpoint)
    if ranges < 1:
        LOG.warning(
            'Root has fewer than %d subordinate ids in /etc/subuid or '
            '/etc/subgid, so servers cannot have ranges of user ids of their '
            'own and are less apart from each other. Extend both files and '
            'restart LXD, or set [lxd] idmap_isolation to off.',
            2 * subordinate_ids.RANGE)
        return
    LOG.info('The host has room for %d ranges of user ids for servers; extend '
             '/etc/subuid and /etc/subgid for more', ranges)
