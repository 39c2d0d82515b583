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

"""What LXD finds in the bytes of an image."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import io
import lzma
import tarfile
from typing import Any
import zlib

import yaml

from tests.unit.fake_lxd import clock
from tests.unit.fake_lxd import errors
from tests.unit.fake_lxd import tree

Part = tuple[str, str, bytes]

_MAGIC = (
    (0, b'\x1f\x8b', '.tar.gz'), (0, b'BZh', '.tar.bz2'),
    (0, b'\xfd7zXZ', '.tar.xz'), (0, b'7zXZ', '.tar.xz'),
    (0, b'\x5d\x00\x00', '.tar.lzma'), (0, b'\x28\xb5\x2f\xfd', '.tar.zst'),
    (0, b'hsqs', '.squashfs'), (0, b'QFI\xfb', '.qcow2'),
    (257, b'ustar', '.tar'))

_ARCHITECTURES = frozenset("""
    i686 x86_64 armv7l aarch64 ppc ppc64 ppc64le s390x mips mips64 riscv32
    riscv64
    """.split())

#: Exceptions by which a damaged tarball shows.
DAMAGE = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)


@dataclasses.dataclass
class Content:
    """An image as far as its import looks.

    :ivar rootfs: its files, or what LXD says when it unpacks them.
    """

    parts: list[Part]
    metadata: dict[str, Any]
    rootfs: tree.Tree | str

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(
            b''.join(content for _f, _n, content in self.parts)).hexdigest()

    @property
    def created_at(self) -> str:
        stamp = self.metadata.get('creation_date') or 0
        return datetime.datetime.fromtimestamp(
            stamp, datetime.timezone.utc).strftime('%Y-%m-%dT%H:%M:%SZ')

    @property
    def expires_at(self) -> str:
        return clock.NEVER


def extension(content: bytes) -> str:
    """Tell the format by its magic number.

    :returns: as in the names of exported files, for example ``.tar.gz``.
    """
    if not content:
        raise errors.bad_request('EOF')
    for offset, magic, name in _MAGIC:
        if content[offset:offset + len(magic)] == magic:
            return name
    raise errors.bad_request('Unsupported compression')


def unified(content: bytes) -> Content:
    """Read a single tarball with metadata.yaml and rootfs/."""
    kind = extension(content)
    if kind == '.squashfs':
        raise errors.bad_request('exec: "sqfs2tar": executable file not '
                                 'found in $PATH')
    if kind == '.qcow2':
        raise errors.bad_request('exec: "qemu-img": executable file not '
                                 'found in $PATH')
    metadata = _metadata(content)
    rootfs = _rootfs(content, 'rootfs/')
    if isinstance(rootfs, tree.Tree) and rootfs.is_empty:
        raise errors.bad_request('Invalid instance type')
    return Content([('', '', content)], metadata, rootfs)


def split(content: bytes, boundary: str) -> Content:
    """Read a multipart upload: metadata first, then the root filesystem."""
    parts = _multipart(content, boundary)
    if not parts:
        raise errors.bad_request('EOF')
    if parts[0][0] != 'metadata':
        raise errors.bad_request('Invalid multipart image')
    if len(parts) < 2:
        raise errors.bad_request('EOF')
    if parts[1][0] not in ('rootfs', 'rootfs.img'):
        raise errors.bad_request('Invalid multipart image')
    extension(parts[0][2])
    return Content(parts[:2], _metadata(parts[0][2]),
                   _rootfs(parts[1][2], ''))


def _multipart(content: bytes, boundary: str) -> list[Part]:
    marker = b'--' + boundary.encode()
    pieces = content.split(b'\r\n' + marker)
    if not pieces[0].startswith(marker):
        raise errors.bad_request('multipart: NextPart: EOF')
    pieces[0] = pieces[0][len(marker):]
    if not pieces[-1].startswith(b'--'):
        raise errors.bad_request('unexpected EOF')
    found = []
    for piece in pieces[:-1]:
        head, _, body = piece.partition(b'\r\n\r\n')
        fields = dict(
            item.strip().partition('=')[::2]
            for line in head.decode('latin-1').splitlines()
            if line.lower().startswith('content-disposition')
            for item in line.split(';')[1:])
        found.append((fields.get('name', '').strip('"'),
                      fields.get('filename', '').strip('"'), body))
    return found


def _metadata(content: bytes) -> dict[str, Any]:
    try:
        files = tree.from_tar(content)
    except DAMAGE:
        files = _readable_part(content)
    raw = files.read('/metadata.yaml')
    if raw is None:
        raise errors.bad_request('Metadata tarball is missing metadata.yaml')
    try:
        metadata = yaml.safe_load(raw)
    except yaml.YAMLError as exc:
        raise errors.bad_request(
            'yaml: line 1: did not find expected node content') from exc
    if not isinstance(metadata, dict):
        raise errors.bad_request('EOF')
    architecture = metadata.get('architecture') or ''
    if architecture not in _ARCHITECTURES:
        raise errors.bad_request(
            f"Architecture isn't supported: {architecture}")
    if not metadata.get('creation_date'):
        raise errors.bad_request('Missing creation date')
    return metadata


def _readable_part(content: bytes) -> tree.Tree:
    """LXD's import reads no further than metadata.yaml."""
    found = tree.Tree()
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            for member in archive:
                if member.name.removeprefix('./') == 'metadata.yaml':
                    stream = archive.extractfile(member)
                    found.put('/metadata.yaml', tree.Node(
                        content=stream.read() if stream else b''))
                    break
    except DAMAGE:
        pass
    return found


def _rootfs(content: bytes, prefix: str) -> tree.Tree | str:
    try:
        kind = extension(content)
    except errors.APIError as exc:
        return exc.text
    if kind == '.qcow2':
        return f'Unsupported image format: {kind}'
    if kind in ('.squashfs', '.tar.zst'):
        # What Python cannot unpack is a system without files.
        files = tree.Tree()
        files.put('/sbin/init', tree.Node(mode=0o755))
        return files
    try:
        return tree.from_tar(content, prefix)
    except DAMAGE as exc:
        return (f'Unpack failed: Failed to run: tar: exit status 2 '
                f'({type(exc).__name__})')
