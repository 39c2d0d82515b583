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

"""Rules for archives of root filesystems."""

from __future__ import annotations

import random
import tarfile
import tracemalloc

import ddt
from oslotest import base

from nova_lxd_py.virt.image import format_inspector
from nova_lxd_py.virt.image import rootfs_rules
from nova_lxd_py.virt.image import tar
from tests.fixtures import format_case
from tests.fixtures import image_samples

PathKind = rootfs_rules.PathKind
ROOTFS = image_samples.ROOTFS


def member(name: str, kind: bytes = tar.REGULAR, link: str = '',
           device: tuple[int, int] = (0, 0)) -> tar.Member:
    return tar.Member(name.encode('utf-8', 'surrogateescape'), kind, 0,
                      link.encode(), device)


@ddt.ddt
class CheckerTestCase(base.BaseTestCase):

    def check(self, *members: tar.Member, prefix: str = '') -> list[str]:
        checker = rootfs_rules.Checker(prefix)
        return [checker.check(each) for each in members]

    def assertForbidden(self, reason: str, *members: tar.Member,
                        prefix: str = '') -> None:
        self.check(*members[:-1], prefix=prefix)
        exc = self.assertRaises(rootfs_rules.Forbidden, self.check, *members,
                                prefix=prefix)
        self.assertRegex(exc.reason, reason)

    def test_ordinary_system(self) -> None:
        """As debootstrap makes one of Debian, with merged /usr."""
        self.assertEqual(
            ['', 'bin', 'usr', 'usr/bin', 'usr/bin/perl',
             'usr/bin/perl5.36.0', 'etc/localtime', 'dev/null', 'dev/ptmx',
             'var/run', 'usr/bin/perl', 'run/initctl', 'usr/bin/sh'],
            self.check(
                member('./', tar.DIRECTORY),
                member('./bin', tar.SYMLINK, 'usr/bin'),
                member('./usr/', tar.DIRECTORY),
                member('./usr/bin/', tar.DIRECTORY),
                member('./usr/bin/perl'),
                member('./usr/bin/perl5.36.0', tar.HARD_LINK,
                       './usr/bin/perl'),
                member('etc/localtime', tar.SYMLINK, '/usr/share/zoneinfo'),
                member('dev/null', tar.CHARACTER, device=(1, 3)),
                member('dev/ptmx', tar.CHARACTER, device=(5, 2)),
                member('var/run', tar.SYMLINK, '../../../../run'),
                # Appended to an archive: the last one counts.
                member('usr/bin/perl'),
                member('run/initctl', tar.FIFO),
                member('usr/bin/sh', tar.SYMLINK, 'dash')))

    def test_deleted_files_of_overlays(self) -> None:
        """Of containers in the container of which an image was made."""
        self.check(member('var/lib/docker/overlay2/x/diff/gone',
                          tar.CHARACTER, device=(0, 0)))

    def test_hard_link_to_a_link(self) -> None:
        self.check(member('a', tar.SYMLINK, 'b'),
                   member('c', tar.HARD_LINK, 'a'))
        self.assertForbidden(
            'c/evil in its archive lies below c, which is a symbolic link',
            member('a', tar.SYMLINK, 'b'), member('c', tar.HARD_LINK, 'a'),
            member('c/evil'))

    @ddt.data('..', '../x', 'a/../x', 'a/..', './..', 'a//..//x')
    def test_parents(self, name: str) -> None:
        self.assertForbidden(r'has "\.\." in', member(name))
        self.assertForbidden(r'has "\.\." in', member('a'),
                             member('b', tar.HARD_LINK, name))

    def test_names_with_dots(self) -> None:
        self.check(member('..a'), member('a..'), member('...'),
                   member('a/..b/c'))

    def test_absolute(self) -> None:
        self.assertForbidden('absolute', member('/etc/passwd'))
        self.assertForbidden('absolute', member('a'), member(
            'b', tar.HARD_LINK, '/a'))

    @ddt.data('.', './', '', './/.')
    def test_root_is_a_directory(self, name: str) -> None:
        for kind in (tar.SYMLINK, tar.REGULAR, tar.FIFO):
            self.assertForbidden('and not a directory', member(name, kind))
        self.assertForbidden('no file before it', member(
            name, tar.HARD_LINK, 'a'))

    def test_prefix(self) -> None:
        self.assertEqual(['', 'a', 'b'], self.check(
            member('./rootfs', tar.DIRECTORY), member('rootfs/a'),
            member('rootfs//b', tar.HARD_LINK, './rootfs/a'),
            prefix='rootfs'))
        self.assertForbidden('outside of rootfs/', member('metadata.yaml'),
                             prefix='rootfs')
        self.assertForbidden(
            'outside of rootfs/', member('rootfs/a'),
            member('rootfs/b', tar.HARD_LINK, 'metadata.yaml'),
            prefix='rootfs')

    def test_duplicates(self) -> None:
        kinds = {tar.REGULAR: 'file', tar.SYMLINK: 'symbolic link',
                 tar.DIRECTORY: 'directory', tar.FIFO: 'FIFO'}
        for first in kinds:
            for second in kinds:
                members = member('a/b', first), member('a/b', second)
                if first == second:
                    self.check(*members)
                else:
                    self.assertForbidden(
                        f'twice: as a.* {kinds[first]} and as .*'
                        f'{kinds[second]}', *members)

    def test_directories_without_a_member(self) -> None:
        self.assertForbidden('twice: as a directory and as a symbolic link',
                             member('a/b/c'), member('a', tar.SYMLINK, '/'))
        self.assertForbidden('lies below a, which is a symbolic link',
                             member('a', tar.SYMLINK, '/'), member('a/b/c/d'))
        self.assertForbidden('lies below a/b, which is a file',
                             member('a/b'), member('a/b/c'))

    @ddt.data((True, 8, 0), (True, 7, 1), (True, 0, 0), (False, 1, 1),
              (False, 1, 2), (False, 0, 1), (False, 10, 237),
              (False, 13, 64), (False, 1 << 20, 3))
    @ddt.unpack
    def test_devices(self, block: bool, major: int, minor: int) -> None:
        self.assertForbidden(
            rf'dev/x in it is a device node .*{major}:{minor}',
            member('dev/x', tar.BLOCK_DEVICE if block else tar.CHARACTER,
                   device=(major, minor)))

    def test_backups(self) -> None:
        for key in (b'GNU.dumpdir', b'GNU.volume.filename'):
            self.assertForbidden('backup', tar.Member(
                b'a', tar.DIRECTORY, 0, records=((key, b'x'),)))

    def test_names_in_messages(self) -> None:
        for name, shown in ((b'a\x1b[31m\n\0b', r'a\x1b[31m\n\x00b'),
                            (b'\xff\xfe', r'\xff\xfe'),
                            ('\xfc\udcff', '\xfc\\udcff'),
                            ('x' * 500, 'x' * 80 + '...')):
            self.assertEqual(shown, rootfs_rules.shown(name))

    def test_long_name(self) -> None:
        self.assertForbidden('longer', member('a/' * 2500 + 'b'))


