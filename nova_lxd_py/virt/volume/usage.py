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
"""

from __future__ import annotations

import contextlib
import threading

from nova import exception
from nova import objects
from oslo_log import log as logging

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.volume import attach_notes
from nova_lxd_py.virt.volume import connections
from nova_lxd_py.virt.volume import device_identity
from nova_lxd_py.virt.volume import lxd_devices

LOG = logging.getLogger(__name__)


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
        name = lxd_devices.name(identifier)
        return [guest for guest in self._guests.all()
                if name in lxd_devices.connected(guest)]

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
        for guest, name in self._users_of_device(identifier, source):
            LOG.error('%(path)s turned up as volume %(volume)s, but is device '
                      '%(name)s of %(guest)s; the host has a stale '
                      'connection', {'path': source, 'volume': identifier,
                                     'name': name, 'guest': guest.name},
                      instance=instance)
            raise exception.VolumeAttachFailed(
                volume_id=identifier,
                reason='the host takes it for another volume')

    def _users_of_device(self, identifier: str, source: str
                         ) -> list[tuple[lxd_guest.Guest, str]]:
        """Find guests that have a block device as another volume.

        :returns: guests with the names of their LXD devices.
        """
        number = device_identity.device_number(source)
        if not any(_is_device(connection.path, number) for other, connection
                   in self.connections().items() if other != identifier):
            return []
        return [(guest, name) for guest in self._guests.all()
                for name, device in lxd_devices.connected(guest).items()
                if name != lxd_devices.name(identifier) and
                _is_device(lxd_devices.source(device), number)]

    def connections(self) -> dict[str, connections.Connection]:
        """List what the host may be connected to.

        :returns: connections by Cinder's IDs of the volumes.
        """
        with self._lock:
            if not self._seeded:
                known = self._host_connections.known()
                for guest in self._guests.all():
                    for name, device in lxd_devices.connected(guest).items():
                        identifier = lxd_devices.volume(name)
                        if identifier not in known:
                            self._host_connections.note(
                                identifier, connections.Connection(
                                    lxd_devices.source(device)))
                    self._note_interrupted(guest)
                self._seeded = True
        return self._host_connections.known()

    def _note_interrupted(self, guest: lxd_guest.Guest) -> None:
        """Record the volume that an earlier process was attaching."""
        pending = attach_notes.read(guest)
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
