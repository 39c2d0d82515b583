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

"""Which guests have a volume, without listing all guests for each attachment.

No guest can have a volume to which this host is not connected. This process
records each connection that it makes, and reads those of earlier ones from the
LXD instances. So LXD is asked only about volumes to which the host may be
connected. What stopped guests had before a reboot of the host, they do not
have until they start.

Nova records a connection only when the driver has attached the volume. If
nova-compute is killed before, nothing says how to disconnect the host: for
iSCSI, Fibre Channel and others the host does not know to which Cinder volume a
device belongs. So the LXD instance has a note of the connection until it has
the volume. Credentials are left out, since disconnecting needs none.
"""

from __future__ import annotations

import contextlib
import json
import threading
from typing import Any

from nova import context as nova_context
from nova import exception
from nova import objects
from oslo_log import log as logging

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.volume import connections
from nova_lxd_py.virt.volume import device_identity
from nova_lxd_py.virt.volume import lxd_devices

LOG = logging.getLogger(__name__)

KEY_ATTACHING = 'user.nova.volume_attaching'

_SECRET = ('auth', 'password', 'secret', 'key')


class VolumeUsage:
    """Finds the guests that have a volume.

    :param guests: the driver's LXD instances.
    :param host_connections: records what the host is connected to.
    """

    def __init__(self, guests: registry.GuestRegistry,
                 host_connections: connections.VolumeConnections) -> None:
        self._guests = guests
        self._host_connections = host_connections
        self._lock = threading.Lock()
        self._seeded = False

    def users(self, identifier: str) -> list[lxd_guest.Guest]:
        """Find all guests that have a volume.

        :param identifier: Cinder's ID of the volume.
        """
        if identifier not in self.connections():
            return []
        return [guest for guest in self._guests.all()
                if identifier in lxd_devices.connected(guest)]

    def other_users(self, instance: objects.Instance, identifier: str
                    ) -> list[lxd_guest.Guest]:
        """Find the guests of other instances that have a volume.

        :param instance: the instance to leave out.
        :param identifier: Cinder's ID of the volume.
        """
        return [guest for guest in self.users(identifier)
                if guest.uuid != instance.uuid]

    def check_exclusive(self, instance: objects.Instance, identifier: str,
                        sharing: bool = False) -> bool:
        """Check that an instance may have a volume.

        :param instance: the instance.
        :param identifier: Cinder's ID of the volume.
        :param sharing: whether other instances may have it as well.
        :returns: whether any guest has it already, this one or another: then
            the host is connected to it and must stay so.
        :raises nova.exception.VolumeAttachFailed: if another instance has it.
        """
        users = self.users(identifier)
        if not sharing and any(guest.uuid != instance.uuid
                               for guest in users):
            raise exception.VolumeAttachFailed(
                volume_id=identifier,
                reason='another server on the host still has it')
        return bool(users)

    def check_device_conflict(self, instance: objects.Instance,
                              identifier: str, source: str) -> None:
        """Check that a block device is not the one of another volume as well.

        :param instance: the instance that is to have the volume.
        :param identifier: Cinder's ID of the volume.
        :param source: path of the block device.
        :raises nova.exception.VolumeAttachFailed: if a guest has the device as
            another volume.
        """
        number = device_identity.device_number(source)
        if not any(_is_device(connection.path, number) for other, connection
                   in self.connections().items() if other != identifier):
            return
        for guest in self._guests.all():
            for other, device in lxd_devices.connected(guest).items():
                if other == identifier or not _is_device(
                        lxd_devices.source(device), number):
                    continue
                LOG.error('%(path)s turned up as volume %(volume)s, but is '
                          'volume %(other)s of %(guest)s; the host has a '
                          'stale connection', {
                              'path': source, 'volume': identifier,
                              'other': other, 'guest': guest.name},
                          instance=instance)
                raise exception.VolumeAttachFailed(
                    volume_id=identifier,
                    reason='the host takes it for another volume')

    def connections(self) -> dict[str, connections.Connection]:
        """List what the host may be connected to.

        :returns: connections by Cinder's IDs of the volumes.
        """
        with self._lock:
            if not self._seeded:
                known = self._host_connections.known()
                for guest in self._guests.all():
                    connected = lxd_devices.connected(guest)
                    for identifier, device in connected.items():
                        if identifier not in known:
                            self._host_connections.note(
                                identifier, connections.Connection(
                                    lxd_devices.source(device)))
                    self._note_interrupted(guest)
                self._seeded = True
        return self._host_connections.known()

    def _note_interrupted(self, guest: lxd_guest.Guest) -> None:
        """Record the volume that an earlier process was attaching."""
        pending = read_note(guest)
        if pending is None:
            return
        identifier = connections.volume_id(pending)
        if identifier not in self._host_connections.known():
            self._host_connections.note(identifier, connections.Connection(
                '', objects.Instance(uuid=guest.uuid), pending))


def _is_device(path: str, number: int) -> bool:
    with contextlib.suppress(device_identity.WrongDevice):
        return device_identity.device_number(path) == number
    return False


def recorded(context: nova_context.RequestContext, instance_uuid: str,
             identifier: str) -> objects.BlockDeviceMapping | None:
    """Look up Nova's record of a volume at an instance.

    :param context: for the request to Nova's database; one of an administrator
        if the instance may be in another project.
    :param instance_uuid: UUID of the instance.
    :param identifier: Cinder's ID of the volume.
    :returns: the record, None if there is none.
    """
    try:
        return objects.BlockDeviceMapping.get_by_volume_and_instance(
            context, identifier, instance_uuid)
    except exception.VolumeBDMNotFound:
        return None


def write_note(guest: lxd_guest.Guest, connection_info: dict[str, Any]
               ) -> None:
    """Note the volume that is going to be connected for a guest.

    :param guest: the guest, whose lock is held.
    :param connection_info: Cinder's description of the connection.
    :raises errors.LXDError: if LXD does not store it.
    """
    guest.update(config={KEY_ATTACHING: json.dumps({
        'driver_volume_type': connection_info['driver_volume_type'],
        connections.LOCAL_ID: connections.volume_id(connection_info),
        'data': {name: value for name, value
                 in connection_info['data'].items()
                 if not any(word in name for word in _SECRET)}})})


def read_note(guest: lxd_guest.Guest) -> dict[str, Any] | None:
    """Return the connection of the volume that was being attached.

    :param guest: the guest.
    """
    text = guest.config.get(KEY_ATTACHING)
    return json.loads(text) if text else None


def clear_note(guest: lxd_guest.Guest) -> None:
    """Remove the note of a guest; an error is logged only, since a note of a
    volume that is attached, or is not connected, does no harm.

    :param guest: the guest, whose lock is held.
    """
    if KEY_ATTACHING not in guest.config:
        return
    try:
        guest.update(config={KEY_ATTACHING: None})
    except errors.LXDError as error:
        LOG.warning('Could not remove %(key)s from %(guest)s: %(error)s',
                    {'key': KEY_ATTACHING, 'guest': guest.name,
                     'error': error}, instance_uuid=guest.uuid)
