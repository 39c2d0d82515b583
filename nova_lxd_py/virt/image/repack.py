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
"""Extraction of the root filesystem of an LXD image during the transfer.

An LXD image is an archive of metadata.yaml, templates/ and rootfs/. Only what
is below rootfs/ may come from the tenant: it becomes an archive of a root
filesystem, with the same content, owners, times and attributes.

Large files get the holes back that LXD has filled with zeros when it created
the image of a server: otherwise a sparse file of a server (``truncate -s 5G``)
would take up all of its size on the next server's disk.
"""

from __future__ import annotations

from nova_lxd_py.virt.image import tar

#: Unit in which holes are looked for.
GRAIN = 64 << 10
#: Files of this size and more are searched for holes.
MIN_SIZE = 1 << 20
#: Bytes of content of a file to keep while it is searched. No holes are made
#: after that: in the archive, the map of a file comes before its content.
LOOKAHEAD = 16 << 20

_ZEROS = bytes(GRAIN)
_USTAR = b'ustar\x0000'


class Repacker:
    """Writes an archive of the members that it is given.

    :ivar size: bytes written altogether.
    """

    def __init__(self) -> None:
        self.size = 0
        self._output: list[bytes] = []

    def take(self) -> list[bytes]:
        """Return what has been written since the last call."""
        output, self._output = self._output, []
        return output

    def add(self, member: tar.Member, path: str, link: str
            ) -> tar.ContentSink:
        """Write a member.

        :param member: as it was read.
        :param path: the path that it gets; '' for the root.
        :param link: the target that it gets if it is a hard link.
        :returns: what receives its content.
        """
        name = _encode(path) or b'.'
        if member.kind == tar.DIRECTORY:
            name += b'/'
        target = (_encode(link) if member.kind == tar.HARD_LINK
                  else member.link)
        if (member.kind == tar.REGULAR and not member.sparse and
                member.size >= MIN_SIZE):
            return _HoleFinder(self, member, name)
        self.write(_headers(member, name, target))
        return _Passing(self, member.size)

    def finish(self) -> None:
        """Write the end of the archive."""
        self.write(bytes(2 * tar.BLOCK))

    def write(self, data: bytes | memoryview) -> None:
        """Append to the archive."""
        self.size += len(data)
        self._output.append(bytes(data))


class _Passing:
    """Passes content on."""

    def __init__(self, repacker: Repacker, size: int) -> None:
        self._repacker = repacker
        self._padding = -size % tar.BLOCK

    def write(self, data: memoryview) -> None:
        self._repacker.write(data)

    def close(self) -> None:
        if self._padding:
            self._repacker.write(bytes(self._padding))


class _HoleFinder:
    """Writes a file without its holes."""

    def __init__(self, repacker: Repacker, member: tar.Member, name: bytes
                 ) -> None:
        self._repacker = repacker
        self._member = member
        self._name = name
        self._rest = bytearray()
        #: Content and the pieces of the file that it makes up.
        self._kept = bytearray()
        self._pieces: list[list[int]] = []
        self._position = 0
        self._passing: _Passing | None = None

    def write(self, data: memoryview) -> None:
        if self._passing is not None:
            self._passing.write(data)
            return
        self._rest += data
        start = 0
        while len(self._rest) - start >= GRAIN:
            self._take(bytes(self._rest[start:start + GRAIN]))
            start += GRAIN
        del self._rest[:start]
        if len(self._kept) > LOOKAHEAD:
            self._decide(bytes(self._rest))

    def close(self) -> None:
        if self._passing is None:
            if self._rest:
                self._take(bytes(self._rest))
            self._decide(b'')
        assert self._passing is not None
        self._passing.close()

    def _take(self, part: bytes) -> None:
        if part != _ZEROS[:len(part)]:
            if not self._pieces or sum(self._pieces[-1]) != self._position:
                self._pieces.append([self._position, 0])
            self._pieces[-1][1] += len(part)
            self._kept += part
        self._position += len(part)

    def _decide(self, rest: bytes) -> None:
        """Write the file so far, and what follows as it comes.

        :param rest: content that is not in a piece yet.
        """
        size = self._member.size
        left = size - self._position
        if left:
            if not self._pieces or sum(self._pieces[-1]) != self._position:
                self._pieces.append([self._position, 0])
            self._pieces[-1][1] += left
        stored = sum(length for _start, length in self._pieces)
        if stored == size:
            self._repacker.write(_headers(self._member, self._name,
                                          self._member.link))
        else:
            pieces = self._pieces
            if not pieces or sum(pieces[-1]) != size:
                # A hole at the end needs an entry in the map as well.
                pieces.append([size, 0])
            index = _sparse_map(pieces)
            self._repacker.write(_sparse_headers(
                self._member, self._name, len(index) + stored) + index)
        self._passing = _Passing(self._repacker, stored)
        self._repacker.write(bytes(self._kept))
        self._repacker.write(rest)
        self._kept.clear()
        self._rest.clear()


def _encode(path: str) -> bytes:
    return path.encode('utf-8', 'surrogateescape')


def _headers(member: tar.Member, name: bytes, link: bytes) -> bytes:
    """Write the headers of a member with another name."""
    block = bytearray(member.header)
    if block[257:263] == b'ustar\0':
        block[345:500] = bytes(155)
    if member.kind == tar.DIRECTORY:
        block[156:157] = tar.DIRECTORY
    records = []
    is_named = is_linked = False
    for key, value in member.records:
        if key in (b'path', b'GNU.sparse.name'):
            value, is_named = name, True
        elif key == b'linkpath':
            value, is_linked = link, True
        records.append((key, value))
    parts = [tar.pax_header(tuple(records))]
    for kind, value, start, known in ((b'L', name, 0, is_named),
                                      (b'K', link, 157, is_linked)):
        if len(value) > 100 and not known:
            parts.append(tar.long_header(kind, value))
        block[start:start + 100] = value[:100].ljust(100, b'\0')
    return b''.join((*parts, tar.with_checksum(block)))


def _sparse_headers(member: tar.Member, name: bytes, stored: int) -> bytes:
    """Write the headers of a file with holes (GNU's pax format 1.0).

    :param stored: bytes of its map and its content.
    """
    block = bytearray(member.header[:tar.BLOCK])
    block[257:265] = _USTAR
    block[345:512] = bytes(167)
    block[:100] = name[:100].ljust(100, b'\0')
    block[124:136] = tar.number_field(stored)
    block[156:157] = tar.REGULAR
    records = tuple((key, value) for key, value in member.records
                    if key not in (b'path', b'size'))
    return tar.pax_header((
        *records, (b'GNU.sparse.major', b'1'), (b'GNU.sparse.minor', b'0'),
        (b'GNU.sparse.name', name),
        (b'GNU.sparse.realsize', b'%d' % member.size),
    )) + tar.with_checksum(block)


def _sparse_map(pieces: list[list[int]]) -> bytes:
    text = b'%d\n' % len(pieces) + b''.join(
        b'%d\n%d\n' % (start, length) for start, length in pieces)
    return text + bytes(-len(text) % tar.BLOCK)
