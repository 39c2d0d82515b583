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

"""What a compute host has, to compare before and after."""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import hashlib
import os
import pathlib
from typing import Any

from nova_lxd_py.virt.guest import guest
from nova_lxd_py.virt.guest import roles
from nova_lxd_py.virt.image import cache
from nova_lxd_py.virt.image import placeholder
from tests.fixtures import cloud

Census = Mapping[str, frozenset[str]]

LISTENER = 'listening port of nova-compute'

_PREFIX = f'{cloud.PREFIX}/'
#: Listening sockets in /proc/net/tcp.
_LISTEN = '0A'


def take(host: cloud.Host, placement: Any) -> Census:
    """List what a host has.

    :param host: looks at LXD and Open vSwitch.
    :param placement: an administrator's client of Placement.
    :returns: names, by kind.
    """
    return {kind: frozenset(names) for kind, names in {
        'LXD instance': (
            found['name'] for found in host.instances()
            # Those age out with the image of which they are copies.
            if found['config'].get(guest.KEY_ROLE) != roles.TEMPLATE),
        'LXD volume': (name for name in host.volumes()
                       if name.startswith('custom/')),
        'LXD image': _images(host),
        'loop device': _loops(),
        'device-mapper device': _device_mapper(),
        'mount': _mounts(),
        'network interface': host.links(),
        'Open vSwitch port': host.ovs_ports(),
        LISTENER: _listeners(),
        'allocation': _allocations(placement),
    }.items()}


def difference(before: Census, after: Census) -> list[str]:
    """Describe what is there that was not, and what is not that was."""
    return [f'{kind} {name} {word}'
            for kind in sorted({*before, *after})
            for word, one, other in (('is left', after, before),
                                     ('is gone', before, after))
            for name in sorted(one.get(kind, frozenset()) -
                               other.get(kind, frozenset()))
            # A new nova-compute opens consoles when they are asked for.
            if (kind, word) != (LISTENER, 'is gone')]


def _images(host: cloud.Host) -> set[str]:
    """List LXD images, without the driver's copies of Glance images and the
    one that all servers have that boot from volumes."""
    empty = hashlib.sha256(placeholder.archive(
        os.uname().machine)).hexdigest()
    return {image['fingerprint'] for image in host.query(
        f'/1.0/images?recursion=1&project={cloud.LXD_PROJECT}')
        if image['fingerprint'] != empty and not any(
            alias['name'].startswith(cache.ALIAS_PREFIX)
            for alias in image['aliases'])}


def _loops() -> set[str]:
    """List the files of the cloud behind loop devices.

    Tests that run at the same time have others, and a container sees those of
    its host.
    """
    found = set()
    for path in pathlib.Path('/sys/block').glob('loop*/loop/backing_file'):
        # Others come and go.
        with contextlib.suppress(OSError):
            name = path.read_text().strip()
            if name.startswith(_PREFIX):
                found.add(name)
    return found


def _device_mapper() -> set[str]:
    found = set()
    for path in pathlib.Path('/sys/block').glob('dm-*/dm/name'):
        with contextlib.suppress(OSError):
            found.add(path.read_text().strip())
    return found


def _mounts() -> set[str]:
    """List the mount points of the cloud, whose daemons have no others."""
    lines = pathlib.Path('/proc/self/mountinfo').read_text().splitlines()
    return {target for target in (line.split()[4] for line in lines)
            if target.startswith(_PREFIX)}


def _listeners() -> set[str]:
    """List the TCP ports on which nova-compute listens."""
    pid = (cloud.PREFIX / 'run' / 'nova-compute.pid').read_text().split()[0]
    inodes = set()
    for path in pathlib.Path(f'/proc/{pid}/fd').iterdir():
        with contextlib.suppress(OSError):
            target = str(path.readlink())
            if target.startswith('socket:['):
                inodes.add(target[8:-1])
    found = set()
    lines = pathlib.Path('/proc/net/tcp').read_text().splitlines()[1:]
    for fields in map(str.split, lines):
        if fields[3] == _LISTEN and fields[9] in inodes:
            found.add(str(int(fields[1].rpartition(':')[2], 16)))
    return found


def _allocations(placement: Any) -> set[str]:
    """List the consumers of the resource providers."""
    found: set[str] = set()
    for provider in placement.get(
            '/resource_providers').json()['resource_providers']:
        answer = placement.get(
            f'/resource_providers/{provider["uuid"]}/allocations')
        found.update(answer.json()['allocations'])
    return found
