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

"""How instances come into being."""

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
from tests.unit.fake_lxd import instance_rules
from tests.unit.fake_lxd import operations
from tests.unit.fake_lxd import routing
from tests.unit.fake_lxd import snapshots
from tests.unit.fake_lxd import state

_ARCHITECTURES = ('x86_64', 'i686')

#: What a copy does not take over from its source.
_OWN = ('volatile.idmap.base', 'volatile.idmap.current',
        'volatile.idmap.next', 'volatile.last_state.power', 'volatile.uuid',
        'volatile.cloud-init.instance-id', 'volatile.apply_template')


@routing.route('POST', '/1.0/instances')
def create(daemon, request):
    body = instance_rules.body_of(request)
    with daemon.store.lock:
        if request.project not in daemon.store.projects:
            raise errors.not_found('Failed loading project: Project not '
                                   'found')
        name = body.get('name') or _pet_name()
        instance_rules.check_name(name)
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
                                 instance_rules.resources(*paths), work)


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
            instance_rules.check_quota(
                daemon, instance, image.unpacked,
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
