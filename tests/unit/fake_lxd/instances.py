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

"""Instances: create, show, change, delete."""

from __future__ import annotations

import re
import time
from typing import Any
import uuid

from tests.unit.fake_lxd import clock
from tests.unit.fake_lxd import config_keys
from tests.unit.fake_lxd import devices
from tests.unit.fake_lxd import errors
from tests.unit.fake_lxd import idmap
from tests.unit.fake_lxd import images
from tests.unit.fake_lxd import operations
from tests.unit.fake_lxd import power
from tests.unit.fake_lxd import routing
from tests.unit.fake_lxd import snapshots
from tests.unit.fake_lxd import state

_ARCHITECTURES = ('x86_64', 'i686')

#: What a copy does not take over from its source.
_OWN = ('volatile.idmap.base', 'volatile.idmap.current',
        'volatile.idmap.next', 'volatile.last_state.power', 'volatile.uuid',
        'volatile.cloud-init.instance-id', 'volatile.apply_template')


def _resources(*paths: str) -> dict[str, list[str]]:
    return {'containers': [path.replace('/instances/', '/containers/')
                           for path in paths], 'instances': list(paths)}


def etag_of(instance: state.Instance) -> tuple[Any, ...]:
    # The description is not part of it in LXD either.
    return (instance.architecture, instance.config, instance.devices,
            instance.ephemeral, instance.profiles)


def check_name(name: str) -> None:
    if '/' in name:
        raise errors.bad_request('The character "/" is reserved for snapshots')
    text = None
    if not 1 <= len(name) <= 63:
        text = 'Name must be 1-63 characters long'
    elif name[0].isdigit():
        text = 'Name must not start with a number'
    elif name.startswith('-'):
        text = 'Name must not start with "-" character'
    elif name.endswith('-'):
        text = 'Name must not end with "-" character'
    elif not re.match(r'[A-Za-z0-9-]+$', name):
        text = 'Name can only contain alphanumeric and hyphen characters'
    if text:
        raise errors.bad_request(f'Invalid instance name: {text}')


def _strings(what: str, value: Any, struct: str) -> None:
    for item in (value or {}).values():
        if isinstance(item, dict):
            _strings(what, item, struct)
        elif not isinstance(item, str):
            kind = ('bool' if isinstance(item, bool) else
                    'number' if isinstance(item, (int, float)) else 'object')
            raise errors.bad_request(
                f'json: cannot unmarshal {kind} into Go struct field '
                f'{struct}.{what} of type string')


def _body(request: routing.Request) -> dict[str, Any]:
    body = request.json()
    struct = 'InstancesPost' if request.method == 'POST' else 'InstancePut'
    _strings('config', body.get('config'), struct)
    _strings('devices', body.get('devices'), struct)
    return body


@routing.route('POST', '/1.0/instances')
def create(daemon, request):
    body = _body(request)
    with daemon.store.lock:
        if request.project not in daemon.store.projects:
            raise errors.not_found('Failed loading project: Project not '
                                   'found')
        name = body.get('name') or _pet_name()
        check_name(name)
        source = body.get('source') or {}
        kind = source.get('type') or ''
        owner = daemon.store.project_with('profiles', request.project, '')
        profiles = body.get('profiles')
        if profiles is None and kind != 'copy':
            profiles = ['default']
        for profile in profiles or []:
            if (owner, profile) not in daemon.store.profiles:
                raise errors.internal(
                    f'Requested profile "{profile}" doesn\'t exist')
        if kind == 'image':
            prepare = _from_image(daemon, request, source)
        elif kind == 'copy':
            prepare = _from_copy(daemon, request, body, source)
        elif kind == 'none':
            def prepare(instance):
                return None
        else:
            raise errors.bad_request(f'Unknown source type {kind}')
    instance = state.Instance(
        name, request.project, {k: v for k, v in (
            body.get('config') or {}).items() if v != ''},
        {key: dict(value) for key, value
         in (body.get('devices') or {}).items()}, list(profiles or []),
        description=body.get('description') or '',
        ephemeral=bool(body.get('ephemeral')),
        architecture=body.get('architecture') or 'x86_64')
    paths = [instance.path]
    if kind == 'copy':
        paths.append('/1.0/instances/' + source['source'])

    def work(operation: operations.Operation) -> None:
        late = prepare(instance)
        _record(daemon, instance, 'copy' if kind == 'copy' else 'create')
        _config, wanted = daemon.store.expanded(instance)
        pool = (devices.root_of(wanted) or {}).get('pool', '')
        daemon.events.lifecycle(
            'instance-created', instance.project, instance.path,
            context={'storage-pool': pool, 'type': 'container'})
        if late is not None:
            try:
                late(operation)
            except errors.APIError:
                # LXD tells no one of the deletion.
                with daemon.store.lock:
                    del daemon.store.instances[instance.project,
                                               instance.name]
                raise

    return daemon.operations.run(request, 'Creating instance',
                                 _resources(*paths), work)


