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

"""The image store."""

from __future__ import annotations

from collections.abc import Callable
import io
import json
import re
import tarfile
from typing import Any
from urllib import parse

from tests.unit.fake_lxd import clock
from tests.unit.fake_lxd import errors
from tests.unit.fake_lxd import image_content
from tests.unit.fake_lxd import operations
from tests.unit.fake_lxd import routing
from tests.unit.fake_lxd import state
from tests.unit.fake_lxd import tree

_COMPRESSIONS = ('none', 'gzip', 'bzip2', 'xz', 'lzma', 'zstd', 'pigz',
                 'squashfs')
_PROGRAMS = {'squashfs': 'tar2sqfs'}


def owner_of(daemon, project: str) -> str:
    return daemon.store.project_with(
        'images', project, 'Check if project has images: fetch project: '
                           'Project not found')


def find(daemon, owner: str, fingerprint: str) -> state.Image:
    """Find an image by its fingerprint or the beginning of it."""
    for (project, full), image in daemon.store.images.items():
        if project == owner and full.startswith(fingerprint):
            return image
    raise errors.not_found('Image not found')


def _shown(daemon, owner: str, image: state.Image) -> dict[str, Any]:
    aliases = [{'name': name, 'description': alias['description']}
               for (project, name), alias in daemon.store.aliases.items()
               if project == owner and alias['target'] == image.fingerprint]
    return {'auto_update': image.auto_update,
            'properties': dict(image.properties), 'public': image.public,
            'expires_at': image.expires_at, 'profiles': list(image.profiles),
            'aliases': aliases, 'architecture': image.architecture,
            'cached': False, 'filename': image.filename,
            'fingerprint': image.fingerprint, 'size': image.size,
            'type': 'container', 'created_at': image.created_at,
            'last_used_at': image.last_used_at,
            'uploaded_at': image.uploaded_at}


def _etag(image: state.Image) -> tuple[Any, ...]:
    return (image.public, image.auto_update, image.properties)


@routing.route('GET', '/1.0/images')
def list_images(daemon, request):
    with daemon.store.lock:
        owner = owner_of(daemon, request.project)
        images = [image for (project, _), image
                  in sorted(daemon.store.images.items()) if project == owner]
        if request.query.get('recursion') == '1':
            return routing.sync([_shown(daemon, owner, image)
                                 for image in images])
        return routing.sync([f'/1.0/images/{image.fingerprint}'
                             for image in images])


@routing.route('POST', '/1.0/images')
def create_image(daemon, request):
    with daemon.store.lock:
        owner = owner_of(daemon, request.project)
    kind = request.headers.get('content-type', '')
    if kind.startswith('multipart/form-data'):
        boundary = re.search(r'boundary="?([^";]+)', kind)
        if boundary is None:
            raise errors.bad_request('no multipart boundary param in '
                                     'Content-Type')
        return _import(daemon, request, owner, lambda: image_content.split(
            request.body, boundary.group(1)))
    body = request.json_or_empty()
    if isinstance(body, dict) and (body or request.body.strip() == b'{}'):
        return _publish(daemon, request, owner, body)
    return _import(daemon, request, owner,
                   lambda: image_content.unified(request.body))


def _import(daemon, request, owner: str,
            read: Callable[[], image_content.Content]) -> routing.Response:
    def work(operation: operations.Operation) -> None:
        content = read()
        wanted = request.headers.get('x-lxd-fingerprint')
        if wanted and wanted != content.fingerprint:
            raise errors.bad_request(
                f"fingerprints don't match, got {content.fingerprint} "
                f"expected {wanted}")
        given = parse.parse_qs(request.headers.get('x-lxd-properties', ''),
                               keep_blank_values=True)
        properties = {key: str(value) for key, value in (
            content.metadata.get('properties') or {}).items()}
        properties.update({key: values[0] for key, values in given.items()})
        names = [name for _field, name, _content in content.parts if name]
        image = state.Image(
            content.fingerprint, content.parts, properties, content.rootfs,
            architecture=content.metadata['architecture'],
            filename=request.headers.get('x-lxd-filename')
            or (names[-1] if names else ''),
            public=request.headers.get('x-lxd-public') in ('1', 'true'),
            created_at=content.created_at, expires_at=content.expires_at,
            metadata=content.metadata)
        operation.update(fingerprint=image.fingerprint, size=str(image.size))
        _add(daemon, owner, image, 'Image with same fingerprint already '
                                   'exists')

    return daemon.operations.run(request, 'Downloading image', None, work)


