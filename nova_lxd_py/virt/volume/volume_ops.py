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

"""What Nova requests for one volume of an instance: attach, detach, extend.

All volumes of an instance together are in :mod:`.server_volumes`.
"""

from __future__ import annotations

import contextlib
from typing import Any

from nova import context as nova_context
from nova import exception
from nova import objects
from oslo_log import log as logging

from nova_lxd_py.virt.guest import disk_view
from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.guest import roles
from nova_lxd_py.virt.metadata import device_tags
from nova_lxd_py.virt.volume import attach_notes
from nova_lxd_py.virt.volume import attachment
from nova_lxd_py.virt.volume import connections
from nova_lxd_py.virt.volume import in_use
from nova_lxd_py.virt.volume import lxd_devices
from nova_lxd_py.virt.volume import mappings
from nova_lxd_py.virt.volume import modes

LOG = logging.getLogger(__name__)


class VolumeOps:
    """Attaches, detaches and extends volumes.

    :param guests: the driver's LXD instances.
    :param host_connections: connects the host to volumes.
    :param attacher: the steps for one volume.
    """

    def __init__(self, guests: registry.GuestRegistry,
                 host_connections: connections.VolumeConnections,
                 attacher: attachment.VolumeAttacher) -> None:
        self._guests = guests
        self._connections = host_connections
        self._attacher = attacher

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
            recorded = mappings.recorded(context, instance.uuid, identifier)
            # LXD or nova-compute may have ended while attaching it before.
            interrupted = self._attacher.is_prepared(identifier)
            if self._connections.is_untraceable(connection_info):
                attach_notes.write(guest, connection_info)
                undo.callback(attach_notes.clear, guest)
            found = self._attacher.connect(
                context, instance, connection_info, mountpoint,
                # Nova records the size only when the volume is attached.
                None, undo, encryption=encryption)
            modes.keep_counters(guest, found)
            if recorded is not None and recorded.tag:
                undo.callback(device_tags.unpublish_volume, instance,
                              identifier)
                device_tags.publish_volume(instance, recorded)
            name = lxd_devices.name(identifier)
            if name not in lxd_devices.connected(guest):
                if interrupted:
                    try:
                        self._attacher.clear(guest, connection_info,
                                             mountpoint)
                    except exception.DeviceDetachFailed:
                        # What a guest uses must not be disconnected.
                        undo.pop_all()
                        raise
                self._attacher.mount(instance, guest, connection_info)
            device = found.devices[name]
            self._attacher.attach_device(instance, guest, identifier, device,
                                         undo)
            undo.pop_all()
            attach_notes.clear(guest)
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

    def _detach_root(self, instance: objects.Instance, identifier: str
                     ) -> None:
        """Detach the root volume of a stopped instance that Nova is about to
        rebuild."""
        guest = self._guests.find(instance)
        if guest and lxd_guest.root_volume(guest) == identifier:
            in_use.check_root(instance, guest)
            guest.update(config=modes.DISCONNECTED)

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
                self._attacher.modes.of(connection_info).grow(
                    connection_info, identifier)
            disk_view.update_sizes(roles.lxd_name(instance), instance.uuid)
        LOG.info('Extended volume %(volume)s to %(size)d bytes',
                 {'volume': identifier, 'size': size}, instance=instance)
