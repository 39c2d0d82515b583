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

"""What creating and changing instances have in common."""

from __future__ import annotations

import re
from typing import Any

from tests.unit.fake_lxd import config_keys
from tests.unit.fake_lxd import devices
from tests.unit.fake_lxd import errors
from tests.unit.fake_lxd import routing
from tests.unit.fake_lxd import state


def resources(*paths: str) -> dict[str, list[str]]:
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


def body_of(request: routing.Request) -> dict[str, Any]:
    body = request.json()
    struct = 'InstancesPost' if request.method == 'POST' else 'InstancePut'
    _strings('config', body.get('config'), struct)
    _strings('devices', body.get('devices'), struct)
    return body


def check_quota(daemon, instance: state.Instance, needed: int, doing: str
                ) -> None:
    """Set the quota of the root disk, as far as it can be.

    :param needed: bytes in it.
    :param doing: what LXD says that it was doing when it cannot.
    """
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
