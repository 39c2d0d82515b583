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

"""Mount points in a guest that are symbolic links.

liblxc mounts a disk device of LXD only at a path without symbolic links, and
does not start the container otherwise. A guest may have a link in the path of
its config drive, an ephemeral disk or a volume, for example ``/mnt`` as a link
to ``var/mnt``.
"""

from __future__ import annotations

from collections.abc import Mapping
import posixpath
import re

from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import session as lxd

#: Links to follow in a path, as the kernel has a limit too (ELOOP).
_MAX_LINKS = 8
_MAX_LENGTH = 255

#: Allowed mount points. A link target is chosen by the tenant and becomes part
#: of liblxc's configuration, where white space would add mount options.
_ALLOWED = re.compile(r'(?!/(?:dev|proc|sys)(?:/|\Z))'
                      r'(?:/[A-Za-z0-9_][A-Za-z0-9._-]*)+')


def resolve(session: lxd.Session, name: str,
            devices: Mapping[str, Mapping[str, str]]
            ) -> dict[str, dict[str, str]]:
    """Replace symbolic links in the paths of a stopped guest's disk devices.

    :param session: LXD session.
    :param name: LXD's name of the instance.
    :param devices: its LXD devices.
    :returns: the devices whose path has links, with the path that the links
        lead to in the guest. A path that is not allowed is left as it is.
    :raises errors.LXDError: if a request fails.
    """
    changes = {}
    for device_name, device in devices.items():
        path = device.get('path', '')
        if (device.get('type') != 'disk' or path in ('', '/') or
                path.startswith('/sys/')):
            continue
        resolved = _resolve(session, name, path)
        if resolved != path and len(resolved) <= _MAX_LENGTH and (
                _ALLOWED.fullmatch(resolved)):
            changes[device_name] = {**device, 'path': resolved}
    return changes


def _resolve(session: lxd.Session, name: str, path: str) -> str:
    """Follow the links in a path inside the guest.

    :returns: the path without links, or an empty string if there are too many.
    """
    resolved, links = '/', 0
    pending = path.strip('/').split('/')
    while pending:
        candidate = posixpath.join(resolved, pending.pop(0))
        target = _link_target(session, name, candidate)
        if target is None:
            resolved = candidate
            continue
        links += 1
        if links > _MAX_LINKS:
            return ''
        target = posixpath.normpath(posixpath.join(resolved, target))
        pending = [*filter(None, target.split('/')), *pending]
        resolved = '/'
    return resolved


def _link_target(session: lxd.Session, name: str, path: str) -> str | None:
    try:
        with session.download('instances', name, 'files',
                              params={'path': path}) as (headers, chunks):
            if headers.get('X-LXD-type') != 'symlink':
                return None
            return b''.join(chunks).decode(errors='replace')
    except errors.NotFound:
        return None
