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

"""Repair of what the end of nova-compute or of LXD has interrupted.

The state of the host (loop devices, opened encrypted volumes, mounts) and the
connections that this process has made are compared with what LXD says that
its instances have, when nova-compute starts and when LXD is reached again.
"""

from __future__ import annotations

from collections.abc import Iterable
import contextlib
import threading

from nova import exception
from oslo_log import log as logging

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.guest import volume_limits
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.volume import attachment
from nova_lxd_py.virt.volume import connections
from nova_lxd_py.virt.volume import lxd_devices
from nova_lxd_py.virt.volume import provisioning
from nova_lxd_py.virt.volume import swap
from nova_lxd_py.virt.volume import usage

LOG = logging.getLogger(__name__)


class Reconciler:
    """Removes what no guest uses, rolls back interrupted swaps, and restores
    the limits of volumes.

    :param guests: the driver's LXD instances.
    :param host_connections: records what the host is connected to.
    :param volume_usage: knows which guests have a volume.
    :param attacher: disconnects volumes.
    :param swapper: rolls back swaps.
    :param provisioner: removes what interrupted first boots left in LXD.
    """

    def __init__(self, guests: registry.GuestRegistry,
                 host_connections: connections.VolumeConnections,
                 volume_usage: usage.VolumeUsage,
                 attacher: attachment.VolumeAttacher,
                 swapper: swap.VolumeSwapper,
                 provisioner: provisioning.VolumeProvisioner) -> None:
        self._guests = guests
        self._connections = host_connections
        self._usage = volume_usage
        self._attacher = attacher
        self._swapper = swapper
        self._provisioner = provisioner
        self._running = threading.Lock()

    def run(self) -> None:
        """Reconcile once; what fails is logged and left for the next time."""
        if not self._running.acquire(blocking=False):
            return
        try:
            self._provisioner.recover()
            self._roll_back_swaps()
            self._remove_unused()
            guests = self._guests.all()
            self._clear_notes(guests)
            self._restore_limits(guests)
        except errors.LXDError as error:
            LOG.warning('Could not reconcile volumes, since LXD does not list '
                        'its instances: %s', error)
        except Exception:
            LOG.exception('Could not reconcile volumes')
        finally:
            self._running.release()

    def _roll_back_swaps(self) -> None:
        for guest in self._guests.all():
            if swap.KEY_SWAP not in guest.config:
                continue
            try:
                with self._guests.lock(guest.uuid):
                    # A swap that is under way has the lock.
                    self._swapper.restore(guest.reload())
            except Exception as error:
                LOG.error('Could not roll back the interrupted swap of a '
                          'volume of %(guest)s; hard reboot the server: '
                          '%(kind)s: %(error)s', {
                              'guest': guest.name,
                              'kind': type(error).__name__, 'error': error},
                          instance_uuid=guest.uuid)

    def restore_limits(self, name: str, uuid: str) -> None:
        """Limit a guest that was restarted; errors are logged only.

        :param name: LXD's name of the instance.
        :param uuid: UUID of the server.
        """
        try:
            # An operation that changes its volumes has the lock.
            with self._guests.lock(uuid):
                volume_limits.apply(self._guests.by_name(name))
        except errors.LXDError as error:
            LOG.warning('Could not apply the QoS limits of volumes to '
                        '%(guest)s: %(error)s',
                        {'guest': name, 'error': error}, instance_uuid=uuid)

    def _restore_limits(self, guests: Iterable[lxd_guest.Guest]) -> None:
        """Limit guests that may have been restarted meanwhile."""
        for guest in guests:
            if volume_limits.find(guest.config, guest.devices):
                self.restore_limits(guest.name, guest.uuid)

    def _clear_notes(self, guests: Iterable[lxd_guest.Guest]) -> None:
        """Clear notes of volumes that are attached or not connected."""
        for guest in guests:
            if usage.read_note(guest) is None:
                continue
            # An operation that attaches a volume has the lock.
            with self._guests.lock(guest.uuid):
                pending = usage.read_note(guest.reload())
                if pending and (connections.volume_id(pending) in
                                _attached([guest]) or
                                connections.volume_id(pending) not in
                                self._connections.known()):
                    usage.clear_note(guest)

    def _remove_unused(self) -> None:
        known = self._usage.connections()
        found = (set(known) | self._connections.find_unrecorded() |
                 self._attacher.modes.mounted())
        if not found:
            return
        unused = found - _attached(self._guests.all())
        for identifier in sorted(unused):
            connection = known.get(identifier)
            try:
                self._remove(identifier, connection)
            except exception.NovaException as error:
                LOG.error('Volume %(volume)s, which no guest has, stays '
                          'connected: %(error)s',
                          {'volume': identifier, 'error': error},
                          instance=connection and connection.instance)

    def _remove(self, identifier: str,
                connection: connections.Connection | None) -> None:
        """Disconnect the host from a volume, unless it is in use by now."""
        with contextlib.ExitStack() as locks:
            instance = connection.instance if connection else None
            if instance is not None:
                # No operation that has connected it is under way then.
                locks.enter_context(self._guests.changing(instance))
            locks.enter_context(connections.lock(identifier))
            if (self._connections.known().get(identifier) is not connection or
                    identifier in _attached(self._guests.all())):
                return
            LOG.warning('Disconnecting volume %s, which no guest has',
                        identifier, instance=instance)
            self._attacher.drop(
                instance, identifier,
                connection.connection_info if connection else None,
                force=False)


def _attached(guests: list[lxd_guest.Guest]) -> set[str]:
    """List the volumes that guests have, or had before an interrupted swap."""
    found: set[str] = set()
    for guest in guests:
        found |= set(lxd_devices.of_guest(guest)) | swap.noted(guest)
    return found
