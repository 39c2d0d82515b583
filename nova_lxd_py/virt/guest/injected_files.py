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

"""Injection of a tenant's files into a new server.

They are written through LXD, which resolves every link within the guest's
root, so that no path leads out of it.
"""

from __future__ import annotations

from collections.abc import Iterable
import posixpath

from nova import exception
from nova import objects
from oslo_log import log as logging

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.lxd import errors

LOG = logging.getLogger(__name__)

#: Longest path that the kernel accepts (PATH_MAX).
LONGEST_PATH = 4095

FILE_MODE = 0o644
DIRECTORY_MODE = 0o755


def check(files: Iterable[tuple[str, bytes]]) -> None:
    """Check that files can be written to their paths.

    A relative path starts at the root of the guest, as with other drivers.

    :param files: paths in the guest and contents.
    :raises nova.exception.InvalidInput: if a path is not acceptable.
    """
    for path, _content in files:
        parts = path.split('/')
        if (not parts[-1] or '..' in parts or '\0' in path or
                len(path) > LONGEST_PATH):
            raise exception.InvalidInput(reason=(
                f'a file cannot be injected at {path!r}; set the path of a '
                f'file, without ".."'))


def inject(instance: objects.Instance, guest: lxd_guest.Guest,
           files: Iterable[tuple[str, bytes]]) -> None:
    """Write files into an instance that has not been started yet.

    :param instance: the instance.
    :param guest: its LXD instance.
    :param files: paths in the guest and contents. They belong to root.
    :raises nova.exception.InvalidInput: if a path is not acceptable, or not
        possible in this image.
    :raises errors.LXDError: if LXD cannot write one.
    """
    files = list(files)
    check(files)
    for path, content in files:
        path = posixpath.normpath('/' + path.lstrip('/'))
        try:
            _write(guest, path, content)
        except (errors.InvalidRequest, errors.OperationFailed,
                errors.NotFound) as exc:
            LOG.error('Could not inject file %(path)r: %(error)s',
                      {'path': path, 'error': exc}, instance=instance)
            raise exception.InvalidInput(reason=(
                f'the file {path!r} could not be written into the '
                f'image')) from exc
    if files:
        LOG.info('Injected %d files', len(files),
                 instance=instance)


def _write(guest: lxd_guest.Guest, path: str, content: bytes) -> None:
    try:
        guest.write_file(path, content, mode=FILE_MODE)
        return
    except errors.NotFound:
        _make_directories(guest, posixpath.dirname(path))
    guest.write_file(path, content, mode=FILE_MODE)


def _make_directories(guest: lxd_guest.Guest, path: str) -> None:
    """Create a directory and its missing parents."""
    if path == '/':
        return
    try:
        guest.write_file(path, b'', mode=DIRECTORY_MODE, kind='directory')
    except (errors.NotFound, errors.OperationFailed):
        _make_directories(guest, posixpath.dirname(path))
        guest.write_file(path, b'', mode=DIRECTORY_MODE, kind='directory')
