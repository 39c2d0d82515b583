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

"""Attaching and detaching ports of an existing instance."""

from __future__ import annotations

from nova import context as nova_context
from nova.network import model as network_model
from nova import objects
from oslo_log import log as logging
from oslo_utils import excutils

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.metadata import device_tags
from nova_lxd_py.virt.vif import manager as vif_manager

LOG = logging.getLogger(__name__)


class InterfaceOps:
    """Attaches and detaches ports, whether the guest runs or not.

    :param guests: registry of the driver's LXD instances.
    :param vifs: VIF manager.
    """

    def __init__(self, guests: registry.GuestRegistry,
                 vifs: vif_manager.VIFManager) -> None:
        self._guests = guests
        self._vifs = vifs

    def attach(self, context: nova_context.RequestContext,
               instance: objects.Instance, vif: network_model.VIF) -> None:
        """Attach a port; after a failure it is not plugged.

        See :meth:`nova.virt.driver.ComputeDriver.attach_interface`.

        :param context: the request context.
        :param instance: the instance, running or not.
        :param vif: the port.
        :raises nova.exception.VirtualInterfacePlugException: if the port
            cannot be plugged.
        :raises errors.LXDError: if LXD cannot add the device.
        """
        with self._guests.changing(instance):
            guest = self._guests.active(instance)
            self._vifs.plug(instance, [vif])
            try:
                device_tags.publish_port(context, instance, vif)
                guest.update(devices={
                    vif_manager.device_name(vif):
                        self._vifs.device(vif, _guest_name(guest, vif))})
            except Exception:
                with excutils.save_and_reraise_exception():
                    self._vifs.unplug(instance, [vif])

    def detach(self, instance: objects.Instance, vif: network_model.VIF
               ) -> None:
        """Detach a port. Idempotent.

        See :meth:`nova.virt.driver.ComputeDriver.detach_interface`.

        :param instance: the instance, running, stopped or already deleted.
        :param vif: the port, which Neutron may have deleted already.
        :raises errors.LXDError: if LXD cannot remove the device.
        """
        with self._guests.changing(instance):
            for guest in self._guests.of(instance):
                self._remove_device(instance, guest, vif)
            # LXD has moved the inner end back to the host.
            self._vifs.unplug(instance, [vif])

    def _remove_device(self, instance: objects.Instance,
                       guest: lxd_guest.Guest, vif: network_model.VIF
                       ) -> None:
        """Remove the LXD device of a port.

        LXD moves the network device from a running guest to the host by its
        name. If the guest's root has renamed or deleted it, LXD removes the
        NIC only if the host has a device with the name of the inner end.
        """
        name = vif_manager.device_name(vif)
        device = guest.devices.get(name)
        if device is None:
            return
        network = guest.state().get('network')
        if network and device.get('name') not in network:
            LOG.info('Recreating the network device of port %s to detach it: '
                     'the guest has renamed or deleted it', vif['id'],
                     instance=instance)
            self._vifs.recreate(instance, vif)
        guest.update(devices={name: None})


def _guest_name(guest: lxd_guest.Guest, vif: network_model.VIF) -> str:
    """Return the name of a port in the guest, or the first free ``ethN``.

    A free name is neither in use by a network device now, nor of a NIC that
    the next start brings back.
    """
    names = {key: device.get('name') for key, device in guest.devices.items()
             if device.get('type') == 'nic'}
    present = names.get(vif_manager.device_name(vif))
    if present:
        return present
    used = {*names.values(), *(guest.state().get('network') or ())}
    number = 0
    while f'eth{number}' in used:
        number += 1
    return f'eth{number}'
