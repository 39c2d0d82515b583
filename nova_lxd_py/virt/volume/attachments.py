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
import os
from typing import Any

from nova.compute import power_state
from nova import context as nova_context
from nova import exception
from nova import objects
from nova.virt import driver as virt_driver
from oslo_log import log as logging
from oslo_utils import excutils

from nova_lxd_py.virt import device_tags
from nova_lxd_py.virt import errors
from nova_lxd_py.virt import instance as lxd_instance
from nova_lxd_py.virt.volume import devices
from nova_lxd_py.virt.volume import filesystems
from nova_lxd_py.virt.volume import identity
from nova_lxd_py.virt.volume import manager
from nova_lxd_py.virt.volume import processes

LOG = logging.getLogger(__name__)

_BlockDeviceInfo = Mapping[str, Any] | None


class Attachments:
    """Gives volumes to servers and takes them away.

    :param guests: the driver's LXD instances.
    :param volumes: connects the host to volumes.
    :param mounted: mounts the filesystems on them, where they are to be
        mounted.
    """

    def __init__(self, guests: lxd_instance.Guests,
                 volumes: manager.VolumeManager,
                 mounted: filesystems.Filesystems) -> None:
        self._guests = guests
        self._volumes = volumes
        self._filesystems = mounted

    # -- one volume ---------------------------------------------------------

    def attach(self, context: nova_context.RequestContext,
               instance: objects.Instance, connection_info: dict[str, Any],
               mountpoint: str) -> None:
        """Give a server one more volume; a failure leaves nothing connected.

        See :meth:`nova.virt.driver.ComputeDriver.attach_volume`.

        :param instance: the server, running or not.
        :param connection_info: Cinder's description of the connection, which
            gets what detaching needs to know.
        :param mountpoint: the device name of the volume.
        """
        identifier = manager.volume_id(connection_info)
        path = devices.guest_path(mountpoint)
        with (self._guests.lock(instance.uuid), manager.lock(identifier),
              contextlib.ExitStack() as undo):
            guest = self._guests.active(instance)
            recorded = _recorded(context, instance, identifier)
            device = self._connect(
                context, instance, connection_info, path,
                recorded.volume_size if recorded else None, undo)
            if recorded is not None and recorded.tag:
                undo.callback(device_tags.forget_volume, instance, identifier)
                device_tags.publish_volume(instance, recorded)
            if devices.name(identifier) not in devices.of_guest(guest):
                self._mount(instance, guest, connection_info)
            self._put_in(instance, guest, identifier, device, undo)
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
        with self._guests.lock(instance.uuid), manager.lock(identifier):
            for guest in self._guests.of(instance):
                self._take_out(instance, guest, connection_info, mountpoint)
            self._disconnect(instance, connection_info, force=False)
        LOG.info('Detached volume %s', identifier, instance=instance)

    def extend(self, instance: objects.Instance,
               connection_info: dict[str, Any], size: int) -> None:
        """Show a server the new size of a volume.

        See :meth:`nova.virt.driver.ComputeDriver.extend_volume`.

        :param connection_info: Cinder's description of the connection.
        :param size: bytes that the volume has by now.
        :raises nova.exception.VolumeExtendFailed: the host does not see it.
        """
        identifier = manager.volume_id(connection_info)
        with self._guests.lock(instance.uuid), manager.lock(identifier):
            self._volumes.extend(instance, connection_info, size)
            if filesystems.is_filesystem(connection_info):
                with manager.explained('grow the filesystem of', instance,
                                       identifier,
                                       exception.VolumeExtendFailed):
                    self._filesystems.grow(connection_info, identifier)
        LOG.info('Volume %(volume)s has %(size)d bytes now',
                 {'volume': identifier, 'size': size}, instance=instance)

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
            path = devices.guest_path(volume['mount_device'])
            with manager.lock(identifier), contextlib.ExitStack() as undo:
                found[devices.name(identifier)] = self._connect(
                    context, instance, connection_info, path,
                    getattr(volume, 'volume_size', None), undo)
                undo.pop_all()
            # Nobody else keeps what the connection has been found to be.
            volume['connection_info'] = connection_info
            if hasattr(volume, 'save'):
                volume.save()
        return found

    def mount_all(self, instance: objects.Instance,
                  guest: lxd_instance.Guest,
                  block_device_info: _BlockDeviceInfo) -> None:
        """Mount the volumes that a server has as filesystems.

        :param instance: the server, whose lock must be held.
        :param guest: its LXD instance, which is about to start.
        :param block_device_info: Nova's description of its disks, which
            :meth:`connect_all` has seen.
        :raises nova.exception.VolumeAttachFailed: one cannot be mounted.
        """
        for volume in _mapping(block_device_info):
            if filesystems.is_filesystem(volume['connection_info']):
                self._mount(instance, guest.reload(),
                            volume['connection_info'])

    def reconnect(self, context: nova_context.RequestContext,
                  instance: objects.Instance, guest: lxd_instance.Guest
                  ) -> dict[str, dict[str, str]]:
        """Connect the host to the volumes that a stopped guest has, where
        Nova does not say what they are.

        :param instance: the server, whose lock must be held.
        :param guest: its LXD instance.
        :returns: as :meth:`connect_all`; nothing has to follow.
        """
        if not devices.of_guest(guest):
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
                    self._disconnect(instance, volume['connection_info'],
                                     force=force)
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
            identifier = name.removeprefix(devices.PREFIX)
            if identifier in known:
                continue
            with manager.lock(identifier):
                if not devices.others(self._guests.all(), instance,
                                      identifier):
                    LOG.warning('It had volume %s, which Nova does not '
                                'mention', identifier, instance=instance)
                    with contextlib.suppress(OSError):
                        self._filesystems.unmount(identifier, True)
                    self._volumes.forget(instance, identifier)

    def release(self, instance: objects.Instance, guest: lxd_instance.Guest,
                block_device_info: _BlockDeviceInfo) -> None:
        """Take all volumes from a stopped server, since Nova makes their
        connections anew.

        :param instance: the server.
        :param guest: its LXD instance, which does not run.
        :param block_device_info: Nova's description of its disks, with the
            present connections.
        :raises nova.exception.VolumeDetachFailed: something is left of one.
        """
        guest.update(devices={name: None for name in devices.of_guest(guest)})
        self.disconnect_all(instance, block_device_info, force=False)

    # -- steps --------------------------------------------------------------

    def _connect(self, context: nova_context.RequestContext,
                 instance: objects.Instance,
                 connection_info: dict[str, Any], path: str,
                 size_gb: int | None, undo: contextlib.ExitStack
                 ) -> dict[str, str]:
        """Connect one volume, and describe it as an LXD device."""
        identifier = manager.volume_id(connection_info)
        guests = self._guests.all()
        holders = devices.holders(guests, identifier)
        if (devices.others(guests, instance, identifier) and
                not connection_info.get('multiattach')):
            raise exception.VolumeAttachFailed(
                volume_id=identifier,
                reason='another server on the host still has it')
        mode = self._filesystems.choose(context, instance, connection_info,
                                        identifier)
        source = self._volumes.connect(instance, connection_info, size_gb,
                                       shared=bool(holders))
        if not holders:
            undo.callback(self._drop, instance, connection_info, force=True)
        self._refuse_mix_up(instance, guests, identifier, source)
        if mode == filesystems.FILESYSTEM:
            with manager.explained('mount', instance, identifier,
                                   exception.VolumeAttachFailed):
                return {**self._filesystems.device(connection_info,
                                                   identifier, path),
                        devices.KEY_SOURCE: source}
        if connection_info['data'].get('qos_specs'):
            LOG.warning('Volume %s has front-end QoS limits, which LXD cannot '
                        'apply to block devices; use the limits of the '
                        'storage (consumer: back-end)', identifier,
                        instance=instance)
        return {'type': 'unix-block', 'source': source, 'path': path}

    @staticmethod
    def _put_in(instance: objects.Instance, guest: lxd_instance.Guest,
                identifier: str, device: Mapping[str, str],
                undo: contextlib.ExitStack) -> None:
        """Put a connected volume into a guest.

        LXD may have done it although it reports a failure, or its answer is
        lost. The host must not be disconnected as long as that may be.
        """
        name = devices.name(identifier)
        before = guest.devices.get(name)
        try:
            guest.update(devices={name: device})
        except errors.LXDError:
            with excutils.save_and_reraise_exception():
                try:
                    guest.update(devices={name: before})
                except errors.LXDError as error:
                    undo.pop_all()
                    LOG.error('Volume %(volume)s stays connected, since LXD '
                              'may have given it to the guest: %(error)s',
                              {'volume': identifier, 'error': error},
                              instance=instance)

    def _refuse_mix_up(self, instance: objects.Instance,
                       guests: Iterable[lxd_instance.Guest], identifier: str,
                       source: str) -> None:
        """See that a device is not the one of another volume as well."""
        number = identity.device_number(source)
        for guest in guests:
            for name, device in devices.of_guest(guest).items():
                if name == devices.name(identifier):
                    continue
                with contextlib.suppress(identity.WrongDevice):
                    if number == identity.device_number(
                            devices.source(device)):
                        LOG.error('%(path)s turned up as volume %(volume)s, '
                                  'but is device %(name)s of %(guest)s; the '
                                  'host has a stale connection',
                                  {'path': source, 'volume': identifier,
                                   'name': name, 'guest': guest.name},
                                  instance=instance)
                        raise exception.VolumeAttachFailed(
                            volume_id=identifier,
                            reason='the host takes it for another volume')

    def _disconnect(self, instance: objects.Instance,
                    connection_info: dict[str, Any], *, force: bool) -> None:
        identifier = manager.volume_id(connection_info)
        if connection_info.get('multiattach'):
            others = devices.others(self._guests.all(), instance, identifier)
            if others:
                LOG.info('Volume %(volume)s stays connected for %(others)s',
                         {'volume': identifier, 'others': ', '.join(
                             guest.name for guest in others)},
                         instance=instance)
                return
        self._drop(instance, connection_info, force=force)

    def _drop(self, instance: objects.Instance,
              connection_info: dict[str, Any], *, force: bool) -> None:
        """Unmount a volume that nobody uses, and disconnect the host."""
        identifier = manager.volume_id(connection_info)
        try:
            with manager.explained('unmount', instance, identifier,
                                   exception.VolumeDetachFailed):
                self._filesystems.unmount(identifier, force)
        except exception.VolumeDetachFailed:
            if not force:
                raise
        self._volumes.disconnect(instance, connection_info, force=force)

    def _mount(self, instance: objects.Instance, guest: lxd_instance.Guest,
               connection_info: dict[str, Any]) -> None:
        identifier = manager.volume_id(connection_info)
        if filesystems.is_filesystem(connection_info):
            with manager.explained('mount', instance, identifier,
                                   exception.VolumeAttachFailed):
                self._filesystems.mount(guest, connection_info, identifier)

    def _take_out(self, instance: objects.Instance, guest: lxd_instance.Guest,
                  connection_info: dict[str, Any], mountpoint: str) -> None:
        """Take a volume out of a guest that does not use it."""
        identifier = manager.volume_id(connection_info)
        name = devices.name(identifier)
        device = devices.of_guest(guest).get(name)
        if device is None:
            return
        self._refuse_busy(guest, device, mountpoint)
        guest.update(devices={name: None})
        try:
            # Something may have opened it in the last moment.
            if device['type'] == 'disk':
                self._filesystems.release(identifier, devices.source(device),
                                          mountpoint)
            else:
                self._refuse_busy(guest, device, mountpoint)
        except exception.DeviceDetachFailed:
            with excutils.save_and_reraise_exception():
                self._mount(instance, guest, connection_info)
                guest.update(devices={name: device})
                LOG.info('Volume %s has gone back to the guest, which uses it',
                         identifier, instance=instance)

    @staticmethod
    def _refuse_busy(guest: lxd_instance.Guest, device: Mapping[str, str],
                     mountpoint: str) -> None:
        if guest.power_state == power_state.SHUTDOWN:
            return
        number = filesystem = 0
        try:
            if device['type'] == 'disk':
                filesystem = os.stat(device['source']).st_dev
            else:
                number = identity.device_number(device['source'])
            init = guest.state()['pid']
        except (identity.WrongDevice, errors.NotFound, OSError):
            # Nobody can use what is not there.
            return
        using = processes.users(init, number, filesystem) if init > 0 else []
        if using:
            LOG.info('%(device)s of %(guest)s is open in processes %(pids)s '
                     'of the host', {'device': mountpoint, 'guest':
                                     guest.name, 'pids': using})
            raise exception.DeviceDetachFailed(
                device=mountpoint,
                reason=f'{len(using)} processes of the server use it; end '
                       f'them first')


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
