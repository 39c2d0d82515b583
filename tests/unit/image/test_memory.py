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

"""Memory while an image is inspected: bounded, whatever the image is."""

from __future__ import annotations

from collections.abc import Iterator
import lzma
import struct
import tarfile
import tracemalloc
import zlib

import ddt
from oslotest import base
import zstandard

from nova_lxd_py.virt.image import format_inspector
from tests.fixtures import image_samples

MIB = 1 << 20

BLOCK_COMPRESSIONS = {
    'gzip': zlib.compress,
    'xz': lambda data: lzma.compress(data, check=lzma.CHECK_CRC32),
    'zstd': zstandard.ZstdCompressor().compress,
}


def header(kind: bytes, size: int, name: str = 'x') -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf()


def record(key: str, size: int) -> bytes:
    """A pax record of some size in all."""
    start = f'{size} {key}='.encode()
    return start + b'x' * (size - len(start) - 1) + b'\n'


@ddt.ddt
class MemoryTestCase(base.BaseTestCase):

    def measure(self, parts: Iterator[bytes], limit: int,
                reason: str | None = None) -> None:
        """Inspect an image.

        :param limit: most bytes of memory.
        :param reason: why the image is refused, None for one that is not.
        """
        inspector = format_inspector.Inspector(1 << 30)
        refused = None
        tracemalloc.start()
        try:
            for part in parts:
                for _piece in inspector.process(part):
                    pass
            for _piece in inspector.end():
                pass
        except format_inspector.UnacceptableImage as exc:
            refused = exc.reason
        finally:
            _now, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        self.assertLess(peak, limit)
        if reason is None:
            self.assertIsNone(refused)
        else:
            self.assertRegex(refused or '', reason)

    def test_global_headers(self) -> None:
        def parts() -> Iterator[bytes]:
            yield image_samples.tar(
                image_samples.ROOTFS)[:512]
            for number in range(50):
                yield header(tarfile.XGLTYPE, MIB) + record(
                    f'comment.{number}', MIB)

        self.measure(parts(), 8 * MIB, 'oversized global headers')

    def test_extended_headers(self) -> None:
        def parts() -> Iterator[bytes]:
            yield header(tarfile.DIRTYPE, 0, 'etc')
            for number in range(20):
                yield (header(tarfile.XHDTYPE, MIB) +
                       record('SCHILY.xattr.user.x', MIB) +
                       header(tarfile.REGTYPE, 0, f'etc/{number}'))
            yield bytes(1024)

        self.measure(parts(), 10 * MIB)

    def names(self, directory: str) -> Iterator[bytes]:
        """An archive of empty files, whose names alone have 500 kB."""
        # Made beforehand, since all is slow while memory is measured.
        return iter([*(header(tarfile.REGTYPE, 0,
                              f'{directory}{number:04}-{"n" * 90}')
                       for number in range(5000)), bytes(1024)])

    def test_names_at_the_top(self) -> None:
        self.measure(self.names(''), MIB // 2, 'not of a root filesystem')

    def test_members(self) -> None:
        self.measure(self.names('etc/'), MIB // 2)

    def test_map_of_a_sparse_file(self) -> None:
        def parts() -> Iterator[bytes]:
            first = bytearray(header(b'S', 0, 'etc/x'))
            first[257:265] = b'ustar  \0'
            first[482] = 1
            first[148:156] = b' ' * 8
            first[148:156] = b'%06o\0 ' % sum(first)
            yield bytes(first)
            extension = bytearray(512)
            extension[504] = 1
            for _number in range(1000):
                yield bytes(extension) * 100

        self.measure(parts(), 12 * MIB, 'too many pieces')

    def test_holes(self) -> None:
        """A file with content and holes by turns is kept up to a limit."""
        grain = b'x' * (64 << 10) + bytes(64 << 10)

        def parts() -> Iterator[bytes]:
            metadata = image_samples.METADATA
            yield (header(tarfile.REGTYPE, len(metadata), 'metadata.yaml') +
                   metadata.ljust(512, b'\0') +
                   header(tarfile.DIRTYPE, 0, 'rootfs') +
                   header(tarfile.REGTYPE, 48 * MIB, 'rootfs/x'))
            for _number in range(384):
                yield grain
            yield bytes(1024)

        self.measure(parts(), 80 * MIB)

    def squashfs(self, compression: str, block: bytes) -> bytes:
        """A squashfs with a table of inodes of the test's own."""
        data = bytearray(image_samples.squashfs(compression))
        table = struct.unpack_from('<Q', data, 64)[0]
        packed = BLOCK_COMPRESSIONS[compression](block)
        made = bytearray(data[:table])
        made += struct.pack('<H', len(packed)) + packed
        struct.pack_into('<Q', made, 72, len(made))
        made += bytes(100)
        struct.pack_into('<Q', made, 40, len(made))
        return bytes(made)

    @ddt.data('gzip', 'xz', 'zstd')
    def test_metadata_block_of_squashfs(self, compression: str) -> None:
        """It has 8 KiB at most, and not a gigabyte."""
        sizes = {'gzip': 4, 'xz': 20, 'zstd': 64}
        data = self.squashfs(compression, bytes(sizes[compression] * MIB))
        self.assertLess(len(data), 40000)
        self.measure(iter((data,)), 12 * MIB, 'inode table is damaged')
