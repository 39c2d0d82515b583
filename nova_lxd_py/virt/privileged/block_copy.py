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

"""Copying of the content of block devices, as root.

This module is imported by the privileged daemon: it must not import nova.
"""

from __future__ import annotations

import os
import stat

from nova_lxd_py.virt import privileged
from nova_lxd_py.virt.privileged import children

#: Maximum bytes of one call.
CHUNK = 64 << 20
_BLOCK = 1 << 20
_BLANK = bytes(_BLOCK)

#: Seconds for one chunk; slower storage is considered dead.
TIMEOUT = 300
_DEADLINE = 240


def _opened(path: str, flags: int) -> int:
    if not isinstance(path, str) or not path.startswith('/'):
        raise ValueError(f'{path!r} is not the path of a device')
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISBLK(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f'{path!r} is not a block device')
    return descriptor


@privileged.context.entrypoint_with_timeout(TIMEOUT)
@children.killable(_DEADLINE)
def copy(source: str, target: str, offset: int, length: int) -> int:
    """Copy a part of a device and flush it to the storage.

    Blocks that are zero on both devices are not written, so that thinly
    provisioned storage does not allocate them.

    :param source: path of the device to read.
    :param target: path of the device to write.
    :param offset: offset of the part in bytes.
    :param length: length of the part in bytes; at most CHUNK are copied.
    :returns: number of bytes that were written.
    :raises OSError: if a device cannot be read or written.
    """
    for number in (offset, length):
        if not isinstance(number, int) or number < 0:
            raise ValueError(f'{number!r} is not a number of bytes')
    written = 0
    reading = _opened(source, os.O_RDONLY)
    try:
        if os.fstat(reading).st_rdev == os.stat(target).st_rdev:
            raise ValueError('A device cannot be copied to itself')
        writing = _opened(target, os.O_RDWR | os.O_EXCL)
        try:
            end = offset + min(length, CHUNK)
            while offset < end:
                data = os.pread(reading, min(_BLOCK, end - offset), offset)
                if not data:
                    raise OSError(f'{source} has only {offset} bytes')
                blank = _BLANK[:len(data)]
                if (data != blank or
                        os.pread(writing, len(data), offset) != blank):
                    done = 0
                    while done < len(data):
                        done += os.pwrite(writing, data[done:], offset + done)
                    written += len(data)
                offset += len(data)
            os.fdatasync(writing)
            # The pages are not read again.
            for descriptor in (reading, writing):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(writing)
    finally:
        os.close(reading)
    return written
