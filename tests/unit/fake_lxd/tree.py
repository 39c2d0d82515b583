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

"""A root filesystem in memory, as LXD's file API shows it."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import io
import posixpath
import tarfile

from tests.unit.fake_lxd import errors


@dataclasses.dataclass
class Node:
    kind: str = 'file'
    content: bytes = b''
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    modified: datetime.datetime = dataclasses.field(
        default_factory=lambda: datetime.datetime.now(datetime.timezone.utc))


def normal(path: str) -> str:
    return posixpath.normpath('/' + path).replace('//', '/')


class Tree:
    """Files by absolute path. Links are resolved inside the tree only."""

    def __init__(self) -> None:
        self._nodes = {'/': Node('directory', mode=0o755)}
        self._unpacked = False

    def copy(self) -> Tree:
        return copy.deepcopy(self)

    @property
    def size(self) -> int:
        return sum(len(node.content) for node in self._nodes.values())

    @property
    def is_empty(self) -> bool:
        return not self._unpacked and len(self._nodes) == 1

    def put(self, path: str, node: Node) -> None:
        """Place a node and the folders above it; for building a tree."""
        path = normal(path)
        self._unpacked = True
        parent = posixpath.dirname(path)
        if parent not in self._nodes:
            self.put(parent, Node('directory', mode=0o755))
        self._nodes[path] = node

    def resolve(self, path: str, follow_last: bool = True) -> str:
        """Follow symbolic links as the guest would."""
        done, rest, hops = '/', normal(path).strip('/').split('/'), 0
        while rest and rest != ['']:
            part = rest.pop(0)
            here = posixpath.join(done, part)
            node = self._nodes.get(here)
            if (node is not None and node.kind == 'symlink'
                    and (rest or follow_last)):
                hops += 1
                if hops > 40:
                    raise errors.internal('too many links')
                target = posixpath.join(done, node.content.decode())
                done, rest = '/', normal(target).strip('/').split('/') + rest
                continue
            done = here
        return done

    def get(self, path: str) -> Node:
        """Find a node, not following a link that it may be itself."""
        where = self.resolve(path, follow_last=False)
        if where in self._nodes:
            return self._nodes[where]
        parent = self._nodes.get(posixpath.dirname(where))
        if parent is not None and parent.kind == 'file':
            raise _sftp(f'lstat {path}: not a directory')
        raise errors.not_found('Not Found')

    def exists(self, path: str) -> bool:
        return self.resolve(path) in self._nodes

    def node(self, path: str) -> Node:
        """The node at the end of all links."""
        return self._nodes[self.resolve(path)]

    def read(self, path: str) -> bytes | None:
        """What the guest reads there; None where is no file."""
        node = self._nodes.get(self.resolve(path))
        return node.content if node is not None else None

    def items(self) -> list[tuple[str, Node]]:
        """All paths with what is there, folders before what they hold."""
        return sorted(self._nodes.items(), key=lambda item: item[0])

    def children(self, path: str) -> list[str]:
        path = self.resolve(path, follow_last=False)
        prefix = path.rstrip('/') + '/'
        return [key[len(prefix):] for key in self._nodes
                if key.startswith(prefix) and key != path
                and '/' not in key[len(prefix):]]

    def write(self, path: str, node: Node, *, append: bool = False) -> None:
        """Write as LXD's SFTP server does."""
        where = self.resolve(path, follow_last=node.kind == 'file')
        parent = self._nodes.get(posixpath.dirname(where))
        if parent is None:
            raise errors.not_found('Not Found')
        if parent.kind != 'directory':
            raise _sftp(f'open {path}: not a directory')
        there = self._nodes.get(where)
        if node.kind == 'file' and there is not None:
            if there.kind == 'directory':
                raise _sftp(f'open {path}: is a directory')
            before = there.content if append else b''
            there.content = before + node.content
            there.modified = node.modified
        elif node.kind == 'symlink' and there is not None:
            if there.content != node.content:
                raise _sftp(f'symlink {node.content.decode()} {path}: file '
                            f'exists')
        elif there is None:
            self._nodes[where] = node

    def remove(self, path: str) -> None:
        where = self.resolve(path, follow_last=False)
        if where not in self._nodes:
            raise errors.not_found('Not Found')
        if self.children(where):
            raise _sftp(f'remove {path}: directory not empty')
        del self._nodes[where]


def _sftp(text: str) -> errors.APIError:
    return errors.internal(f'sftp: "{text}" (SSH_FX_FAILURE)')


def from_tar(content: bytes, prefix: str = '') -> Tree:
    """Unpack a tarball of any compression that Python reads.

    :param prefix: only what is below, for example ``rootfs/``.
    :raises tarfile.TarError, EOFError, OSError: when it is damaged.
    """
    found = Tree()
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for member in archive:
            name = member.name.removeprefix('./')
            if prefix and not (name + '/').startswith(prefix):
                continue
            name = '/' + name[len(prefix):]
            node = Node(mode=member.mode, uid=member.uid, gid=member.gid)
            if member.isdir():
                node.kind = 'directory'
            elif member.issym():
                node.kind, node.content = 'symlink', member.linkname.encode()
                node.mode = 0o777
            elif member.isfile():
                stream = archive.extractfile(member)
                node.content = stream.read() if stream else b''
            else:
                continue
            found.put(name, node)
    return found