def _add(daemon, owner: str, image: state.Image, duplicate: str) -> None:
    with daemon.store.lock:
        if (owner, image.fingerprint) in daemon.store.images:
            raise errors.bad_request(duplicate)
        daemon.store.images[owner, image.fingerprint] = image
    daemon.events.lifecycle('image-created', owner,
                            f'/1.0/images/{image.fingerprint}',
                            context={'type': 'container'}, by_api=True)


def _publish(daemon, request, owner: str, body: dict[str, Any]
             ) -> routing.Response:
    source = body.get('source') or {}
    compression = body.get('compression_algorithm') or 'gzip'
    if source.get('type') not in ('instance', 'container', 'snapshot',
                                  'virtual-machine'):
        raise errors.internal('Invalid images JSON')
    program = compression.split()[0]
    if program in _COMPRESSIONS and program not in daemon.compressions:
        raise errors.bad_request(
            f'exec: "{_PROGRAMS.get(program, program)}": executable file '
            f'not found in $PATH')
    if program not in _COMPRESSIONS:
        raise errors.bad_request(
            f'Invalid compression algorithm "{compression}"')
    with daemon.store.lock:
        name, _, snapshot = source.get('name', '').partition('/')
        instance = daemon.store.instance(request.project, name)
        if source['type'] == 'snapshot' and snapshot not in instance.snapshots:
            raise errors.not_found('Instance not found')

    def work(operation: operations.Operation) -> None:
        with daemon.store.lock:
            if source['type'] == 'snapshot':
                files = instance.snapshots[snapshot].files
            elif instance.is_running:
                raise errors.bad_request(
                    'Cannot export a running instance as an image')
            else:
                files = instance.files
            files = files.copy() if files else tree.Tree()
        content = _pack(files, instance.architecture,
                        dict(body.get('properties') or {}), compression)
        read = image_content.unified(content)
        image = state.Image(
            read.fingerprint, read.parts, dict(body.get('properties') or {}),
            read.rootfs, architecture=instance.architecture,
            filename=body.get('filename') or '',
            public=bool(body.get('public')), created_at=clock.now(),
            expires_at=clock.ZERO)
        operation.update(fingerprint=image.fingerprint, size=str(image.size))
        _add(daemon, owner, image,
             f'The image already exists: {image.fingerprint}')
        for alias in body.get('aliases') or []:
            _name(daemon, owner, image, alias)

    return daemon.operations.run(request, 'Downloading image', None, work)


def _name(daemon, owner: str, image: state.Image, alias: dict[str, str]
          ) -> None:
    name = alias['name']
    with daemon.store.lock:
        if (owner, name) in daemon.store.aliases:
            raise errors.bad_request(f'Alias already exists: {name}')
        daemon.store.aliases[owner, name] = {
            'target': image.fingerprint,
            'description': alias.get('description') or ''}
    daemon.events.lifecycle(
        'image-alias-created', owner, f'/1.0/images/aliases/{name}',
        context={'target': image.fingerprint}, by_api=True)


def _pack(files: tree.Tree, architecture: str, properties: dict[str, str],
          compression: str) -> bytes:
    mode = {'none': 'w', 'gzip': 'w:gz', 'pigz': 'w:gz', 'bzip2': 'w:bz2',
            'xz': 'w:xz', 'lzma': 'w:xz'}.get(compression.split()[0], 'w')
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        metadata = json.dumps({
            'architecture': architecture, 'creation_date': 1700000000,
            'properties': properties}).encode()
        _pack_file(archive, 'metadata.yaml', tree.Node(content=metadata))
        for path, node in files.items():
            _pack_file(archive, 'rootfs' + path, node)
    return stream.getvalue()


