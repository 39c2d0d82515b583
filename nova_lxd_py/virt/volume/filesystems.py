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

"""Volumes that a guest gets as mounted filesystems instead of block devices.

The kernel lets no unprivileged container mount a block device. The host can do
it for the guest, which means that the host's kernel reads what is on a
tenant's volume; so it happens only where the operator has allowed it, and only
with the filesystems that the operator has named.
"""

from __future__ import annotations

from collections.abc import Mapping
import errno
import json
import os
import time
from typing import Any

from nova import context as nova_context
from nova import exception
from nova import objects
from nova.volume import cinder
from oslo_config import cfg
from oslo_log import log as logging

from nova_lxd_py.virt.guest import flavor as lxd_flavor
from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.privileged import mounts
from nova_lxd_py.virt.privileged import probe as contents
from nova_lxd_py.virt.volume import base

LOG = logging.getLogger(__name__)

BLOCK = 'block'
FILESYSTEM = 'filesystem'

#: Under this key of the connection the mode is kept while it is attached.
KEY_MODE = 'lxd_mode'
#: Under this key is what was found, or made, on it when it was connected.
KEY_KIND = 'lxd_filesystem'

#: Where tenants and administrators may say which mode they want.
METADATA = 'lxd_volume_mode'

_LABEL_LENGTH = 12

#: Seconds for a device to be free once its filesystem is unmounted.
_PATIENCE = 5.0


