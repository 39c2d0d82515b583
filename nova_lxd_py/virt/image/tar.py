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
"""Reading the headers of a tar archive while it passes by.

Nothing is unpacked here; that is LXD's job. The walk tells what kind of image
an archive is, for which processors, and whether it is complete.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses

BLOCK = 512
#: Longest extended header or captured file that is kept in memory.
MAX_CAPTURE = 1 << 20

_ZEROS = bytes(BLOCK)
_REGULAR = (b'0', b'\0', b'7', b'S')
_BODILESS = (b'1', b'2', b'3', b'4', b'6')


class NotTar(Exception):
    """The stream is not a tar archive from its beginning."""


class Damaged(Exception):
    """The archive began well and then cannot be read."""


@dataclasses.dataclass(frozen=True)
class Member:
    """One member of an archive.

    :ivar path: without a leading ``./`` or ``/``; '' for the top itself.
    :ivar regular: whether it is a file with content.
    :ivar size: bytes of content in the archive.
    """

    path: str
    regular: bool
    size: int

    @property
    def top(self) -> str:
        """The first component of the path."""
        return self.path.partition('/')[0]


#: Called with each member; returns how many bytes of its content to give to
#: OnContent, or None for no call.
OnMember = Callable[[Member], 'int | None']
#: Called with a member and the beginning of its content.
OnContent = Callable[[Member, bytes], None]


class Walker:
    """Follows a tar archive (v7, ustar, pax, GNU) from header to header.

    :param on_member: called for each member, in order.
    :param on_content: called for members of which content was asked for.
    """

    def __init__(self, on_member: OnMember, on_content: OnContent) -> None:
        self._on_member = on_member
        self._on_content = on_content
        self.members = 0
        #: Whether the marker at the end of the archive has been seen.
        self.complete = False
        self._buffer = bytearray()
        self._skip = 0
        self._wanted = 0
        self._deliver: Callable[[bytes], None] | None = None
        self._sparse = False
        self._long_name: str | None = None
        self._pax: dict[str, str] = {}
        self._global_pax: dict[str, str] = {}

    def feed(self, data: bytes) -> None:
        """Give the next part of the archive.

        :param data: any number of bytes.
        :raises NotTar: there is no tar header at the very beginning.
        :raises Damaged: there is none where one must be later.
        """
        position, end = 0, len(data)
        while position < end and not self.complete:
            if self._wanted:
                taken = min(self._wanted, end - position)
                self._buffer += data[position:position + taken]
                self._wanted -= taken
                position += taken
                if not self._wanted:
                    self._captured()
            elif self._skip and not self._sparse:
                taken = min(self._skip, end - position)
                self._skip -= taken
                position += taken
            elif not self._buffer and end - position >= BLOCK:
                self._block(data[position:position + BLOCK])
                position += BLOCK
            else:
                taken = min(BLOCK - len(self._buffer), end - position)
                self._buffer += data[position:position + taken]
                position += taken
                if len(self._buffer) == BLOCK:
                    block = bytes(self._buffer)
                    self._buffer.clear()
                    self._block(block)

    def finish(self) -> None:
        """Say that the archive is at its end.

        :raises NotTar: not even one header came.
        :raises Damaged: it should have gone on.
        """
        if self.complete:
            return
        if not self.members:
            raise NotTar()
        raise Damaged('the archive breaks off before its end')

    def _captured(self) -> None:
        content = bytes(self._buffer)
        self._buffer.clear()
        deliver, self._deliver = self._deliver, None
        assert deliver is not None
        deliver(content)

    def _capture(self, size: int, limit: int,
                 deliver: Callable[[bytes], None]) -> None:
        """Keep the first bytes of the content that follows, skip the rest."""
        padded = -(-size // BLOCK) * BLOCK
        self._wanted = min(size, limit)
        self._skip = padded - self._wanted
        self._deliver = deliver
        if not self._wanted:
            self._captured()

    def _block(self, block: bytes) -> None:
        if self._sparse:
            # A further block of the map of a sparse file.
            self._sparse = block[504] != 0
            return
        if block == _ZEROS:
            self.complete = True
            return
        if not _checksum_fits(block):
            if not self.members:
                raise NotTar()
            raise Damaged('the archive has no header where one must be')
        kind = block[156:157]
        size = 0 if kind in _BODILESS else _number(block[124:136])
        self.members += 1
        if kind in (b'L', b'K', b'x', b'X', b'g'):
            if size > MAX_CAPTURE:
                raise Damaged('the archive has an oversized header')
            self._capture(size, size, {
                b'L': self._set_long_name, b'K': lambda content: None,
                b'x': self._set_pax, b'X': self._set_pax,
                b'g': self._set_global_pax}[kind])
            return
        self._member(block, kind, size)

    def _member(self, block: bytes, kind: bytes, size: int) -> None:
        overrides = {**self._global_pax, **self._pax}
        path = overrides.get('path') or self._long_name or _path(block)
        if kind not in _BODILESS and overrides.get('size', '').isdigit():
            size = int(overrides['size'])
        self._pax, self._long_name = {}, None
        if kind == b'S':
            self._sparse = block[482] != 0
        member = Member(_clean(path), kind in _REGULAR, size)
        wanted = self._on_member(member)
        if wanted is not None and not self._sparse:
            self._capture(size, min(wanted, MAX_CAPTURE),
                          lambda content: self._on_content(member, content))
        else:
            self._skip = -(-size // BLOCK) * BLOCK

    def _set_long_name(self, content: bytes) -> None:
        self._long_name = content.rstrip(b'\0').decode('utf-8', 'replace')

    def _set_pax(self, content: bytes) -> None:
        self._pax = _pax_records(content)

    def _set_global_pax(self, content: bytes) -> None:
        self._global_pax.update(_pax_records(content))


def _checksum_fits(block: bytes) -> bool:
    try:
        stated = _number(block[148:156])
    except Damaged:
        return False
    # The field itself counts as spaces.
    return sum(block) - sum(block[148:156]) + 8 * 32 == stated


def _number(field: bytes) -> int:
    if field[0] & 0x80:
        if field[0] & 0x40:
            raise Damaged('the archive has a member of negative size')
        return int.from_bytes(bytes([field[0] & 0x7f]) + field[1:], 'big')
    text = field.split(b'\0', 1)[0].strip()
    try:
        return int(text, 8) if text else 0
    except ValueError:
        raise Damaged('the archive has an unreadable header') from None


def _path(block: bytes) -> str:
    name = block[:100].split(b'\0', 1)[0]
    if block[257:263] == b'ustar\0':
        prefix = block[345:500].split(b'\0', 1)[0]
        if prefix:
            name = prefix + b'/' + name
    return name.decode('utf-8', 'replace')


def _clean(path: str) -> str:
    return '/'.join(part for part in path.split('/') if part not in ('', '.'))


def _pax_records(content: bytes) -> dict[str, str]:
    records: dict[str, str] = {}
    position = 0
    while position < len(content):
        length, separator, _rest = content[position:position + 20].partition(
            b' ')
        if not separator or not length.isdigit() or not int(length):
            break
        record = content[position + len(length) + 1:
                         position + int(length) - 1]
        key, _equals, value = record.partition(b'=')
        records[key.decode('utf-8', 'replace')] = value.decode(
            'utf-8', 'replace')
        position += int(length)
    return records