def _pet_name() -> str:
    return f'smiling-shark-{uuid.uuid4().hex[:4]}'


def _from_image(daemon, request, source: dict[str, Any]):
    owner = images.owner_of(daemon, request.project)
    fingerprint = source.get('fingerprint') or ''
    if source.get('alias'):
        try:
            fingerprint = daemon.store.aliases[owner, source['alias']][
                'target']
        except KeyError:
            raise errors.not_found('Image alias not found') from None
    if not fingerprint:
        raise errors.internal('Must specify one of alias, fingerprint or '
                              'properties for init from image')

    def prepare(instance: state.Instance):
        with daemon.store.lock:
            try:
                image = images.find(daemon, owner, fingerprint)
            except errors.APIError:
                raise errors.bad_request(
                    'Image not provided for instance creation') from None
            instance.architecture = image.architecture
            image.last_used_at = clock.now()
            instance.config.update(
                {f'image.{key}': value
                 for key, value in image.properties.items()})
            instance.config['volatile.base_image'] = image.fingerprint
            instance.metadata = image.metadata

        def late(operation: operations.Operation) -> None:
            if isinstance(image.rootfs, str):
                raise errors.bad_request(
                    f'Failed creating instance from image: {image.rootfs}')
            _check_quota(daemon, instance, image.unpacked,
                         'Failed creating instance from image')
            with daemon.store.lock:
                instance.files = image.rootfs.copy()
            operation.update(
                create_instance_from_image_unpack_progress='Unpack: 100% '
                                                           '(1.00GB/s)',
                progress={'percent': '100', 'speed': '1000000000',
                          'stage': 'create_instance_from_image_unpack'})

        return late

    return prepare


def _check_quota(daemon, instance: state.Instance, needed: int, doing: str
                 ) -> None:
    _config, wanted = daemon.store.expanded(instance)
    root = devices.root_of(wanted) or {}
    pool = daemon.store.pools[root['pool']]
    if not pool.has_quota:
        return
    size = root.get('size')
    limit = config_keys.size_in_bytes(size) if size else None
    stuck = (instance.too_low_quota or needed) < needed
    # What LXD fails to set stays set, and then nothing else can be set.
    if limit is not None and limit < needed:
        instance.too_low_quota = limit
        stuck = True
    if stuck:
        raise errors.bad_request(
            f'{doing}: Failed to run: btrfs '
            f'qgroup limit -e none 0/276 /var/lib/lxd/storage-pools/'
            f'{pool.name}/containers/{instance.project}_{instance.name}: '
            f'exit status 1 (ERROR: unable to limit requested quota group: '
            f'Disk quota exceeded)')


def disk_usage(instance: state.Instance) -> int:
    """Bytes in the root filesystem, or what a test says there are."""
    return instance.usage.get(
        'disk', instance.files.size if instance.files else 16384)


def _from_copy(daemon, request, body: dict[str, Any],
               source: dict[str, Any]):
    wanted = source.get('source') or ''
    if not wanted:
        raise errors.bad_request('Must specify a source instance')
    project = source.get('project') or request.project
    name, _, snapshot = wanted.partition('/')
    origin = daemon.store.instances.get((project, name))
    if origin is None or (snapshot and snapshot not in origin.snapshots):
        raise errors.not_found(
            f'Failed to fetch instance "{wanted}" in project "{project}": '
            f'Instance not found')
    given: Any = origin.snapshots[snapshot] if snapshot else origin

    def prepare(instance: state.Instance) -> None:
        with daemon.store.lock:
            instance.config = {
                **{key: value for key, value in given.config.items()
                   if key not in _OWN
                   and key not in (body.get('config') or {})
                   and not re.match(r'volatile\.[^.]+\.(host_name|hwaddr|'
                                    r'last_state\.)', key)},
                **instance.config}
            instance.devices = {
                **{key: dict(value) for key, value in given.devices.items()},
                **instance.devices}
            instance.architecture = origin.architecture
            instance.ephemeral = instance.ephemeral or given.ephemeral
            instance.files = given.files.copy() if given.files else None
            instance.metadata = origin.metadata
            if not snapshot and not source.get('instance_only'):
                instance.snapshots = snapshots.copy_all(origin)

    return prepare


