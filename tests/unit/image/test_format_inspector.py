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

"""Telling what an image is from its bytes."""

from __future__ import annotations

import gzip
import random
import tarfile
import tracemalloc
import zlib

import ddt
from oslotest import base
import zstandard

from nova_lxd_py.virt.image import decompression
from nova_lxd_py.virt.image import format_inspector
from tests.fixtures import format_case
from tests.fixtures import image_samples

Kind = format_inspector.Kind

COMPRESSIONS = image_samples.COMPRESSIONS
METADATA = image_samples.METADATA
ROOTFS = image_samples.ROOTFS
elf = image_samples.elf
inspect = format_case.inspect
squashfs = image_samples.squashfs
tar = image_samples.tar
unified = image_samples.unified


@ddt.ddt
class ArchiveTestCase(format_case.FormatTestCase):

    @ddt.data(*COMPRESSIONS)
    def test_rootfs(self, compression: str) -> None:
        plain = tar(ROOTFS)
        found = inspect(COMPRESSIONS[compression](plain))
        self.assertEqual((Kind.ROOTFS, None, len(plain)),
                         (found.kind, found.architecture,
                          found.unpacked_size))

    @ddt.data(*COMPRESSIONS)
    def test_unified(self, compression: str) -> None:
        found = inspect(COMPRESSIONS[compression](unified()))
        # Its headers, content and end, without metadata.
        size = 512 * (1 + len(ROOTFS) + 2 + 2)
        self.assertEqual((Kind.UNIFIED, 'x86_64', size),
                         (found.kind, found.architecture,
                          found.unpacked_size))

    @ddt.data('./', './/', '././')
    def test_prefixes(self, prefix: str) -> None:
        self.assertEqual(Kind.ROOTFS, inspect(tar(ROOTFS, prefix)).kind)
        plain = tar({'metadata.yaml': METADATA, 'rootfs/etc': None}, prefix)
        self.assertEqual(Kind.UNIFIED, inspect(plain).kind)

    @ddt.data(tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    def test_dialects(self, dialect: int) -> None:
        members = dict(ROOTFS)
        # Longer than a plain header holds, and not in ASCII.
        members[f'usr/share/{"d" * 90}/{"f" * 90}'] = b'x' * 600
        if dialect != tarfile.USTAR_FORMAT:
            members[f'usr/share/{"ü" * 120}'] = b'y' * 513
        plain = tar(members, format=dialect)
        self.assertEqual(len(plain), inspect(plain).unpacked_size)

    @ddt.data(1, 7, 511, 512, 513, 10007)
    def test_any_chunks(self, chunk: int) -> None:
        members = {**ROOTFS, 'usr/a': b'x' * 1000, f'usr/{"l" * 200}': b'y'}
        for compression, compress in COMPRESSIONS.items():
            plain = tar(members)
            with self.subTest(compression):
                self.assertEqual(len(plain), inspect(
                    compress(plain), chunk).unpacked_size)

    def test_metadata_comes_last(self) -> None:
        plain = tar({'rootfs': None, 'rootfs/etc/motd': b'x' * 3000,
                     'metadata.yaml': b'architecture: aarch64\n'})
        self.assertEqual('aarch64', inspect(plain).architecture)

    def test_only_metadata_is_read(self) -> None:
        """Other files of an LXD image mean nothing, wherever they are."""
        other = b'architecture: riscv64\n'
        plain = tar({'templates': None, 'templates/hosts.tpl': other,
                     'backup.yaml': other, 'rootfs': None,
                     'rootfs/metadata.yaml': other,
                     'metadata.yaml': METADATA, 'metadata.yaml.old': other})
        self.assertEqual('x86_64', inspect(plain).architecture)

    def test_metadata_is_a_file(self) -> None:
        member = tarfile.TarInfo('metadata.yaml')
        member.type, member.linkname = tarfile.SYMTYPE, 'rootfs/etc/motd'
        link = member.tobuf()
        plain = tar({'metadata.yaml': METADATA, 'rootfs': None})
        self.assertEqual('x86_64', inspect(link + plain).architecture)

    def test_kind_is_known_early(self) -> None:
        """LXD must be told before it gets the first byte."""
        plain = tar({**ROOTFS, 'usr/large': random.randbytes(1 << 20)})
        for data, kind in ((plain, Kind.ROOTFS),
                           (gzip.compress(plain), Kind.ROOTFS),
                           (unified() + bytes(1 << 20), Kind.UNIFIED),
                           (squashfs() + bytes(1 << 20), Kind.SQUASHFS)):
            inspector = format_inspector.Inspector(1 << 30)
            inspector.feed(data[:65536])
            self.assertIs(kind, inspector.kind)

    def test_programs(self) -> None:
        found = inspect(tar({**ROOTFS, 'usr/bin/a': elf(183),
                             'bin/b': elf(62), 'usr/lib/c': elf(22, True),
                             'usr/sbin/d': elf(40)}))
        self.assertEqual({'aarch64', 'x86_64', 'armv7l', 'armv6l', 'armv8l'},
                         found.programs)
        found = inspect(tar({**ROOTFS, 'bin/s': elf(22, True)}))
        self.assertEqual({'s390x'}, found.programs)

    def test_huge_sizes_in_headers(self) -> None:
        """Files above 8 GiB have their size in another notation."""
        for dialect in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            member = tarfile.TarInfo('usr/huge')
            member.size = 9 << 30
            plain = tar(ROOTFS)
            data = plain[:plain.index(b'usr/bin/init')] + member.tobuf(dialect)
            self.assertUnacceptable('breaks off', data + bytes(5000))

    def test_sparse_file(self) -> None:
        """GNU's old form has its map between header and content."""
        member = tarfile.TarInfo('usr/sparse')
        member.size = 512
        member.type = b'S'
        block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
        block[482] = 1
        block[148:156] = b' ' * 8
        block[148:156] = b'%06o\0 ' % sum(block)
        plain = tar(ROOTFS)
        first_extension = bytearray(512)
        first_extension[504] = 1
        data = (plain[:512] + bytes(block) + bytes(first_extension) +
                bytes(512) + b'x' * 512 + plain[512:])
        self.assertEqual(Kind.ROOTFS, inspect(data).kind)

    @ddt.data('gzip', 'bzip2', 'xz', 'zstd')
    def test_several_streams(self, compression: str) -> None:
        """Parallel compressors write one stream after the other."""
        plain = tar({**ROOTFS, 'usr/a': random.randbytes(9000)})
        compress = COMPRESSIONS[compression]
        data = b''.join(compress(plain[start:start + 3000])
                        for start in range(0, len(plain), 3000))
        for chunk in (1, 100, 65536):
            self.assertEqual(len(plain), inspect(data, chunk).unpacked_size)

    def test_padding(self) -> None:
        for compress in COMPRESSIONS.values():
            self.assertEqual(Kind.ROOTFS, inspect(
                compress(tar(ROOTFS)) + bytes(4096)).kind)

    def test_no_rubbish_behind(self) -> None:
        for name in ('gzip', 'bzip2', 'xz', 'lzma', 'zstd'):
            self.assertUnacceptable('something else follows', COMPRESSIONS[
                name](tar(ROOTFS)) + b'rubbish, and more of it')

    def test_skippable_frames(self) -> None:
        frame = b'\x52\x2a\x4d\x18\x04\0\0\0abcd'
        data = COMPRESSIONS['zstd'](tar(ROOTFS))
        self.assertEqual(Kind.ROOTFS, inspect(data + frame + data).kind)


@ddt.ddt
class DamageTestCase(format_case.FormatTestCase):

    @ddt.data(*COMPRESSIONS)
    def test_truncated(self, compression: str) -> None:
        members = {**ROOTFS, 'usr/a': random.randbytes(60000)}
        data = COMPRESSIONS[compression](tar(members))
        for share in (0.1, 0.5, 0.8):
            self.assertUnacceptable(
                'breaks off', data[:int(len(data) * share)])

    @ddt.data('gzip', 'bzip2', 'xz', 'lzma', 'zstd')
    def test_last_byte_missing(self, compression: str) -> None:
        data = COMPRESSIONS[compression](tar(ROOTFS))
        self.assertUnacceptable('breaks off', data[:-1])

    def test_archive_cut_between_members(self) -> None:
        plain = tar(ROOTFS)
        end = plain.index(b'usr/bin/init')
        self.assertUnacceptable('breaks off', plain[:end])

    @ddt.data('gzip', 'bzip2', 'xz')
    def test_flipped_bit(self, compression: str) -> None:
        members = {**ROOTFS, 'usr/a': random.randbytes(60000)}
        data = bytearray(COMPRESSIONS[compression](tar(members)))
        data[len(data) // 2] ^= 4
        self.assertUnacceptable('damaged|no header|unreadable', bytes(data))

    def test_nothing_but_unacceptable(self) -> None:
        """Whatever the bytes, no other exception comes out."""
        generator = random.Random(7)
        sources = [compress(tar(ROOTFS)) for compress
                   in COMPRESSIONS.values()]
        sources += [unified(), *map(squashfs, image_samples.SQUASHFS)]
        for _round in range(40):
            for source in sources:
                data = bytearray(source)
                for _flip in range(generator.randint(1, 20)):
                    data[generator.randrange(len(data))] = (
                        generator.randrange(256))
                try:
                    inspect(bytes(data), limit=16 << 20)
                except format_inspector.UnacceptableImage as exc:
                    self.assertTrue(exc.reason)

    def test_broken_metadata(self) -> None:
        for metadata in (b'', b'{', b'- a\n', b'architecture:\n',
                         b'architecture: [1]\n', b'\xff\xfe', b'a: &x [*x]',
                         b'[' * 400, b'creation_date: 1\n'):
            self.assertUnacceptable('names no architecture',
                                    unified(metadata))
        self.assertUnacceptable('larger', unified(b'#' * 200000))


@ddt.ddt
class SizeTestCase(format_case.FormatTestCase):

    @ddt.data('gzip', 'bzip2', 'xz', 'lzma', 'zstd')
    def test_bomb(self, compression: str) -> None:
        """It is noticed early, and costs no memory."""
        start = tar(ROOTFS)[:-512 * 4]
        member = tarfile.TarInfo('usr/zeros')
        member.size = 40 << 20
        data = COMPRESSIONS[compression](
            start[:512 * 2] + member.tobuf() + bytes(40 << 20))
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        self.assertUnacceptable('more than 0 GiB.*image_max_unpacked_gb',
                                data, limit=8 << 20)
        _now, peak = tracemalloc.get_traced_memory()
        self.assertLess(peak, 40 << 20)

    def test_window_too_large(self) -> None:
        parameters = zstandard.ZstdCompressionParameters(
            window_log=28, write_content_size=False)
        compressor = zstandard.ZstdCompressor(
            compression_params=parameters).compressobj()
        data = compressor.compress(tar(ROOTFS)) + compressor.flush()
        self.assertUnacceptable('zstd data is damaged', data)

    def test_squashfs_bomb(self) -> None:
        self.assertUnacceptable('more than', squashfs(), limit=100000)

    @ddt.data(*image_samples.SQUASHFS)
    def test_squashfs(self, compression: str) -> None:
        for chunk in (1, 100, 65536):
            found = inspect(squashfs(compression) + bytes(3000), chunk)
            self.assertEqual(
                (Kind.SQUASHFS, None, image_samples.SQUASHFS_SIZE),
                (found.kind, found.architecture, found.unpacked_size))

    @ddt.data(*image_samples.SQUASHFS)
    def test_truncated_squashfs(self, compression: str) -> None:
        data = squashfs(compression)
        self.assertUnacceptable('breaks off', data[:-1])
        self.assertUnacceptable('breaks off', data[:90])

    def test_squashfs_of_another_compressor(self) -> None:
        data = bytearray(squashfs())
        data[20] = 5
        self.assertUnacceptable('lz4.*mksquashfs -comp zstd', bytes(data))

    def test_damaged_squashfs(self) -> None:
        data = bytearray(squashfs())
        data[64:72] = (1 << 40).to_bytes(8, 'little')
        self.assertUnacceptable('superblock is damaged', bytes(data))
        data = bytearray(squashfs())
        data[0x90:0xb0] = bytes(32)
        self.assertUnacceptable('inode table is damaged', bytes(data))

    @ddt.data(0, 2048, 4095, (1 << 20) + 1)
    def test_block_size_of_squashfs(self, size: int) -> None:
        data = bytearray(squashfs())
        data[12:16] = size.to_bytes(4, 'little')
        self.assertUnacceptable('superblock is damaged', bytes(data))


def _at(offset: int, magic: bytes) -> bytes:
    return (bytes(offset) + magic).ljust(70000, b'\0')


@ddt.ddt
class OtherFilesTestCase(format_case.FormatTestCase):

    @ddt.data(
        (b'QFI\xfb\0\0\0\x03' + bytes(70000), 'qcow2'),
        (b'KDMV' + bytes(70000), 'VMDK'),
        (b'vhdxfile' + bytes(70000), 'VHDX'),
        (b'conectix' + bytes(70000), 'VHD'),
        (_at(64, b'\x7f\x10\xda\xbe'), 'VDI'),
        (_at(0x8001, b'CD001'), 'ISO'),
        (_at(512, b'EFI PART'), 'GPT'),
        (_at(510, b'\x55\xaa'), 'boot sector'),
        (_at(0x438, b'\x53\xef'), 'ext4'),
        (elf(62) + bytes(70000), 'program'),
        (b'PK\x03\x04' + bytes(70000), 'zip'),
        (bytes(70000), 'zeros'),
        (b'', 'empty'),
        (b'x', 'text'),
        (b'#!/bin/sh\necho hello\n', 'text'),
        (b'<!DOCTYPE html><html>Not found</html>', 'web page'),
        (b'\x04\x22\x4d\x18' + bytes(7000), 'lz4'),
        (b'\x80\x81\x82' * 300, 'no known kind'))
    @ddt.unpack
    def test_named(self, data: bytes, name: str) -> None:
        self.assertUnacceptable(f'{name}.*rootfs tarball or a squashfs', data)

    def test_named_inside_compression(self) -> None:
        qcow2 = b'QFI\xfb\0\0\0\x03' + bytes(700)
        for name in ('gzip', 'bzip2', 'xz', 'zstd'):
            self.assertUnacceptable(f'{name}-compressed and inside a qcow2',
                                    COMPRESSIONS[name](qcow2))
        self.assertUnacceptable('gzip-compressed and inside empty',
                                gzip.compress(b''))

    def test_archive_that_is_a_disk_to_lxd(self) -> None:
        """LXD goes by the first bytes, which are a member's name here."""
        self.assertUnacceptable('qcow2', tar(
            {'QFI\udcfb': b'x', **ROOTFS}, format=tarfile.GNU_FORMAT))

    def test_archives_of_other_things(self) -> None:
        for members, reason in (
                ({'README': b'x', 'src': None}, 'README, src.*tar -C ROOTFS'),
                ({'disk.raw': b'x' * 999}, r'disk image \(disk.raw\)'),
                ({'blobs': None, 'oci-layout': b'{}'}, 'OCI.*docker export'),
                ({'debian/etc/passwd': b'x'}, 'at its top are debian'),
                ({'home/me/notes': b'x'}, 'at its top are home'),
                ({'metadata.yaml': METADATA}, 'metadata half'),
                ({'rootfs/etc': None}, 'no metadata.yaml')):
            self.assertUnacceptable(reason, tar(members))
        self.assertUnacceptable('no known kind|zeros', tar({}))

    def test_endless_archive_of_other_things(self) -> None:
        """What it is must be clear at some point: all of it is in memory
        until then."""
        inspector = format_inspector.Inspector(1 << 40)
        member = tarfile.TarInfo('video')
        member.size = 1 << 30
        inspector.feed(member.tobuf())

        def feed_forever() -> None:
            for _number in range(100):
                inspector.feed(bytes(1 << 20))

        self.assertRaises(format_inspector.UnacceptableImage, feed_forever)


@ddt.ddt
class ArchitectureTestCase(base.BaseTestCase):

    @ddt.data(('amd64', 'x86_64'), ('X86_64', 'x86_64'), ('i586', 'i686'),
              ('arm64', 'aarch64'), ('armhf', 'armv7l'),
              ('ppc64el', 'ppc64le'), ('riscv64', 'riscv64'))
    @ddt.unpack
    def test_names(self, name: str, expected: str) -> None:
        self.assertEqual(
            expected,
            format_inspector.canonical_architecture(name))


class DecompressorTestCase(base.BaseTestCase):

    def test_pieces_are_small(self) -> None:
        for name in ('gzip', 'bzip2', 'xz', 'lzma', 'zstd'):
            plain = bytes(8 << 20)
            total = 0
            decompressor = decompression.Decompressor(name)
            for piece in decompressor.feed(COMPRESSIONS[name](plain)):
                total += len(piece)
                if name != 'zstd':
                    self.assertLessEqual(len(piece), decompression.PIECE)
            decompressor.finish()
            self.assertEqual(len(plain), total)

    def test_order_and_content(self) -> None:
        plain = b''.join(bytes([number % 251]) * number
                         for number in range(3000))
        for name in ('gzip', 'bzip2', 'xz', 'lzma', 'zstd'):
            packed = COMPRESSIONS[name](plain)
            decompressor = decompression.Decompressor(name)
            found = b''.join(
                piece for start in range(0, len(packed), 999)
                for piece in decompressor.feed(packed[start:start + 999]))
            self.assertEqual(zlib.crc32(plain), zlib.crc32(found))
