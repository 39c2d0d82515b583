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

"""Storage pools and custom volumes."""

from __future__ import annotations

from typing import Any

from tests.unit.fake_lxd import clock
from tests.unit.fake_lxd import config_keys
from tests.unit.fake_lxd import errors
from tests.unit.fake_lxd import routing
from tests.unit.fake_lxd import state
from tests.unit.fake_lxd import storage_backups

_VOLUME_KEYS = frozenset("""
    block.filesystem block.mount_options
    size security.shifted security.unmapped snapshots.expiry
    snapshots.pattern snapshots.schedule volatile.idmap.last
    volatile.idmap.next
    """.split())


def _suffix(project: str) -> str:
    return '' if project == 'default' else f'?project={project}'


def _pool_shown(daemon, pool: state.Pool) -> dict[str, Any]:
    used = [f'/1.0/profiles/{name}{_suffix(owner)}'
            for (owner, name), profile in daemon.store.profiles.items()
            if any(device.get('pool') == pool.name
                   for device in profile.devices.values())]
    return {'config': dict(pool.config), 'description': pool.description,
            'name': pool.name, 'driver': pool.driver, 'used_by': used,
            'status': pool.status, 'locations': ['none']}


@routing.route('GET', '/1.0/storage-pools')
def list_pools(daemon, request):
    with daemon.store.lock:
        pools = list(daemon.store.pools.values())
        if request.query.get('recursion') == '1':
            return routing.sync([_pool_shown(daemon, pool) for pool in pools])
        return routing.sync([f'/1.0/storage-pools/{pool.name}'
                             for pool in pools])


@routing.route('POST', '/1.0/storage-pools')
def create_pool(daemon, request):
    body = request.json()
    name = body.get('name') or ''
    if not name:
        raise errors.bad_request('No name provided')
    with daemon.store.lock:
        if name in daemon.store.pools:
            raise errors.conflict('The storage pool already exists: The '
                                  'record already exists')
        daemon.store.pools[name] = state.Pool(
            name, body.get('driver') or 'dir', dict(body.get('config') or {}),
            body.get('description') or '')
    daemon.events.lifecycle('storage-pool-created', 'default',
                            f'/1.0/storage-pools/{name}', by_api=True)
    return routing.created(f'/1.0/storage-pools/{name}')


@routing.route('GET', '/1.0/storage-pools/{name}')
def get_pool(daemon, request, name):
    with daemon.store.lock:
        return routing.sync(_pool_shown(daemon, daemon.store.pool(name)))


@routing.route('GET', '/1.0/storage-pools/{name}/resources')
def pool_resources(daemon, request, name):
    with daemon.store.lock:
        try:
            pool = daemon.store.pool(name)
        except errors.APIError as exc:
            raise errors.internal(exc.text) from None
        return routing.sync({
            'space': {'used': pool.used, 'total': pool.total},
            'inodes': {'used': 0, 'total': 0}})


def _owner(daemon, request) -> str:
    return daemon.store.project_with('storage.volumes', request.project,
                                     'Project not found')


def _find(daemon, request, pool: str, name: str) -> tuple[str, state.Volume]:
    owner = _owner(daemon, request)
    daemon.store.pool(pool)
    try:
        return owner, daemon.store.volumes[owner, pool, name]
    except KeyError:
        raise errors.not_found('Storage pool volume not found') from None


def users(daemon, owner: str, volume: state.Volume) -> list[state.Instance]:
    """Instances that have a volume among their devices."""
    found = []
    for instance in daemon.store.instances.values():
        if daemon.store.project_with('storage.volumes', instance.project,
                                     '') != owner:
            continue
        _config, devices = daemon.store.expanded(instance)
        if any(device.get('type') == 'disk'
               and device.get('pool') == volume.pool
               and device.get('source') == volume.name
               for device in devices.values()):
            found.append(instance)
    return found


def _shown(daemon, owner: str, volume: state.Volume) -> dict[str, Any]:
    return {'config': dict(volume.config), 'description': volume.description,
            'name': volume.name, 'type': 'custom',
            'used_by': [instance.path + _suffix(instance.project)
                        for instance in users(daemon, owner, volume)],
            'location': 'none', 'content_type': volume.content_type,
            'project': owner, 'created_at': clock.ZERO}


def _check(owner: str, name: str, pool: state.Pool, config: dict[str, str]
           ) -> None:
    for key, value in sorted(config.items()):
        known = key in _VOLUME_KEYS and (
            pool.has_block_devices or not key.startswith('block.'))
        if not known and not key.startswith('user.'):
            raise errors.internal(
                f'Invalid option for volume "{owner}_{name}" option "{key}"')
        if key == 'size' and value:
            try:
                config_keys.size_in_bytes(value)
            except errors.APIError as exc:
                raise errors.internal(
                    f'Invalid value for volume "{owner}_{name}" option '
                    f'"size": {exc.text}') from None


def _event(daemon, action: str, owner: str, pool: str, name: str,
           **context: str) -> None:
    daemon.events.lifecycle(
        f'storage-volume-{action}', owner,
        f'/1.0/storage-pools/{pool}/volumes/custom/{owner}_{name}',
        context=context, by_api=True)


@routing.route('GET', '/1.0/storage-pools/{pool}/volumes')
def list_all_volumes(daemon, request, pool):
    return list_volumes(daemon, request, pool)


