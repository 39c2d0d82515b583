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

"""Config drives: an instance's metadata in the directory ``/config-drive``.

cloud-init searches that directory, as it searches a disk labelled
``config-2``, which a container cannot mount. Guests that need the disk can
have it as well, see :mod:`.config_drive_device`.

The directory is a custom volume in LXD's storage pool, which LXD fills from a
backup that the driver generates in memory. Compared with a bind-mounted
directory of the host, or with files injected into the root disk:

* LXD maps the owner of the files to the guest's root user, whatever its uid
  range is; nobody else can read them, neither in the guest nor on the host;
* nova-compute needs no root privileges and shares no path with LXD, so it
  works from a container, with LXD's snap and over TLS;
* snapshots and images of the instance do not contain the drive and the
  administrator's password that is in it;
* the volume's keys name the instance, so it can be found and deleted without
  any record outside LXD.
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

#: Name of the volume's LXD device. Tenants cannot choose device names.
DEVICE = 'config-drive'

#: Mount point in the guest, which cloud-init searches.
PATH = '/config-drive'

#: Value of KEY_ROLE on the volume.
ROLE = 'config-drive'

#: Quota of the volume. The content is a few hundred KiB; the quota must exceed
#: the minimum size of any filesystem that a pool may use (300 MiB for XFS).
SIZE = '512MiB'

_VOLUMES = ('volumes', 'custom')

#: Name of the LXD backup with which the files of a drive are read, and the
#: time after which LXD deletes one that an interrupted read has left.
_BACKUP = 'read-back'
_BACKUP_LIFETIME = datetime.timedelta(hours=1)
#: Path of the volume's content in a backup.
_CONTENT = 'backup/volume/'


class ConfigDriveManager:
    """Creates and deletes config drives.

    :param session: LXD session.
    """

    def __init__(self, session: lxd.Session) -> None:
        self._session = session
        self._options = session.options
        self._pool = session.options.storage_pool

    def check(self, instance: objects.Instance) -> None:
        """Check that this host can create the config drive of an instance.

        :param instance: the instance.
        :raises nova.exception.InvalidInput: if the flavor's extra spec or the
            image's property is not a boolean.
        :raises nova.exception.ComputeResourcesUnavailable: if the config
            drive is to be a block device, and this host cannot create one.
        """
        if self._needs_block_device(instance):
            config_drive_device.check(self._session.is_local)

    def _needs_block_device(self, instance: objects.Instance) -> bool:
        return bool(configdrive.required_by(instance)) and (
            config_drive_device.is_wanted(instance, self._options))

    def build(self, instance: objects.Instance, ports: Iterable[Any],
              injected_files: Iterable[tuple[str, bytes]] = (),
              admin_password: str | None = None
              ) -> dict[str, dict[str, str]]:
        """Create the config drive of a new instance, if it needs one.

        Leftovers of an interrupted build are replaced.

        :param instance: the instance.
        :param ports: its ports, in the order of the guest's devices.
        :param injected_files: pairs of path and content, which the metadata
            has as ``files`` for cloud-init.
        :param admin_password: password of the guest's administrator.
        :returns: the LXD devices to add to the guest, by name.
        :raises errors.LXDError: if LXD cannot create the volume; nothing is
            left behind.
        :raises nova.exception.ComputeResourcesUnavailable: if the host cannot
            create the block device; the volume is left for :meth:`remove`.
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
        LOG.debug('Created config drive %s', name, instance=instance)
        devices = self._volume_device(name)
        if self._needs_block_device(instance):
            devices.update(config_drive_device.devices(
                config_drive_device.create(instance, name, files)))
        return devices

    def ensure(self, instance: objects.Instance, ports: Iterable[Any]
               ) -> dict[str, dict[str, str]]:
        """Find the config drive of an instance, or recreate it if it is lost.

        A recreated one lacks the injected files and the administrator's
        password, which Nova does not store.

        :param instance: the instance.
        :param ports: its ports, in the order of the guest's devices.
        :returns: the LXD devices to add to the guest, by name.
        :raises errors.LXDError: if LXD cannot create the volume.
        :raises nova.exception.ComputeResourcesUnavailable: if the host cannot
            create the block device.
        """
        if not configdrive.required_by(instance):
            return {}
        name = volume_name(instance)
        try:
            self._session.get('storage-pools', self._pool, *_VOLUMES, name)
        except errors.NotFound:
            LOG.warning('Config drive is missing, recreating it without '
                        'injected files and password', instance=instance)
            return self.build(instance, ports)
        devices = self._volume_device(name)
        if self._needs_block_device(instance):
            # A loop device does not survive a reboot of the host.
            path = config_drive_device.find(name)
            if path is None:
                config_drive_device.check(self._session.is_local)
                path = config_drive_device.create(
                    instance, name, self._read_files(name))
            devices.update(config_drive_device.devices(path))
        return devices

    def remove(self, instance: objects.Instance) -> None:
        """Delete the config drive of an instance. Idempotent.

        No guest may have the device any more.

        :param instance: the instance.
        :raises errors.LXDError: if LXD cannot delete the volume.
        """
        config_drive_device.remove(instance, volume_name(instance))
        try:
            self._session.delete('storage-pools', self._pool, *_VOLUMES,
                                 volume_name(instance))
        except errors.NotFound:
            return
        LOG.debug('Deleted config drive', instance=instance)

    def _import(self, name: str, backup: bytes) -> None:
        self._session.upload(
            'storage-pools', self._pool, *_VOLUMES, chunks=[backup],
            headers={'Content-Type': 'application/octet-stream',
                     'X-LXD-name': name})

    def _read_files(self, name: str) -> list[tuple[str, bytes]]:
        """Read the files of a config drive from LXD, by means of a backup.

        They cannot be generated again: Nova does not store the
        administrator's password and the injected files.

        :param name: name of the volume.
        :returns: pairs of relative path and content.
        """
        backups = ('storage-pools', self._pool, *_VOLUMES, name, 'backups')
        with contextlib.suppress(errors.NotFound):
            self._session.delete(*backups, _BACKUP)
        self._session.post(*backups, body={
            'name': _BACKUP, 'compression_algorithm': 'none',
            'volume_only': True, 'optimized_storage': False,
            'expires_at': (timeutils.utcnow() + _BACKUP_LIFETIME).isoformat(
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

    def _volume_device(self, name: str) -> dict[str, dict[str, str]]:
        return {DEVICE: {'type': 'disk', 'pool': self._pool, 'source': name,
                         'path': PATH, 'readonly': 'true'}}


def volume_name(instance: objects.Instance) -> str:
    """Return the name of the volume of an instance's config drive.

    :param instance: the instance.
    :returns: the LXD volume's name, derived from the instance's uuid.
    """
    return f'config-drive-{instance.uuid}'


def _backup(name: str, uuid: str,
            files: Iterable[tuple[str, str | bytes]]) -> bytes:
    """Generate the backup of a custom volume, for LXD to restore.

    The format is that of LXD's API extension ``custom_volume_backup``, which
    newer versions have to keep reading.

    :param name: name of the volume.
    :param uuid: uuid of the instance.
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
        # JSON is a subset of YAML.
        _add(tar, 'backup/index.yaml', now, json.dumps(index).encode())
        seen: set[str] = set()
        for path, content in files:
            path = f'{_CONTENT}{path}'
            for directory in _parents(path):
                if directory not in seen:
                    seen.add(directory)
                    _add(tar, directory, now)
            _add(tar, path, now, content.encode('utf-8')
                 if isinstance(content, str) else content)
    return out.getvalue()


def _parents(path: str) -> Iterator[str]:
    """List the parent directories of a file, from ``backup/volume`` down.

    :raises ValueError: if the path could leave the volume.
    """
    parts = path.split('/')
    # Nova generates these paths from constants and numbers only.
    if not all(parts) or '..' in parts or '.' in parts:
        raise ValueError(f'"{path}" is not a path below the config drive')
    for length in range(2, len(parts)):
        yield '/'.join(parts[:length])


def _add(tar: tarfile.TarFile, path: str, now: int,
         content: bytes | None = None) -> None:
    """Add a file, or a directory if content is None, readable by root only."""
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
