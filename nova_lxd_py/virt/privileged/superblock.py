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

"""Features in superblocks of tenants for which they must not be mounted.

mount(2) of some filesystems sleeps for a time that the superblock defines, or
opens another device of the host that the superblock names. A tenant can write
any superblock on a volume, so the driver reads it before the kernel does.

This module is imported by the privileged daemon: it must not import nova.
"""

from __future__ import annotations

import os
import struct

from nova_lxd_py.virt.privileged import luks

# From fs/ext4/ext4.h of Linux.
_EXT_OFFSET, _EXT_SIZE, _EXT_MAGIC = 1024, 1024, 0xef53
_COMPAT_HAS_JOURNAL = 0x4
_INCOMPAT_JOURNAL_DEVICE, _INCOMPAT_MMP = 0x8, 0x100
_EXT_NAMES = frozenset({'ext2', 'ext3', 'ext4', 'ext4dev', 'jbd'})

# From fs/xfs/libxfs/xfs_format.h of Linux.
_XFS_MAGIC = b'XFSB'


def refusal(descriptor: int, kind: str) -> str:
    """Return the feature for which a filesystem must not be mounted, or an
    encrypted volume not opened.

    :param descriptor: file descriptor of the device, open for reading.
    :param kind: name of the filesystem, as libblkid identifies it.
    :returns: description of the feature; '' if there is none.
    :raises OSError: if the device cannot be read.
    """
    if kind in _EXT_NAMES:
        return _ext(os.pread(descriptor, _EXT_SIZE, _EXT_OFFSET))
    if kind == 'xfs':
        return _xfs(os.pread(descriptor, 56, 0))
    if kind == 'crypto_LUKS':
        return luks.refusal(descriptor)
    return ''


def _ext(block: bytes) -> str:
    if len(block) < _EXT_SIZE:
        return 'an incomplete superblock'
    magic, = struct.unpack_from('<H', block, 0x38)
    if magic != _EXT_MAGIC:
        return 'an invalid superblock'
    compat, incompat = struct.unpack_from('<2I', block, 0x5c)
    journal_inode, journal_device = struct.unpack_from('<2I', block, 0xe0)
    if incompat & _INCOMPAT_MMP:
        # The kernel waits for up to twice s_mmp_update_interval, 65535
        # seconds, for a sign of another host.
        return 'multiple mount protection'
    if incompat & _INCOMPAT_JOURNAL_DEVICE or journal_device or (
            compat & _COMPAT_HAS_JOURNAL and not journal_inode):
        # The kernel opens the device with the number in s_journal_dev.
        return 'an external journal'
    if block[0x200]:
        # The kernel parses s_mount_opts before the options of the caller.
        return 'mount options in its superblock'
    return ''


def _xfs(block: bytes) -> str:
    if len(block) < 56 or not block.startswith(_XFS_MAGIC):
        return 'an invalid superblock'
    realtime_blocks, = struct.unpack_from('>Q', block, 16)
    log_start, = struct.unpack_from('>Q', block, 48)
    if not log_start:
        return 'an external log'
    if realtime_blocks:
        return 'a realtime section'
    return ''