@routing.route('GET', '/1.0/storage-pools/{pool}/volumes/custom')
def list_volumes(daemon, request, pool):
    with daemon.store.lock:
        owner = _owner(daemon, request)
        daemon.store.pool(pool)
        volumes = [volume for key, volume in sorted(
            daemon.store.volumes.items()) if key[:2] == (owner, pool)]
        if request.query.get('recursion') == '1':
            return routing.sync([_shown(daemon, owner, volume)
                                 for volume in volumes])
        return routing.sync([
            f'/1.0/storage-pools/{pool}/volumes/custom/{volume.name}'
            f'{_suffix(owner)}' for volume in volumes])


@routing.route('POST', '/1.0/storage-pools/{pool}/volumes')
def create_volume_of_type(daemon, request, pool):
    if request.json().get('type') != 'custom':
        raise errors.bad_request('Currently not allowed to create storage '
                                 'volumes of type')
    return create_volume(daemon, request, pool)


@routing.route('POST', '/1.0/storage-pools/{pool}/volumes/custom')
def create_volume(daemon, request, pool):
    if request.headers.get('content-type') == 'application/octet-stream':
        with daemon.store.lock:
            owner = _owner(daemon, request)
        return storage_backups.restore(daemon, request, owner, pool)
    body = request.json()
    name = body.get('name') or ''
    with daemon.store.lock:
        if not name:
            raise errors.bad_request('No name provided')
        if '/' in name:
            raise errors.bad_request(
                'Storage volume names may not contain slashes')
        owner = _owner(daemon, request)
        found = daemon.store.pool(pool)
        if (owner, pool, name) in daemon.store.volumes:
            raise errors.conflict('Volume by that name already exists')
        config = dict(body.get('config') or {})
        _check(owner, name, found, config)
        daemon.store.volumes[owner, pool, name] = state.Volume(
            name, pool, config, body.get('description') or '',
            body.get('content_type') or 'filesystem')
    _event(daemon, 'created', owner, pool, name, type='custom')
    return routing.empty()


@routing.route('GET', '/1.0/storage-pools/{pool}/volumes/custom/{name}')
def get_volume(daemon, request, pool, name):
    with daemon.store.lock:
        owner, volume = _find(daemon, request, pool, name)
        return routing.sync(_shown(daemon, owner, volume),
                            etag_of=(name, 'custom', volume.config))


@routing.route('GET', '/1.0/storage-pools/{pool}/volumes/custom/{name}/state')
def get_volume_state(daemon, request, pool, name):
    with daemon.store.lock:
        _owner_, volume = _find(daemon, request, pool, name)
        usage: dict[str, int] = {}
        if daemon.store.pool(pool).has_quota and volume.config.get('size'):
            usage['total'] = config_keys.size_in_bytes(volume.config['size'])
        return routing.sync({'usage': usage or None})


def _update(daemon, request, pool, name):
    body = request.json()
    with daemon.store.lock:
        owner, volume = _find(daemon, request, pool, name)
        request.check_etag(name, 'custom', volume.config)
        config = dict(body.get('config') or {})
        if request.method == 'PATCH':
            config = {**volume.config, **config}
        _check(owner, name, daemon.store.pool(pool), config)
        volume.config = {key: value for key, value in config.items() if value}
        if request.method == 'PUT' or 'description' in body:
            volume.description = body.get('description') or ''
    _event(daemon, 'updated', owner, pool, name)
    return routing.empty()


routing.route('PUT', '/1.0/storage-pools/{pool}/volumes/custom/{name}')(
    _update)
routing.route('PATCH', '/1.0/storage-pools/{pool}/volumes/custom/{name}')(
    _update)


@routing.route('POST', '/1.0/storage-pools/{pool}/volumes/custom/{name}')
def rename_volume(daemon, request, pool, name):
    new = request.json().get('name') or ''
    with daemon.store.lock:
        owner, volume = _find(daemon, request, pool, name)
        if not new:
            raise errors.bad_request('No name provided')
        if (owner, pool, new) in daemon.store.volumes:
            raise errors.conflict('Volume by that name already exists')
        if any(user.is_running for user in users(daemon, owner, volume)):
            raise errors.internal('Volume is still in use by running '
                                  'instances')
        for user in users(daemon, owner, volume):
            for device in user.devices.values():
                if (device.get('pool'), device.get('source')) == (pool, name):
                    device['source'] = new
        del daemon.store.volumes[owner, pool, name]
        volume.name = new
        daemon.store.volumes[owner, pool, new] = volume
    _event(daemon, 'renamed', owner, pool, new, old_name=name)
    return routing.created(
        f'/1.0/storage-pools/{pool}/volumes/custom/{new}')


@routing.route('DELETE', '/1.0/storage-pools/{pool}/volumes/custom/{name}')
def delete_volume(daemon, request, pool, name):
    with daemon.store.lock:
        owner, volume = _find(daemon, request, pool, name)
        if users(daemon, owner, volume):
            raise errors.bad_request('The storage volume is still in use')
        del daemon.store.volumes[owner, pool, name]
    _event(daemon, 'deleted', owner, pool, name)
    return routing.empty()


@routing.route('DELETE', '/1.0/storage-pools/{pool}/volumes/container/{name}')
def delete_instance_volume(daemon, request, pool, name):
    if (request.project, name) not in daemon.store.instances:
        raise errors.not_found('Storage pool volume not found')
    raise errors.bad_request('Storage volumes of type "container" cannot be '
                             'deleted with the storage API')
