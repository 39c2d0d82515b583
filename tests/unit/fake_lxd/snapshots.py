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

"""Snapshots of instances."""

from __future__ import annotations

from typing import Any

from tests.unit.fake_lxd import errors
from tests.unit.fake_lxd import operations
from tests.unit.fake_lxd import routing
from tests.unit.fake_lxd import state


def _suffix(project: str) -> str:
    return '' if project == 'default' else f'?project={project}'


def _resources(*paths: str) -> dict[str, list[str]]:
    return {'containers': [path.replace('/instances/', '/containers/')
                           for path in paths], 'instances': list(paths)}


def _take(instance: state.Instance, name: str) -> state.Snapshot:
    return state.Snapshot(
        name, dict(instance.config),
        {key: dict(value) for key, value in instance.devices.items()},
        list(instance.profiles),
        instance.files.copy() if instance.files else None,
        ephemeral=instance.ephemeral)


def _next_name(instance: state.Instance) -> str:
    number = 0
    while f'snap{number}' in instance.snapshots:
        number += 1
    return f'snap{number}'


def copy_all(instance: state.Instance) -> dict[str, state.Snapshot]:
    return {name: state.Snapshot(
        name, dict(snapshot.config), dict(snapshot.devices),
        list(snapshot.profiles),
        snapshot.files.copy() if snapshot.files else None,
        created_at=snapshot.created_at)
        for name, snapshot in instance.snapshots.items()}


def shown(daemon, instance: state.Instance, snapshot: state.Snapshot
          ) -> dict[str, Any]:
    expanded = state.Instance(
        instance.name, instance.project, snapshot.config, snapshot.devices,
        snapshot.profiles)
    config, devices = daemon.store.expanded(expanded)
    return {'expires_at': snapshot.expires_at,
            'architecture': instance.architecture,
            'config': dict(snapshot.config),
            'created_at': snapshot.created_at,
            'devices': dict(snapshot.devices),
            'ephemeral': snapshot.ephemeral, 'expanded_config': config,
            'expanded_devices': devices,
            'last_used_at': '1970-01-01T00:00:00Z', 'name': snapshot.name,
            'profiles': list(snapshot.profiles), 'stateful': False,
            'size': 16384}


def _find(daemon, request, name: str, snapshot: str
          ) -> tuple[state.Instance, state.Snapshot]:
    instance = daemon.store.instances.get((request.project, name))
    if instance is None or snapshot not in instance.snapshots:
        raise errors.not_found(
            f'Failed to fetch snapshot "{snapshot}" of instance "{name}" in '
            f'project "{request.project}": InstanceSnapshot not found')
    return instance, instance.snapshots[snapshot]


@routing.route('GET', '/1.0/instances/{name}/snapshots')
def list_snapshots(daemon, request, name):
    with daemon.store.lock:
        instance = daemon.store.instance(request.project, name)
        if request.query.get('recursion') == '1':
            return routing.sync([shown(daemon, instance, snapshot)
                                 for snapshot in instance.snapshots.values()])
        return routing.sync([
            f'{instance.path}/snapshots/{key}{_suffix(instance.project)}'
            for key in instance.snapshots])


@routing.route('POST', '/1.0/instances/{name}/snapshots')
def create(daemon, request, name):
    body = request.json()
    with daemon.store.lock:
        instance = daemon.store.instance(request.project, name)
        snapshot = body.get('name') or _next_name(instance)
    if '/' in snapshot:
        raise errors.bad_request(
            'Invalid snapshot name: Cannot contain "/"')

    def work(operation: operations.Operation) -> None:
        refusal = f'Failed creating instance snapshot record "{snapshot}": '
        with daemon.store.lock:
            if body.get('stateful') and instance.is_running:
                raise errors.bad_request(
                    "Unable to create a stateful snapshot. CRIU isn't "
                    "installed")
            if ' ' in snapshot:
                raise errors.bad_request(
                    refusal + 'Invalid instance snapshot name: Cannot '
                              'contain space or / characters')
            if snapshot in instance.snapshots:
                raise errors.bad_request(
                    refusal + 'Add snapshot info to the database: This '
                              '"instances_snapshots" entry already exists')
            instance.snapshots[snapshot] = _take(instance, snapshot)
        daemon.events.lifecycle(
            'instance-snapshot-created', instance.project,
            f'{instance.path}/snapshots/{snapshot}')

    return daemon.operations.run(request, 'Snapshotting instance',
                                 _resources(instance.path), work)


@routing.route('GET', '/1.0/instances/{name}/snapshots/{snapshot}')
def get(daemon, request, name, snapshot):
    with daemon.store.lock:
        instance, found = _find(daemon, request, name, snapshot)
        return routing.sync(shown(daemon, instance, found),
                            etag_of=(found.expires_at,))


@routing.route('PUT', '/1.0/instances/{name}/snapshots/{snapshot}')
def update(daemon, request, name, snapshot):
    body = request.json()
    with daemon.store.lock:
        instance, found = _find(daemon, request, name, snapshot)

    def work(operation: operations.Operation) -> None:
        found.expires_at = body.get('expires_at') or found.expires_at
        daemon.events.lifecycle(
            'instance-snapshot-updated', instance.project,
            f'{instance.path}/snapshots/{snapshot}')

    return daemon.operations.run(
        request, 'Updating snapshot',
        _resources(f'/1.0/instances/{snapshot}'), work)


@routing.route('POST', '/1.0/instances/{name}/snapshots/{snapshot}')
def rename(daemon, request, name, snapshot):
    new = request.json().get('name') or ''
    with daemon.store.lock:
        instance, found = _find(daemon, request, name, snapshot)
        if new in instance.snapshots:
            raise errors.conflict(f"Name '{name}/{new}' already in use")

    def work(operation: operations.Operation) -> None:
        with daemon.store.lock:
            del instance.snapshots[snapshot]
            found.name = new
            instance.snapshots[new] = found
        daemon.events.lifecycle(
            'instance-snapshot-renamed', instance.project,
            f'{instance.path}/snapshots/{new}',
            context={'old_name': f'{name}/{snapshot}'})

    return daemon.operations.run(request, 'Renaming snapshot',
                                 _resources(instance.path), work)


@routing.route('DELETE', '/1.0/instances/{name}/snapshots/{snapshot}')
def delete(daemon, request, name, snapshot):
    with daemon.store.lock:
        instance, _found = _find(daemon, request, name, snapshot)

    def work(operation: operations.Operation) -> None:
        with daemon.store.lock:
            instance.snapshots.pop(snapshot, None)
        daemon.events.lifecycle(
            'instance-snapshot-deleted', instance.project,
            f'{instance.path}/snapshots/{snapshot}')

    return daemon.operations.run(
        request, 'Deleting snapshot',
        _resources(f'{instance.path}/{snapshot}'), work)


def restore(daemon, instance: state.Instance, name: str) -> None:
    with daemon.store.lock:
        key = name.rpartition('/')[2]
        snapshot = instance.snapshots.get(key)
        if snapshot is None:
            raise errors.bad_request(
                f'Snapshot {instance.name}/{key} does not exist')
        instance.config = dict(snapshot.config)
        instance.devices = {key: dict(value) for key, value
                            in snapshot.devices.items()}
        instance.profiles = list(snapshot.profiles)
        instance.files = snapshot.files.copy() if snapshot.files else None
    daemon.events.lifecycle('instance-restored', instance.project,
                            instance.path, context={'snapshot': key})
