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

"""Checks of root filesystems in LXD's storage pools, as root.

This module is imported by the privileged daemon: it must not import nova.
"""

from __future__ import annotations

import contextlib
import os
import stat

from nova_lxd_py.virt import privileged
from nova_lxd_py.virt.privileged import command

PRESENT, ABSENT, REPLACED = 'present', 'absent', 'replaced'

_OPEN = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@privileged.context.entrypoint_with_timeout(command.TIMEOUT)
def find_as_root(pool: str, container: str) -> str:
    """Call :func:`find` as root."""
    return find(pool, container)


def find(pool: str, container: str) -> str:
    """Check what the root of a container is, without following any link.

    :param pool: directory of the storage pool.
    :param container: name of the container in it.
    :returns: PRESENT for a directory on the pool, ABSENT if it is not there,
        as on pools that are not mounted, REPLACED for anything else.
    :raises PermissionError: if only root can look.
    :raises OSError: if it cannot be read.
    """
    if not os.path.isabs(pool) or container in ('', '.', '..') or (
            '/' in container or '\0' in container):
        raise ValueError(f'{container!r} in {pool!r} is no container')
    with contextlib.ExitStack() as stack:
        try:
            parent = os.open(pool, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, parent)
            for name in ('containers', container, 'rootfs'):
                about = os.stat(name, dir_fd=parent, follow_symlinks=False)
                if not stat.S_ISDIR(about.st_mode):
                    return REPLACED
                parent = os.open(name, _OPEN, dir_fd=parent)
                stack.callback(os.close, parent)
        except FileNotFoundError:
            return ABSENT
        except NotADirectoryError:
            # Replaced between the two calls.
            return REPLACED
    return PRESENT
