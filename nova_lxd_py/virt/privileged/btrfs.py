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

"""Quotas of root disks in btrfs storage pools, as root.

The kernel reserves space for the change of a quota in the subvolume through
which it is requested. LXD requests it through the disk itself, so it cannot
raise the quota of a disk that is full to the last 16 KiB. Through the pool's
own subvolume, which has no quota, it can be raised at any time.

This module is imported by the privileged daemon: it must not import nova.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct

from nova_lxd_py.virt import privileged
from nova_lxd_py.virt.privileged import command

# From linux/btrfs.h and linux/btrfs_tree.h.
_INO_LOOKUP = 0xd0009412
_INO_LOOKUP_SIZE = 4096
_QGROUP_LIMIT = 0x8030942b
_MAX_REFERENCED = 1
_FIRST_INODE = 256

_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@privileged.context.entrypoint_with_timeout(command.TIMEOUT)
def set_quota(pool: str, container: str, size: int) -> None:
    """Set the quota of the root disk of a container.

    :param pool: directory of the storage pool.
    :param container: name of the container in it.
    :param size: the quota in bytes.
    :raises FileNotFoundError: if the pool is not mounted on this host, or has
        no such container.
    :raises OSError: if it is no subvolume of a btrfs pool with quotas.
    """
    if not os.path.isabs(pool) or container in ('', '.', '..') or (
            '/' in container or '\0' in container):
        raise ValueError(f'{container!r} in {pool!r} is no container')
    if not isinstance(size, int) or not 0 < size < 1 << 63:
        raise ValueError(f'{size!r} is no quota')
    with contextlib.ExitStack() as stack:
        top = os.open(pool, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, top)
        disk = top
        for name in ('containers', container):
            disk = os.open(name, _OPEN, dir_fd=disk)
            stack.callback(os.close, disk)
        if os.fstat(disk).st_ino != _FIRST_INODE:
            raise OSError(errno.EINVAL, 'Not a subvolume', container)
        lookup = bytearray(_INO_LOOKUP_SIZE)
        struct.pack_into('=QQ', lookup, 0, 0, _FIRST_INODE)
        fcntl.ioctl(disk, _INO_LOOKUP, lookup)
        subvolume, = struct.unpack_from('=Q', lookup)
        fcntl.ioctl(top, _QGROUP_LIMIT, struct.pack(
            '=6Q', subvolume, _MAX_REFERENCED, size, 0, 0, 0))
