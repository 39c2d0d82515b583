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

"""Volumes of servers: attached and detached, hot or cold.

In an LXD instance a volume is a device that is named after the volume, so LXD
itself knows which volumes a server has; the secrets of their connections stay
in Nova. The device is in the guest only while the host is connected: it is
taken out first and put in last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import contextlib
from typing import Any

from nova import context as nova_context
from nova import exception
from nova import objects
from nova.virt import driver as virt_driver
from oslo_log import log as logging

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.metadata import device_tags
from nova_lxd_py.virt.volume import attach_steps
from nova_lxd_py.virt.volume import filesystems
from nova_lxd_py.virt.volume import lxd_devices
from nova_lxd_py.virt.volume import manager
from nova_lxd_py.virt.volume import swap
from nova_lxd_py.virt.volume import usage

LOG = logging.getLogger(__name__)

_BlockDeviceInfo = Mapping[str, Any] | None


class Attachments:
    """Gives volumes to servers and takes them away.

    :param guests: the driver's LXD instances.
    :param volumes: connects the host to volumes.
    :param mounted: mounts the filesystems on them, where they are to be
        mounted.
    :param who: knows which guests have a volume.
    """

    def __init__(self, guests: registry.GuestRegistry,
                 volumes: manager.VolumeManager,
                 mounted: filesystems.Filesystems, who: usage.VolumeUsage
                 ) -> None:
        self._guests = guests
        self._volumes = volumes
        self._filesystems = mounted
        self._holders = who
        self._steps = attach_steps.AttachSteps(volumes, mounted, self._holders)
        self._swaps = swap.VolumeSwapper(guests, mounted, self._steps)

    # -- one volume ---------------------------------------------------------

    def attach(self, context: nova_context.RequestContext,
               instance: objects.Instance, connection_info: dict[str, Any],
               mountpoint: str, encrypted: dict[str, Any] | None = None
               ) -> None:
        """Give a server one more volume; a failure leaves nothing connected.

        See :meth:`nova.virt.driver.ComputeDriver.attach_volume`.

        :param instance: the server, running or not.
        :param connection_info: Cinder's description of the connection, which
            gets what detaching needs to know.
        :param mountpoint: the device name of the volume.
        :param encrypted: how it is encrypted, if it is.
        """
        identifier = manager.volume_id(connection_info)
        path = lxd_devices.guest_path(mountpoint)
        with (self._guests.changing(instance), manager.lock(identifier),
              contextlib.ExitStack() as undo):
            guest = self._guests.active(instance)
            recorded = _recorded(context, instance, identifier)
            device = self._steps.connect(
                context, instance, connection_info, path,
                recorded.volume_size if recorded else None, undo,
                encrypted=encrypted)
            if recorded is not None and recorded.tag:
                undo.callback(device_tags.unpublish_volume, instance,
                              identifier)
                device_tags.publish_volume(instance, recorded)
            if lxd_devices.name(
                    identifier) not in lxd_devices.connected(guest):
                if self._filesystems.is_prepared(identifier):
                    # LXD or this process ended while it was attached before.
                    try:
                        self._steps.clear(guest, connection_info, mountpoint)
                    except exception.DeviceDetachFailed:
                        # Nothing may be disconnected that a guest uses.
                        undo.pop_all()
                        raise
                self._steps.mount(instance, guest, connection_info)
            self._steps.attach_device(instance, guest, connection_info, mountpoint,
                                      device, undo)
            undo.pop_all()
        LOG.info('Attached volume %(volume)s at %(path)s',
                 {'volume': identifier, 'path': device['path']},
                 instance=instance)

    def detach(self, instance: objects.Instance,
               connection_info: dict[str, Any], mountpoint: str) -> None:
        """Take a volume away from a server; one that is gone is a success.

        See :meth:`nova.virt.driver.ComputeDriver.detach_volume`.

        :param instance: the server, running, stopped or already deleted.
        :param connection_info: Cinder's description of the connection.
        :param mountpoint: the device name of the volume.
        :raises nova.exception.DeviceDetachFailed: the guest uses it; it stays
            attached.
        :raises nova.exception.VolumeDetachFailed: the host could not be
            disconnected.
        """
        identifier = manager.volume_id(connection_info)
        with self._guests.changing(instance), manager.lock(identifier):
            for guest in self._having(instance):
                self._steps.detach_device(instance, guest, connection_info,
                                          mountpoint)
            self._steps.disconnect(instance, connection_info, force=False)
        LOG.info('Detached volume %s', identifier, instance=instance)

    def _having(self, instance: objects.Instance) -> list[lxd_guest.Guest]:
        """List the LXD instances of a server that may have volumes: its own
        and, while it is rescued, its rescue instance."""
        own = self._guests.find(instance)
        if own is None:
            return self._guests.of(instance)
        if own.config.get(lxd_guest.KEY_RESCUED) != 'true':
            return [own]
        rescue = self._guests.find(instance, lxd_guest.ROLE_RESCUE)
        return [own, rescue] if rescue else [own]

    def swap(self, context: nova_context.RequestContext,
             instance: objects.Instance, old: dict[str, Any],
             new: dict[str, Any], mountpoint: str, size_gb: int | None
             ) -> None:
        """Put a volume in place of another one. See
        :meth:`.swap.VolumeSwapper.swap`.
        """
        self._swaps.swap(context, instance, old, new, mountpoint, size_gb)

    def extend(self, context: nova_context.RequestContext,
               instance: objects.Instance,
               connection_info: dict[str, Any], size: int) -> None:
        """Show a server the new size of a volume.

        See :meth:`nova.virt.driver.ComputeDriver.extend_volume`.

        :param context: for asking Cinder and the key manager.
        :param connection_info: Cinder's description of the connection.
        :param size: bytes that the volume has by now.
        :raises nova.exception.VolumeExtendFailed: the host does not see it.
        """
        identifier = manager.volume_id(connection_info)
        with self._guests.changing(instance), manager.lock(identifier):
            self._volumes.extend(instance, connection_info, size, context)
            if filesystems.is_filesystem(connection_info):
                with manager.explained('grow the filesystem of', instance,
                                       identifier,
                                       exception.VolumeExtendFailed):
                    self._filesystems.grow(connection_info, identifier)
        LOG.info('Volume %(volume)s has %(size)d bytes now',
                 {'volume': identifier, 'size': size}, instance=instance)

    def recover(self) -> None:
        """Put right what the end of nova-compute has interrupted."""
        self._swaps.recover()

    # -- all volumes of a server --------------------------------------------

    def connect_all(self, context: nova_context.RequestContext,
                    instance: objects.Instance,
                    block_device_info: _BlockDeviceInfo
                    ) -> dict[str, dict[str, str]]:
        """Connect the host to all volumes of a server that is about to start.

        The server's lock must be held. What is connected already is left as
        it is.

        :param instance: the server, which does not run.
        :param block_device_info: Nova's description of its disks.
        :returns: the LXD devices to give to the guest, by name;
            :meth:`mount_all` has to follow before it starts.
        :raises nova.exception.VolumeAttachFailed: one cannot be connected;
            :meth:`disconnect_all` takes back the others.
        """
        found = {}
        for volume in _mapping(block_device_info):
            connection_info = volume['connection_info']
            identifier = manager.volume_id(connection_info)
            path = lxd_devices.guest_path(volume['mount_device'])
            with manager.lock(identifier), contextlib.ExitStack() as undo:
                found[lxd_devices.name(identifier)] = self._steps.connect(
                    context, instance, connection_info, path,
                    getattr(volume, 'volume_size', None), undo)
                if filesystems.is_filesystem(connection_info):
                    self._filesystems.prepare(identifier)
                undo.pop_all()
            # Nobody else keeps what the connection has been found to be.
            volume['connection_info'] = connection_info
            if hasattr(volume, 'save'):
                volume.save()
        return found

    def mount_all(self, instance: objects.Instance,
                  guest: lxd_guest.Guest,
                  block_device_info: _BlockDeviceInfo) -> None:
        """Mount the volumes that a server has as filesystems, and see that the
        host is still connected to the others.

        Until they are written down on the guest, another server that has the
        same volume may let go of it.

        :param instance: the server, whose lock must be held.
        :param guest: its LXD instance, which is about to start.
        :param block_device_info: Nova's description of its disks, which
            :meth:`connect_all` has seen.
        :raises nova.exception.VolumeAttachFailed: one cannot be mounted, or
            is not connected.
        """
        for volume in _mapping(block_device_info):
            identifier = manager.volume_id(volume['connection_info'])
            with manager.lock(identifier):
                if identifier not in self._volumes.connections():
                    raise exception.VolumeAttachFailed(
                        volume_id=identifier,
                        reason='another server on the host has just let go of '
                               'it; start this one again')
                if filesystems.is_filesystem(volume['connection_info']):
                    self._steps.mount(instance, guest.reload(),
                                      volume['connection_info'])

    def reconnect(self, context: nova_context.RequestContext,
                  instance: objects.Instance, guest: lxd_guest.Guest
                  ) -> dict[str, dict[str, str]]:
        """Connect the host to the volumes that a stopped guest has, where
        Nova does not say what they are.

        :param instance: the server, whose lock must be held.
        :param guest: its LXD instance.
        :returns: as :meth:`connect_all`; nothing has to follow.
        """
        if not lxd_devices.of_guest(guest):
            return {}
        info = virt_driver.get_block_device_info(
            instance,
            objects.BlockDeviceMappingList.get_by_instance_uuid(
                context, instance.uuid))
        found = self.connect_all(context, instance, info)
        self.mount_all(instance, guest, info)
        return found

    def disconnect_all(self, instance: objects.Instance,
                       block_device_info: _BlockDeviceInfo, *,
                       force: bool) -> None:
        """Disconnect the host from all volumes of a server that is gone.

        :param instance: the server, whose guests are gone or have lost the
            devices.
        :param block_device_info: Nova's description of its disks.
        :param force: the server is being deleted: nothing is raised.
        :raises nova.exception.VolumeDetachFailed: something is left of one.
        """
        for volume in _mapping(block_device_info):
            # Empty if the server did not get as far as having it.
            if not volume.get('connection_info'):
                continue
            try:
                with manager.lock(manager.volume_id(
                        volume['connection_info'])):
                    self._steps.disconnect(
                        instance, volume['connection_info'], force=force)
            except exception.NovaException as error:
                if not force:
                    raise
                LOG.warning('A volume stays connected: %s', error,
                            instance=instance)

    def clear(self, instance: objects.Instance, names: Iterable[str],
              block_device_info: _BlockDeviceInfo, *, force: bool) -> None:
        """Disconnect the host from all volumes of a server that is gone, also
        from those of which Nova no longer says how they are connected.

        :param instance: the server.
        :param names: of the LXD devices that it had.
        :param block_device_info: Nova's description of its disks.
        :param force: as for :meth:`disconnect_all`.
        :raises nova.exception.VolumeDetachFailed: as there.
        """
        self.disconnect_all(instance, block_device_info, force=force)
        known = {manager.volume_id(volume['connection_info'])
                 for volume in _mapping(block_device_info)
                 if volume.get('connection_info')}
        for name in names:
            identifier = lxd_devices.volume(name)
            if identifier in known:
                continue
            with manager.lock(identifier):
                if not self._holders.others(instance, identifier):
                    LOG.warning('It had volume %s, which Nova does not '
                                'mention', identifier, instance=instance)
                    with contextlib.suppress(OSError):
                        self._filesystems.unmount(identifier, True)
                    self._volumes.forget(instance, identifier)

    def release(self, instance: objects.Instance, guest: lxd_guest.Guest,
                block_device_info: _BlockDeviceInfo) -> None:
        """Take all volumes from a stopped server, since Nova makes their
        connections anew.

        :param instance: the server.
        :param guest: its LXD instance, which does not run.
        :param block_device_info: Nova's description of its disks, with the
            present connections.
        :raises nova.exception.VolumeDetachFailed: something is left of one.
        """
        guest.update(
            devices={
                name: None for name in lxd_devices.of_guest(guest)})
        self.disconnect_all(instance, block_device_info, force=False)


def _mapping(block_device_info: _BlockDeviceInfo) -> list[Any]:
    """List the volumes, but not the one that the server boots from."""
    return [volume for volume in
            virt_driver.block_device_info_get_mapping(block_device_info)
            if volume.get('boot_index') != 0]


def _recorded(context: nova_context.RequestContext,
              instance: objects.Instance, identifier: str
              ) -> objects.BlockDeviceMapping | None:
    """Look up Nova's description of a volume that is just being attached.

    :returns: it, None if Nova has none.
    """
    try:
        return objects.BlockDeviceMapping.get_by_volume_and_instance(
            context, identifier, instance.uuid)
    except exception.VolumeBDMNotFound:
        return None