class PathTableTestCase(base.BaseTestCase):

    def test_against_a_dict(self) -> None:
        generator = random.Random(3)
        table = rootfs_rules.PathTable()
        expected: dict[str, PathKind] = {}
        for number in range(10000):
            path = f'p/{generator.randrange(12000)}'
            kind = PathKind(generator.randrange(4))
            self.assertEqual(expected.get(path), table.get(path))
            if path not in expected:
                table.add(path, kind)
                expected[path] = kind
        for number in range(12000):
            path = f'p/{number}'
            self.assertEqual(expected.get(path), table.get(path))

    def test_memory(self) -> None:
        table = rootfs_rules.PathTable()
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        for number in range(25_000):
            table.add(str(number) * 50, PathKind.FILE)
        now, peak = tracemalloc.get_traced_memory()
        # With the names it would be 300 bytes for each; other threads use a
        # little as well.
        self.assertLess(now, 25_000 * 40)
        self.assertLess(peak, 25_000 * 60)

    def test_limit(self) -> None:
        table = rootfs_rules.PathTable(10)
        for number in range(10):
            table.add(str(number), PathKind.FILE)
        exc = self.assertRaises(rootfs_rules.Forbidden, table.add, 'x',
                                PathKind.FILE)
        self.assertIn('more than 10 files', exc.reason)


