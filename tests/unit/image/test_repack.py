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

"""Root filesystems taken out of LXD images: the same after GNU tar."""

from __future__ import annotations

import io
import os
import pathlib
import random
import subprocess
import tarfile
from typing import Any

import ddt
import fixtures
from oslotest import base

from nova_lxd_py.virt.image import format_inspector
from nova_lxd_py.virt.image import repack
from tests.fixtures import image_samples

METADATA = image_samples.METADATA
MIB = 1 << 20


def taken_out(data: bytes, chunk: int = 65536) -> bytes:
    """Inspect an LXD image and return its root filesystem."""
    inspector = format_inspector.Inspector(1 << 30)
    pieces = []
    for start in range(0, len(data), chunk):
        pieces += inspector.process(data[start:start + chunk])
    pieces += inspector.end()
    return b''.join(pieces)


def image(*members: Any, prefix: str = '', **kwargs: Any) -> bytes:
    """Make an LXD image.

    :param members: each with its content or None.
    :param prefix: of all names in the archive.
    :param kwargs: as for tarfile.
    """
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode='w', **kwargs) as archive:
        for member, content in ((file('metadata.yaml', METADATA)),
                                (directory('rootfs')), *members):
            member.name = prefix + member.name
            archive.addfile(member, io.BytesIO(content or b''))
    return stream.getvalue()


def file(name: str, content: bytes = b'', **fields: Any) -> Any:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in fields.items():
        setattr(member, key, value)
    return member, content


def directory(name: str) -> Any:
    return file(name, type=tarfile.DIRTYPE, mode=0o755)


def listing(data: bytes, strip: int = 0) -> list[Any]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        found = []
        for member in archive:
            stream = archive.extractfile(member) if member.isreg() else None
            pax = {key: value for key, value in member.pax_headers.items()
                   if key not in ('path', 'linkpath')}
            found.append((
                member.name[strip:], member.type,
                member.linkname[strip if member.islnk() else 0:],
                member.mode, member.uid, member.gid, member.mtime,
                member.devmajor, member.devminor, pax,
                stream.read() if stream else None))
        return found


