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

"""The Cinder volumes of an instance: what Nova requests for one of them, and
what happens to all when the instance is created, started or deleted.

In an LXD instance a volume is a device that is named after the volume, so LXD
itself knows which volumes an instance has; the secrets of their connections
stay in Nova.

``block_device_info`` is Nova's description of the disks of an instance, see
:func:`nova.virt.driver.get_block_device_info`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import contextlib
import time
from typing import Any

from nova import context as nova_context
from nova import exception
from nova import objects
from nova.virt import driver as virt_driver
from oslo_log import log as logging

from nova_lxd_py.virt.guest import disk_view
from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.guest import roles
from nova_lxd_py.virt.metadata import device_tags
from nova_lxd_py.virt.volume import attachment
from nova_lxd_py.virt.volume import base
from nova_lxd_py.virt.volume import connections
from nova_lxd_py.virt.volume import in_use
from nova_lxd_py.virt.volume import lxd_devices
from nova_lxd_py.virt.volume import mode_selection
from nova_lxd_py.virt.volume import modes
from nova_lxd_py.virt.volume import provisioning
from nova_lxd_py.virt.volume import statistics
from nova_lxd_py.virt.volume import usage

LOG = logging.getLogger(__name__)

BlockDeviceInfo = Mapping[str, Any] | None

#: Seconds to write the cached data of all volumes of an instance.
FLUSH_TIMEOUT = 120.0
#: Seconds that each volume gets if others have used up the time.
_LEAST_FLUSH_TIMEOUT = 5.0


class ServerVolumes:
    """Attaches, connects, mounts, disconnects and detaches volumes.

    :param guests: the driver's LXD instances.
    :param host_connections: connects the host to volumes.
    :param volume_usage: knows which guests have a volume.
    :param attacher: the steps for one volume.
    :param provisioner: makes root filesystems on volumes.
    """

    def __init__(self, guests: registry.GuestRegistry,
                 host_connections: connections.VolumeConnections,
                 volume_usage: usage.VolumeUsage,
                 attacher: attachment.VolumeAttacher,
                 provisioner: provisioning.VolumeProvisioner) -> None:
        self._guests = guests
        self._connections = host_connections
        self._usage = volume_usage
        self._attacher = attacher
        self._provisioner = provisioner

    # -- one volume ---------------------------------------------------------

    def attach(self, context: nova_context.RequestContext,
               instance: objects.Instance, connection_info: dict[str, Any],
               mountpoint: str, encryption: dict[str, Any] | None) -> None:
        """Attach a volume; a failure leaves nothing connected. See
        :meth:`nova.virt.driver.ComputeDriver.attach_volume`.
        """
        identifier = connections.volume_id(connection_info)
        # Before anything is connected.
        lxd_devices.guest_path(mountpoint)
        with (self._guests.changing(instance), connections.lock(identifier),
              contextlib.ExitStack() as undo):
            guest = self._guests.active(instance)
            recorded = usage.recorded(context, instance.uuid, identifier)
            # LXD or nova-compute may have ended while attaching it before.
            interrupted = self._attacher.modes.filesystem.is_prepared(
                identifier)
            if self._connections.is_untraceable(connection_info):
                usage.write_note(guest, connection_info)
                undo.callback(usage.clear_note, guest)
            found = self._attacher.connect(
                context, instance, connection_info, mountpoint,
                # Nova records the size only when the volume is attached.
                None, undo, encryption=encryption)
            lxd_devices.keep_counters(guest, found)
            if recorded is not None and recorded.tag:
                undo.callback(device_tags.unpublish_volume, instance,
                              identifier)
                device_tags.publish_volume(instance, recorded)
            if identifier not in lxd_devices.connected(guest):
                if interrupted:
                    try:
                        self._attacher.clear(guest, connection_info,
                                             mountpoint)
                    except exception.DeviceDetachFailed:
                        # What a guest uses must not be disconnected.
                        undo.pop_all()
                        raise
                self._attacher.mount(instance, guest, connection_info)
            device = found.devices[lxd_devices.name(identifier)]
            self._attacher.attach_device(instance, guest, identifier, device,
                                         undo)
            undo.pop_all()
            usage.clear_note(guest)
        LOG.info('Attached volume %(volume)s at %(path)s',
                 {'volume': identifier, 'path': device['path']},
                 instance=instance)

    def detach(self, instance: objects.Instance,
               connection_info: dict[str, Any], mountpoint: str) -> None:
        """Detach a volume; success if it is not attached. See
        :meth:`nova.virt.driver.ComputeDriver.detach_volume`.

        :raises nova.exception.DeviceDetachFailed: if the guest uses the
            volume, which stays attached.
        :raises nova.exception.VolumeDetachFailed: if the host cannot be
            disconnected.
        """
        if not connection_info:
            self._detach_unrecorded(instance, mountpoint)
            return
        identifier = connections.volume_id(connection_info)
        with self._guests.changing(instance), connections.lock(identifier):
            if connection_info.get(modes.KEY_MODE) == modes.ROOT:
                self._detach_root(instance, identifier)
            else:
                for guest in self._instances_of(instance):
                    self._attacher.detach_device(instance, guest,
                                                 connection_info, mountpoint)
            self._attacher.disconnect(instance, connection_info, force=False)
        LOG.info('Detached volume %s', identifier, instance=instance)

    def _detach_unrecorded(self, instance: objects.Instance, mountpoint: str
                           ) -> None:
        """Detach a volume of which Nova has only the device name.

        Nova records the connection when the driver has attached the volume: it
        has none if nova-compute or its database ended meanwhile.
        """
        path = lxd_devices.guest_path(mountpoint)
        paths = (path, lxd_devices.mounted_path(path))
        with self._guests.changing(instance):
            for guest in self._instances_of(instance):
                for identifier, device in lxd_devices.of_guest(guest).items():
                    if device.get('path') in paths:
                        self._detach_by_device(instance, guest, identifier,
                                               device, mountpoint)

    def _detach_by_device(self, instance: objects.Instance,
                          guest: lxd_guest.Guest, identifier: str,
                          device: Mapping[str, str], mountpoint: str) -> None:
        """Detach a volume that only its LXD device describes."""
        with connections.lock(identifier):
            self._attacher.detach_device(
                instance, guest,
                mode_selection.connection_of(identifier, device), mountpoint)
            if not self._usage.other_users(instance, identifier):
                known = self._usage.connections().get(identifier)
                self._attacher.drop(
                    instance, identifier,
                    known.connection_info if known else None, force=False)
        LOG.info('Detached volume %s, whose attachment Nova has not recorded',
                 identifier, instance=instance)

    def _detach_root(self, instance: objects.Instance, identifier: str
                     ) -> None:
        """Detach the root volume of a stopped instance that Nova is about to
        rebuild."""
        guest = self._guests.find(instance)
        if guest and lxd_guest.root_volume(guest) == identifier:
            in_use.check_root(instance, guest)
            guest.update(config=lxd_devices.DISCONNECTED)

    def _instances_of(self, instance: objects.Instance
                      ) -> list[lxd_guest.Guest]:
        """List the LXD instances of a server that may have volumes: its own
        and, while it is rescued, its rescue instance."""
        own = self._guests.find(instance)
        if own is None:
            return self._guests.of(instance)
        if not own.is_rescued:
            return [own]
        rescue = self._guests.find(instance, roles.RESCUE)
        return [own, rescue] if rescue else [own]

    def extend(self, context: nova_context.RequestContext,
               instance: objects.Instance, connection_info: dict[str, Any],
               size: int) -> None:
        """Show a server the new size of a volume. See
        :meth:`nova.virt.driver.ComputeDriver.extend_volume`.

        :param size: new size of the volume in bytes.
        :raises nova.exception.VolumeExtendFailed: if the host does not see it.
        """
        identifier = connections.volume_id(connection_info)
        with self._guests.changing(instance), connections.lock(identifier):
            self._connections.extend(instance, connection_info, size, context)
            with connections.map_exceptions(
                    'grow the filesystem of', instance, identifier,
                    exception.VolumeExtendFailed):
                self._attacher.modes.of(connection_info).grow(connection_info)
            disk_view.update_sizes(roles.lxd_name(instance), instance.uuid)
        LOG.info('Extended volume %(volume)s to %(size)d bytes',
                 {'volume': identifier, 'size': size}, instance=instance)

    # -- all volumes; the caller holds the lock of the instance -------------

    def connect(self, context: nova_context.RequestContext,
                instance: objects.Instance, guest: lxd_guest.Guest | None,
                block_device_info: BlockDeviceInfo
                ) -> lxd_devices.GuestChanges:
        """Connect the host to all volumes of an instance that does not run.

        What is connected already is left as it is.

        :param context: for requests to Cinder and the key manager.
        :param instance: the instance.
        :param guest: its LXD instance, None if that does not exist yet.
        :param block_device_info: Nova's description of its disks.
        :returns: what the LXD instance needs; :meth:`mount` has to follow
            before it starts.
        :raises nova.exception.VolumeAttachFailed: if one cannot be connected;
            :meth:`disconnect` rolls back the others.
        :raises nova.exception.BuildAbortException: if this host cannot boot
            from the root volume.
        """
        root = root_mapping(block_device_info)
        expected = lxd_guest.root_volume(guest)
        if root is None and expected:
            raise exception.VolumeAttachFailed(
                volume_id=expected,
                reason='the server boots from it, but Nova does not say how '
                       'it is connected')
        changes = lxd_devices.GuestChanges()
        for volume in sorted(mappings(block_device_info), key=_is_root,
                             reverse=True):
            found = self._connect(context, instance, volume)
            changes.config.update(found.config)
            changes.devices.update(found.devices)
        lxd_devices.keep_counters(guest, changes)
        return changes

    def _connect(self, context: nova_context.RequestContext,
                 instance: objects.Instance, volume: Any
                 ) -> lxd_devices.GuestChanges:
        connection_info = volume['connection_info']
        with (connections.lock(connections.volume_id(connection_info)),
              contextlib.ExitStack() as undo):
            found = self._attacher.connect(
                context, instance, connection_info, volume['mount_device'],
                getattr(volume, 'volume_size', None), undo,
                root=_is_root(volume))
            undo.pop_all()
        # Nova's record is the only place where the findings are kept.
        volume['connection_info'] = connection_info
        if hasattr(volume, 'save'):
            volume.save()
        return found

    def provision(self, context: nova_context.RequestContext,
                  instance: objects.Instance,
                  block_device_info: BlockDeviceInfo,
                  changes: lxd_devices.GuestChanges) -> None:
        """Make the root filesystem on a connected boot volume, if any, unless
        it has one. See :meth:`.provisioning.VolumeProvisioner.prepare`.

        :param context: for requests to Cinder and Glance.
        :param changes: what :meth:`connect` has returned; what is written to
            the volume here is not counted as the instance's.
        """
        root = root_mapping(block_device_info)
        if root is not None:
            self._provisioner.prepare(context, instance,
                                      root['connection_info'])
            changes.config.update(statistics.store(
                lxd_guest.KEY_ROOT_COUNTERS,
                root['connection_info'][base.DEVICE_PATH]))

    def mount(self, instance: objects.Instance, guest: lxd_guest.Guest,
              block_device_info: BlockDeviceInfo) -> None:
        """Mount the connected volumes that the guest has as filesystems, and
        check that the host is still connected to the others.

        Until the guest has the devices, another server that has the same
        volume may release it.

        :param guest: its LXD instance, which is about to start.
        :param block_device_info: what :meth:`connect` was given.
        :raises nova.exception.VolumeAttachFailed: if one cannot be mounted
            or is no longer connected.
        """
        for volume in mappings(block_device_info):
            connection_info = volume['connection_info']
            identifier = connections.volume_id(connection_info)
            with connections.lock(identifier):
                if identifier not in self._connections.known():
                    raise exception.VolumeAttachFailed(
                        volume_id=identifier,
                        reason='another server on the host has just released '
                               'it; start this one again')
                if connection_info[modes.KEY_MODE] != modes.BLOCK:
                    self._attacher.mount(instance, guest.reload(),
                                         connection_info)

    def flush(self, instance: objects.Instance, guest: lxd_guest.Guest
              ) -> list[str]:
        """Write what the host has cached of an instance's volumes to their
        storage, so that it survives a crash of the host and is part of
        Cinder's snapshots.

        Failures are logged as warnings: storage that does not answer must not
        keep an instance from stopping.

        :param guest: its LXD instance.
        :returns: IDs of the volumes that could not be written in time.
        """
        failed = []
        deadline = time.monotonic() + FLUSH_TIMEOUT
        for identifier, device in lxd_devices.connected(guest).items():
            timeout = max(deadline - time.monotonic(), _LEAST_FLUSH_TIMEOUT)
            found = mode_selection.connection_of(identifier, device)
            try:
                self._attacher.modes.of(found).flush(found, timeout)
            # Not only OSError: the privileged daemon may be gone.
            except Exception as error:
                LOG.warning('Could not write cached data of volume %(volume)s '
                            'to its storage: %(error)s',
                            {'volume': identifier, 'error': error},
                            instance=instance)
                failed.append(identifier)
        return failed

    def reconnect(self, context: nova_context.RequestContext,
                  instance: objects.Instance, guest: lxd_guest.Guest
                  ) -> dict[str, dict[str, str]]:
        """Connect the host to the volumes of a stopped guest, and mount them,
        where Nova's driver call does not name them (unrescue).

        :returns: LXD devices by name.
        """
        if not lxd_devices.of_guest(guest):
            return {}
        info = virt_driver.get_block_device_info(
            instance,
            objects.BlockDeviceMappingList.get_by_instance_uuid(
                context, instance.uuid))
        data = {'block_device_mapping': [
            volume for volume in mappings(info) if not _is_root(volume)]}
        found = self.connect(context, instance, None, data)
        lxd_devices.keep_counters(guest, found)
        self.mount(instance, guest, data)
        return found.devices

    def disconnect(self, instance: objects.Instance,
                   block_device_info: BlockDeviceInfo) -> None:
        """Disconnect the host from all volumes of an instance whose build
        failed; errors are logged only.

        Volumes that its LXD instance still has stay connected: it could not
        be deleted, and may be running.

        :raises errors.LXDError: if LXD does not say which those are.
        """
        for volume in _connected(block_device_info):
            identifier = connections.volume_id(volume['connection_info'])
            users = self._usage.users(identifier)
            if any(guest.uuid == instance.uuid for guest in users):
                LOG.error('Volume %s stays connected after a failed build, '
                          'since the LXD instance still has it', identifier,
                          instance=instance)
                continue
            self._disconnect(instance, volume, force=True)

    def _disconnect(self, instance: objects.Instance, volume: Any, *,
                    force: bool) -> None:
        connection_info = volume['connection_info']
        identifier = connections.volume_id(connection_info)
        if _is_root(volume):
            # Nova may not have saved it.
            connection_info.setdefault(modes.KEY_MODE, modes.ROOT)
            self._provisioner.drop_pool(identifier)
        try:
            with connections.lock(identifier):
                self._attacher.disconnect(instance, connection_info,
                                          force=force)
        except exception.NovaException as error:
            if not force:
                raise
            LOG.warning('Volume %(volume)s stays connected: %(error)s',
                        {'volume': identifier, 'error': error},
                        instance=instance)

    def release(self, instance: objects.Instance, guest: lxd_guest.Guest,
                block_device_info: BlockDeviceInfo) -> None:
        """Detach and disconnect all volumes of a stopped instance, since Nova
        is about to make new connections.

        :param guest: its LXD instance.
        :param block_device_info: Nova's description of its disks, with the
            present connections.
        :raises nova.exception.DeviceDetachFailed: if the instance runs.
        :raises nova.exception.VolumeDetachFailed: if one cannot be
            disconnected.
        """
        if root_mapping(block_device_info) is not None:
            in_use.check_root(instance, guest.reload())
        guest.update(config=lxd_devices.DISCONNECTED, devices={
            lxd_devices.name(identifier): None
            for identifier in lxd_devices.of_guest(guest)})
        for volume in _connected(block_device_info):
            self._disconnect(instance, volume, force=False)

    def remove(self, instance: objects.Instance, volumes: Iterable[str],
               block_device_info: BlockDeviceInfo, *, force: bool
               ) -> None:
        """Disconnect the host from all volumes of an instance that is gone
        from LXD, also from those that Nova no longer names.

        :param volumes: Cinder's IDs of the volumes that it had, see
            :func:`.lxd_devices.volumes`.
        :param force: log errors only.
        :raises nova.exception.VolumeDetachFailed: if one cannot be
            disconnected.
        """
        named = set()
        for volume in _connected(block_device_info):
            named.add(connections.volume_id(volume['connection_info']))
            self._disconnect(instance, volume, force=force)
        for identifier in set(volumes) - named:
            self._provisioner.drop_pool(identifier)
            with connections.lock(identifier):
                if not self._usage.other_users(instance, identifier):
                    LOG.warning('Disconnecting volume %s, which Nova does not '
                                'mention', identifier, instance=instance)
                    self._attacher.drop(instance, identifier, None,
                                        force=True)


def mappings(block_device_info: BlockDeviceInfo) -> list[Any]:
    """List the block device mappings of volumes.

    :param block_device_info: Nova's description of the disks.
    """
    return list(virt_driver.block_device_info_get_mapping(block_device_info))


def root_mapping(block_device_info: BlockDeviceInfo) -> Any | None:
    """Return the mapping of the volume that an instance boots from.

    :param block_device_info: Nova's description of the disks.
    :returns: the mapping, None if the root disk is not a volume.
    """
    return next(filter(_is_root, mappings(block_device_info)), None)


def _connected(block_device_info: BlockDeviceInfo) -> list[Any]:
    """List the mappings of volumes that have a connection, which is missing if
    the instance did not get that far."""
    return [volume for volume in mappings(block_device_info)
            if volume.get('connection_info')]


def _is_root(volume: Mapping[str, Any]) -> bool:
    return volume.get('boot_index') == 0
