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
"""Reader of the headers of a tar archive during the transfer.

Nothing is unpacked here. The reader accepts v7, ustar, pax and GNU archives
and is deliberately stricter than GNU tar, which unpacks images on the host:
where the two could read an archive differently, it is refused.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Protocol

BLOCK = 512
#: Bytes of a long name or extended header that are kept in memory.
MAX_CAPTURE = 1 << 20
#: Bytes of records of global extended headers that are kept in memory.
MAX_GLOBAL = 64 << 10
#: Bytes of the map of a sparse file in GNU's old format.
MAX_SPARSE_MAP = 4 << 20

ZEROS = bytes(BLOCK)
_GNU_MAGIC = b'ustar  \0'
_PAX_MAGIC = b'ustar\x0000'

REGULAR, HARD_LINK, SYMLINK, CHARACTER, BLOCK_DEVICE, DIRECTORY, FIFO = (
    b'0', b'1', b'2', b'3', b'4', b'5', b'6')
#: GNU's old format of sparse files; pax ones are of the type REGULAR.
GNU_SPARSE = b'S'
#: How else a regular file is marked: by old programs, and as contiguous.
_ALSO_REGULAR = (b'\0', b'7')
_BODILESS = (HARD_LINK, SYMLINK, CHARACTER, BLOCK_DEVICE, DIRECTORY, FIFO)

#: Records that a global header must not have: each member would get the
#: same, which no program wants and not every program reads alike.
_MEMBER_KEYS = (b'path', b'linkpath', b'size', b'GNU.')


class NotTar(Exception):
    """The stream is not a tar archive from its beginning."""


class Damaged(Exception):
    """The archive began well and then cannot be read."""


@dataclasses.dataclass(frozen=True)
class Member:
    """One member of an archive.

    :ivar name: the name as stored, without a NUL.
    :ivar kind: the type flag; REGULAR for all kinds of plain files.
    :ivar size: bytes of content in the archive.
    :ivar link: target of a symbolic or hard link, as stored.
    :ivar device: major and minor number of a device node.
    :ivar header: its header block, with the map of a sparse file behind it.
    :ivar records: its own extended (pax) header, in order.
    """

    name: bytes
    kind: bytes
    size: int
    link: bytes = b''
    device: tuple[int, int] = (0, 0)
    header: bytes = b''
    records: tuple[tuple[bytes, bytes], ...] = ()

    @property
    def path(self) -> str:
        """Its path without ``./`` and superfluous slashes; '' for the top of
        the archive. Bytes that are not UTF-8 are kept as surrogates."""
        return clean(self.name)

    @property
    def regular(self) -> bool:
        """Whether it is a file with content."""
        return self.kind in (REGULAR, GNU_SPARSE)

    @property
    def sparse(self) -> bool:
        """Whether it is stored without its holes."""
        return self.kind == GNU_SPARSE or any(
            key.startswith(b'GNU.sparse.') for key, _value in self.records)

    @property
    def top(self) -> str:
        """The first component of the path."""
        return self.path.partition('/')[0]


class ContentSink(Protocol):
    """Receives the content of one member."""

    def write(self, data: memoryview) -> None:
        """Receive the next part, which is valid during the call only."""

    def close(self) -> None:
        """Handle the end of the content."""


class Capture:
    """Keeps the beginning of a member's content.

    :param limit: bytes to keep.
    :param deliver: called with them when the content is complete.
    """

    def __init__(self, limit: int, deliver: Callable[[bytes], None]) -> None:
        self._limit = limit
        self._deliver = deliver
        self._kept = bytearray()

    def write(self, data: memoryview) -> None:
        room = self._limit - len(self._kept)
        if room > 0:
            self._kept += data[:room]

    def close(self) -> None:
        self._deliver(bytes(self._kept))


#: Called with each member; returns what receives its content, or None.
OnMember = Callable[[Member], 'ContentSink | None']


class Walker:
    """Follows a tar archive from header to header.

    :param on_member: called for each member, in order.
    """

    def __init__(self, on_member: OnMember) -> None:
        self._on_member = on_member
        #: Header blocks seen.
        self.headers = 0
        #: Whether the marker at the end of the archive has been seen.
        self.complete = False
        self._buffer = bytearray()
        self._left = 0
        self._padding = 0
        self._sink: ContentSink | None = None
        self._sparse_header: bytearray | None = None
        self._long_name: bytes | None = None
        self._long_link: bytes | None = None
        self._records: list[tuple[bytes, bytes]] | None = None
        self._global_size = 0

    def feed(self, data: bytes) -> None:
        """Read the next part of the archive.

        :param data: any number of bytes.
        :raises NotTar: if there is no tar header at the very beginning.
        :raises Damaged: if there is none where one must be later.
        """
        view = memoryview(data)
        position, end = 0, len(data)
        while position < end and not self.complete:
            if self._left:
                taken = min(self._left, end - position)
                self._left -= taken
                if self._sink is not None:
                    self._sink.write(view[position:position + taken])
                if not self._left:
                    self._end_content()
            elif self._padding:
                taken = min(self._padding, end - position)
                self._padding -= taken
            elif not self._buffer and end - position >= BLOCK:
                taken = BLOCK
                self._block(bytes(view[position:position + BLOCK]))
            else:
                taken = min(BLOCK - len(self._buffer), end - position)
                self._buffer += view[position:position + taken]
                if len(self._buffer) == BLOCK:
                    block = bytes(self._buffer)
                    self._buffer.clear()
                    self._block(block)
            position += taken

    def finish(self) -> None:
        """Check that the archive has been complete.

        :raises NotTar: if there was no header at all.
        :raises Damaged: if it is truncated.
        """
        if self.complete:
            return
        if not self.headers:
            raise NotTar()
        raise Damaged('the archive breaks off before its end')

    def _end_content(self) -> None:
        sink, self._sink = self._sink, None
        if sink is not None:
            sink.close()

    def _begin_content(self, size: int, sink: ContentSink | None) -> None:
        self._left = size
        self._padding = -size % BLOCK
        self._sink = sink
        if not size:
            self._end_content()

    def _block(self, block: bytes) -> None:
        if self._sparse_header is not None:
            self._sparse_block(block)
            return
        if block == ZEROS:
            self.complete = True
            return
        if not _checksum_fits(block):
            if not self.headers:
                raise NotTar()
            raise Damaged('the archive has no header where one must be')
        self.headers += 1
        kind = block[156:157]
        if kind in (b'L', b'K', b'x', b'X', b'g'):
            self._extension(kind, _number(block[124:136]))
        elif kind == GNU_SPARSE and block[482]:
            self._sparse_header = bytearray(block)
        else:
            self._member(block)

    def _sparse_block(self, block: bytes) -> None:
        """Read a further block of the map of a GNU sparse file."""
        header = self._sparse_header
        assert header is not None
        header += block
        if len(header) > MAX_SPARSE_MAP:
            raise Damaged('the archive has a sparse file of too many pieces')
        if not block[504]:
            self._sparse_header = None
            self._member(bytes(header))

    def _extension(self, kind: bytes, size: int) -> None:
        if size > MAX_CAPTURE:
            raise Damaged('the archive has an oversized header')
        self._begin_content(size, Capture(size, {
            b'L': self._set_long_name, b'K': self._set_long_link,
            b'x': self._set_records, b'X': self._set_records,
            b'g': self._set_global}[kind]))

    def _member(self, header: bytes) -> None:
        kind = header[156:157]
        if kind in _ALSO_REGULAR:
            kind = REGULAR
        if ((self._records and not header[257:].startswith(b'ustar')) or
                (kind == GNU_SPARSE and header[257:265] != _GNU_MAGIC)):
            raise Damaged('the archive mixes formats that do not fit together')
        records = dict(self._records or ())
        name = records.get(b'path', self._long_name)
        name = records.get(b'GNU.sparse.name', name)
        if name is None:
            name = _name(header)
        link = records.get(b'linkpath', self._long_link)
        if link is None:
            link = header[157:257].split(b'\0', 1)[0]
        size = 0
        if kind not in _BODILESS:
            size = _number(header[124:136])
            if b'size' in records:
                size = _decimal(records[b'size'])
        if kind == REGULAR and name.endswith(b'/'):
            # A directory, as old programs write it.
            if size:
                raise Damaged('the archive has a directory with content')
            kind = DIRECTORY
        device = (0, 0)
        if kind in (CHARACTER, BLOCK_DEVICE):
            device = (_number(header[329:337]), _number(header[337:345]))
        member = Member(name, kind, size, link, device, header,
                        tuple(self._records or ()))
        self._records = self._long_name = self._long_link = None
        self._begin_content(size, self._on_member(member))

    def _set_long_name(self, content: bytes) -> None:
        if self._long_name is not None:
            raise Damaged('the archive has a member of two names')
        self._long_name = _c_string(content)

    def _set_long_link(self, content: bytes) -> None:
        if self._long_link is not None:
            raise Damaged('the archive has a link of two targets')
        self._long_link = _c_string(content)

    def _set_records(self, content: bytes) -> None:
        if self._records is not None:
            raise Damaged('the archive has a member of two extended headers')
        self._records = _pax_records(content)

    def _set_global(self, content: bytes) -> None:
        self._global_size += len(content)
        if self._global_size > MAX_GLOBAL:
            raise Damaged('the archive has oversized global headers')
        for key, _value in _pax_records(content):
            if key.startswith(_MEMBER_KEYS):
                raise Damaged(
                    f'the archive has a global header that gives all members '
                    f'the same {key[:40].decode("ascii", "replace")}')


def clean(name: bytes) -> str:
    """Normalize the name of a member as tar understands it.

    :param name: as stored.
    :returns: its components with a slash between; bytes that are not UTF-8
        are kept as surrogates. A leading slash is dropped as well.
    """
    return '/'.join(part for part in name.decode(
        'utf-8', 'surrogateescape').split('/') if part not in ('', '.'))


def checksum(block: bytes | bytearray) -> int:
    """Calculate the checksum of a header block."""
    # The field itself counts as spaces.
    return sum(block) - sum(block[148:156]) + 8 * 32


def pax_header(records: tuple[tuple[bytes, bytes], ...]) -> bytes:
    """Write an extended header for the member that follows.

    :param records: keys and values; none for no header.
    """
    if not records:
        return b''
    content = b''.join(_pax_record(key, value) for key, value in records)
    return _extension_header(b'x', b'././@PaxHeader', content,
                             _PAX_MAGIC)


def long_header(kind: bytes, name: bytes) -> bytes:
    """Write a GNU long name (L) or link target (K)."""
    return _extension_header(kind, b'././@LongLink', name + b'\0',
                             _GNU_MAGIC)


def with_checksum(block: bytearray) -> bytes:
    """Complete a header block.

    :param block: what is changed, and returned.
    """
    block[148:156] = b'%06o\0 ' % checksum(block[:BLOCK])
    return bytes(block)


def number_field(number: int, width: int = 12) -> bytes:
    """Write a number of a header: in octal, or in binary where it is large."""
    if number < 8 ** (width - 1):
        return b'%0*o\0' % (width - 1, number)
    return b'\x80' + number.to_bytes(width - 1, 'big')


def _extension_header(kind: bytes, name: bytes, content: bytes, magic: bytes
                      ) -> bytes:
    block = bytearray(BLOCK)
    block[:len(name)] = name
    block[100:108], block[108:116], block[116:124] = (
        b'0000644\0', b'0000000\0', b'0000000\0')
    block[124:136] = number_field(len(content))
    block[136:148] = number_field(0)
    block[156:157] = kind
    block[257:265] = magic
    return with_checksum(block) + content + bytes(-len(content) % BLOCK)


def _pax_record(key: bytes, value: bytes) -> bytes:
    rest = b' ' + key + b'=' + value + b'\n'
    length = len(rest)
    # The length counts its own digits.
    while length != len(rest) + len(b'%d' % length):
        length = len(rest) + len(b'%d' % length)
    return b'%d' % length + rest


def _checksum_fits(block: bytes) -> bool:
    try:
        return checksum(block) == _number(block[148:156])
    except Damaged:
        return False


def _number(field: bytes) -> int:
    if field[0] & 0x80:
        if field[0] & 0x40:
            raise Damaged('the archive has a member of negative size')
        number = int.from_bytes(bytes([field[0] & 0x7f]) + field[1:], 'big')
        if number >= 1 << 63:
            raise Damaged('the archive has an unreadable header')
        return number
    text = field.split(b'\0', 1)[0].strip(b' ')
    if text.strip(b'01234567'):
        raise Damaged('the archive has an unreadable header')
    return int(text, 8) if text else 0


def _decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > 18:
        raise Damaged('the archive has an unreadable extended header')
    return int(text)


def _c_string(content: bytes) -> bytes:
    name, _nul, rest = content.partition(b'\0')
    if not name or rest.strip(b'\0'):
        raise Damaged('the archive has an unreadable long name')
    return name


def _name(block: bytes) -> bytes:
    name = block[:100].split(b'\0', 1)[0]
    if block[257:263] == b'ustar\0':
        prefix = block[345:500].split(b'\0', 1)[0]
        if prefix:
            name = prefix + b'/' + name
    return name


#: Records whose values are strings that GNU tar ends at a NUL.
_STRINGS = (b'path', b'linkpath', b'GNU.sparse.name')


def _pax_records(content: bytes) -> list[tuple[bytes, bytes]]:
    records = []
    position = 0
    while position < len(content):
        length, separator, _rest = content[position:position + 20].partition(
            b' ')
        if not length.strip(b'\0') and not content[position:].strip(b'\0'):
            break
        end = position + _decimal(length)
        start = position + len(length) + 1
        key, equals, value = content[start:end - 1].partition(b'=')
        if (not separator or end > len(content) or end <= start or
                content[end - 1:end] != b'\n' or not equals or not key or
                (key in _STRINGS and (not value or b'\0' in value))):
            raise Damaged('the archive has an unreadable extended header')
        records.append((key, value))
        position = end
    return records
