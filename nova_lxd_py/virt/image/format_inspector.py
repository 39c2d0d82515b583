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
"""Detection of the format of an image, and its check, during the transfer.

Glance's ``disk_format`` says little: containers' root filesystems are uploaded
as ``raw``, like disks. So the content decides, and anything that is no
container image is refused, with the name of its format, before LXD has
received all of it.

Only the root filesystem is the tenant's. An archive of one is checked member
by member (:mod:`.rootfs_rules`); from an LXD image, which has metadata and
templates as well, it is extracted (:mod:`.repack`).
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import enum

import yaml

from nova_lxd_py.virt.image import decompression
from nova_lxd_py.virt.image import repack
from nova_lxd_py.virt.image import rootfs_rules
from nova_lxd_py.virt.image import squashfs as image_squashfs
from nova_lxd_py.virt.image import tar as image_tar

#: Bytes that are needed to detect a format; an ISO has its mark at 32 KiB.
HEAD = 36 << 10
#: Bytes of an archive after which it is refused if its kind is still unknown.
UNDECIDED = 64 << 20

#: Bytes that metadata.yaml may have; most have a hundredth of it.
MAX_METADATA = 128 << 10

#: Advice in messages about an image of the wrong kind.
ADVICE = ('a container needs a root filesystem: upload a rootfs tarball or a '
          'squashfs as disk_format raw')

#: Where disk images and other files carry their mark.
_MAGICS: tuple[tuple[int, bytes, str], ...] = (
    (0, b'QFI\xfb', 'a qcow2 disk image'),
    (0, b'QED\0', 'a QED disk image'),
    (0, b'KDMV', 'a VMDK disk image'),
    (0, b'# Disk Descriptor', 'a VMDK disk descriptor'),
    (0, b'conectix', 'a VHD disk image'),
    (0, b'vhdxfile', 'a VHDX disk image'),
    (64, b'\x7f\x10\xda\xbe', 'a VDI disk image'),
    (0, b'LUKS\xba\xbe', 'a LUKS-encrypted volume'),
    (512, b'EFI PART', 'a disk image with a GPT partition table'),
    (0x8001, b'CD001', 'an ISO image'),
    (0x438, b'\x53\xef', 'an ext4 filesystem image'),
    (0, b'XFSB', 'an XFS filesystem image'),
    (510, b'\x55\xaa', 'a disk image with a boot sector'),
    (0, b'\x7fELF', 'a program (ELF)'),
    (0, b'PK\x03\x04', 'a zip archive'),
    (0, b'7z\xbc\xaf\x27\x1c', 'a 7-Zip archive'),
    (0, b'Rar!', 'a RAR archive'),
    (0, b'!<arch>', 'a Debian package or static library'),
    (0, b'\xed\xab\xee\xdb', 'an RPM package'),
    (0, b'07070', 'a cpio archive'),
    (0, b'\xc7\x71', 'a cpio archive'),
    (0, b'\x04\x22\x4d\x18', 'an lz4-compressed file, which LXD cannot read'),
    (0, b'\x89LZO', 'an lzop-compressed file, which LXD cannot read'),
    (0, b'sqsh', 'a big-endian squashfs, which Linux cannot read'),
)

#: Directories at the top of a root filesystem (FHS, and what some add).
_ROOT_NAMES = frozenset((
    'bin', 'boot', 'dev', 'etc', 'home', 'init', 'lib', 'lib32', 'lib64',
    'libx32', 'libo32', 'lost+found', 'media', 'mnt', 'nix', 'opt', 'proc',
    'root', 'run', 'sbin', 'snap', 'srv', 'sys', 'tmp', 'usr', 'var'))
#: Any of these makes a tree a root filesystem that something can run in.
_ROOT_ESSENTIALS = frozenset(('bin', 'etc', 'nix', 'sbin', 'usr'))
_PROGRAM_DIRECTORIES = ('bin/', 'sbin/', 'usr/bin/', 'usr/sbin/')
_LXD_NAMES = frozenset(('metadata.yaml', 'rootfs', 'templates'))
_OCI_NAMES = frozenset(('oci-layout', 'manifest.json', 'index.json', 'blobs',
                        'repositories'))
_DISK_SUFFIXES = ('.raw', '.img', '.qcow2', '.vmdk', '.vhd', '.vhdx', '.vdi',
                  '.iso', '.ova', '.ovf')

#: LXD's names of architectures by the other names in use for them.
_ARCHITECTURE_ALIASES = {
    'amd64': 'x86_64', 'x86-64': 'x86_64', 'i386': 'i686', 'i486': 'i686',
    'i586': 'i686', 'x86': 'i686', '386': 'i686', 'arm64': 'aarch64',
    'armhf': 'armv7l', 'armv7': 'armv7l', 'arm': 'armv7l', 'armel': 'armv6l',
    'powerpc': 'ppc', 'powerpc64': 'ppc64', 'powerpc64le': 'ppc64le',
    'ppc64el': 'ppc64le',
}
#: ELF machine numbers in LXD's terms; some stand for several.
_ELF_MACHINES: dict[int, tuple[str, ...]] = {
    3: ('i686',), 8: ('mips', 'mips64'), 20: ('ppc',),
    21: ('ppc64', 'ppc64le'), 22: ('s390x',),
    40: ('armv7l', 'armv6l', 'armv8l'), 62: ('x86_64',), 183: ('aarch64',),
    243: ('riscv64', 'riscv32'), 258: ('loongarch64',),
}
_ELF_HEADER = 20

#: How many times larger than allowed the archive of an LXD image may be, as
#: LXD writes the holes of sparse files as zeros.
_MAX_WITH_HOLES = 4
#: Names at the top of an archive to remember for the message.
_MAX_TOPS = 20


class UnacceptableImage(Exception):
    """No container can be made from the image.

    :param reason: what it is instead and what to do, for the tenant.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Kind(enum.Enum):
    """What an image can be."""

    #: One archive of metadata.yaml and rootfs/, as LXD exports them. LXD gets
    #: what is in rootfs/ as an archive of a root filesystem.
    UNIFIED = 'LXD image'
    #: An archive of a root filesystem, passed on to LXD as it is.
    ROOTFS = 'root filesystem archive'
    #: A squashfs of a root filesystem, passed on to LXD as it is.
    SQUASHFS = 'root filesystem squashfs'