@ddt.ddt
class RepackTestCase(base.BaseTestCase):

    def members(self, dialect: int) -> list[Any]:
        deep = 'rootfs/usr/' + 'd' * 70 + '/' + 'e' * 60
        found = [
            file('rootfs/etc/hostname', b'x\n', mode=0o640, uid=7, gid=8,
                 mtime=1234567890),
            file('rootfs/usr/setuid', b'y' * 600, mode=0o4755, uid=65534),
            file('rootfs/usr/exactly', b'z' * 1024),
            file('rootfs/empty'),
            file('rootfs/sl', type=tarfile.SYMTYPE, linkname='/etc/hostname'),
            file('rootfs/hl', type=tarfile.LNKTYPE,
                 linkname='rootfs/etc/hostname'),
            file('rootfs/null', type=tarfile.CHRTYPE, devmajor=1, devminor=3),
            file('rootfs/fifo', type=tarfile.FIFOTYPE),
            file(deep[:97], b'name without a prefix' * 9),
            file(deep, b'name with a prefix'),
        ]
        if dialect != tarfile.USTAR_FORMAT:
            long = 'rootfs/usr/' + 'l' * 120
            found += [
                file(long, b'long'), file('rootfs/usr/ünï\udcff', b'odd'),
                file('rootfs/to-long', type=tarfile.LNKTYPE, linkname=long),
                file('rootfs/far', type=tarfile.SYMTYPE,
                     linkname='/' + 't' * 200),
                file('rootfs/' + 'm' * 99, b'short enough without rootfs/')]
        if dialect == tarfile.PAX_FORMAT:
            found += [
                file('rootfs/usr/attributes', b'a', mtime=1234.5, pax_headers={
                    'SCHILY.xattr.user.test': 'value=\nmore',
                    'SCHILY.xattr.security.capability': 'bytes'}),
                file('rootfs/large-uid', uid=1 << 30)]
        return found

    @ddt.data(tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    def test_same_members(self, dialect: int) -> None:
        for prefix in ('', './'):
            data = image(*self.members(dialect), prefix=prefix,
                         format=dialect)
            if prefix:
                # A hard link's target has no prefix here.
                self.assertTrue(taken_out(data))
                continue
            expected = listing(data, len('rootfs/'))[2:]
            for chunk in (65536, 1000, 1):
                found = listing(taken_out(data, chunk))
                self.assertEqual('.', found[0][0])
                self.assertEqual(expected, found[1:])

    def test_extended_headers_byte_by_byte(self) -> None:
        """Attributes are not text."""
        name = b'SCHILY.xattr.security.capability'
        value = b'\1\0\0\2\0\x20\0\0\0\0=\n\xff\xfe\0'
        record = b'%d ' % (len(name) + len(value) + 5) + name + b'=' + (
            value + b'\n')
        self.assertEqual(len(record), int(record.split()[0]))
        header = tarfile.TarInfo('pax')
        header.type, header.size = tarfile.XHDTYPE, len(record)
        data = image(file('rootfs/etc/x'), format=tarfile.USTAR_FORMAT)
        start = data.index(b'rootfs/etc/x')
        data = (data[:start] + header.tobuf(tarfile.USTAR_FORMAT) +
                record.ljust(512, b'\0') + data[start:])
        self.assertIn(record, taken_out(data))

    def unpack(self, data: bytes) -> pathlib.Path:
        """Unpack with GNU tar, as LXD does."""
        directory = pathlib.Path(self.useFixture(fixtures.TempDir()).path)
        subprocess.run(
            ['tar', '--restrict', '--force-local', '-C', str(directory),
             '--numeric-owner', '--xattrs-include=*', '-xf', '-'],
            input=data, check=True, capture_output=True)
        return directory

    def test_gnu_tar_unpacks_it(self) -> None:
        for dialect in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            members = [(member, content) for member, content
                       in self.members(dialect) if member.name != 'rootfs/null'
                       and '\udcff' not in member.name]
            root = self.unpack(taken_out(image(*members, format=dialect)))
            self.assertEqual(b'x\n', (root / 'hl').read_bytes())
            self.assertEqual(2, (root / 'etc/hostname').stat().st_nlink)
            self.assertEqual('/etc/hostname', os.readlink(root / 'sl'))
            self.assertEqual('/' + 't' * 200, os.readlink(root / 'far'))
            self.assertEqual(b'long', (root / 'to-long').read_bytes())

    def test_sparse_files_stay_sparse(self) -> None:
        """As GNU tar writes them, in all of its formats."""
        directory = pathlib.Path(self.useFixture(fixtures.TempDir()).path)
        (directory / 'rootfs').mkdir()
        content = random.randbytes(5000)
        name = 'sparse' + 'x' * 120
        with open(directory / 'rootfs' / name, 'wb') as stream:
            for position in range(0, 60 * MIB, 2 * MIB):
                stream.seek(position)
                stream.write(content)
            stream.truncate(64 * MIB)
        (directory / 'metadata.yaml').write_bytes(METADATA)
        expected = (directory / 'rootfs' / name).read_bytes()
        for options in (['--format=gnu'], ['--sparse-version=0.0'],
                        ['--sparse-version=0.1'], ['--sparse-version=1.0']):
            if 'gnu' not in options[0]:
                options.append('--format=posix')
            data = subprocess.run(
                ['tar', '-C', str(directory), '--sparse', *options, '-c',
                 'metadata.yaml', 'rootfs'],
                check=True, capture_output=True).stdout
            found = taken_out(data)
            self.assertLess(len(found), MIB)
            made = self.unpack(found) / name
            self.assertEqual(expected, made.read_bytes(), options)
            self.assertLess(made.stat().st_blocks * 512, 2 * MIB)

    def test_holes_come_back(self) -> None:
        """LXD writes them as zeros when it makes an image of a server."""
        some = random.randbytes(repack.GRAIN)
        for content in (
                bytes(8 * MIB), some + bytes(8 * MIB), bytes(8 * MIB) + some,
                bytes(8 * MIB + 100), bytes(8 * MIB) + b'x',
                b'x' + bytes(4 * MIB) + b'y' + bytes(4 * MIB + 3)):
            data = image(file('rootfs/' + 'n' * 200, content, mode=0o600,
                              pax_headers={'SCHILY.xattr.user.a': 'b'}),
                         file('rootfs/after', b'after'))
            found = taken_out(data)
            self.assertLess(len(found), MIB)
            root = self.unpack(found)
            made = root / ('n' * 200)
            self.assertEqual(content, made.read_bytes())
            self.assertEqual(0o600, made.stat().st_mode & 0o777)
            self.assertLess(made.stat().st_blocks * 512, MIB)
            self.assertEqual(b'after', (root / 'after').read_bytes())
            self.assertIn(b'SCHILY.xattr.user.a=b\n', found)

    def test_no_holes(self) -> None:
        for size in (MIB, MIB + 1, 3 * MIB + 70000, repack.LOOKAHEAD,
                     repack.LOOKAHEAD + 5 * MIB + 17):
            content = random.randbytes(size)
            data = image(file('rootfs/full', content),
                         file('rootfs/after', b'after'))
            found = listing(taken_out(data))
            self.assertEqual([content, b'after'],
                             [entry[-1] for entry in found[1:]])
            self.assertNotIn(b'GNU.sparse', taken_out(data))

    def test_holes_before_much_content(self) -> None:
        """The file is passed on before its end has been seen."""
        content = (bytes(8 * MIB) + random.randbytes(repack.LOOKAHEAD) +
                   bytes(8 * MIB) + random.randbytes(3 * MIB + 3))
        data = image(file('rootfs/mixed', content),
                     file('rootfs/after', b'after'))
        for chunk in (65536, 1 << 20):
            found = taken_out(data, chunk)
            self.assertLess(len(found), len(content) - 7 * MIB)
            root = self.unpack(found)
            self.assertEqual(content, (root / 'mixed').read_bytes())
            self.assertEqual(b'after', (root / 'after').read_bytes())

    def test_hole_at_which_the_file_is_passed_on(self) -> None:
        """What follows it is content, however much that is."""
        self.patch(repack, 'LOOKAHEAD', MIB)
        for holes in (0, 1, 20):
            content = (bytes(MIB) +
                       random.randbytes(repack.LOOKAHEAD + repack.GRAIN) +
                       bytes(holes * repack.GRAIN) +
                       random.randbytes(2 * repack.LOOKAHEAD + 5))
            data = image(file('rootfs/mixed', content),
                         file('rootfs/after', b'after'))
            for chunk in (65536, 1 << 20, len(data)):
                root = self.unpack(taken_out(data, chunk))
                self.assertEqual(content, (root / 'mixed').read_bytes())
                self.assertEqual(b'after', (root / 'after').read_bytes())

    def test_holes_do_not_count(self) -> None:
        inspector = format_inspector.Inspector(2 * MIB)
        data = image(file('rootfs/a', bytes(7 * MIB)))
        for start in range(0, len(data), 65536):
            inspector.feed(data[start:start + 65536])
        self.assertLess(inspector.finish().unpacked_size, MIB)
        # But not without end: they have to be looked at.
        inspector = format_inspector.Inspector(2 * MIB)
        data = image(file('rootfs/a', bytes(20 * MIB)))

        def feed() -> None:
            for start in range(0, len(data), 65536):
                inspector.feed(data[start:start + 65536])

        self.assertRaises(format_inspector.UnacceptableImage, feed)