def _record(daemon, instance: state.Instance, template: str) -> None:
    """Enter a new instance into the database, or refuse it."""
    store = daemon.store
    key = (instance.project, instance.name)
    try:
        with store.lock:
            _check_record(daemon, instance)
            instance.guest = state.Guest(**vars(daemon.default_guest))
            instance.console = None
            instance.logs['lxc.log'] = b''
            store.instances[key] = instance
        # Others see it already, without a uid range.
        time.sleep(daemon.record_delay)
        with store.lock:
            try:
                _initialise(daemon, instance, template)
            except errors.APIError as exc:
                del store.instances[key]
                raise errors.bad_request(
                    f'Failed initialising instance: {exc.text}') from None
    except errors.APIError as exc:
        raise errors.bad_request(
            f'Failed creating instance record: {exc.text}') from None


def _check_record(daemon, instance: state.Instance) -> None:
    config_keys.check(instance.config)
    if instance.architecture not in _ARCHITECTURES:
        raise errors.bad_request(
            "Requested architecture isn't supported by this host")
    for device in instance.devices.values():
        if device.get('type') not in devices.TYPES:
            raise errors.bad_request(
                f'Invalid device type {device.get("type", "")}')
    if (instance.project, instance.name) in daemon.store.instances:
        raise errors.bad_request('Add instance info to the database: This '
                                 '"instances" entry already exists')


def _initialise(daemon, instance: state.Instance, template: str) -> None:
    _config, wanted = daemon.store.expanded(instance)
    if not wanted:
        raise errors.bad_request(
            'Failed getting root disk: No root device could be found')
    try:
        devices.check(wanted)
    except errors.APIError as exc:
        raise errors.bad_request(f'Invalid devices: {exc.text}') from None
    root = devices.root_of(wanted) or {}
    if root.get('pool') not in daemon.store.pools:
        raise errors.bad_request(
            'Failed loading storage pool: Storage pool not found')
    devices.check_added(daemon, instance, wanted)
    instance.config.setdefault('volatile.last_state.idmap', '[]')
    instance.config.update({
        'volatile.apply_template': template,
        'volatile.cloud-init.instance-id': str(uuid.uuid4()),
        'volatile.uuid': str(uuid.uuid4())})
    config, _devices = daemon.store.expanded(instance)
    idmap.choose(daemon, instance, config)


@routing.route('PUT', '/1.0/instances/{name}')
def replace(daemon, request, name):
    body = _body(request)
    with daemon.store.lock:
        instance = daemon.store.instance(request.project, name)
        request.check_etag(*etag_of(instance))
    if body.get('restore'):
        return daemon.operations.run(
            request, 'Restoring snapshot', _resources(instance.path),
            lambda operation: snapshots.restore(daemon, instance,
                                                body['restore']))

    def work(operation: operations.Operation) -> None:
        with daemon.store.lock:
            _change(daemon, instance, dict(body.get('config') or {}),
                    dict(body.get('devices') or {}),
                    body.get('profiles') or [],
                    body.get('description') or '', replaces=True)
            instance.ephemeral = bool(body.get('ephemeral'))
        daemon.events.lifecycle('instance-updated', instance.project,
                                instance.path)

    return daemon.operations.run(request, 'Updating instance',
                                 _resources(instance.path), work)


@routing.route('PATCH', '/1.0/instances/{name}')
def patch(daemon, request, name):
    body = _body(request)
    with daemon.store.lock:
        instance = daemon.store.instance(request.project, name)
        request.check_etag(*etag_of(instance))
        profiles = body.get('profiles')
        try:
            _change(daemon, instance,
                    {**instance.config, **(body.get('config') or {})},
                    {**instance.devices, **(body.get('devices') or {})},
                    instance.profiles if profiles is None else profiles,
                    # Yes, 5.0.2 forgets it.
                    body.get('description') or '')
        except errors.APIError as exc:
            code = exc.code if exc.code == 404 else 500
            raise errors.APIError(code, exc.text) from None
    daemon.events.lifecycle('instance-updated', instance.project,
                            instance.path)
    return routing.empty()


