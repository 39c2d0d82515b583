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


"""Removing a server, or what is left of one, from this host."""

from __future__ import annotations

from typing import Any

from nova.compute import task_states
from nova import objects
from oslo_log import log as logging

from nova_lxd_py.virt.console import serial
from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.guest import roles
from nova_lxd_py.virt.server import local_disks
from nova_lxd_py.virt.server import snapshot
from nova_lxd_py.virt.vif import manager as vif_manager
from nova_lxd_py.virt.volume import lxd_devices
from nova_lxd_py.virt.volume import server_volumes

LOG = logging.getLogger(__name__)


class TeardownOps:
    """Removes servers.

    :param guests: the driver's LXD instances.
    :param vifs: unplugs ports.
    :param disks: config drives and ephemeral disks.
    :param snapshots: images being made of servers.
    :param serial_consoles: serial consoles.
    :param volumes: Cinder volumes.
    """

    def __init__(self, guests: registry.GuestRegistry,
                 vifs: vif_manager.VIFManager,
                 disks: local_disks.LocalDisks,
                 snapshots: snapshot.SnapshotOps,
                 serial_consoles: serial.SerialConsoleManager,
                 volumes: server_volumes.ServerVolumes) -> None:
        self._guests = guests
        self._vifs = vifs
        self._disks = disks
        self._snapshots = snapshots
        self._serial_consoles = serial_consoles
        self._volumes = volumes

    def destroy(self, instance: objects.Instance, network_info: Any,
                block_device_info: dict[str, Any] | None,
                destroy_disks: bool) -> None:
        """Remove an instance from this host; one that is gone is a success.

        See :meth:`nova.virt.driver.ComputeDriver.destroy` and
        :meth:`nova.virt.driver.ComputeDriver.cleanup`.

        :param network_info: the ports that Nova knows. All that the instance
            has on this host are unplugged, unless this is None.
        :param destroy_disks: False stops the LXD instance and keeps it with
            its disks.
        """
        with self._guests.changing(instance):
            found = self._guests.of(instance)
            guest = next((one for one in found
                          if one.role == roles.SERVER), None)
            if not found:
                LOG.warning('LXD has no instance of this server; removing '
                            'volumes, disks and ports only',
                            instance=instance)
            elif guest is not None and _is_reverted_here(instance, guest):
                LOG.info('Keeping LXD instance %s: the resize is reverted on '
                         'this host', guest.name, instance=instance)
                if lxd_devices.of_guest(guest):
                    guest.stop()
                    self._volumes.release(instance, guest, block_device_info)
                return
            volumes = lxd_devices.volumes(guest)
            devices = guest.devices if guest else {}
            if destroy_disks:
                self._guests.delete_all(instance, found)
                self._disks.delete_ephemeral(instance, guest)
                self._snapshots.delete_image_of(instance, found)
            elif guest is not None:
                guest.stop()
                guest.update(devices={
                    name: None for name, device in guest.devices.items()
                    if device.get('path') != '/'},
                    config=lxd_devices.DISCONNECTED)
            # Not earlier: a console may be requested until the guest is gone.
            self._serial_consoles.remove(instance)
            # Nova makes the volumes available in Cinder next, so that the
            # host must have no connection to them any more.
            self._volumes.remove(instance, volumes, block_device_info,
                                 force=destroy_disks)
            if network_info is not None:
                self._vifs.unplug_all(instance, network_info, devices)
            self._disks.delete_config_drive(instance, guest)


def _is_reverted_here(instance: objects.Instance, guest: lxd_guest.Guest
                      ) -> bool:
    """Whether Nova destroys the instance as the first step of reverting a
    resize on this host, where there is only one LXD instance."""
    return (instance.task_state == task_states.RESIZE_REVERTING and
            not instance.deleted and
            lxd_guest.KEY_RESIZE in guest.config)