def _pack_file(archive: tarfile.TarFile, name: str, node: tree.Node) -> None:
    member = tarfile.TarInfo(name.rstrip('/'))
    member.mode, member.uid, member.gid = node.mode, node.uid, node.gid
    if node.kind == 'directory':
        member.type = tarfile.DIRTYPE
        archive.addfile(member)
    elif node.kind == 'symlink':
        member.type = tarfile.SYMTYPE
        member.linkname = node.content.decode()
        archive.addfile(member)
    else:
        member.size = len(node.content)
        archive.addfile(member, io.BytesIO(node.content))


@routing.route('GET', '/1.0/images/aliases')
def list_aliases(daemon, request):
    with daemon.store.lock:
        owner = owner_of(daemon, request.project)
        names = sorted(name for project, name in daemon.store.aliases
                       if project == owner)
        if request.query.get('recursion') == '1':
            return routing.sync([_alias(daemon, owner, name)
                                 for name in names])
        return routing.sync([f'/1.0/images/aliases/{name}'
                             for name in names])


def _alias(daemon, owner: str, name: str) -> dict[str, str]:
    try:
        alias = daemon.store.aliases[owner, name]
    except KeyError:
        raise errors.not_found('Image alias not found') from None
    return {'description': alias['description'], 'target': alias['target'],
            'name': name, 'type': 'container'}


@routing.route('POST', '/1.0/images/aliases')
def create_alias(daemon, request):
    body = request.json()
    name, target = body.get('name') or '', body.get('target') or ''
    if not name or not target:
        raise errors.bad_request('name and target are required')
    with daemon.store.lock:
        owner = owner_of(daemon, request.project)
        if (owner, name) in daemon.store.aliases:
            raise errors.conflict(f'Alias "{name}" already exists')
        image = find(daemon, owner, target)
        daemon.store.aliases[owner, name] = {
            'target': image.fingerprint,
            'description': body.get('description') or ''}
    daemon.events.lifecycle(
        'image-alias-created', owner, f'/1.0/images/aliases/{name}',
        context={'target': image.fingerprint}, by_api=True)
    return routing.created(f'/1.0/images/aliases/{name}')


@routing.route('GET', '/1.0/images/aliases/{name}')
def get_alias(daemon, request, name):
    with daemon.store.lock:
        alias = _alias(daemon, owner_of(daemon, request.project), name)
        return routing.sync(alias, etag_of=(alias,))


@routing.route('PUT', '/1.0/images/aliases/{name}')
def update_alias(daemon, request, name):
    body = request.json()
    with daemon.store.lock:
        owner = owner_of(daemon, request.project)
        request.check_etag(_alias(daemon, owner, name))
        if not body.get('target'):
            raise errors.bad_request('The target field is required')
        image = find(daemon, owner, body['target'])
        daemon.store.aliases[owner, name] = {
            'target': image.fingerprint,
            'description': body.get('description') or ''}
    daemon.events.lifecycle(
        'image-alias-updated', owner, f'/1.0/images/aliases/{name}',
        context={'target': image.fingerprint}, by_api=True)
    return routing.empty()


@routing.route('PATCH', '/1.0/images/aliases/{name}')
def patch_alias(daemon, request, name):
    with daemon.store.lock:
        request.check_etag(
            _alias(daemon, owner_of(daemon, request.project), name))
    # 5.0.2 waits half a minute for a lock that it holds itself.
    raise errors.internal('context deadline exceeded')


@routing.route('POST', '/1.0/images/aliases/{name}')
def rename_alias(daemon, request, name):
    new = request.json().get('name') or ''
    with daemon.store.lock:
        owner = owner_of(daemon, request.project)
        _alias(daemon, owner, name)
        if (owner, new) in daemon.store.aliases:
            raise errors.conflict(f'Alias "{new}" already exists')
        daemon.store.aliases[owner, new] = daemon.store.aliases.pop(
            (owner, name))
    daemon.events.lifecycle(
        'image-alias-renamed', owner, f'/1.0/images/aliases/{new}',
        context={'old_name': name}, by_api=True)
    return routing.created(f'/1.0/images/aliases/{new}')


