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

"""The quota of a root disk, and LXD's errors when it is exceeded.

While the disk is full, the quota is extended: see :mod:`.root_extension`.
"""

from __future__ import annotations

from collections.abc import Mapping
import re

from oslo_utils import units

from nova_lxd_py.virt.lxd import errors

#: Key of an LXD instance: quota of its root disk by the flavor; the disk may
#: have a temporary extension.
KEY_ROOT_QUOTA = 'user.nova.root_quota'
#: Key that is written and removed to learn whether LXD can write to the root
#: disk.
KEY_SPACE_CHECK = 'user.nova.space_check'

#: Name of the root disk's LXD device.
DEVICE = 'root'

#: Bytes by which the quota of a full disk is extended at a time, and in total.
EXTENSION = 64 * units.Mi
MAX_EXTENSION = 4 * EXTENSION

#: LXD's size suffixes.
_UNITS = {'': 1, 'B': 1}
for _power, _letter in enumerate('KMGTPE', 1):
    _UNITS[f'{_letter}iB'] = 1024 ** _power
    _UNITS[f'{_letter if _power > 1 else "k"}B'] = 1000 ** _power


def size_bytes(device: Mapping[str, str]) -> int | None:
    """Parse the quota of a disk.

    :param device: the LXD device.
    :returns: bytes, None for no quota.
    """
    match = re.fullmatch(r'(\d+) ?([A-Za-z]*)', device.get('size', ''))
    if match is None or match[2] not in _UNITS:
        return None
    return int(match[1]) * _UNITS[match[2]]


def extended(device: Mapping[str, str], size: int | None = None
             ) -> dict[str, str]:
    """Return a disk with a larger quota.

    :param device: the LXD device.
    :param size: the quota in bytes if not one extension more; a quota is
        never made smaller, and no quota stays none.
    :returns: the new LXD device.
    """
    present = size_bytes(device)
    if present is None:
        return dict(device)
    if size is None:
        size = present + EXTENSION
    return {**device, 'size': f'{size}B'} if size > present else dict(device)


def is_exceeded(exc: errors.LXDError) -> bool:
    """Whether a request failed since the quota of a disk is exceeded."""
    return 'quota exceeded' in exc.message.lower()


def may_be_exceeded(exc: errors.LXDError) -> bool:
    """Whether a request may have failed for a full root disk although LXD's
    text does not say so: the mount point of a disk is made in a process of
    its own, of which LXD reports only that it failed."""
    return 'forkmount' in exc.message
