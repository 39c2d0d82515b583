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

"""All Cinder volumes of one server: data volumes and the one it boots from.

Locks of the server must be held by callers, but for the operations that Nova
asks for by volume (:meth:`ServerVolumes.attach` and those after it).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import dataclasses
from typing import Any

from nova import context as nova_context
from nova import objects

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.volume import attachments
from nova_lxd_py.virt.volume import boot_volumes
from nova_lxd_py.virt.volume import lxd_devices
from nova_lxd_py.virt.volume import root_volumes

#: Changes to the configuration of a guest that keeps its disks while the host
#: is disconnected from its volumes.
DISCONNECTED: Mapping[str, str | None] = root_volumes.DISCONNECTED

_BlockDeviceInfo = Mapping[str, Any] | None


@dataclasses.dataclass(frozen=True)
class ConnectedVolumes:
    """What the guest of connected volumes has to be given.

    :ivar config: LXD configuration keys.
    :ivar devices: LXD devices by name.
    """

    config: dict[str, str]
    devices: dict[str, dict[str, str]]


class ServerVolumes:
    """Connects, mounts and disconnects the volumes of servers.

    :param data: volumes that servers have beside their root.
    :param boot: volumes that servers boot from.
    """

    def __init__(self, data: attachments.Attachments,
                 boot: boot_volumes.BootVolumes) -> None:
        self._data = data
        self._boot = boot

    # -- all volumes of a server --------------------------------------------

    def connect(self, context: nova_context.RequestContext,
                instance: objects.Instance, guest: lxd_guest.Guest | None,
                block_device_info: _BlockDeviceInfo) -> ConnectedVolumes:
        """Connect the host to all volumes of an instance that does not run.

        :param context: for asking Cinder and the key manager.
        :param instance: the instance.
        :param guest: its LXD instance, None if that is yet to be made.
        :param block_device_info: Nova's description of its disks.
        :returns: what to give to the LXD instance; :meth:`mount` has to
            follow before it starts.
        :raises nova.exception.VolumeAttachFailed: if one cannot be
            connected; :meth:`disconnect` undoes the others.
        :raises nova.exception.BuildAbortException: if this host cannot boot
            from the root volume.
        """
        config = self._boot.connect(instance, guest, block_device_info)
        return ConnectedVolumes(config, self._data.connect_all(
            context, instance, block_device_info))

    def provision(self, context: nova_context.RequestContext,
                  instance: objects.Instance,
                  block_device_info: _BlockDeviceInfo) -> None:
        """Make the root filesystem on a connected boot volume, if any, unless
        it has one.

        :param context: for asking Cinder and Glance.
        """
        self._boot.prepare(context, instance, block_device_info)

    def placeholder_source(self) -> dict[str, str]:
        """Return what the LXD instance of a volume-backed server is made from.

        :returns: the ``source`` for LXD's ``POST /1.0/instances``.
        :raises errors.LXDError: if the request fails.
        """
        return self._boot.source()

    def mount(self, instance: objects.Instance, guest: lxd_guest.Guest,
              block_device_info: _BlockDeviceInfo) -> None:
        """Mount the connected volumes that the guest has as filesystems.

        :param guest: its LXD instance, which is about to start.
        :raises nova.exception.VolumeAttachFailed: if one cannot be mounted
            or is no longer connected.
        """
        self._boot.mount(instance, guest, block_device_info)
        self._data.mount_all(instance, guest, block_device_info)

    def reconnect(self, context: nova_context.RequestContext,
                  instance: objects.Instance, guest: lxd_guest.Guest
                  ) -> dict[str, dict[str, str]]:
        """Connect the host to the volumes of a stopped guest, and mount them,
        where Nova's driver call does not name them (unrescue).

        :returns: LXD devices by name.
        """
        return self._data.reconnect(context, instance, guest)

    def disconnect(self, instance: objects.Instance,
                   block_device_info: _BlockDeviceInfo) -> None:
        """Disconnect the host from all volumes of an instance whose build
        failed; errors are logged only."""
        self._data.disconnect_all(instance, block_device_info, force=True)
        self._boot.disconnect(instance, None, block_device_info, force=True)

    def release(self, instance: objects.Instance, guest: lxd_guest.Guest,
                block_device_info: _BlockDeviceInfo) -> None:
        """Detach and disconnect all volumes of a stopped instance, since Nova
        is about to make new connections.

        :raises nova.exception.VolumeDetachFailed: if one cannot be
            disconnected.
        """
        self._data.release(instance, guest, block_device_info)
        self._boot.release(instance, guest, block_device_info)

    def remove(self, instance: objects.Instance,
               root_volume: str | None, names: Iterable[str],
               block_device_info: _BlockDeviceInfo, *, force: bool) -> None:
        """Disconnect the host from all volumes of an instance that is gone
        from LXD, also from those that Nova no longer names.

        :param root_volume: Cinder's ID of the volume that it booted from.
        :param names: LXD devices of volumes that it had.
        :param force: log errors only.
        :raises nova.exception.VolumeDetachFailed: if one cannot be
            disconnected.
        """
        self._data.clear(instance, names, block_device_info, force=force)
        self._boot.disconnect(instance, root_volume, block_device_info,
                              force=force)

    # -- one volume ---------------------------------------------------------

    def attach(self, context: nova_context.RequestContext,
               instance: objects.Instance, connection_info: dict[str, Any],
               mountpoint: str, encryption: dict[str, Any] | None) -> None:
        """Attach a volume. See
        :meth:`nova.virt.driver.ComputeDriver.attach_volume`."""
        self._data.attach(context, instance, connection_info, mountpoint,
                          encryption)

    def detach(self, instance: objects.Instance,
               connection_info: dict[str, Any], mountpoint: str) -> None:
        """Detach a volume. See
        :meth:`nova.virt.driver.ComputeDriver.detach_volume`."""
        if not self._boot.detach(instance, connection_info):
            self._data.detach(instance, connection_info, mountpoint)

    def extend(self, context: nova_context.RequestContext,
               instance: objects.Instance, connection_info: dict[str, Any],
               size: int) -> None:
        """Show a server the new size of a volume. See
        :meth:`nova.virt.driver.ComputeDriver.extend_volume`.

        :param size: bytes that the volume has by now.
        """
        if not self._boot.extend(instance, connection_info, size):
            self._data.extend(context, instance, connection_info, size)

    def swap(self, context: nova_context.RequestContext,
             instance: objects.Instance, old: dict[str, Any],
             new: dict[str, Any], mountpoint: str, size_gb: int | None
             ) -> None:
        """Replace a volume by another one with its content. See
        :meth:`nova.virt.driver.ComputeDriver.swap_volume`."""
        self._data.swap(context, instance, old, new, mountpoint, size_gb)

    def reconcile(self) -> None:
        """Finish or undo what an end of nova-compute has interrupted."""
        self._data.recover()
        self._boot.recover()


def is_volume_backed(block_device_info: _BlockDeviceInfo) -> bool:
    """Whether an instance boots from a volume.

    :param block_device_info: Nova's description of its disks.
    """
    return root_volumes.find(block_device_info) is not None


def data_devices(guest: lxd_guest.Guest | None) -> list[str]:
    """List the LXD devices that are data volumes of a guest.

    :param guest: its LXD instance, just read; None for one that is gone.
    """
    if guest is None:
        return []
    return [name for name, device in lxd_devices.of_guest(guest).items()
            if device['type'] != lxd_devices.ROOT]