class Filesystems:
    """Chooses modes of volumes and mounts their filesystems.

    :param options: the ``[lxd]`` option group.
    """

    def __init__(self, options: cfg.ConfigOpts.GroupAttr) -> None:
        self._options = options
        self._cinder = cinder.API()

    # -- which mode ---------------------------------------------------------

    def choose(self, context: nova_context.RequestContext | None,
               instance: objects.Instance, connection_info: dict[str, Any],
               identifier: str) -> str:
        """Decide how a server gets a volume, unless that is decided already.

        What the volume says counts before what the server says, then come
        its flavor, its image and the host.

        :param context: for asking Cinder.
        :param instance: the server.
        :param connection_info: Cinder's description of the connection, which
            gets the decision.
        :param identifier: Cinder's id of the volume.
        :returns: BLOCK or FILESYSTEM.
        :raises nova.exception.VolumeAttachFailed: what was asked for cannot
            be had.
        """
        if KEY_MODE in connection_info:
            return connection_info[KEY_MODE]
        mode = self._options.volume_mode
        if self._options.volume_filesystems:
            mode = self._wanted(context, instance, identifier) or mode
        if mode == FILESYSTEM and not self._options.volume_filesystems:
            mode = BLOCK
        if mode not in (BLOCK, FILESYSTEM):
            raise exception.VolumeAttachFailed(
                volume_id=identifier,
                reason=f'{METADATA} is "{mode}", which is neither '
                       f'"{BLOCK}" nor "{FILESYSTEM}"')
        if mode == FILESYSTEM:
            _refuse_sharing(connection_info, identifier)
        connection_info[KEY_MODE] = mode
        return mode

    def _wanted(self, context: nova_context.RequestContext | None,
                instance: objects.Instance, identifier: str) -> str | None:
        if context is not None:
            volume = self._cinder.get(context, identifier)
            found = (volume.get('volume_metadata') or {}).get(METADATA)
            if found:
                return found
        return (instance.metadata.get(METADATA) or
                instance.flavor.extra_specs.get(
                    lxd_flavor.SPEC_VOLUME_MODE) or
                instance.system_metadata.get(f'image_{METADATA}'))

    # -- devices ------------------------------------------------------------

    def target(self, identifier: str) -> str:
        """Tell where a volume is mounted on the host.

        :param identifier: Cinder's id of the volume.
        """
        return os.path.join(self._options.volume_mount_directory, identifier)

    @staticmethod
    def adopt(old: Mapping[str, Any], new: dict[str, Any], identifier: str
              ) -> None:
        """Have one volume attached as another one is, whose content it gets.

        :param old: connection of a volume that is attached.
        :param new: connection of the other one.
        :param identifier: Cinder's id of the other one.
        :raises nova.exception.VolumeAttachFailed: that cannot be.
        """
        for key in (KEY_MODE, KEY_KIND):
            if key in old:
                new[key] = old[key]
        if is_filesystem(new):
            _refuse_sharing(new, identifier)

    def device(self, connection_info: dict[str, Any], identifier: str,
               path: str, probe: bool = True) -> dict[str, str]:
        """Describe a connected volume as an LXD device, and see that it has a
        filesystem.

        :param connection_info: Cinder's description of the connection.
        :param identifier: Cinder's id of the volume.
        :param path: the device name of the volume.
        :param probe: whether to look at what is on it.
        :returns: the device, which needs :meth:`mount` before a start.
        :raises base.Refused: there is something else on the volume.
        """
        if probe:
            connection_info[KEY_KIND] = self._find_kind(connection_info,
                                                        identifier)
        device = {'type': 'disk', 'source': self.target(identifier),
                  'path': guest_directory(path)}
        if is_read_only(connection_info):
            device['readonly'] = 'true'
        return device

    def _find_kind(self, connection_info: dict[str, Any], identifier: str
                   ) -> str:
        """Find out which filesystem is on a volume; an empty one gets one.

        :raises base.Refused: there is something else on it.
        """
        path = base.device_path(connection_info) or ''
        allowed = self._options.volume_filesystems
        found = contents.content(path)
        if found in allowed and found in mounts.MAKERS:
            return found
        if found:
            raise base.Refused(
                f'it holds {found}, and the host mounts '
                f'{", ".join(allowed)} only; attach it as a block device')
        if is_read_only(connection_info):
            raise base.Refused('it is empty, and a filesystem cannot be made '
                               'on it while it is read-only')
        kind = allowed[0]
        mounts.make_filesystem(path, kind, identifier[:_LABEL_LENGTH])
        LOG.info('Made a filesystem of type %(kind)s on the empty volume '
                 '%(volume)s', {'kind': kind, 'volume': identifier})
        return kind

    def _kind(self, connection_info: dict[str, Any], identifier: str) -> str:
        """Tell which filesystem was on a volume when it was connected.

        The kernel finds no other one there, whatever happened since.
        """
        kind = connection_info.get(KEY_KIND)
        if kind is None:
            kind = self._find_kind(connection_info, identifier)
            connection_info[KEY_KIND] = kind
        return kind

    # -- mounts -------------------------------------------------------------

    def prepare(self, identifier: str) -> None:
        """Make the folder of a volume that is to be mounted: LXD wants to see
        it before.

        :param identifier: Cinder's id of the volume.
        """
        mounts.create_mount_point(self.target(identifier))

    def mount(self, guest: lxd_guest.Guest, connection_info: dict[str, Any],
              identifier: str) -> None:
        """Mount a volume for a guest that has its range of ids.

        :param guest: the guest, just read, which does not have the mount yet.
        :param connection_info: Cinder's description of the connection.
        :param identifier: Cinder's id of the volume.
        :raises base.Refused: there is no filesystem, or the kernel cannot do
            it.
        """
        uid, gid, size = id_range(guest)
        try:
            mounts.mount(base.device_path(connection_info) or '',
                         self._kind(connection_info, identifier),
                         self.target(identifier),
                         is_read_only(connection_info), uid, gid, size)
        except OSError as error:
            refuse_old_kernel(identifier, error)
            raise

    def is_prepared(self, identifier: str) -> bool:
        """Whether a volume is mounted, or is about to be.

        :param identifier: Cinder's id of the volume.
        """
        return os.path.isdir(self.target(identifier))

    def is_mounted(self, identifier: str) -> bool:
        """Whether a volume is mounted.

        :param identifier: Cinder's id of the volume.
        """
        return mounts.is_mounted(self.target(identifier))

    def unmount(self, identifier: str, force: bool) -> bool:
        """Unmount a volume, if it is mounted.

        :param identifier: Cinder's id of the volume.
        :param force: even while something uses it.
        :returns: whether it was mounted.
        :raises OSError: something uses it, without force.
        """
        return self.is_prepared(identifier) and mounts.unmount(
            self.target(identifier), force)

    def release(self, identifier: str, path: str, mountpoint: str) -> None:
        """Unmount a volume that has just been taken out of a guest.

        :param identifier: Cinder's id of the volume.
        :param path: its block device.
        :param mountpoint: the device name of the volume.
        :raises nova.exception.DeviceDetachFailed: something holds it still,
            in the guest or on the host.
        """
        try:
            self.unmount(identifier, False)
            # A container that is just being started has a copy of all mounts
            # for a moment.
            deadline = time.monotonic() + _PATIENCE
            while (held := mounts.is_in_use(path)) and (
                    time.monotonic() < deadline):
                time.sleep(0.02)
        except FileNotFoundError:
            held = False
        except OSError as error:
            LOG.info('Volume %(volume)s cannot be unmounted: %(error)s',
                     {'volume': identifier, 'error': error})
            held = True
        if held:
            raise exception.DeviceDetachFailed(
                device=mountpoint,
                reason='the server has it mounted in another place, or a '
                       'process stands in it')

    def freeze(self, identifier: str) -> None:
        """Bring the filesystem of a volume to rest: all of it is on the
        storage then, and whoever writes to it waits.

        :param identifier: Cinder's id of the volume, mounted or not.
        :raises OSError: the kernel refuses.
        """
        mounts.freeze(self.target(identifier))

    def thaw(self, identifier: str) -> None:
        """Take :meth:`freeze` back; again is no change.

        :param identifier: Cinder's id of the volume.
        """
        mounts.thaw(self.target(identifier))

    def grow(self, connection_info: dict[str, Any], identifier: str) -> None:
        """Have the filesystem of a mounted volume fill it.

        :param connection_info: Cinder's description of the connection.
        :param identifier: Cinder's id of the volume.
        :raises OSError: the kernel refuses.
        """
        mounts.grow(base.device_path(connection_info) or '',
                    self._kind(connection_info, identifier),
                    self.target(identifier))


