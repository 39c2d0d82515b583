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

"""Validation of the arguments of privileged functions for volumes.

This module is imported by the privileged daemon: it must not import nova.
"""

from __future__ import annotations

import os
import re
import stat

_DEVICE = re.compile(r'/dev/[A-Za-z0-9_./:+@-]+|(?:/[A-Za-z0-9_.:+@-]+)+')
_TARGET = re.compile(
    r'(?:/[^/\0]+)+/[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}')


def checked_device(path: str) -> str:
    """Validate the path of a block device.

    :param path: the path.
    :returns: the path.
    :raises ValueError: if it is not the path of a block device.
    """
    if not isinstance(path, str) or not _DEVICE.fullmatch(path):
        raise ValueError(f'{path!r} is not the path of a device')
    if not stat.S_ISBLK(os.stat(path).st_mode):
        raise ValueError(f'{path!r} is not a block device')
    return path


def checked_target(path: str) -> str:
    """Validate the path of a directory that is named after a volume.

    :param path: the path.
    :returns: the path.
    :raises ValueError: if it is not such a path.
    """
    if (not isinstance(path, str) or not _TARGET.fullmatch(path) or
            os.path.normpath(path) != path):
        raise ValueError(f'{path!r} is not a directory for a volume')
    return path


def check_ids(uid_base: int, gid_base: int, size: int) -> None:
    """Validate the id mapping of a guest.

    :param uid_base: host uid of root in the guest.
    :param gid_base: host gid of root in the guest.
    :param size: number of mapped ids in both ranges; 0 disables mapping.
    :raises ValueError: if it is not a valid mapping of an unprivileged guest.
    """
    for number in (uid_base, gid_base, size):
        if not isinstance(number, int) or not 0 <= number < 2 ** 32:
            raise ValueError(f'{number!r} is not an id')
    if size and not (uid_base and gid_base):
        raise ValueError('Root in a guest cannot be root of the host')
