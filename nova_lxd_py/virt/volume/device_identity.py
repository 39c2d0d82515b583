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

"""Whether a block device of the host is the volume that it should be.

Names such as ``/dev/sdb`` are reused as soon as a device is gone. Connections
that were not removed properly have given servers other tenants' volumes
(CVE-2023-2088), so no device is trusted because of its name.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from typing import Any

from oslo_utils import units

#: Directory of persistent names of devices.
_BY_ID = '/dev/disk/by-id'
#: Prefixes of such names, the most reliable first.
_CERTAIN = ('dm-uuid-', 'wwn-', 'nvme-', 'scsi-')

#: Names that the kernel assigns in order of appearance.
_FLEETING = re.compile(r'/dev/(?:sd[a-z]+|dm-\d+|nvme\d+n\d+|vd[a-z]+)')

#: Keys of connections with the identifier of a device, and the attribute in
#: sysfs with the identifier that the device reports.
_NAMES = {'volume_nguid': 'nguid', 'nguid': 'nguid', 'vol_uuid': 'uuid',
          'volume_uuid': 'uuid', 'wwn': 'wwid', 'wwid': 'wwid'}


class WrongDevice(Exception):
    """A device is not the expected one; the message says what it is."""


def device_number(path: str) -> int:
    """Return the number of a block device.

    :param path: a path on the host; links are followed.
    :returns: its ``st_rdev``.
    :raises WrongDevice: if it is not a block device.
    """
    try:
        about = os.stat(path)
    except OSError as error:
        raise WrongDevice(f'{path} is missing: {error.strerror}') from None
    if not stat.S_ISBLK(about.st_mode):
        raise WrongDevice(f'{path} is not a block device')
    return about.st_rdev


def size(path: str) -> int:
    """Return the size of a block device in bytes.

    :param path: a path on the host.
    :raises WrongDevice: if it is not a block device.
    """
    return int(_attribute(device_number(path), 'size') or 0) * 512


def is_read_only(path: str) -> bool:
    """Whether the kernel refuses to write to a block device.

    :param path: path of the device on the host.
    :raises WrongDevice: if it is not a block device.
    """
    return _attribute(device_number(path), 'ro') == '1'


def statistics(path: str) -> str | None:
    """Return the kernel's statistics of requests to a block device.

    :param path: path of the device on the host.
    :returns: content of ``stat`` in sysfs, None if there is none.
    :raises WrongDevice: if it is not a block device.
    """
    return _attribute(device_number(path), 'stat')


def check(path: str, connection_info: dict[str, Any], size_gb: int | None
          ) -> None:
    """Validate that a device is the volume of a connection.

    :param path: path of the device.
    :param connection_info: Cinder's description of the connection.
    :param size_gb: size of the volume in GiB, None if unknown. The back end
        may have made it somewhat larger.
    :raises WrongDevice: if it is another one.
    """
    number = device_number(path)
    found = size(path)
    if found == 0 or (size_gb and found < size_gb * units.Gi):
        raise WrongDevice(
            f'{path} has {found} bytes and not the {size_gb or "?"} GiB of '
            f'the volume')
    for key, file in _NAMES.items():
        wanted = connection_info['data'].get(key)
        named = (_attribute(number, file) or
                 _attribute(number, f'device/{file}') or
                 _multipath_name(number))
        if wanted and named and _plain(str(wanted)) not in _plain(named):
            raise WrongDevice(
                f'{path} calls itself {named} and not {wanted}')


def _multipath_name(number: int) -> str | None:
    """Return the WWID of a multipath device, of which the name is made."""
    name = _attribute(number, 'dm/uuid') or ''
    return name.removeprefix('mpath-') if name.startswith('mpath-') else None


def stable_path(path: str) -> str:
    """Find a persistent name of a device.

    :param path: path of the device.
    :returns: a name by the identifier that the device reports if there is one,
        else the path as it is; in ``/dev``, as LXD requires.
    """
    if not os.path.normpath(path).startswith('/dev/'):
        path = os.path.realpath(path)
    if not _FLEETING.fullmatch(path):
        return path
    number = device_number(path)
    found = []
    with contextlib.suppress(OSError):
        for name in os.listdir(_BY_ID):
            with contextlib.suppress(OSError):
                if os.stat(f'{_BY_ID}/{name}').st_rdev == number:
                    found.append(name)
    for kind in _CERTAIN:
        for name in sorted(found):
            if name.startswith(kind):
                return f'{_BY_ID}/{name}'
    return path


def is_fleeting(path: str) -> bool:
    """Whether the name of a device may become another one's.

    :param path: path of the device.
    """
    return _FLEETING.fullmatch(path) is not None


def _attribute(number: int, name: str) -> str | None:
    try:
        with open(f'/sys/dev/block/{os.major(number)}:{os.minor(number)}/'
                  f'{name}', encoding='utf-8') as stream:
            return stream.read().strip()
    except OSError:
        return None


def _plain(name: str) -> str:
    """Normalize an identifier to its hexadecimal digits."""
    return re.sub(r'[^0-9a-f]', '', name.lower().removeprefix('0x'))
