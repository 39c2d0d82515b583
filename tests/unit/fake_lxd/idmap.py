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

"""Uid ranges of unprivileged containers."""

from __future__ import annotations

import json

from tests.unit.fake_lxd import errors
from tests.unit.fake_lxd import state

DEFAULT_SIZE = 65536


def render(base: int, size: int) -> str:
    """Write a range as LXD writes it into volatile keys."""
    if not size:
        return '[]'
    return json.dumps(
        [{'Isuid': is_uid, 'Isgid': not is_uid, 'Hostid': base, 'Nsid': 0,
          'Maprange': size} for is_uid in (True, False)],
        separators=(',', ':'))


def choose(daemon, instance: state.Instance, config: dict[str, str]) -> None:
    """Give an instance its range, in its volatile keys.

    :param config: its expanded config.
    """
    first, count = daemon.uid_range
    if config.get('security.privileged') == 'true':
        base, size, key = 0, 0, '0'
    elif config.get('security.idmap.isolated') != 'true':
        base, size, key = first, count, '0'
    else:
        size = int(config.get('security.idmap.size') or DEFAULT_SIZE)
        wanted = config.get('security.idmap.base')
        base = int(wanted) if wanted else _allocate(daemon, instance, size)
        key = str(base)
        if base + size > first + count:
            raise errors.bad_request(
                'Not enough uid/gid available for the container')
    instance.config['volatile.idmap.base'] = key
    instance.config['volatile.idmap.next'] = render(base, size)


def _allocate(daemon, instance: state.Instance, size: int) -> int:
    """Find a gap between the ranges of the other instances, LXD's way.

    An instance that is only just being made has none yet, which LXD takes
    for one from id 0 on, and then gives away ids that are not its own.
    """
    taken = []
    for other in daemon.store.instances.values():
        config, _devices = daemon.store.expanded(other)
        if (other is instance
                or config.get('security.privileged') == 'true'
                or config.get('security.idmap.isolated') != 'true'):
            continue
        taken.append((int(config.get('volatile.idmap.base') or 0),
                      int(config.get('security.idmap.size')
                          or DEFAULT_SIZE)))
    taken.sort()
    offset = daemon.uid_range[0] + DEFAULT_SIZE
    if not taken or taken[0][0] >= offset + size:
        return offset
    for (base, length), following in zip(taken, [*taken[1:], None]):
        offset = base + length
        if following is not None and offset + size <= following[0]:
            break
    return offset
