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

"""The volumes that servers boot from: connected and mounted.

Such a server's LXD instance is a stub: its own root disk is empty, and
liblxc is told to use the folder at which the host has mounted the volume,
with the guest's ids. The stub says in its keys which volume it is.

The mount has to be there before every start. It stays while the server is
stopped, as connections of other volumes do, and goes with the connection.
"""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import os
from typing import Any

from nova.compute import power_state
from nova import exception
from nova import objects
from nova.virt import driver as virt_driver
from oslo_config import cfg
from oslo_log import log as logging

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.privileged import mounts
from nova_lxd_py.virt.privileged import probe
from nova_lxd_py.virt.privileged import rootfs
from nova_lxd_py.virt.volume import base
from nova_lxd_py.virt.volume import filesystems
from nova_lxd_py.virt.volume import lxd_devices
from nova_lxd_py.virt.volume import manager
from nova_lxd_py.virt.volume import usage

LOG = logging.getLogger(__name__)

#: Key of LXD with words for liblxc.
_RAW = 'raw.lxc'

#: Keys of a guest that boots from a volume.
KEYS = (_RAW, lxd_guest.KEY_ROOT_VOLUME, lxd_guest.KEY_ROOT_DEVICE,
        lxd_guest.KEY_ROOT_BOOT)

#: Changes to such a guest's keys when the host is disconnected.
DISCONNECTED = {lxd_guest.KEY_ROOT_DEVICE: None,
                lxd_guest.KEY_ROOT_BOOT: None}

_BlockDeviceInfo = Mapping[str, Any] | None


