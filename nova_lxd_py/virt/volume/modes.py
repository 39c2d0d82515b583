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


"""The three ways in which a guest gets a volume.

``block``
    The guest gets the block device and does with it what it likes.
``filesystem``
    The host mounts the volume's filesystem, and the guest gets the mount. The
    kernel lets no unprivileged container mount a block device. It means that
    the host's kernel reads what is on a tenant's volume, so it happens only
    where the operator allows it, and only with the filesystems that are named
    in ``[lxd] volume_filesystems``.
``root``
    The same for the root filesystem: the guest boots from the volume. Its LXD
    instance is a placeholder, whose own root disk is empty; liblxc is told to
    use the directory at which the host has mounted the volume.

Mounts have the guest's IDs. They must be there before the guest starts, stay
while it is stopped, and are removed with the connection.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
import errno
import os
import time
from typing import Any

from nova import exception
from nova import objects
from oslo_config import cfg
from oslo_log import log as logging

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import uid_ranges
from nova_lxd_py.virt.privileged import mounts
from nova_lxd_py.virt.privileged import probe
from nova_lxd_py.virt.privileged import rootfs
from nova_lxd_py.virt.volume import base
from nova_lxd_py.virt.volume import connections
from nova_lxd_py.virt.volume import device_identity
from nova_lxd_py.virt.volume import lxd_devices
from nova_lxd_py.virt.volume import statistics

LOG = logging.getLogger(__name__)

BLOCK, FILESYSTEM, ROOT = 'block', 'filesystem', lxd_devices.ROOT

#: Key of a connection: the mode of the volume, as long as it is attached.
KEY_MODE = 'lxd_mode'
#: Key of a connection: the filesystem that was found or made on the volume.
KEY_KIND = 'lxd_filesystem'

#: Seconds for a device to be released after its filesystem was unmounted.
_RELEASE_TIMEOUT = 5.0


class Mode(abc.ABC):
    """One way in which a guest gets a volume.

    A ``connection_info`` is Cinder's description of the connection, with what
    the driver has added to it.

    :param options: the ``[lxd]`` option group.
    """

    name: str

    def __init__(self, options: cfg.ConfigOpts.GroupAttr) -> None:
        self._options = options

    def check(self, instance: objects.Instance,
              connection_info: Mapping[str, Any]) -> None:
        """Validate that a volume may be used in this mode, before the host is
        connected to it.

        :param instance: the instance that is to have it.
        :param connection_info: the connection.
        :raises nova.exception.NovaException: if it may not.
        """

    @abc.abstractmethod
    def prepare(self, connection_info: dict[str, Any], probed: bool) -> None:
        """Prepare a volume to which the host has just been connected.

        :param connection_info: the connection.
        :param probed: whether it is known what is on the volume, or will be.
        :raises base.Refused: if the volume cannot be used.
        """

    @abc.abstractmethod
    def describe(self, connection_info: Mapping[str, Any], mountpoint: str
                 ) -> lxd_devices.GuestChanges:
        """Describe a connected volume for LXD.

        :param connection_info: the connection.
        :param mountpoint: device name of the volume, which Nova or the tenant
            has chosen.
        :raises nova.exception.InvalidDevicePath: if that is no disk's name.
        """

    def mount(self, guest: lxd_guest.Guest, connection_info: dict[str, Any]
              ) -> None:
        """Mount a connected volume for a guest, where the mode needs it.

        What was mounted there before is unmounted. The filesystem grows to the
        size of the volume if it can.

        :param guest: the guest, just read, which does not use the mount yet.
        :param connection_info: the connection.
        :raises base.Refused: if there is no usable filesystem, or the kernel
            cannot map its IDs.
        :raises OSError: if the kernel refuses.
        """

    def grow(self, connection_info: dict[str, Any]) -> None:
        """Grow the mounted filesystem to the size of its volume.

        :param connection_info: the connection.
        :raises OSError: if the kernel refuses.
        """

    @abc.abstractmethod
    def flush(self, connection_info: Mapping[str, Any], deadline: float
              ) -> None:
        """Write what the host has cached of a volume to its storage.

        :param connection_info: the connection.
        :param deadline: seconds after which to give up.
        :raises OSError: if it cannot be written, or not in time.
        """


class BlockMode(Mode):
    """The guest gets the block device."""

    name = BLOCK

    def prepare(self, connection_info: dict[str, Any], probed: bool) -> None:
        """See :meth:`Mode.prepare`."""
        # LXD gives guests write access to all block devices. Nor can the host
        # protect this one: the flag (BLKROSET) would outlive the attachment.
        if is_read_only(connection_info) and not device_identity.is_read_only(
                connection_info[base.DEVICE_PATH]):
            raise base.Refused(
                'it is read-only, which the host cannot enforce for a block '
                'device of this back end; attach it as a filesystem')

    def describe(self, connection_info: Mapping[str, Any], mountpoint: str
                 ) -> lxd_devices.GuestChanges:
        """See :meth:`Mode.describe`."""
        path = connection_info[base.DEVICE_PATH]
        return lxd_devices.GuestChanges(devices={
            lxd_devices.name(connections.volume_id(connection_info)): {
                'type': 'unix-block', 'source': path,
                'path': lxd_devices.guest_path(mountpoint),
                lxd_devices.KEY_BOOT: lxd_devices.boot_id(),
                **statistics.store(lxd_devices.KEY_COUNTERS, path)}})

    def flush(self, connection_info: Mapping[str, Any], deadline: float
              ) -> None:
        """See :meth:`Mode.flush`."""
        mounts.sync_device(connection_info[base.DEVICE_PATH], deadline)


class _MountedMode(Mode):
    """The host mounts the filesystem of the volume."""

    @abc.abstractmethod
    def target(self, identifier: str) -> str:
        """Return the directory on the host at which a volume is mounted.

        :param identifier: Cinder's ID of the volume.
        """

    @abc.abstractmethod
    def unmount(self, identifier: str, force: bool) -> None:
        """Unmount a volume, if it is mounted.

        :param identifier: Cinder's ID of the volume.
        :param force: even while something uses it.
        :raises OSError: if something uses it, without force.
        """

    @abc.abstractmethod
    def _make_filesystem(self, connection_info: Mapping[str, Any], found: str
                         ) -> str:
        """Make a filesystem on a volume that has none that may be mounted.

        :param found: what is on the volume.
        :returns: which filesystem.
        :raises base.Refused: if nothing may be made of the volume.
        """

    @abc.abstractmethod
    def _mount(self, connection_info: Mapping[str, Any], kind: str,
               target: str, ids: tuple[int, int, int]) -> None:
        """Mount the filesystem with the IDs of a guest."""

    def prepare(self, connection_info: dict[str, Any], probed: bool) -> None:
        """See :meth:`Mode.prepare`."""
        if not probed:
            # The volume may have been attached elsewhere since then.
            connection_info.pop(KEY_KIND, None)

    def _kind(self, connection_info: dict[str, Any]) -> str:
        """Return which filesystem was on a volume when it was connected.

        The kernel mounts no other one, whatever happened since.
        """
        if connection_info.get(KEY_KIND) is None:
            found = probe.content(connection_info[base.DEVICE_PATH])
            if found not in self._options.volume_filesystems:
                found = self._make_filesystem(connection_info, found)
            connection_info[KEY_KIND] = found
        return connection_info[KEY_KIND]

    def mount(self, guest: lxd_guest.Guest, connection_info: dict[str, Any]
              ) -> None:
        """See :meth:`Mode.mount`."""
        identifier = connections.volume_id(connection_info)
        try:
            kind = self._kind(connection_info)
            ids = uid_ranges.of_guest(guest)
            if ids is None:
                raise base.Refused(
                    'LXD has not given the server a range of user ids')
            self._mount(connection_info, kind, self.target(identifier), ids)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EINVAL,
                                   errno.EOPNOTSUPP):
                raise
            LOG.error('The kernel cannot mount volume %(volume)s with mapped '
                      'ids, which takes Linux 5.12, for xfs 5.19: %(error)s',
                      {'volume': identifier, 'error': error},
                      instance_uuid=guest.uuid)
            raise base.Refused(
                'the kernel of the host cannot map the user ids of its '
                'filesystem; attach it as a block device') from None
        if is_read_only(connection_info):
            return
        # The volume may be larger than when it was mounted last.
        try:
            self.grow(connection_info)
        except Exception as error:
            # All content is there, in a filesystem of the old size.
            LOG.warning('Could not grow the filesystem of volume %(volume)s '
                        'of %(guest)s: %(error)s',
                        {'volume': identifier, 'guest': guest.name,
                         'error': error}, instance_uuid=guest.uuid)

    def grow(self, connection_info: dict[str, Any]) -> None:
        """See :meth:`Mode.grow`."""
        mounts.grow(connection_info[base.DEVICE_PATH],
                    self._kind(connection_info),
                    self.target(connections.volume_id(connection_info)))

    def flush(self, connection_info: Mapping[str, Any], deadline: float
              ) -> None:
        """See :meth:`Mode.flush`."""
        mounts.sync(self.target(connections.volume_id(connection_info)),
                    deadline)


class FilesystemMode(_MountedMode):
    """The guest gets the mounted filesystem below its ``/mnt``."""

    name = FILESYSTEM

    def target(self, identifier: str) -> str:
        """See :meth:`_MountedMode.target`."""
        return mount_directory(self._options, identifier)

    def check(self, instance: objects.Instance,
              connection_info: Mapping[str, Any]) -> None:
        """See :meth:`Mode.check`."""
        if connection_info.get('multiattach'):
            raise exception.VolumeAttachFailed(
                volume_id=connections.volume_id(connection_info),
                reason='a filesystem cannot be mounted by several servers at '
                       'a time; attach it as a block device')

    def prepare(self, connection_info: dict[str, Any], probed: bool) -> None:
        """See :meth:`Mode.prepare`; an empty volume gets a filesystem."""
        super().prepare(connection_info, probed)
        if not probed:
            self._kind(connection_info)
        # LXD requires the directory before the volume is mounted.
        mounts.create_mount_point(self.target(
            connections.volume_id(connection_info)))

    def describe(self, connection_info: Mapping[str, Any], mountpoint: str
                 ) -> lxd_devices.GuestChanges:
        """See :meth:`Mode.describe`."""
        identifier = connections.volume_id(connection_info)
        path = connection_info[base.DEVICE_PATH]
        device = {'type': 'disk', 'source': self.target(identifier),
                  'path': lxd_devices.mounted_path(
                      lxd_devices.guest_path(mountpoint)),
                  lxd_devices.KEY_SOURCE: path,
                  lxd_devices.KEY_BOOT: lxd_devices.boot_id(),
                  **statistics.store(lxd_devices.KEY_COUNTERS, path)}
        if is_read_only(connection_info):
            device['readonly'] = 'true'
        return lxd_devices.GuestChanges(
            devices={lxd_devices.name(identifier): device})

    def _make_filesystem(self, connection_info: Mapping[str, Any], found: str
                         ) -> str:
        identifier = connections.volume_id(connection_info)
        allowed = self._options.volume_filesystems
        if found:
            raise base.Refused(
                f'it holds {found}, and the host mounts '
                f'{", ".join(allowed)} only; attach it as a block device')
        if is_read_only(connection_info):
            raise base.Refused('it is empty, and a filesystem cannot be made '
                               'on it while it is read-only')
        kind = allowed[0]
        mounts.make_filesystem(connection_info[base.DEVICE_PATH], kind,
                               identifier[:mounts.LABEL_LENGTH])
        LOG.info('Made a filesystem of type %(kind)s on the empty volume '
                 '%(volume)s', {'kind': kind, 'volume': identifier})
        return kind

    def _mount(self, connection_info: Mapping[str, Any], kind: str,
               target: str, ids: tuple[int, int, int]) -> None:
        mounts.mount(connection_info[base.DEVICE_PATH], kind, target,
                     is_read_only(connection_info),
                     self._options.volume_discard, *ids)

    def unmount(self, identifier: str, force: bool) -> None:
        """See :meth:`_MountedMode.unmount`."""
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

    name = ROOT

    def target(self, identifier: str) -> str:
        """See :meth:`_MountedMode.target`."""
        return os.path.join(self._options.volume_root_directory,
                            rootfs.mount_parent(identifier), identifier)

    def check(self, instance: objects.Instance,
              connection_info: Mapping[str, Any]) -> None:
        """See :meth:`Mode.check`.

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
        elif is_read_only(connection_info):
            reason = 'the volume is read-only'
        if reason:
            raise exception.BuildAbortException(instance_uuid=instance.uuid,
                                                reason=reason)

    def describe(self, connection_info: Mapping[str, Any], mountpoint: str
                 ) -> lxd_devices.GuestChanges:
        """See :meth:`Mode.describe`."""
        identifier = connections.volume_id(connection_info)
        path = connection_info[base.DEVICE_PATH]
        # The mount is mapped already, and no mount can be mapped twice: where
        # LXD tells liblxc to map its own root disks, it must not do so here.
        return lxd_devices.GuestChanges(config={
            lxd_devices.KEY_RAW:
                'lxc.rootfs.options =\n'
                f'lxc.rootfs.path = dir:{self.target(identifier)}',
            lxd_guest.KEY_ROOT_VOLUME: identifier,
            lxd_guest.KEY_ROOT_DEVICE: path,
            lxd_guest.KEY_ROOT_BOOT: lxd_devices.boot_id(),
            **statistics.store(lxd_guest.KEY_ROOT_COUNTERS, path)})

    def _make_filesystem(self, connection_info: Mapping[str, Any], found: str
                         ) -> str:
        raise base.Refused(root_refusal(found,
                                        self._options.volume_filesystems))

    def _mount(self, connection_info: Mapping[str, Any], kind: str,
               target: str, ids: tuple[int, int, int]) -> None:
        try:
            rootfs.mount(connection_info[base.DEVICE_PATH], kind, target,
                         self._options.volume_discard, *ids)
        except FileNotFoundError:
            raise base.Refused(
                'there is no complete root filesystem on it') from None

    def unmount(self, identifier: str, force: bool) -> None:
        """See :meth:`_MountedMode.unmount`; leftovers of a first boot are
        removed."""
        target = self.target(identifier)
        # Only the guest's root and the host's may look into the wrapper.
        if os.path.isdir(os.path.dirname(target)):
            rootfs.unmount(target, force)
        staging = mount_directory(self._options, identifier)
        if _is_mount_point(staging):
            rootfs.close_staging(staging)


def is_read_only(connection_info: Mapping[str, Any]) -> bool:
    """Whether nothing may be written to a volume."""
    return connection_info['data'].get('access_mode') == 'ro'


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
