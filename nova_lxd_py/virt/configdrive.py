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

"""Config drives: a server's metadata as a folder at ``/config-drive``.

cloud-init looks there for what it would otherwise find on a disk labelled
``config-2``, which a container cannot mount.

The folder is a custom volume in LXD's storage pool, filled by LXD itself from
a backup that the driver makes up in memory. Compared with a folder on the host
that is bind-mounted into the guest, and with files put into the root disk,

* LXD gives the files to the guest's root user, whatever uid range that has;
  everything is readable by nobody else, neither in the guest nor on the host;
* nova-compute needs no root privileges and no path in common with LXD, so it
  works from a container, for the snap and over TLS;
* a snapshot or an image of the server does not contain the drive, and with it
  the administrator's password;
* the volume bears the server's uuid, so LXD knows to whom it belongs, and the
  pool's own cleanup holds for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import io
import json
import tarfile
import time
from typing import Any

from nova.api.metadata import base as instance_metadata
from nova import context as nova_context
from nova.network import model as network_model
from nova import objects
from nova.virt import configdrive
from oslo_log import log as logging

from nova_lxd_py.virt import errors
from nova_lxd_py.virt import instance as lxd_instance
from nova_lxd_py.virt import session as lxd

LOG = logging.getLogger(__name__)

#: LXD device of the drive; the driver's own, never a tenant's.
DEVICE = 'config-drive'

#: Where cloud-init looks in the guest.
PATH = '/config-drive'

#: Value of KEY_ROLE on the volume.
ROLE = 'config-drive'

#: Quota of the volume. Nothing is written to it later; the smallest size of
#: every filesystem that a pool may put on it fits (XFS wants 300 MiB).
SIZE = '512MiB'

_VOLUMES = ('volumes', 'custom')


class ConfigDrives:
    """Makes and removes config drives.

    :param session: the way to LXD.
    :param pool: name of the storage pool for them.
    """

    def __init__(self, session: lxd.Session, pool: str) -> None:
        self._session = session
        self._pool = pool

    def build(self, context: nova_context.RequestContext,
              instance: objects.Instance, ports: Iterable[Any],
              injected_files: Iterable[tuple[str, bytes]] = (),
              admin_password: str | None = None) -> dict[str, str] | None:
        """Make the config drive of a new server, if it is to have one.

        What an interrupted build left of it is replaced.

        :param context: the request's context.
        :param instance: the server.
        :param ports: its ports, in the order of the guest's devices.
        :param injected_files: pairs of path and content; cloud-init puts
            them where the tenant wanted them.
        :param admin_password: password of the guest's administrator.
        :returns: the LXD device to give to the guest, or None.
        :raises errors.LXDError: LXD cannot make it; nothing is left of it.
        """
        if not configdrive.required_by(instance):
            return None
        extra = {'admin_pass': admin_password} if admin_password else None
        metadata = instance_metadata.InstanceMetadata(
            instance, content=list(injected_files), extra_md=extra,
            network_info=network_model.NetworkInfo(ports))
        name = volume_name(instance)
        backup = _backup(name, instance.uuid,
                         metadata.metadata_for_config_drive())
        self.remove(instance)
        self._import(name, backup)
        LOG.debug('Made config drive %s', name, instance=instance)
        return self._device(name)

    def ensure(self, context: nova_context.RequestContext,
               instance: objects.Instance, ports: Iterable[Any]
               ) -> dict[str, str] | None:
        """Find the config drive of a server, or make it anew if it is lost.

        A new one lacks injected files and password: Nova does not keep them.

        :param context: the request's context.
        :param instance: the server.
        :param ports: its ports, in the order of the guest's devices.
        :returns: the LXD device to give to the guest, or None.
        :raises errors.LXDError: LXD cannot make it.
        """
        if not configdrive.required_by(instance):
            return None
        name = volume_name(instance)
        try:
            self._session.get('storage-pools', self._pool, *_VOLUMES, name)
        except errors.NotFound:
            LOG.warning('The config drive of this server is gone; making it '
                        'anew', instance=instance)
            return self.build(context, instance, ports)
        return self._device(name)

    def remove(self, instance: objects.Instance) -> None:
        """Delete the config drive of a server.

        Its guest must be gone, or have lost the device. A drive that is not
        there is a success.

        :param instance: the server.
        :raises errors.LXDError: LXD cannot delete it.
        """
        try:
            self._session.delete('storage-pools', self._pool, *_VOLUMES,
                                 volume_name(instance))
        except errors.NotFound:
            return
        LOG.debug('Removed its config drive', instance=instance)

    def _import(self, name: str, backup: bytes) -> None:
        self._session.upload(
            'storage-pools', self._pool, *_VOLUMES, chunks=[backup],
            headers={'Content-Type': 'application/octet-stream',
                     'X-LXD-name': name})

    def _device(self, name: str) -> dict[str, str]:
        return {'type': 'disk', 'pool': self._pool, 'source': name,
                'path': PATH, 'readonly': 'true'}


def volume_name(instance: objects.Instance) -> str:
    """Name the volume of a server's config drive.

    :param instance: the server.
    :returns: LXD's name, which follows from the uuid alone.
    """
    return f'config-drive-{instance.uuid}'


def _backup(name: str, uuid: str,
            files: Iterable[tuple[str, str | bytes]]) -> bytes:
    """Write the backup of a custom volume that has never existed.

    The format is that of LXD's API extension ``custom_volume_backup``: newer
    versions have to read the backups of older ones.

    :param name: name of the volume.
    :param uuid: uuid of the server.
    :param files: pairs of relative path and content.
    :returns: an uncompressed tarball.
    """
    index = {
        'name': name, 'backend': '', 'pool': '', 'optimized': False,
        'optimized_header': False, 'type': 'custom',
        'config': {'volume': {
            'name': name, 'type': 'custom', 'content_type': 'filesystem',
            'description': 'Config drive of a server',
            'config': {'size': SIZE,
                       lxd_instance.KEY_UUID: uuid,
                       lxd_instance.KEY_ROLE: ROLE}}}}
    now = int(time.time())
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w', format=tarfile.PAX_FORMAT) as tar:
        # YAML contains JSON.
        _add(tar, 'backup/index.yaml', now, json.dumps(index).encode())
        seen: set[str] = set()
        for path, content in files:
            path = f'backup/volume/{path}'
            for folder in _parents(path):
                if folder not in seen:
                    seen.add(folder)
                    _add(tar, folder, now)
            _add(tar, path, now, content.encode('utf-8')
                 if isinstance(content, str) else content)
    return out.getvalue()


def _parents(path: str) -> Iterator[str]:
    """List the folders above a file, from ``backup/volume`` on."""
    parts = path.split('/')
    # Nova's paths are fixed words and numbers; see that it stays so.
    if not all(parts) or '..' in parts or '.' in parts:
        raise ValueError(f'"{path}" is not a path below the config drive')
    for length in range(2, len(parts)):
        yield '/'.join(parts[:length])


def _add(tar: tarfile.TarFile, path: str, now: int,
         content: bytes | None = None) -> None:
    """Add a file, or a folder if it has no content; root's alone."""
    entry = tarfile.TarInfo(path)
    entry.mtime = now
    if content is None:
        entry.type = tarfile.DIRTYPE
        entry.mode = 0o700
        tar.addfile(entry)
        return
    entry.mode = 0o400
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))