def _change(daemon, instance: state.Instance, config: dict[str, str],
            wanted: devices.Devices, profiles: list[str], description: str,
            replaces: bool = False) -> None:
    """Change an instance; all of it or nothing."""
    config = {key: value for key, value in config.items() if value != ''}
    try:
        config_keys.check(config)
    except errors.APIError as exc:
        raise errors.bad_request(f'Invalid config: {exc.text}') from None
    if replaces and any(
            key.startswith('volatile.idmap.') or key ==
            'volatile.last_state.idmap' for key in instance.config
            if key not in config):
        raise errors.bad_request(
            "Volatile idmap keys can't be deleted by the user")
    before = (instance.config, instance.devices, instance.profiles)
    _config_before, devices_before = daemon.store.expanded(instance)
    instance.config = dict(config)
    instance.devices = {key: dict(value) for key, value in wanted.items()}
    instance.profiles = list(profiles)
    try:
        _apply(daemon, instance, devices_before, before[0])
    except (errors.APIError, KeyError) as exc:
        instance.config, instance.devices, instance.profiles = before
        if isinstance(exc, KeyError):
            raise errors.not_found('Profile not found') from None
        raise
    instance.description = description


def _apply(daemon, instance: state.Instance, before: devices.Devices,
           config_before: dict[str, str]) -> None:
    config, after = daemon.store.expanded(instance)
    try:
        devices.check(after)
    except errors.APIError as exc:
        raise errors.bad_request(f'Invalid devices: {exc.text}') from None
    old_root, root = devices.root_of(before) or {}, devices.root_of(after)
    if root and old_root and root.get('pool') != old_root.get('pool'):
        raise errors.bad_request(f'Cannot update root disk device pool name '
                                 f'to "{root.get("pool")}"')
    if root != old_root:
        _check_quota(daemon, instance, disk_usage(instance),
                     'Failed to update device "root"')
    added = {key: device for key, device in after.items()
             if before.get(key) != device}
    devices.check_added(daemon, instance, added)
    if instance.is_running:
        gone = [key for key in before if after.get(key) != before[key]]
        devices.stop(instance, gone)
        devices.start(daemon, instance, added)
        power.take_volumes(daemon, instance, added,
                           config.get('volatile.idmap.current', '[]'))
        limit = config.get('limits.memory')
        if limit and not limit.endswith('%') and (
                config_keys.size_in_bytes(limit)
                < instance.usage.get('memory', 1 << 20)):
            raise errors.bad_request(
                'setting cgroup item for the container failed')
    if any(config.get(key) != config_before.get(key) for key in (
            'security.privileged', 'security.idmap.isolated',
            'security.idmap.base', 'security.idmap.size')):
        idmap.choose(daemon, instance, config)
    if devices.nics(before) != devices.nics(after) or any(
            config.get(key) != config_before.get(key) for key in {
                *config, *config_before} if key.startswith('cloud-init.')):
        instance.config['volatile.cloud-init.instance-id'] = str(uuid.uuid4())


@routing.route('POST', '/1.0/instances/{name}')
def rename(daemon, request, name):
    new = request.json().get('name') or ''
    with daemon.store.lock:
        instance = daemon.store.instance(request.project, name)
        if (request.project, new) in daemon.store.instances:
            raise errors.conflict(f'Name "{new}" already in use')
        check_name(new)

    def work(operation: operations.Operation) -> None:
        with daemon.store.lock:
            if instance.is_running:
                raise errors.bad_request(
                    'Renaming of running container not allowed')
            daemon.store.instances[instance.project, new] = (
                daemon.store.instances.pop((instance.project, name)))
            instance.name = new
            instance.config.setdefault('volatile.apply_template', 'rename')
            instance.config['volatile.cloud-init.instance-id'] = str(
                uuid.uuid4())
        daemon.events.lifecycle('instance-renamed', instance.project,
                                instance.path, context={'old_name': name})

    return daemon.operations.run(request, 'Renaming instance',
                                 _resources(instance.path), work)


@routing.route('DELETE', '/1.0/instances/{name}')
def delete(daemon, request, name):
    with daemon.store.lock:
        instance = daemon.store.instance(request.project, name)
        if instance.is_running:
            raise errors.bad_request('Instance is running')

    def work(operation: operations.Operation) -> None:
        with daemon.store.lock:
            if instance.busy:
                raise power.busy(
                    instance, 'Failed to create instance delete operation')
            config, _devices = daemon.store.expanded(instance)
            if config.get('security.protection.delete') == 'true':
                raise errors.bad_request('Container is protected')
            if daemon.store.instances.pop(
                    (instance.project, instance.name), None) is None:
                raise errors.bad_request('Instance not found')
        daemon.events.lifecycle('instance-deleted', instance.project,
                                instance.path)

    return daemon.operations.run(request, 'Deleting instance',
                                 _resources(instance.path), work)
