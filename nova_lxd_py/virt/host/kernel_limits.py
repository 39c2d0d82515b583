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

"""Limits of the host's kernel that stop containers.

They are meant for a single system. Guests with systemd reach some of them when
a host has a dozen of them, and then fail in ways that do not name the limit.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import os

#: Servers that a host should be able to run.
SERVERS = 500

_PROC = '/proc'
#: Names of the daemons, as the kernel shortens them.
_DAEMONS = ('lxd', 'incusd')


@dataclasses.dataclass(frozen=True)
class Limit:
    """A limit, and what a server takes of it."""

    #: Name of the sysctl.
    name: str
    #: Value for hundreds of servers. Most are those of "Server settings for a
    #: LXD production setup" in LXD's documentation; tools/kernel_limits.sh
    #: sets them.
    recommended: int
    #: What an idle Debian with systemd takes, as measured; 0 if nothing.
    per_server: int
    #: What the limit applies to.
    scope: str
    #: Sysctl of what the kernel keeps for the host itself.
    reserve: str = ''
    #: Whether only servers that share a range of host uids share the limit.
    per_range: bool = False


# The kernel charges inotify to the user that created the user namespace, which
# is root for all containers, whatever their ranges of uids are (inc_ucount).
# Keys are charged to the host uid. There is one table of neighbours for all
# network namespaces.
LIMITS = (
    Limit('fs.inotify.max_user_instances', 1048576, 10,
          'all servers together'),
    Limit('fs.inotify.max_user_watches', 1048576, 32, 'all servers together'),
    Limit('fs.inotify.max_queued_events', 1048576, 0,
          'each inotify instance'),
    Limit('kernel.keys.maxkeys', 20000, 20,
          'servers that share a range of host uids', per_range=True),
    Limit('kernel.keys.maxbytes', 2000000, 350,
          'servers that share a range of host uids', per_range=True),
    Limit('kernel.pty.max', 8192, 2, 'all servers together',
          reserve='kernel.pty.reserve'),
    Limit('net.ipv4.neigh.default.gc_thresh3', 8192, 2,
          'all servers together'),
    Limit('net.ipv6.neigh.default.gc_thresh3', 8192, 2,
          'all servers together'),
    Limit('fs.file-max', 2097152, 600, 'all servers together'),
    Limit('fs.aio-max-nr', 524288, 0,
          'programs with asynchronous I/O, such as MySQL, together'),
    Limit('vm.max_map_count', 262144, 0, 'each process'),
)

#: Open files of the daemon: a setting of its systemd unit.
NOFILE = Limit('LimitNOFILE', 1048576, 0,
               'LXD and to each process of the servers, which inherits it')


@dataclasses.dataclass(frozen=True)
class Shortage:
    """A limit that is too low."""

    limit: Limit
    value: int
    #: How many servers it allows; None if it does not limit their number.
    servers: int | None


def shortages(shared_range: bool, server_pid: int | None
              ) -> Iterator[Shortage]:
    """Find the limits that are too low for hundreds of servers.

    Limits that the kernel does not have, or does not show here, as in a
    container image of nova-compute, are skipped.

    :param shared_range: whether servers may share a range of host uids.
    :param server_pid: process id of LXD; None if unknown.
    :returns: an iterator over the limits with their values.
    """
    for limit in LIMITS:
        value = _sysctl(limit.name)
        if value is None or (limit.per_range and not shared_range):
            continue
        reserve = _sysctl(limit.reserve) if limit.reserve else None
        yield from _check(limit, value, value - (reserve or 0))
    open_files = _open_files(server_pid)
    if open_files is not None:
        yield from _check(NOFILE, open_files, open_files)


def _check(limit: Limit, value: int, usable: int) -> Iterator[Shortage]:
    if limit.per_server:
        servers = usable // limit.per_server
        if servers < SERVERS:
            yield Shortage(limit, value, servers)
    elif value < limit.recommended:
        yield Shortage(limit, value, None)


def _sysctl(name: str) -> int | None:
    try:
        return int(_read('sys', *name.split('.')))
    except (OSError, ValueError):
        return None


def _open_files(pid: int | None) -> int | None:
    """Return the hard limit of open files of LXD; its runtime uses it."""
    try:
        # Its namespace of process ids may be another than this one.
        if _read(str(pid), 'comm').strip() not in _DAEMONS:
            return None
        for line in _read(str(pid), 'limits').splitlines():
            if line.startswith('Max open files'):
                return int(line.split()[4])
    except (OSError, ValueError):
        pass
    return None


def _read(*path: str) -> str:
    with open(os.path.join(_PROC, *path), encoding='ascii',
              errors='replace') as stream:
        return stream.read()