class RootVolumes:
    """Gives servers the volumes that they boot from.

    The lock of the server must be held.

    :param options: the ``[lxd]`` option group.
    :param volumes: connects the host to volumes.
    :param who: knows which guests have a volume.
    """

    def __init__(self, options: cfg.ConfigOpts.GroupAttr,
                 volumes: manager.VolumeManager, who: usage.VolumeUsage
                 ) -> None:
        self._options = options
        self._volumes = volumes
        self._holders = who

    def check(self, instance: objects.Instance, volume: Mapping[str, Any]
              ) -> None:
        """See that this host may boot a server from a volume.

        :param instance: the server.
        :param volume: Nova's description of the volume.
        :raises nova.exception.BuildAbortException: it may not.
        """
        connection_info = volume['connection_info']
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
        elif filesystems.is_read_only(connection_info):
            reason = 'the volume is read-only'
        if reason:
            raise exception.BuildAbortException(instance_uuid=instance.uuid,
                                                reason=reason)

    def connect(self, instance: objects.Instance, volume: Any
                ) -> dict[str, str]:
        """Connect the host to the volume that a server boots from.

        What is connected already is left as it is.

        :param instance: the server, which does not run.
        :param volume: Nova's description of the volume.
        :returns: LXD configuration keys for the server; :meth:`mount` has to
            follow before it starts.
        :raises nova.exception.VolumeAttachFailed: it cannot be connected;
            what was not connected before is not so now.
        """
        self.check(instance, volume)
        connection_info = volume['connection_info']
        identifier = manager.volume_id(connection_info)
        with manager.lock(identifier), contextlib.ExitStack() as undo:
            connected = self._holders.check_exclusive(instance, identifier)
            path = self._volumes.connect(
                instance, connection_info,
                getattr(volume, 'volume_size', None), shared=connected)
            if not connected:
                undo.callback(self._volumes.disconnect, instance,
                              connection_info, force=True)
            self._holders.check_device_conflict(instance, identifier, path)
            connection_info[filesystems.KEY_MODE] = lxd_devices.ROOT
            # It may have been elsewhere since that was found.
            connection_info.pop(filesystems.KEY_KIND, None)
            undo.pop_all()
        # Nobody else keeps what the connection has been found to be.
        volume['connection_info'] = connection_info
        if hasattr(volume, 'save'):
            volume.save()
        # The mount has the guest's ids already. Where LXD has liblxc map those
        # of its own root disks, it must not try that here: no mount can be
        # mapped twice.
        return {_RAW: 'lxc.rootfs.options =\n'
                      f'lxc.rootfs.path = dir:{self.target(identifier)}',
                lxd_guest.KEY_ROOT_VOLUME: identifier,
                lxd_guest.KEY_ROOT_DEVICE: path,
                lxd_guest.KEY_ROOT_BOOT: lxd_devices.boot_id()}

    def target(self, identifier: str) -> str:
        """Tell where the root on a volume is mounted on the host.

        :param identifier: Cinder's id of the volume.
        """
        return os.path.join(self._options.volume_root_directory,
                            rootfs.mount_parent(identifier), identifier)

    def mount(self, instance: objects.Instance, guest: lxd_guest.Guest,
              volume: Mapping[str, Any]) -> None:
        """Mount the volume that a guest boots from, and have its filesystem
        fill it.

        :param instance: the server.
        :param guest: its LXD instance, just read and about to start.
        :param volume: Nova's description of the volume, which
            :meth:`connect` has seen.
        :raises nova.exception.VolumeAttachFailed: it cannot be mounted.
        """
        connection_info = volume['connection_info']
        identifier = manager.volume_id(connection_info)
        with manager.explained('mount', instance, identifier,
                               exception.VolumeAttachFailed):
            path = base.device_path(connection_info) or ''
            kind = (connection_info.pop(filesystems.KEY_KIND, None) or
                    self.kind(path))
            try:
                rootfs.mount(path, kind, self.target(identifier),
                             *filesystems.id_range(guest))
            except FileNotFoundError:
                raise base.Refused(
                    'there is no complete root filesystem on it') from None
            except OSError as error:
                filesystems.refuse_old_kernel(identifier, error)
                raise
        # It may be larger than when the host was connected last.
        with manager.growing(instance, identifier):
            mounts.grow(path, kind, self.target(identifier))

    def kind(self, path: str) -> str:
        """Find out which filesystem is on a volume that has a root.

        :param path: of its block device.
        :returns: the filesystem's name.
        :raises base.Refused: there is something else on it.
        """
        found = probe.content(path)
        if found not in self._options.volume_filesystems:
            raise base.Refused(refusal(found,
                                       self._options.volume_filesystems))
        return found

    def disconnect(self, instance: objects.Instance,
                   connection_info: dict[str, Any], *, force: bool) -> None:
        """Disconnect the host from the volume of a server that does not run.

        :param instance: the server; its guest may be gone.
        :param connection_info: Cinder's description of the connection; empty
            if the server did not get as far as having one.
        :param force: the server is being deleted: nothing is raised.
        :raises nova.exception.VolumeDetachFailed: something of it is left.
        """
        if not connection_info:
            return
        identifier = manager.volume_id(connection_info)
        with manager.lock(identifier):
            if self._holders.others(instance, identifier):
                LOG.warning('Volume %s stays connected for another server',
                            identifier, instance=instance)
                return
            self._unmount(instance, identifier, force)
            self._volumes.disconnect(instance, connection_info, force=force)

    def clear(self, instance: objects.Instance, identifier: str) -> None:
        """Disconnect the host from the volume of a server that is gone, where
        Nova no longer says how it is connected.

        :param instance: the server.
        :param identifier: Cinder's id of the volume.
        """
        with manager.lock(identifier):
            if not self._holders.others(instance, identifier):
                self._unmount(instance, identifier, True)
                self._volumes.forget(instance, identifier)

    def _unmount(self, instance: objects.Instance, identifier: str,
                 force: bool) -> None:
        try:
            with manager.explained('unmount', instance, identifier,
                                   exception.VolumeDetachFailed):
                rootfs.unmount(self.target(identifier), force)
                rootfs.close_staging(os.path.join(
                    self._options.volume_mount_directory, identifier))
        except exception.VolumeDetachFailed:
            if not force:
                raise

    def release(self, instance: objects.Instance, guest: lxd_guest.Guest,
                connection_info: dict[str, Any]) -> None:
        """Take its root from a stopped guest, until it is connected again.

        :param instance: the server.
        :param guest: its LXD instance.
        :param connection_info: Cinder's description of the connection.
        :raises nova.exception.DeviceDetachFailed: the guest runs.
        :raises nova.exception.VolumeDetachFailed: something of it is left.
        """
        if guest.power_state != power_state.SHUTDOWN:
            raise exception.DeviceDetachFailed(
                device=instance.root_device_name or 'root',
                reason='the server runs from it; stop it first')
        guest.update(config=DISCONNECTED)
        self.disconnect(instance, connection_info, force=False)

    def extend(self, instance: objects.Instance,
               connection_info: dict[str, Any], size: int) -> None:
        """Have the root of a server fill its volume, which has grown.

        :param instance: the server.
        :param connection_info: Cinder's description of the connection.
        :param size: bytes that the volume has by now.
        :raises nova.exception.VolumeExtendFailed: the host does not see it.
        """
        identifier = manager.volume_id(connection_info)
        with manager.lock(identifier):
            self._volumes.extend(instance, connection_info, size)
            with manager.explained('grow the filesystem of', instance,
                                   identifier, exception.VolumeExtendFailed):
                path = base.device_path(connection_info) or ''
                mounts.grow(path, self.kind(path), self.target(identifier))
        LOG.info('Its root volume %(volume)s has %(size)d bytes now',
                 {'volume': identifier, 'size': size}, instance=instance)


def find(block_device_info: _BlockDeviceInfo) -> Any | None:
    """Find the volume that a server boots from.

    :param block_device_info: Nova's description of its disks.
    :returns: Nova's description of the volume; None for a server whose root
        disk is none.
    """
    for volume in virt_driver.block_device_info_get_mapping(
            block_device_info):
        if volume.get('boot_index') == 0:
            return volume
    return None


def is_root(connection_info: Mapping[str, Any]) -> bool:
    """Whether a server has booted from the volume of a connection."""
    return connection_info.get(filesystems.KEY_MODE) == lxd_devices.ROOT


def refusal(content: str, allowed: list[str]) -> str:
    """Say why a server cannot boot from what is on a volume.

    :param content: what :func:`.contents.content` has found.
    :param allowed: filesystems that the host mounts.
    """
    if not content:
        return ('it is empty; a server boots from a volume that was made from '
                'an image, or from one that a server has booted from before')
    return (f'it holds {content}, and servers boot from '
            f'{" and ".join(allowed)} with a root filesystem only; make the '
            f'volume from an image for containers')