@routing.route('DELETE', '/1.0/images/aliases/{name}')
def delete_alias(daemon, request, name):
    with daemon.store.lock:
        owner = owner_of(daemon, request.project)
        _alias(daemon, owner, name)
        del daemon.store.aliases[owner, name]
    daemon.events.lifecycle('image-alias-deleted', owner,
                            f'/1.0/images/aliases/{name}', by_api=True)
    return routing.empty()


@routing.route('GET', '/1.0/images/{fingerprint}')
def get_image(daemon, request, fingerprint):
    with daemon.store.lock:
        owner = owner_of(daemon, request.project)
        image = find(daemon, owner, fingerprint)
        return routing.sync(_shown(daemon, owner, image),
                            etag_of=_etag(image))


def _update(daemon, request, fingerprint):
    body = request.json()
    with daemon.store.lock:
        owner = owner_of(daemon, request.project)
        image = find(daemon, owner, fingerprint)
        request.check_etag(*_etag(image))
        properties = dict(body.get('properties') or {})
        if request.method == 'PATCH':
            properties = {**image.properties, **properties}
        image.properties = {key: value for key, value in properties.items()
                            if value}
        if request.method == 'PUT' or 'public' in body:
            image.public = bool(body.get('public'))
        if request.method == 'PUT' or 'auto_update' in body:
            image.auto_update = bool(body.get('auto_update'))
    daemon.events.lifecycle('image-updated', owner,
                            f'/1.0/images/{image.fingerprint}', by_api=True)
    return routing.empty()


routing.route('PUT', '/1.0/images/{fingerprint}')(_update)
routing.route('PATCH', '/1.0/images/{fingerprint}')(_update)


@routing.route('DELETE', '/1.0/images/{fingerprint}')
def delete_image(daemon, request, fingerprint):
    with daemon.store.lock:
        owner = owner_of(daemon, request.project)
        full = find(daemon, owner, fingerprint).fingerprint

    def work(operation: operations.Operation) -> None:
        with daemon.store.lock:
            if daemon.store.images.pop((owner, full), None) is None:
                raise errors.bad_request('Image not found')
            for key, alias in list(daemon.store.aliases.items()):
                if key[0] == owner and alias['target'] == full:
                    del daemon.store.aliases[key]
        daemon.events.lifecycle('image-deleted', owner,
                                f'/1.0/images/{full}', by_api=True)

    return daemon.operations.run(
        request, 'Deleting image', {'images': [f'/1.0/images/{full}']}, work)


@routing.route('GET', '/1.0/images/{fingerprint}/export')
def export_image(daemon, request, fingerprint):
    with daemon.store.lock:
        owner = owner_of(daemon, request.project)
        image = find(daemon, owner, fingerprint)
    daemon.events.lifecycle('image-retrieved', owner,
                            f'/1.0/images/{image.fingerprint}', by_api=True)
    if len(image.parts) == 1:
        content = image.parts[0][2]
        name = image.fingerprint + image_content.extension(content)
        return routing.content(request, content, name)
    boundary = '4d5e6f' * 10
    names = [f'meta-{image.fingerprint}', image.fingerprint]
    body = b''.join(
        b'--%s\r\nContent-Disposition: form-data; name="%s"; '
        b'filename="%s"\r\nContent-Type: application/octet-stream\r\n\r\n%s'
        b'\r\n' % (boundary.encode(), field.encode(),
                   (name + image_content.extension(content)).encode(),
                   content)
        for name, (field, _filename, content) in zip(names, image.parts))
    return routing.Response(
        200, iter([body, b'--%s--\r\n' % boundary.encode()]),
        {'Content-Type': f'multipart/form-data; boundary={boundary}'})
