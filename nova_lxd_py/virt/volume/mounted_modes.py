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

"""The modes in which the host mounts the filesystem of a volume for a guest.

Mounts have the guest's IDs. They must be there before the guest starts, stay
while it is stopped, and are removed with the connection.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
import os
import time
from typing import Any

from nova import exception
from nova import objects
from oslo_config import cfg
from oslo_log import log as logging

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.privileged import mounts
from nova_lxd_py.virt.privileged import probe
from nova_lxd_py.virt.privileged import rootfs
from nova_lxd_py.virt.volume import base
from nova_lxd_py.virt.volume import id_mapping
from nova_lxd_py.virt.volume import io_counters
from nova_lxd_py.virt.volume import lxd_devices
from nova_lxd_py.virt.volume import modes

LOG = logging.getLogger(__name__)

#: Seconds for a device to be released after its filesystem was unmounted.
_RELEASE_TIMEOUT = 5.0


class _MountedMode(modes.Mode):
    """The host mounts the filesystem of the volume."""

    @abc.abstractmethod
    def target(self, identifier: str) -> str:
        """Return the directory on the host at which a volume is mounted.

        :param identifier: Cinder's ID of the volume.
        """

    @abc.abstractmethod
    def _find_kind(self, connection_info: Mapping[str, Any], identifier: str
                   ) -> str:
        """Return which filesystem is on a volume.

        :raises base.Refused: if there is something else on it.
        """

    @abc.abstractmethod
    def _mount(self, connection_info: Mapping[str, Any], kind: str,
               target: str, ids: tuple[int, int, int]) -> None:
        """Mount the filesystem with the IDs of a guest."""

    def _kind(self, connection_info: dict[str, Any], identifier: str) -> str:
        """Return which filesystem was on a volume when it was connected.

        The kernel mounts no other one, whatever happened since.
        """
        if connection_info.get(modes.KEY_KIND) is None:
            connection_info[modes.KEY_KIND] = self._find_kind(
                connection_info, identifier)
        return connection_info[modes.KEY_KIND]

    def mount(self, guest: lxd_guest.Guest, connection_info: dict[str, Any],
              identifier: str) -> None:
        """See :meth:`.Mode.mount`."""
        try:
            self._mount(connection_info, self._kind(connection_info,
                                                    identifier),
                        self.target(identifier),
                        id_mapping.id_range(guest))
        except OSError as error:
            id_mapping.raise_if_unsupported(guest, identifier, error)
            raise
        if modes.is_read_only(connection_info):
            return
        # The volume may be larger than when it was mounted last.
        try:
            self.grow(connection_info, identifier)
        except Exception as error:
            # All content is there, in a filesystem of the old size.
            LOG.warning('Could not grow the filesystem of volume %(volume)s '
                        'of %(guest)s: %(error)s',
                        {'volume': identifier, 'guest': guest.name,
                         'error': error}, instance_uuid=guest.uuid)

    def grow(self, connection_info: dict[str, Any], identifier: str) -> None:
        """See :meth:`.Mode.grow`."""
        mounts.grow(base.device_path(connection_info) or '',
                    self._kind(connection_info, identifier),
                    self.target(identifier))

    def flush(self, identifier: str, path: str, deadline: float) -> None:
        """See :meth:`.Mode.flush`."""
        mounts.sync(self.target(identifier), deadline)


class FilesystemMode(_MountedMode):
    """The guest gets the mounted filesystem below its ``/mnt``."""

    name = modes.FILESYSTEM

    def target(self, identifier: str) -> str:
        """See :meth:`_MountedMode.target`."""
        return mount_directory(self._options, identifier)

    def check(self, instance: objects.Instance,
              connection_info: Mapping[str, Any], identifier: str) -> None:
        """See :meth:`.Mode.check`."""
        if connection_info.get('multiattach'):
            raise exception.VolumeAttachFailed(
                volume_id=identifier,
                reason='a filesystem cannot be mounted by several servers at '
                       'a time; attach it as a block device')

    def prepare(self, connection_info: dict[str, Any], identifier: str,
                probed: bool) -> None:
        """See :meth:`.Mode.prepare`; an empty volume gets a filesystem."""
        if not probed:
            connection_info.pop(modes.KEY_KIND, None)
            self._kind(connection_info, identifier)
        # LXD requires the directory before the volume is mounted.
        mounts.create_mount_point(self.target(identifier))

    def describe(self, connection_info: Mapping[str, Any], identifier: str,
                 mountpoint: str) -> modes.GuestChanges:
        """See :meth:`.Mode.describe`."""
        path = base.device_path(connection_info) or ''
        device = {'type': 'disk', 'source': self.target(identifier),
                  'path': guest_directory(lxd_devices.guest_path(mountpoint)),
                  lxd_devices.KEY_SOURCE: path,
                  lxd_devices.KEY_BOOT: lxd_devices.boot_id(),
                  **io_counters.store(lxd_devices.KEY_COUNTERS, path)}
        if modes.is_read_only(connection_info):
            device['readonly'] = 'true'
        return modes.GuestChanges(
            devices={lxd_devices.name(identifier): device})

    def _find_kind(self, connection_info: Mapping[str, Any], identifier: str
                   ) -> str:
        path = base.device_path(connection_info) or ''
        allowed = self._options.volume_filesystems
        found = probe.content(path)
        if found in allowed and found in mounts.MAKERS:
            return found
        if found:
            raise base.Refused(
                f'it holds {found}, and the host mounts '
                f'{", ".join(allowed)} only; attach it as a block device')
        if modes.is_read_only(connection_info):
            raise base.Refused('it is empty, and a filesystem cannot be made '
                               'on it while it is read-only')
        kind = allowed[0]
        mounts.make_filesystem(path, kind, identifier[:mounts.LABEL_LENGTH])
        LOG.info('Made a filesystem of type %(kind)s on the empty volume '
                 '%(volume)s', {'kind': kind, 'volume': identifier})
        return kind

    def _mount(self, connection_info: Mapping[str, Any], kind: str,
               target: str, ids: tuple[int, int, int]) -> None:
        mounts.mount(base.device_path(connection_info) or '', kind, target,
                     modes.is_read_only(connection_info),
                     self._options.volume_discard, *ids)

    def unmount(self, identifier: str, force: bool) -> None:
        """See :meth:`.Mode.unmount`."""
        if self.is_prepared(identifier):
            mounts.unmount(self.target(identifier), force)

    def is_prepared(self, identifier: str) -> bool:
        """Whether a volume is mounted or is about to be."""
        return _is_mount_point(self.target(identifier))

    def is_mounted(self, identifier: str) -> bool:
        """Whether a volume is mounted."""
        return mounts.is_mounted(self.target(identifier))

    def release(self, identifier: str, path: str, mountpoint: str) -> None:
        """Unmount a volume that has just been detached from its guest.

        :param identifier: Cinder's ID of the volume.
        :param path: path of its block device.
        :param mountpoint: device name of the volume.
        :raises nova.exception.DeviceDetachFailed: if something in the guest or
            on the host still uses it.
        """
        try:
            self.unmount(identifier, False)
            # A container that is just being started has a copy of all mounts
            # for a moment.
            deadline = time.monotonic() + _RELEASE_TIMEOUT
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
                reason='the server has it mounted in another place, or the '
                       'working directory of a process is on it')


class RootMode(_MountedMode):
    """The guest boots from the mounted filesystem."""

    name = modes.ROOT

    def target(self, identifier: str) -> str:
        """See :meth:`_MountedMode.target`."""
        return os.path.join(self._options.volume_root_directory,
                            rootfs.mount_parent(identifier), identifier)

    def check(self, instance: objects.Instance,
              connection_info: Mapping[str, Any], identifier: str) -> None:
        """See :meth:`.Mode.check`.

        :raises nova.exception.BuildAbortException: if this host cannot boot
            servers from the volume.
        """
        reason = ''
        if not self._options.volume_filesystems:
            reason = ('this host does not mount volumes, so it cannot boot '
                      'servers from them; its operator has to name the '
                      'filesystems that it may mount ([lxd] '
                      'volume_filesystems), or create the server from an '
                      'image without a new volume')
        elif connection_info.get('multiattach'):
            reason = ('the volume may be attached to several servers, which '
                      'would destroy the filesystem that each boots from; '
                      'use a volume without multiattach')
        elif modes.is_read_only(connection_info):
            reason = 'the volume is read-only'
        if reason:
            raise exception.BuildAbortException(instance_uuid=instance.uuid,
                                                reason=reason)

    def prepare(self, connection_info: dict[str, Any], identifier: str,
                probed: bool) -> None:
        """See :meth:`.Mode.prepare`."""
        if not probed:
            # The volume may have been attached elsewhere since then.
            connection_info.pop(modes.KEY_KIND, None)

    def describe(self, connection_info: Mapping[str, Any], identifier: str,
                 mountpoint: str) -> modes.GuestChanges:
        """See :meth:`.Mode.describe`."""
        path = base.device_path(connection_info) or ''
        # The mount is mapped already, and no mount can be mapped twice: where
        # LXD tells liblxc to map its own root disks, it must not do so here.
        return modes.GuestChanges(config={
            modes.KEY_RAW:
                'lxc.rootfs.options =\n'
                f'lxc.rootfs.path = dir:{self.target(identifier)}',
            lxd_guest.KEY_ROOT_VOLUME: identifier,
            lxd_guest.KEY_ROOT_DEVICE: path,
            lxd_guest.KEY_ROOT_BOOT: lxd_devices.boot_id(),
            **io_counters.store(lxd_guest.KEY_ROOT_COUNTERS, path)})

    def _find_kind(self, connection_info: Mapping[str, Any], identifier: str
                   ) -> str:
        found = probe.content(base.device_path(connection_info) or '')
        if found not in self._options.volume_filesystems:
            raise base.Refused(root_refusal(found,
                                            self._options.volume_filesystems))
        return found

    def _mount(self, connection_info: Mapping[str, Any], kind: str,
               target: str, ids: tuple[int, int, int]) -> None:
        try:
            rootfs.mount(base.device_path(connection_info) or '', kind,
                         target, self._options.volume_discard, *ids)
        except FileNotFoundError:
            raise base.Refused(
                'there is no complete root filesystem on it') from None

    def unmount(self, identifier: str, force: bool) -> None:
        """See :meth:`.Mode.unmount`; leftovers of a first boot are removed."""
        target = self.target(identifier)
        # Only the guest's root and the host's may look into the wrapper.
        if os.path.isdir(os.path.dirname(target)):
            rootfs.unmount(target, force)
        staging = mount_directory(self._options, identifier)
        if _is_mount_point(staging):
            rootfs.close_staging(staging)


def _is_mount_point(target: str) -> bool:
    """Whether there is a directory for a volume, mounted or not."""
    # A filesystem that has shut itself down does not say what it has (EIO).
    return os.path.isdir(target) or mounts.is_mounted(target)


def mount_directory(options: cfg.ConfigOpts.GroupAttr, identifier: str
                    ) -> str:
    """Return the directory on the host at which a data volume is mounted, and
    a root volume while an image is unpacked to it.

    :param options: the ``[lxd]`` option group.
    :param identifier: Cinder's ID of the volume.
    """
    return os.path.join(options.volume_mount_directory, identifier)


def guest_directory(path: str) -> str:
    """Return where the guest finds a mounted volume.

    :param path: device name of the volume, which has been validated.
    :returns: a directory of the same name below ``/mnt``.
    """
    return '/mnt/' + path.removeprefix('/dev/')


def root_refusal(content: str, allowed: list[str]) -> str:
    """Describe why a server cannot boot from what is on a volume.

    :param content: what :func:`.probe.content` has found.
    :param allowed: filesystems that the host mounts.
    """
    if not content:
        return ('it is empty; a server boots from a volume that was made from '
                'an image, or from one that a server has booted from before')
    return (f'it holds {content}, and servers boot from '
            f'{" and ".join(allowed)} with a root filesystem only; make the '
            f'volume from an image for containers')