def refuse_old_kernel(identifier: str, error: OSError) -> None:
    """Say so where it is the kernel that cannot mount with mapped ids.

    :param identifier: Cinder's id of the volume.
    :param error: what the kernel said.
    :raises base.Refused: it cannot.
    """
    if error.errno in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        LOG.error('The kernel cannot mount volume %(volume)s with mapped ids, '
                  'which takes Linux 5.12, for xfs 5.19: %(error)s',
                  {'volume': identifier, 'error': error})
        raise base.Refused(
            'the kernel of the host cannot map the user ids of its '
            'filesystem; attach it as a block device') from None


def is_filesystem(connection_info: Mapping[str, Any]) -> bool:
    """Whether a volume has been attached as a filesystem."""
    return connection_info.get(KEY_MODE) == FILESYSTEM


def is_read_only(connection_info: Mapping[str, Any]) -> bool:
    """Whether nothing may be written to a volume."""
    return connection_info['data'].get('access_mode') == 'ro'


def _refuse_sharing(connection_info: Mapping[str, Any], identifier: str
                    ) -> None:
    if connection_info.get('multiattach'):
        raise exception.VolumeAttachFailed(
            volume_id=identifier,
            reason='a filesystem cannot be mounted by several servers at a '
                   'time; attach it as a block device')


def guest_directory(path: str) -> str:
    """Tell where the guest finds a mounted volume.

    :param path: the device name of the volume, which has been checked.
    :returns: a folder of the same name below ``/mnt``.
    """
    return '/mnt/' + path.removeprefix('/dev/')


def id_range(guest: lxd_guest.Guest) -> tuple[int, int, int]:
    """Read which ids of the host a guest has, or gets at its next start.

    :param guest: the guest, just read.
    :returns: first user id, first group id, and how many; 0 for a guest with
        the ids of the host.
    :raises base.Refused: LXD does not say.
    """
    if guest.config.get('security.privileged') == 'true':
        return 0, 0, 0
    entries = json.loads(guest.config.get('volatile.idmap.next') or '[]')
    first = {}
    for entry in entries:
        if entry['Nsid'] == 0:
            for flag, kind in (('Isuid', 'uid'), ('Isgid', 'gid')):
                if entry[flag]:
                    first[kind] = entry
    if set(first) != {'uid', 'gid'}:
        raise base.Refused('LXD has not given the server a range of user ids')
    return (first['uid']['Hostid'], first['gid']['Hostid'],
            min(entry['Maprange'] for entry in first.values()))