@dataclasses.dataclass(frozen=True)
class Content:
    """What a whole image has been found to be.

    :ivar kind: what it is.
    :ivar architecture: what its metadata says, in LXD's terms; None where it
        brings no metadata.
    :ivar programs: architectures that its programs were built for, where they
        could be seen.
    :ivar unpacked_size: bytes that it takes when unpacked.
    """

    kind: Kind
    architecture: str | None
    programs: frozenset[str]
    unpacked_size: int


def canonical_architecture(name: str) -> str:
    """Translate a name of an architecture into the one that LXD uses.

    :param name: as Glance, Debian, Go or uname have it.
    :returns: LXD's name, or the given one in lower case if it is unknown.
    """
    name = name.strip().lower()
    return _ARCHITECTURE_ALIASES.get(name, name)


def describe(head: bytes) -> str:
    """Name what a file is, for saying that it is no container image.

    :param head: its first bytes, HEAD of them if there are as many.
    :returns: a noun phrase.
    """
    if not head:
        return 'empty'
    for offset, magic, name in _MAGICS:
        if head[offset:offset + len(magic)] == magic:
            return name
    if not head.strip(b'\0'):
        return 'a raw disk image or otherwise begins with zeros'
    start = head[:512]
    if all(byte in b'\t\n\r\f\x1b' or 32 <= byte < 127 for byte in start):
        lowered = start.lstrip().lower()
        if lowered.startswith((b'<!doctype', b'<html', b'<?xml')):
            return 'a web page or XML document'
        return 'a text file'
    return 'of no known kind'


