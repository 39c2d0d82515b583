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
``config-2``, which a container cannot mount. Guests that want to see that disk
can have it as well, see :mod:`.configdisk`.

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
import contextlib
import datetime
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
from oslo_utils import timeutils

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import session as lxd
from nova_lxd_py.virt.metadata import config_drive_device

LOG = logging.getLogger(__name__)

#: LXD device of the folder; the driver's own, never a tenant's.
DEVICE = 'config-drive'

#: Where cloud-init looks in the guest.
PATH = '/config-drive'

#: Value of KEY_ROLE on the volume.
ROLE = 'config-drive'

#: Quota of the volume. Nothing is written to it later; the smallest size of
#: every filesystem that a pool may put on it fits (XFS wants 300 MiB).
SIZE = '512MiB'

_VOLUMES = ('volumes', 'custom')

#: Name of the backup through which a drive is read back, and for how long LXD
#: keeps one that an interruption has left.
_BACKUP = 'read-back'
_BACKUP_LIFE = datetime.timedelta(hours=1)
#: Where a backup has the content of its volume.
_CONTENT = 'backup/volume/'


class ConfigDriveManager:
    """Makes and removes config drives.

    :param session: the way to LXD.
    """

    def __init__(self, session: lxd.Session) -> None:
        self._session = session
        self._options = session.options
        self._pool = session.options.storage_pool

    def check(self, instance: objects.Instance) -> None:
        """See that a server can have the config drive that it is to have.

        :param instance: the server.
        :raises nova.exception.InvalidInput: what it is to be is unclear.
        :raises nova.exception.ComputeResourcesUnavailable: this host cannot
            make it.
        """
        if self._has_disk(instance):
            config_drive_device.check(self._session.is_local)

    def _has_disk(self, instance: objects.Instance) -> bool:
        return bool(configdrive.required_by(instance)) and (
            config_drive_device.is_wanted(instance, self._options))

    def build(self, context: nova_context.RequestContext,
              instance: objects.Instance, ports: Iterable[Any],
              injected_files: Iterable[tuple[str, bytes]] = (),
              admin_password: str | None = None
              ) -> dict[str, dict[str, str]]:
        """Make the config drive of a new server, if it is to have one.

        What an interrupted build left of it is replaced.

        :param context: the request's context.
        :param instance: the server.
        :param ports: its ports, in the order of the guest's devices.
        :param injected_files: pairs of path and content; cloud-init puts
            them where the tenant wanted them.
        :param admin_password: password of the guest's administrator.
        :returns: the LXD devices to give to the guest, by name.
        :raises errors.LXDError: LXD cannot make it; nothing is left of it.
        :raises nova.exception.ComputeResourcesUnavailable: the host cannot
            make its block device.
        """
        if not configdrive.required_by(instance):
            return {}
        extra = {'admin_pass': admin_password} if admin_password else None
        metadata = instance_metadata.InstanceMetadata(
            instance, content=list(injected_files), extra_md=extra,
            network_info=network_model.NetworkInfo(ports))
        name = volume_name(instance)
        files = list(metadata.metadata_for_config_drive())
        self.remove(instance)
        self._import(name, _backup(name, instance.uuid, files))
        LOG.debug('Made config drive %s', name, instance=instance)
        devices = self._folder(name)
        if self._has_disk(instance):
            devices.update(config_drive_device.devices(
                config_drive_device.make(instance, name, files)))
        return devices

    def ensure(self, context: nova_context.RequestContext,
               instance: objects.Instance, ports: Iterable[Any]
               ) -> dict[str, dict[str, str]]:
        """Find the config drive of a server, or make it anew if it is lost.

        A new one lacks injected files and password: Nova does not keep them.

        :param context: the request's context.
        :param instance: the server.
        :param ports: its ports, in the order of the guest's devices.
        :returns: the LXD devices to give to the guest, by name.
        :raises errors.LXDError: LXD cannot make it.
        :raises nova.exception.ComputeResourcesUnavailable: the host cannot
            make its block device.
        """
        if not configdrive.required_by(instance):
            return {}
        name = volume_name(instance)
        try:
            self._session.get('storage-pools', self._pool, *_VOLUMES, name)
        except errors.NotFound:
            LOG.warning('The config drive of this server is gone; making it '
                        'anew', instance=instance)
            return self.build(context, instance, ports)
        devices = self._folder(name)
        if self._has_disk(instance):
            # Gone after a reboot of the host.
            disk = config_drive_device.find(name)
            if disk is None:
                config_drive_device.check(self._session.is_local)
                disk = config_drive_device.make(
                    instance, name, self._read_back(name))
            devices.update(config_drive_device.devices(disk))
        return devices

    def remove(self, instance: objects.Instance) -> None:
        """Delete the config drive of a server.

        Its guest must be gone, or have lost the device. A drive that is not
        there is a success.

        :param instance: the server.
        :raises errors.LXDError: LXD cannot delete it.
        """
        config_drive_device.remove(instance, volume_name(instance))
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

    def _read_back(self, name: str) -> list[tuple[str, bytes]]:
        """Have LXD tell what is in a drive.

        Nova could not say it again: it forgets the administrator's password
        and injected files.

        :param name: of the volume.
        :returns: pairs of relative path and content.
        """
        backups = ('storage-pools', self._pool, *_VOLUMES, name, 'backups')
        with contextlib.suppress(errors.NotFound):
            self._session.delete(*backups, _BACKUP)
        self._session.post(*backups, body={
            'name': _BACKUP, 'compression_algorithm': 'none',
            'volume_only': True, 'optimized_storage': False,
            'expires_at': (timeutils.utcnow() + _BACKUP_LIFE).isoformat(
                timespec='seconds') + 'Z'})
        try:
            with self._session.download(*backups, _BACKUP, 'export') as (
                    _headers, chunks):
                content = io.BytesIO(b''.join(chunks))
        finally:
            self._session.delete(*backups, _BACKUP)
        with tarfile.open(fileobj=content, mode='r:') as tar:
            return [(entry.name.removeprefix(_CONTENT),
                     tar.extractfile(entry).read())  # type: ignore[union-attr]
                    for entry in tar if entry.isfile() and
                    entry.name.startswith(_CONTENT)]

    def _folder(self, name: str) -> dict[str, dict[str, str]]:
        return {DEVICE: {'type': 'disk', 'pool': self._pool, 'source': name,
                         'path': PATH, 'readonly': 'true'}}


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
                       lxd_guest.KEY_UUID: uuid,
                       lxd_guest.KEY_ROLE: ROLE}}}}
    now = int(time.time())
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w', format=tarfile.PAX_FORMAT) as tar:
        # YAML contains JSON.
        _add(tar, 'backup/index.yaml', now, json.dumps(index).encode())
        seen: set[str] = set()
        for path, content in files:
            path = f'{_CONTENT}{path}'
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
