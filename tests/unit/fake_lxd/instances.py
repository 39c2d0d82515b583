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

"""Instances: change, rename, delete."""

from __future__ import annotations

import uuid

from tests.unit.fake_lxd import config_keys
from tests.unit.fake_lxd import devices
from tests.unit.fake_lxd import errors
from tests.unit.fake_lxd import idmap
from tests.unit.fake_lxd import instance_rules
from tests.unit.fake_lxd import operations
from tests.unit.fake_lxd import power
from tests.unit.fake_lxd import routing
from tests.unit.fake_lxd import snapshots
from tests.unit.fake_lxd import state


@routing.route('PUT', '/1.0/instances/{name}')
def replace(daemon, request, name):
    body = instance_rules.body_of(request)
    with daemon.store.lock:
        instance = daemon.store.instance(request.project, name)
        request.check_etag(*instance_rules.etag_of(instance))
    if body.get('restore'):
        return daemon.operations.run(
            request, 'Restoring snapshot',
            instance_rules.resources(instance.path),
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
                                 instance_rules.resources(instance.path), work)


@routing.route('PATCH', '/1.0/instances/{name}')
def patch(daemon, request, name):
    body = instance_rules.body_of(request)
    with daemon.store.lock:
        instance = daemon.store.instance(request.project, name)
        request.check_etag(*instance_rules.etag_of(instance))
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
        instance_rules.check_quota(
            daemon, instance, instance_rules.disk_usage(instance),
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
        instance_rules.check_name(new)

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
                                 instance_rules.resources(instance.path), work)


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
                                 instance_rules.resources(instance.path), work)
