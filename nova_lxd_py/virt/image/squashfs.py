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
"""Check of the inodes of a squashfs filesystem during the transfer.

They tell how large it is when unpacked, which its superblock does not say, and
which device nodes it has. Their table follows all file content, so that it is
kept during the transfer and read at the end, together with the table of
directories that follows it. unsquashfs before 4.5.1 accepts names with ``..``
or ``/``, writes through a symbolic link if the directory has a second entry of
the same name, and unpacks a directory once for each directory that contains
it, so that a small image can have any number of files.
"""

from __future__ import annotations

import array
import lzma
import struct
import sys
import zlib

from nova_lxd_py.virt.image import decompression
from nova_lxd_py.virt.image import rootfs_rules

MAGIC = b'hsqs'
SUPERBLOCK = 96
#: Compressed bytes of an inode table to keep in memory at most: enough for
#: several million files.
MAX_TABLE = 64 << 20
#: Bytes that a table may have when decompressed.
MAX_INODES = 128 << 20

_COMPRESSORS = {1: 'gzip', 2: 'lzma', 3: 'lzo', 4: 'xz', 5: 'lz4', 6: 'zstd'}
_METADATA_BLOCK = 8192
_UNCOMPRESSED = 0x8000
_NO_FRAGMENT = 0xffffffff
_BLOCK_RAW = 1 << 24

#: Bytes of an inode of each type behind the header that all have, without its
#: variable part. Types 1, 2 and 3 and their long forms are handled apart.
_FIXED = {4: 8, 5: 8, 6: 4, 7: 4, 11: 12, 12: 12, 13: 8, 14: 8}
_HEADER = 16
_DIRECTORY, _LONG_DIRECTORY = 1, 8
#: Blocks of a table: each but the last few is full.
_MAX_BLOCKS = 2 * MAX_INODES // _METADATA_BLOCK
#: What the size of a directory counts besides its listing.
_NOT_LISTED = 3
_BLOCK_DEVICES = (4, 11)
_DEVICES = (4, 5, 11, 12)


class Damaged(Exception):
    """The squashfs filesystem cannot be read."""


class Unsupported(Exception):
    """The squashfs filesystem cannot be checked."""


