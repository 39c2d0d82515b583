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

"""The file API of instances."""

from __future__ import annotations

import posixpath
from typing import Any

from tests.unit.fake_lxd import errors
from tests.unit.fake_lxd import routing
from tests.unit.fake_lxd import state
from tests.unit.fake_lxd import tree


def _open(daemon, request, name: str) -> tuple[state.Instance, tree.Tree, str]:
    instance = daemon.store.instance(request.project, name)
    path = request.query.get('path') or ''
    if not path:
        raise errors.bad_request('Missing path argument')
    if instance.files is None:
        raise errors.not_found('Not Found')
    return instance, instance.files, tree.normal(path)


def _event(daemon, action: str, instance: state.Instance, path: str) -> None:
    daemon.events.lifecycle(f'instance-file-{action}', instance.project,
                            instance.path, context={'path': path})


@routing.route('GET', '/1.0/instances/{name}/files')
def read(daemon, request, name):
    with daemon.store.lock:
        instance, files, path = _open(daemon, request, name)
        node = files.get(path)
        headers = {
            'X-LXD-uid': str(node.uid), 'X-LXD-gid': str(node.gid),
            'X-LXD-mode': f'{node.mode:04o}', 'X-LXD-type': node.kind,
            'X-LXD-modified': node.modified.strftime(
                '%Y-%m-%d %H:%M:%S +0000 UTC')}
        children = files.children(path) if node.kind == 'directory' else None
        content = node.content
        if node.kind == 'symlink':
            # LXD shows where a relative link leads to.
            content = posixpath.normpath(posixpath.join(
                posixpath.dirname(path), content.decode())).encode()
    _event(daemon, 'retrieved', instance, path)
    if children is not None:
        return routing.sync(children, headers=headers)
    return routing.content(request, content, posixpath.basename(path),
                           headers)


@routing.route('POST', '/1.0/instances/{name}/files')
def write(daemon, request, name):
    headers = request.headers
    kind = headers.get('x-lxd-type') or 'file'
    how = headers.get('x-lxd-write') or 'overwrite'
    with daemon.store.lock:
        instance, files, path = _open(daemon, request, name)
        if how not in ('overwrite', 'append'):
            raise errors.bad_request(f'Bad file write mode: {how}')
        if kind not in ('file', 'directory', 'symlink'):
            raise errors.bad_request(f'Bad file type: {kind}')
        defaults: dict[str, Any] = {'file': 0o644, 'directory': 0o755,
                                    'symlink': 0o777}
        node = tree.Node(
            kind, b'' if kind == 'directory' else request.body,
            _mode(headers.get('x-lxd-mode')) or defaults[kind],
            int(headers.get('x-lxd-uid') or 0),
            int(headers.get('x-lxd-gid') or 0))
        existed = kind == 'file' and files.exists(path)
        files.write(path, node, append=how == 'append')
        if existed:
            there = files.node(path)
            if 'x-lxd-mode' in headers:
                there.mode = node.mode
            if 'x-lxd-uid' in headers:
                there.uid = node.uid
            if 'x-lxd-gid' in headers:
                there.gid = node.gid
    _event(daemon, 'pushed', instance, path)
    return routing.empty()


def _mode(text: str | None) -> int:
    if not text:
        return 0
    try:
        return int(text, 8 if text.startswith('0') else 10)
    except ValueError:
        raise errors.bad_request(
            f'strconv.Atoi: parsing "{text}": invalid syntax') from None


@routing.route('DELETE', '/1.0/instances/{name}/files')
def delete(daemon, request, name):
    with daemon.store.lock:
        instance, files, path = _open(daemon, request, name)
        files.remove(path)
    _event(daemon, 'deleted', instance, path)
    return routing.empty()
