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
"""What the archive of a root filesystem may hold.

GNU tar unpacks it on the host as root. These rules do not rely on its own
precautions: nothing may be written outside the directory that becomes the
root, and nothing may be there that a container has no use for.
"""

from __future__ import annotations

import array
import enum
import hashlib
import os

from nova_lxd_py.virt.image import tar

#: Paths that an archive may have.
MAX_PATHS = 8_000_000
#: Bytes of a name; paths of Linux are shorter (``PATH_MAX``).
_MAX_PATH = 4096
_SHOWN = 80

#: Character devices by major number that may be in the root filesystem of a
#: container, with their minor numbers; None for any.
_CHARACTER_DEVICES: dict[int, frozenset[int] | None] = {
    0: frozenset((0,)),  # What overlayfs marks a deleted file with.
    1: frozenset((3, 5, 7, 8, 9)),  # null zero full random urandom
    4: None,  # tty0 and on, ttyS0 and on
    5: frozenset((0, 1, 2, 3)),  # tty console ptmx ttyprintk
    7: None,  # vcs
    10: frozenset((200, 229)),  # net/tun fuse
    136: None,  # pts
}


class Forbidden(Exception):
    """A member must not be in the archive of a root filesystem.

    :param reason: which one and why, for the tenant.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class PathKind(enum.IntEnum):
    """What a path of an archive is; duplicates must agree in it."""

    DIRECTORY = 0
    SYMLINK = 1
    FILE = 2
    SPECIAL = 3


_KINDS = {
    tar.REGULAR: PathKind.FILE, tar.GNU_SPARSE: PathKind.FILE,
    tar.SYMLINK: PathKind.SYMLINK, tar.DIRECTORY: PathKind.DIRECTORY,
    tar.CHARACTER: PathKind.SPECIAL, tar.BLOCK_DEVICE: PathKind.SPECIAL,
    tar.FIFO: PathKind.SPECIAL,
}
_NAMES = {PathKind.DIRECTORY: 'a directory', PathKind.SYMLINK:
          'a symbolic link', PathKind.FILE: 'a file',
          PathKind.SPECIAL: 'a device or FIFO'}


class PathTable:
    """Kinds of paths in 8 bytes each and without the paths.

    An open-addressing hash table of keyed hashes. Two paths that share a hash
    of 62 bits are taken for one; the key is random, so that nobody can craft
    such paths.

    :param limit: how many paths it takes.
    """

    def __init__(self, limit: int = MAX_PATHS) -> None:
        self._limit = limit
        self._key = os.urandom(16)
        self._slots = array.array('Q', [0]) * (1 << 10)
        self._used = 0

    def get(self, path: str) -> PathKind | None:
        """Look up a path.

        :returns: its kind, None if it is unknown.
        """
        found = self._slots[self._slot(self._hash(path))]
        return PathKind(found & 3) if found else None

    def add(self, path: str, kind: PathKind) -> None:
        """Record a path that is not in the table yet.

        :raises Forbidden: if there are too many.
        """
        if self._used >= self._limit:
            raise Forbidden(f'its archive has more than {self._limit} files')
        value = self._hash(path)
        self._slots[self._slot(value)] = value | kind
        self._used += 1
        if self._used * 3 > len(self._slots) * 2:
            self._grow()

    def _hash(self, path: str) -> int:
        digest = hashlib.blake2b(path.encode('utf-8', 'surrogateescape'),
                                 digest_size=8, key=self._key).digest()
        # The last two bits are the kind's, and zero is an empty slot.
        return (int.from_bytes(digest, 'little') | 4) & ~3

    def _slot(self, value: int) -> int:
        slots = self._slots
        mask = len(slots) - 1
        index = (value >> 3) & mask
        while slots[index] and slots[index] & ~3 != value:
            index = (index + 1) & mask
        return index

    def _grow(self) -> None:
        old = self._slots
        self._slots = array.array('Q', [0]) * (2 * len(old))
        for value in old:
            if value:
                self._slots[self._slot(value & ~3)] = value


class Checker:
    """Checks the members of the archive of a root filesystem, in order.

    :param prefix: the directory of the archive that becomes the root: '' for
        the top of the archive.
    """

    def __init__(self, prefix: str = '') -> None:
        self._prefix = prefix
        self._paths = PathTable()
        self._paths.add('', PathKind.DIRECTORY)
        self._last_parent = ''

    def link_target(self, member: tar.Member) -> str:
        """Return the path below the root that a hard link leads to.

        :raises Forbidden: if it leads elsewhere.
        """
        return self._inside(member.link, f'the target of the hard link '
                                         f'{shown(member.name)}')

    def check(self, member: tar.Member) -> str:
        """Check the next member.

        :param member: one below the prefix, or the prefix itself.
        :returns: its path below the root, '' for the root itself.
        :raises Forbidden: if it must not be there.
        """
        path = self._inside(member.name, 'a member')
        if member.kind == tar.HARD_LINK:
            kind = self._hard_link(member)
        elif member.kind in _KINDS:
            kind = _KINDS[member.kind]
        else:
            raise Forbidden(f'{shown(member.name)} in its archive is of a '
                            f'type that no root filesystem has '
                            f'({member.kind!r})')
        for key, _value in member.records:
            if key.startswith((b'GNU.dumpdir', b'GNU.volume.')):
                raise Forbidden(f'{shown(member.name)} in its archive is part '
                                f'of an incremental or multi-volume backup')
        if member.kind in (tar.CHARACTER, tar.BLOCK_DEVICE):
            check_device(member.kind == tar.BLOCK_DEVICE, *member.device,
                         shown(member.name))
        self._record(path, kind, member.name)
        return path

    def _inside(self, name: bytes, what: str) -> str:
        """Find the path of a name below the root."""
        check_name(name, what)
        path = tar.clean(name)
        if not self._prefix:
            return path
        top, _slash, rest = path.partition('/')
        if top != self._prefix:
            raise Forbidden(f'{what} of its archive ({shown(name)}) is '
                            f'outside of {self._prefix}/')
        return rest

    def _hard_link(self, member: tar.Member) -> PathKind:
        kind = self._paths.get(self.link_target(member))
        if kind is None or kind is PathKind.DIRECTORY:
            raise Forbidden(
                f'the hard link {shown(member.name)} in its archive leads to '
                f'{shown(member.link)}, which is no file before it')
        return kind

    def _record(self, path: str, kind: PathKind, name: bytes) -> None:
        if not path:
            if kind is not PathKind.DIRECTORY:
                raise Forbidden(f'the root of its archive ({shown(name)}) is '
                                f'{_NAMES[kind]} and not a directory')
            return
        self._record_parents(path, name)
        known = self._paths.get(path)
        if known is None:
            self._paths.add(path, kind)
        elif known is not kind:
            raise Forbidden(f'{shown(name)} is in its archive twice: as '
                            f'{_NAMES[known]} and as {_NAMES[kind]}')

    def _record_parents(self, path: str, name: bytes) -> None:
        """Check that nothing above a path is anything but a directory."""
        closest = parent = path.rpartition('/')[0]
        if parent == self._last_parent:
            return
        new = []
        while (known := self._paths.get(parent)) is not PathKind.DIRECTORY:
            if known is not None:
                raise Forbidden(
                    f'{shown(name)} in its archive lies below '
                    f'{shown(parent)}, which is {_NAMES[known]}')
            new.append(parent)
            parent = parent.rpartition('/')[0]
        for each in new:
            self._paths.add(each, PathKind.DIRECTORY)
        # A directory stays one, so that its members need no further look.
        self._last_parent = closest


def check_name(name: bytes, what: str = 'a member') -> None:
    """Check the name of a member of an archive, or of a hard link's target.

    :param name: as stored.
    :param what: whose name it is.
    :raises Forbidden: if it could lead out of where it is unpacked.
    """
    if name.startswith(b'/'):
        raise Forbidden(f'{what} of its archive ({shown(name)}) has an '
                        f'absolute name; make it with "tar -C ROOTFS -c ."')
    if b'..' in name.split(b'/'):
        raise Forbidden(f'{what} of its archive ({shown(name)}) has ".." in '
                        f'its name')
    if len(name) > _MAX_PATH:
        raise Forbidden(f'{what} of its archive ({shown(name)}) has a longer '
                        f'name than Linux allows')


def check_device(block: bool, major: int, minor: int, name: str) -> None:
    """Check that a container may have a device node.

    :param block: whether it is a block device.
    :param major: its major number.
    :param minor: its minor number.
    :param name: what it is called.
    :raises Forbidden: if it must not.
    """
    allowed = _CHARACTER_DEVICES.get(major, frozenset())
    if block or (allowed is not None and minor not in allowed):
        raise Forbidden(
            f'{name} in it is a device node ({"block" if block else "char"} '
            f'{major}:{minor}) that a container must not have; leave it out')


def shown(name: bytes | str) -> str:
    """Format a name for a message: printable and not long."""
    if isinstance(name, bytes):
        name = name.decode('utf-8', 'backslashreplace')
    # Surrogates and control characters must not reach logs or databases.
    text = ''.join(char if char.isprintable() else
                   char.encode('unicode_escape', 'surrogatepass').decode()
                   for char in name[:_SHOWN])
    return text + ('...' if len(name) > _SHOWN else '')
