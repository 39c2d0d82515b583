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

"""Checks of LXD: its API, the driver's project and the storage pool."""

from __future__ import annotations

from typing import Any

from oslo_log import log as logging

from nova_lxd_py.virt import exception_mapping
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import migration
from nova_lxd_py.virt.lxd import server_kind
from nova_lxd_py.virt.lxd import session as lxd

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


def check_single(session: lxd.Session) -> None:
    """Check that LXD is not a member of a cluster.

    :param session: the connected LXD session.
    :raises StartupError: if it is.
    """
    if session.server.get('environment', {}).get('server_clustered'):
        product = session.kind.product
        raise exception_mapping.StartupError(
            f'{product} at {session.endpoint} is a member of a cluster, which '
            f'would create instances of this host on any of its members; use '
            f'{product} without a cluster on each compute host')


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


def check_migration(session: lxd.Session, options: Any) -> None:
    """Ensure that other hosts can fetch instances from LXD.

    :param session: the connected LXD session.
    :param options: the ``[lxd]`` option group.
    :raises StartupError: if LXD does not listen where it should.
    """
    address = options.migration_address
    if not address:
        return
    try:
        listens = migration.listen(session, address)
    except ValueError as exc:
        raise exception_mapping.StartupError(
            f'[lxd] migration_address is "{address}", which is not an address '
            f'with or without a port') from exc
    except (errors.OperationFailed, errors.InvalidRequest) as exc:
        raise exception_mapping.StartupError(
            f'LXD cannot listen at [lxd] migration_address {address}: {exc}'
        ) from exc
    if not listens:
        present = session.server['config'].get('core.https_address')
        raise exception_mapping.StartupError(
            f'[lxd] migration_address is {address}, but LXD listens at '
            f'{present} (core.https_address); change one of them')
