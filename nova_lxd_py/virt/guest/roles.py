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

"""Purposes of the driver's LXD instances, and their names.

A server has an LXD instance of its own, and others while it is rescued,
resized or being made an image of.
"""

from __future__ import annotations

from typing import Any

#: A server's own LXD instance.
SERVER = 'server'
#: Runs instead of a server's own one while the server is rescued.
RESCUE = 'rescue'
#: A copy of a server that an image is being made of.
SNAPSHOT = 'snapshot'
#: A copy of a server that shows whether its root disk fits a smaller quota.
PROBE = 'probe'
#: An instance that others are cloned from, or that holds a uid range.
TEMPLATE = 'template'
#: An instance through which LXD unpacks an image to a volume.
UNPACKED = 'unpacked'
#: A server that is coming from another host, until Nova finishes the
#: migration here.
INCOMING = 'incoming'
#: A server that has gone to another host, until Nova confirms or reverts that.
MOVED = 'moved'

_SUFFIXES = {SERVER: '', INCOMING: '', MOVED: '', RESCUE: '-rescue',
             SNAPSHOT: '-snapshot', PROBE: '-probe', UNPACKED: '-unpacked'}

#: LXD instances besides a server's own, with names of their own.
AUXILIARY = frozenset(role for role in _SUFFIXES if _SUFFIXES[role])

#: The longest addition to the name of an instance.
LONGEST_SUFFIX = max(_SUFFIXES.values(), key=len)


def lxd_name(instance: Any, role: str = SERVER) -> str:
    """Return the name of a server's LXD instance with one of the roles.

    :param instance: the :class:`nova.objects.Instance`.
    :param role: the role; not TEMPLATE, which no server has.
    """
    return instance.name + _SUFFIXES[role]


def lxd_names(instance: Any) -> list[str]:
    """Return the names of all LXD instances that a server may have.

    :param instance: the :class:`nova.objects.Instance`.
    :returns: names, that of its own one first.
    """
    return [instance.name + end for end in dict.fromkeys(_SUFFIXES.values())]