class Reader:
    """Reads a squashfs filesystem during the transfer.

    :param head: its first SUPERBLOCK bytes or more.
    :raises Damaged: if the superblock makes no sense.
    :raises Unsupported: if its compressor is not one of gzip, xz and zstd, or
        its tables are too large.
    """

    def __init__(self, head: bytes) -> None:
        (magic, self._inodes, _time, self._block_size, _fragments,
         compressor, _block_log, _flags, _ids, major, _minor, self._root,
         self._length, _id_table, _xattrs, self._inode_table,
         self._directory_table, *others) = struct.unpack_from(
             '<4sIIIIHHHHHHQQQQQQQQ', head)
        if (magic != MAGIC or major != 4 or
                not 4096 <= self._block_size <= 1 << 20 or
                not SUPERBLOCK <= self._inode_table < self._directory_table
                <= self._length):
            raise Damaged('its squashfs superblock is damaged')
        self._compressor = _COMPRESSORS.get(compressor, str(compressor))
        if self._compressor not in ('gzip', 'xz', 'zstd'):
            raise Unsupported(
                f'it is a squashfs compressed with {self._compressor}, whose '
                f'unpacked size cannot be checked; make it with '
                f'"mksquashfs -comp zstd" (or xz or gzip)')
        if self._directory_table - self._inode_table > MAX_TABLE:
            raise Unsupported('it is a squashfs with more files than any '
                              'root filesystem has')
        self._directories_end = min(
            (place for place in (*others, _id_table, _xattrs, self._length)
             if place > self._directory_table), default=self._length)
        if self._directories_end - self._directory_table > MAX_TABLE:
            raise Unsupported('it is a squashfs with larger directories than '
                              'any root filesystem has')
        self._position = 0
        self._table = bytearray()
        self._directories = bytearray()
        #: Where each directory's listing is: block, offset in it, length.
        self._listings = array.array('I')

    def feed(self, data: bytes) -> None:
        """Read the next part, from the very beginning on.

        :param data: any number of bytes.
        """
        start, stop, end = (
            max(0, place - self._position) for place in (
                self._inode_table, self._directory_table,
                self._directories_end))
        self._table += data[start:stop]
        self._directories += data[stop:end]
        self._position += len(data)

    def finish(self) -> int:
        """Check the filesystem when all of it has been read.

        :returns: bytes of file content when unpacked; holes do not count.
        :raises Damaged: if it is truncated, or cannot be read.
        :raises rootfs_rules.Forbidden: if it has a device node that a
            container must not have, or a directory whose names are invalid or
            not in order.
        """
        if self._position < self._length:
            raise Damaged('the squashfs breaks off before its end')
        try:
            inodes, blocks = _decompressed(self._compressor, self._table)
            root = blocks[self._root >> 16] + (self._root & 0xffff)
            if struct.unpack_from('<H', inodes, root)[0] not in (
                    _DIRECTORY, _LONG_DIRECTORY):
                raise ValueError('its root is no directory')
            known = bytearray(len(inodes) // 8 + 1)
            size = self._content_size(inodes, known)
            self._check_directories(blocks, known, root)
            return size
        except (struct.error, LookupError, ValueError, EOFError, zlib.error,
                lzma.LZMAError, decompression.Corrupt) as exc:
            raise Damaged(f'its squashfs inode table is damaged ({exc})'
                          ) from exc

    def _check_directories(self, blocks: dict[int, int], known: bytearray,
                           root: int) -> None:
        """Check names, and that each entry leads to an inode that has been
        read, and no two to one directory.

        :param blocks: where the blocks of the inode table are.
        :param known: a bit for each byte at which an inode begins.
        :param root: where the inode of the root is.
        """
        table, places = _decompressed(self._compressor, self._directories)
        parented = bytearray(len(known))
        _set(parented, root)
        total = 0
        listings = iter(self._listings)
        for block, offset, length in zip(listings, listings, listings):
            total += length
            if total > MAX_INODES:
                raise ValueError('directories overlap')
            position = places[block] + offset
            end = position + length
            if end > len(table):
                raise ValueError('a directory is longer than the table')
            before = b''
            while position < end:
                count, start, _number = struct.unpack_from('<3I', table,
                                                           position)
                position += 12
                for _entry in range(count + 1):
                    inode, _difference, kind, last = struct.unpack_from(
                        '<HhHH', table, position)
                    position += 8
                    name = bytes(table[position:position + last + 1])
                    position += last + 1
                    _check_entry(name, before)
                    before = name
                    place = blocks[start] + inode
                    if not _is_set(known, place):
                        raise ValueError('an entry leads to no inode')
                    if kind == _DIRECTORY:
                        if _is_set(parented, place):
                            raise ValueError('a directory is in two others')
                        _set(parented, place)
            if position != end:
                raise ValueError('a directory ends within an entry')

    def _content_size(self, inodes: bytearray, known: bytearray) -> int:
        """Read all inodes.

        :param known: gets a bit for each byte at which an inode begins.
        """
        total, position = 0, 0
        for _inode in range(self._inodes):
            kind, = struct.unpack_from('<H', inodes, position)
            _set(known, position)
            position += _HEADER
            if kind in (2, 9):
                size, position = self._file(inodes, position, kind)
                total += size
            elif kind == _DIRECTORY:
                block, _links, size, offset = struct.unpack_from(
                    '<IIHH', inodes, position)
                self._listings.extend(
                    (block, offset, size - _NOT_LISTED)
                    if size > _NOT_LISTED else ())
                position += 16
            elif kind == _LONG_DIRECTORY:
                _links, size, block, _parent, _count, offset = (
                    struct.unpack_from('<IIIIHH', inodes, position))
                self._listings.extend(
                    (block, offset, size - _NOT_LISTED)
                    if size > _NOT_LISTED else ())
                position = _long_directory(inodes, position)
            elif kind in (3, 10):
                length, = struct.unpack_from('<I', inodes, position + 4)
                position += 8 + length + (4 if kind == 10 else 0)
            else:
                if kind in _DEVICES:
                    _check_device(kind, inodes, position)
                position += _FIXED[kind]
        return total

    def _file(self, inodes: bytearray, position: int, kind: int
              ) -> tuple[int, int]:
        """Read one file's inode.

        :returns: bytes of its content on disk, and where the inode ends.
        """
        if kind == 2:
            _start, fragment, _offset, size = struct.unpack_from(
                '<IIII', inodes, position)
            position += 16
        else:
            _start, size, _sparse, _links, fragment, _offset, _xattr = (
                struct.unpack_from('<QQQIIII', inodes, position))
            position += 40
        count, tail = divmod(size, self._block_size)
        in_block = tail and fragment == _NO_FRAGMENT
        end = position + 4 * (count + bool(in_block))
        if end > len(inodes):
            raise ValueError('a file is longer than the table')
        blocks = array.array('I', inodes[position:end])
        if sys.byteorder == 'big':
            blocks.byteswap()
        # A block stored as nothing is a hole.
        filled = [bool(block & (_BLOCK_RAW - 1)) for block in blocks]
        content = sum(filled[:count]) * self._block_size
        if tail and (not in_block or filled[count]):
            content += tail
        return content, end


def _decompressed(compressor: str, table: bytearray
                  ) -> tuple[bytearray, dict[int, int]]:
    """Decompress a table.

    :returns: its content, and where in it the content of each block is, by
        where the block begins in the table.
    :raises ValueError: if a block has a wrong length.
    :raises decompression.Corrupt: if a block cannot be decompressed.
    :raises Damaged: if the table is too large.
    """
    view, position = memoryview(table), 0
    result, places = bytearray(), {}
    while position + 2 <= len(view):
        header, = struct.unpack_from('<H', view, position)
        size = header & (_UNCOMPRESSED - 1)
        block = bytes(view[position + 2:position + 2 + size])
        if len(block) < size:
            raise ValueError('short block')
        if not header & _UNCOMPRESSED:
            block = decompression.decompress_block(compressor, block,
                                                   _METADATA_BLOCK)
        if len(block) > _METADATA_BLOCK:
            raise ValueError('large block')
        places[position] = len(result)
        result += block
        position += 2 + size
        if len(result) > MAX_INODES or len(places) > _MAX_BLOCKS:
            raise Damaged('its squashfs inode table is damaged (it does not '
                          'end)')
    return result, places


def _set(bits: bytearray, place: int) -> None:
    bits[place >> 3] |= 1 << (place & 7)


def _is_set(bits: bytearray, place: int) -> bool:
    return bool(bits[place >> 3] & 1 << (place & 7))


def _check_entry(name: bytes, before: bytes) -> None:
    """Check a name in a directory, and that it comes after another one: the
    kernel requires that order, and no name is there twice."""
    if name in (b'.', b'..') or b'/' in name or b'\0' in name:
        raise rootfs_rules.Forbidden(
            f'a file in it has a name that cannot be '
            f'({rootfs_rules.shown(name)})')
    if name <= before:
        raise rootfs_rules.Forbidden(
            f'a directory in it has {rootfs_rules.shown(name)} twice, or is '
            f'not sorted')


def _check_device(kind: int, inodes: bytearray, position: int) -> None:
    device, = struct.unpack_from('<I', inodes, position + 4)
    # As the kernel's new_encode_dev().
    rootfs_rules.check_device(
        kind in _BLOCK_DEVICES, (device & 0xfff00) >> 8,
        (device & 0xff) | ((device >> 12) & 0xfff00), 'a file')


def _long_directory(inodes: bytearray, position: int) -> int:
    count, = struct.unpack_from('<H', inodes, position + 16)
    position += 24
    for _entry in range(count):
        length, = struct.unpack_from('<I', inodes, position + 8)
        position += 12 + length + 1
    return position
