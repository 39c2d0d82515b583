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

"""Custom volumes that come as backups."""

from __future__ import annotations

from typing import Any

import yaml

from tests.unit.fake_lxd import errors
from tests.unit.fake_lxd import image_content
from tests.unit.fake_lxd import operations
from tests.unit.fake_lxd import routing
from tests.unit.fake_lxd import state
from tests.unit.fake_lxd import tree


def restore(daemon, request: routing.Request, owner: str, pool: str
            ) -> routing.Response:
    """Make a volume of an uploaded backup.

    :param owner: the project that gets it.
    """
    if pool not in daemon.store.pools:
        raise errors.internal('Storage pool not found: Storage pool not '
                              'found')
    volume = _volume(_unpack(request.body), pool)
    volume.name = request.headers.get('x-lxd-name') or volume.name

    def work(operation: operations.Operation) -> None:
        refusal = (f'Create custom volume from backup: Error inserting '
                   f'volume "{volume.name}" for project "{owner}" in pool '
                   f'"{pool}" of type "custom" into database ')
        key = (owner, pool, volume.name)
        with daemon.store.lock:
            if '/' in volume.name:
                raise errors.bad_request(
                    refusal + '"Volume name may not be a snapshot"')
            if key in daemon.store.volumes:
                raise errors.bad_request(
                    refusal + '"UNIQUE constraint failed: '
                    + ', '.join(f'storage_volumes.{column}' for column in (
                        'storage_pool_id', 'node_id', 'project_id', 'name',
                        'type')) + '"')
            daemon.store.volumes[key] = volume
        daemon.events.lifecycle(
            'storage-volume-created', owner,
            f'/1.0/storage-pools/{pool}/volumes/custom/{owner}_{volume.name}',
            context={'type': 'custom'})

    return daemon.operations.run(
        request, 'Restoring custom volume backup',
        {'storage_volumes': [f'/1.0/storage_volumes/{volume.name}']}, work)


def _unpack(content: bytes) -> tree.Tree:
    try:
        image_content.extension(content)
        return tree.from_tar(content, 'backup/')
    except errors.APIError as exc:
        raise errors.internal(exc.text) from None
    except image_content.DAMAGE as exc:
        raise errors.internal('unexpected EOF') from exc


def _volume(files: tree.Tree, pool: str) -> state.Volume:
    index: dict[str, Any] = yaml.safe_load(
        files.read('/index.yaml') or b'') or {}
    if not index:
        raise errors.internal('Backup is missing at "backup/index.yaml"')
    given = index['config']['volume']
    return state.Volume(
        given['name'], pool, dict(given.get('config') or {}),
        given.get('description') or '',
        given.get('content_type') or 'filesystem',
        {path.removeprefix('/volume/'): (
            node.content if node.kind == 'file' else None, node.mode)
         for path, node in files.items()
         if path.startswith('/volume/')})