class Inspector:
    """Checks an image while it is transferred, in bounded memory.

    :param max_size: bytes that it may have when unpacked.
    """

    def __init__(self, max_size: int) -> None:
        self._max_size = max_size
        self._head = bytearray()
        self._started = False
        self._inner = bytearray()
        self._compression: str | None = None
        self._decompressor: decompression.Decompressor | None = None
        self._squashfs: image_squashfs.Reader | None = None
        self._archive = image_tar.Walker(self._member)
        self._rules = rootfs_rules.Checker()
        self._repacker = repack.Repacker()
        self._unpacked = 0
        self._tops: dict[str, None] = {}
        self._programs: set[str] = set()
        #: What the image is; None until that is certain.
        self.kind: Kind | None = None
        #: What its metadata says, as far as it has been seen.
        self.architecture: str | None = None
        #: What was found when the image was at its end.
        self.content: Content | None = None

    def process(self, data: bytes) -> Iterator[bytes]:
        """Inspect the next part of the image.

        Nothing happens unless the result is consumed.

        :param data: any number of bytes.
        :returns: for an LXD image, the next parts of the archive of its root
            filesystem; nothing for other kinds, which are passed on as they
            are.
        :raises UnacceptableImage: as soon as it is certain that no container
            can be made of it.
        """
        if not self._started:
            self._head += data
            if len(self._head) < HEAD:
                return
            data = self._start()
        yield from self._inspect(data)

    def end(self) -> Iterator[bytes]:
        """Check that the image is complete, and set :attr:`content`.

        :returns: as :meth:`process`.
        :raises UnacceptableImage: if it is incomplete, or no container image.
        """
        if not self._started:
            yield from self._inspect(self._start())
        try:
            if self._squashfs is not None:
                size = self._squashfs.finish()
                self._check_size(size)
                self.content = Content(Kind.SQUASHFS, None, frozenset(), size)
                return
            if self._decompressor is not None:
                self._decompressor.finish()
            self._archive.finish()
        except image_tar.NotTar:
            raise self._no_archive() from None
        except rootfs_rules.Forbidden as exc:
            # In a squashfs, whose tables are read at its end.
            raise UnacceptableImage(exc.reason) from exc
        except (image_squashfs.Damaged, decompression.Corrupt,
                image_tar.Damaged) as exc:
            raise self._damaged(exc) from exc
        self.content = self._archive_content()
        yield from self._repacker.take()

    def feed(self, data: bytes) -> None:
        """Inspect the next part of an image that is passed on as it is.

        :param data: any number of bytes.
        :raises UnacceptableImage: as for :meth:`process`.
        """
        for _piece in self.process(data):
            pass

    def finish(self) -> Content:
        """Check that an image that is passed on as it is has been complete.

        :returns: what it is.
        :raises UnacceptableImage: as for :meth:`end`.
        """
        for _piece in self.end():
            pass
        assert self.content is not None
        return self.content

    # -- by kind ------------------------------------------------------------

    def _start(self) -> bytes:
        head = bytes(self._head)
        self._head.clear()
        self._started = True
        if head.startswith(image_squashfs.MAGIC):
            if len(head) < image_squashfs.SUPERBLOCK:
                raise UnacceptableImage('it is a squashfs that breaks off in '
                                        'its first bytes; upload it again')
            try:
                self._squashfs = image_squashfs.Reader(head)
            except image_squashfs.Unsupported as exc:
                raise UnacceptableImage(str(exc)) from exc
            except image_squashfs.Damaged as exc:
                raise self._damaged(exc) from exc
            self.kind = Kind.SQUASHFS
            return head
        self._compression = decompression.detect(head)
        if self._compression is not None:
            self._decompressor = decompression.Decompressor(self._compression)
        # LXD looks for these marks first, also where an archive follows.
        elif (head.startswith((b'QFI\xfb', b'KDMV')) or
              head[257:262] != b'ustar'):
            self._inner += head
            raise self._no_archive()
        return head

    def _inspect(self, data: bytes) -> Iterator[bytes]:
        if self._squashfs is not None:
            self._squashfs.feed(data)
            return
        try:
            if self._decompressor is None:
                self._unpack(data)
                yield from self._repacker.take()
            else:
                for piece in self._decompressor.feed(data):
                    self._unpack(piece)
                    yield from self._repacker.take()
        except image_tar.NotTar:
            raise self._no_archive() from None
        except rootfs_rules.Forbidden as exc:
            raise UnacceptableImage(exc.reason) from exc
        except (decompression.Corrupt, image_tar.Damaged) as exc:
            raise self._damaged(exc) from exc
        if self.kind is None and self._unpacked > UNDECIDED:
            raise self._unknown_archive()

    def _unpack(self, piece: bytes) -> None:
        self._unpacked += len(piece)
        if len(self._inner) < HEAD:
            self._inner += piece[:HEAD - len(self._inner)]
        self._archive.feed(piece)
        if self.kind is Kind.UNIFIED:
            self._check_size(max(self._unpacked // _MAX_WITH_HOLES,
                                 self._repacker.size))
        else:
            self._check_size(self._unpacked)

    def _check_size(self, size: int) -> None:
        if size > self._max_size:
            raise UnacceptableImage(
                f'unpacked it takes more than {self._max_size >> 30} GiB, the '
                f'largest that the compute hosts allow ([lxd] '
                f'image_max_unpacked_gb)')

    # -- archives -----------------------------------------------------------

    def _member(self, member: image_tar.Member
                ) -> image_tar.ContentSink | None:
        """Check a member of the archive.

        :returns: what receives its content, if anything.
        """
        rootfs_rules.check_name(member.name)
        top = member.top
        if top and (len(self._tops) < _MAX_TOPS or
                    top in _LXD_NAMES | _ROOT_NAMES | _OCI_NAMES):
            self._tops.setdefault(top)
        if self.kind is None:
            if top in _LXD_NAMES:
                self.kind = Kind.UNIFIED
                self._rules = rootfs_rules.Checker('rootfs')
            elif top in _ROOT_NAMES:
                self.kind = Kind.ROOTFS
        if self.kind is Kind.UNIFIED:
            return self._unified_member(member)
        path = self._rules.check(member)
        if member.regular and path.startswith(_PROGRAM_DIRECTORIES):
            return image_tar.Capture(_ELF_HEADER, self._program)
        return None

    def _unified_member(self, member: image_tar.Member
                        ) -> image_tar.ContentSink | None:
        if member.top == 'rootfs':
            path = self._rules.check(member)
            link = ''
            if member.kind == image_tar.HARD_LINK:
                link = self._rules.link_target(member)
            return self._repacker.add(member, path, link)
        # Everything else that an LXD image can have, such as templates,
        # properties and an expiry date, is dropped.
        if (member.path == 'metadata.yaml' and member.regular and
                self.architecture is None):
            if member.size > MAX_METADATA:
                raise UnacceptableImage('its metadata.yaml is larger than any '
                                        'real one')
            return image_tar.Capture(MAX_METADATA, self._metadata)
        return None

    def _program(self, content: bytes) -> None:
        """Record which processors a program is for."""
        if content.startswith(b'\x7fELF') and len(content) == _ELF_HEADER:
            machine = int.from_bytes(
                content[18:20], 'big' if content[5] == 2 else 'little')
            self._programs.update(_ELF_MACHINES.get(machine, ()))

    def _metadata(self, content: bytes) -> None:
        """Record the architecture that metadata.yaml states."""
        try:
            # Not the loader in C: deep nesting would crash the process.
            stated = yaml.safe_load(content)['architecture']
        except (yaml.YAMLError, LookupError, TypeError, ValueError,
                RecursionError):
            stated = None
        if not isinstance(stated, str) or not stated.strip():
            raise UnacceptableImage('its metadata.yaml names no architecture')
        self.architecture = canonical_architecture(stated)

    def _archive_content(self) -> Content:
        if self.kind is Kind.UNIFIED:
            if 'rootfs' not in self._tops:
                raise UnacceptableImage(
                    'it is only the metadata half of an LXD image; upload '
                    'the root filesystem (the other file) instead')
            if self.architecture is None:
                raise UnacceptableImage(
                    'it has rootfs/ like an LXD image but no metadata.yaml; '
                    'upload the content of rootfs/ as a plain tarball, or add '
                    'metadata.yaml')
            self._repacker.finish()
            return Content(self.kind, self.architecture, frozenset(),
                           self._repacker.size)
        if self.kind is None or not _ROOT_ESSENTIALS.intersection(self._tops):
            raise self._unknown_archive()
        return Content(self.kind, None, frozenset(self._programs),
                       self._unpacked)

    # -- reasons ------------------------------------------------------------

    def _no_archive(self) -> UnacceptableImage:
        what = describe(bytes(self._inner))
        if self._compression is not None:
            what = f'{self._compression}-compressed and inside {what}'
        return UnacceptableImage(f'it is {what}; {ADVICE}')

    def _unknown_archive(self) -> UnacceptableImage:
        tops = list(self._tops)
        if _OCI_NAMES.intersection(tops):
            return UnacceptableImage(
                'it is a Docker or OCI image archive; unpack its layers into '
                'one root filesystem (for example with "docker export") and '
                'upload that')
        if any(top.lower().endswith(_DISK_SUFFIXES) for top in tops):
            return UnacceptableImage(
                f'it is an archive of a disk image '
                f'({rootfs_rules.shown(tops[0])}); {ADVICE}')
        names = ', '.join(rootfs_rules.shown(top) for top in tops[:5]
                          ) or 'nothing'
        return UnacceptableImage(
            f'it is an archive, but not of a root filesystem: at its top are '
            f'{names} rather than etc/, usr/, bin/; make it with '
            f'"tar -C ROOTFS -c ."')

    def _damaged(self, exc: Exception) -> UnacceptableImage:
        return UnacceptableImage(f'{exc}; upload it again')