@ddt.ddt
class StrictReadingTestCase(format_case.FormatTestCase):
    """Archives that GNU tar could read otherwise are refused."""

    def archive(self, *blocks: bytes) -> bytes:
        plain = image_samples.tar(ROOTFS)
        # Behind the first member, a directory.
        return plain[:512] + b''.join(blocks) + plain[512:]

    def extended(self, kind: bytes, content: bytes) -> bytes:
        header = tarfile.TarInfo('header')
        header.type, header.size = kind, len(content)
        return header.tobuf() + content.ljust(
            -(-len(content) // 512) * 512, b'\0')

    def test_global_headers(self) -> None:
        for record in (b'12 path=etc\n', b'19 linkpath=/etc/x\n',
                       b'9 size=1\n', b'21 GNU.sparse.name=x\n'):
            self.assertUnacceptable('global header', self.archive(
                self.extended(b'g', record)))
        # As "git archive" writes it.
        self.assertEqual(
            format_inspector.Kind.ROOTFS, format_case.inspect(
                self.archive(self.extended(
                    b'g', b'19 comment=0123456\n'))).kind)

    @ddt.data(b'9 path=a\nrubbish', b'9 path=ab\n', b'99 path=a\n',
              b'0 path=a\n', b'x path=a\n', b'7 path=\n', b'11 path=a\0b\n',
              b'9 pathaaa\n', b' 9 path=a\n')
    def test_extended_headers(self, content: bytes) -> None:
        self.assertUnacceptable('unreadable extended header', self.archive(
            self.extended(b'x', content)))

    def test_two_headers_for_one_member(self) -> None:
        for kind, content in ((b'x', b'10 path=aa\n'), (b'L', b'abc\0'),
                              (b'K', b'abc\0')):
            header = self.extended(kind, content)
            self.assertUnacceptable('two|extended header', self.archive(
                header, header))

    def changed(self, start: int, content: bytes) -> bytes:
        """A header of a file that is changed in one place."""
        block = bytearray(image_samples.tarfile_header('etc/x', 0))
        block[start:start + len(content)] = content
        return tar.with_checksum(block)

    def test_padding_of_an_extended_header(self) -> None:
        content = b'9 path=a\n'
        self.assertEqual(
            format_inspector.Kind.ROOTFS, format_case.inspect(
                self.archive(self.extended(
                    b'x', content + bytes(20)))).kind)

    def test_extended_header_of_an_old_member(self) -> None:
        """Programs that know only the old format ignore the header."""
        old = self.changed(257, bytes(8))
        self.assertEqual(
            format_inspector.Kind.ROOTFS,
            format_case.inspect(self.archive(old)).kind)
        self.assertUnacceptable('mixes formats', self.archive(
            self.extended(b'x', b'9 path=a\n'), old))

    def test_sparse_file_in_another_format(self) -> None:
        self.assertUnacceptable('mixes formats', self.archive(
            self.changed(156, b'S')))

    def test_negative_size(self) -> None:
        for size in (b'\xff' * 12, b'\xc0' + bytes(10) + b'\1'):
            self.assertUnacceptable('negative size', self.archive(
                self.changed(124, size)))

    def test_long_name_with_more_behind_it(self) -> None:
        self.assertUnacceptable('long name', self.archive(
            self.extended(b'L', b'a\0../b\0')))

    def test_directory_with_content(self) -> None:
        self.assertUnacceptable('directory with content', self.archive(
            image_samples.tarfile_header('usr/x/', 512), bytes(512)))

    def test_name_of_a_sparse_file(self) -> None:
        """GNU tar prefers it to the path."""
        records = b'27 GNU.sparse.name=../evil\n17 path=harmless\n'
        self.assertUnacceptable(r'"\.\."', self.archive(
            self.extended(b'x', records)))
