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

"""Identification of the content of volumes, as root.

This module is imported by the privileged daemon: it must not import nova.
"""

from __future__ import annotations

import os
import re

from nova_lxd_py.virt import privileged
from nova_lxd_py.virt.privileged import blkid
from nova_lxd_py.virt.privileged import children
from nova_lxd_py.virt.privileged import command
from nova_lxd_py.virt.privileged import superblock
from nova_lxd_py.virt.privileged import validation

#: Name that os-brick gives to the opened device of an encrypted volume.
_OPENED = re.compile(r'/dev/mapper/crypt-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-'
                     r'[0-9a-f]{12}')

#: Bytes at the beginning of a volume that must be zero for it to be empty.
_BEGINNING = 1 << 20


@privileged.context.entrypoint_with_timeout(command.TIMEOUT)
@children.killable(command.DEADLINE)
def content(device: str) -> str:
    """Identify the content of a volume.

    :param device: path of its block device.
    :returns: name of the filesystem, if it can be mounted safely; '' if the
        volume is empty; another description, such as ``unknown`` or ``ext4
        with an external journal``, for any other content.
    :raises OSError: if the volume cannot be read.
    """
    return _content(device)


def _content(device: str) -> str:
    path = os.path.realpath(validation.checked_device(device))
    with open(path, 'rb') as stream:
        found = blkid.probe(stream.fileno())
        if found is None:
            # wipefs must agree, and the part where signatures are must be
            # zero.
            signatures = command.run('wipefs', '--no-act', '--parsable', path)
            blank = all(line.startswith('#')
                        for line in signatures.splitlines()) and (
                _begins_blank(stream.fileno()))
            return '' if blank else 'unknown'
        feature = superblock.refusal(stream.fileno(), found.get('TYPE', ''))
    if feature:
        return f'{found["TYPE"]} with {feature}'
    if found.get('USAGE') == 'filesystem':
        return found.get('TYPE', 'unknown')
    return found.get('PTTYPE') or found.get('TYPE') or 'unknown'


def _begins_blank(descriptor: int, start: int = 0) -> bool:
    # Read with offsets: libblkid has moved the file position.
    offset, end = start, start + _BEGINNING
    while offset < end:
        part = os.pread(descriptor, end - offset, offset)
        if not part:
            break
        if any(part):
            return False
        offset += len(part)
    return True


def _is_unwritten(device: str, below: str) -> bool:
    with (open(device, 'rb') as opened,
          open(validation.checked_device(below), 'rb') as lower):
        # The opened device spans everything after the header.
        start = os.lseek(lower.fileno(), 0, os.SEEK_END) - os.lseek(
            opened.fileno(), 0, os.SEEK_END)
        return start > 0 and _begins_blank(lower.fileno(), start)


@privileged.context.entrypoint_with_timeout(command.TIMEOUT)
@children.killable(command.DEADLINE)
def make_blank(device: str, below: str) -> None:
    """Zero the beginning of an encrypted volume that has not been written to.

    Before the first write, the decrypted content is random, and would be taken
    for unknown data. A volume with any known signature is left unchanged.

    :param device: path of the opened device.
    :param below: '' if the volume has just been formatted; otherwise the path
        of the underlying device. The volume is left unchanged then unless
        that device is blank after the header, which encrypted data never is.
    :raises OSError: if it cannot be written, or is in use.
    """
    if not isinstance(device, str) or not _OPENED.fullmatch(device):
        raise ValueError(
            f'{device!r} is not the device of an encrypted volume')
    if _content(device) != 'unknown' or (
            below and not _is_unwritten(device, below)):
        return
    descriptor = os.open(device, os.O_WRONLY | os.O_EXCL | os.O_CLOEXEC)
    try:
        size = os.lseek(descriptor, 0, os.SEEK_END)
        os.pwrite(descriptor, bytes(min(_BEGINNING, size)), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
