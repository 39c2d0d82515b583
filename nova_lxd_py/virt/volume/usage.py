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

"""Who has a volume, without a list of all servers for each one attached.

No server can have a volume to which this host has no connection. All are made
in this process, or are seen on the instances when it begins; so LXD has to be
asked only about a volume that the host is connected to already. What stopped
servers had before a reboot of the host, they do not have until they start.
"""

from __future__ import annotations

import contextlib
import threading

from nova import exception
from nova import objects
from oslo_log import log as logging

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.volume import device_identity
from nova_lxd_py.virt.volume import lxd_devices
from nova_lxd_py.virt.volume import manager

LOG = logging.getLogger(__name__)


class VolumeUsage:
    """Finds the guests that have a volume.

    :param guests: the driver's LXD instances.
    :param volumes: knows what this process has connected.
    """

    def __init__(self, guests: registry.GuestRegistry,
                 volumes: manager.VolumeManager) -> None:
        self._guests = guests
        self._volumes = volumes
        self._lock = threading.Lock()
        self._begun = False

    def of(self, identifier: str) -> list[lxd_guest.Guest]:
        """Find all guests that have a volume.

        :param identifier: Cinder's id of the volume.
        """
        if identifier not in self._connections():
            return []
        return lxd_devices.holders(self._guests.all(), identifier)

    def others(self, instance: objects.Instance, identifier: str
               ) -> list[lxd_guest.Guest]:
        """Find the guests of other servers that have a volume.

        :param instance: the server that is left out.
        :param identifier: Cinder's id of the volume.
        """
        return [guest for guest in self.of(identifier)
                if guest.uuid != instance.uuid]

    def check_exclusive(self, instance: objects.Instance, identifier: str,
                        sharing: bool = False) -> bool:
        """See that a server may have a volume.

        :param instance: the server.
        :param identifier: Cinder's id of the volume.
        :param sharing: whether other servers may have it, too.
        :returns: whether any has it already, this one or another: the host is
            connected to it then, and has to stay so.
        :raises nova.exception.VolumeAttachFailed: another server has it.
        """
        having = self.of(identifier)
        if not sharing and any(guest.uuid != instance.uuid
                               for guest in having):
            raise exception.VolumeAttachFailed(
                volume_id=identifier,
                reason='another server on the host still has it')
        return bool(having)

    def check_device_conflict(self, instance: objects.Instance, identifier: str,
                              source: str) -> None:
        """See that a device is not the one of another volume as well.

        :param instance: the server that is to have it.
        :param identifier: Cinder's id of the volume that it should be.
        :param source: path of the block device.
        :raises nova.exception.VolumeAttachFailed: it is.
        """
        for guest, name in self._of_same_device(identifier, source):
            LOG.error('%(path)s turned up as volume %(volume)s, but is device '
                      '%(name)s of %(guest)s; the host has a stale '
                      'connection', {'path': source, 'volume': identifier,
                                     'name': name, 'guest': guest.name},
                      instance=instance)
            raise exception.VolumeAttachFailed(
                volume_id=identifier,
                reason='the host takes it for another volume')

    def _of_same_device(self, identifier: str, source: str
                        ) -> list[tuple[lxd_guest.Guest, str]]:
        """Find guests that have a block device as another volume.

        :returns: guests with the names of their LXD devices.
        """
        number = device_identity.device_number(source)
        if not any(_is_device(path, number) for other, path
                   in self._connections().items() if other != identifier):
            return []
        return [(guest, name) for guest in self._guests.all()
                for name, device in lxd_devices.connected(guest).items()
                if name != lxd_devices.name(identifier) and
                _is_device(lxd_devices.source(device), number)]

    def _connections(self) -> dict[str, str]:
        """List what the host may be connected to: paths of block devices by
        volume."""
        with self._lock:
            if not self._begun:
                for guest in self._guests.all():
                    for name, device in lxd_devices.connected(guest).items():
                        self._volumes.note(lxd_devices.volume(name),
                                           lxd_devices.source(device))
                self._begun = True
        return self._volumes.connections()


def _is_device(path: str, number: int) -> bool:
    with contextlib.suppress(device_identity.WrongDevice):
        return device_identity.device_number(path) == number
    return False
