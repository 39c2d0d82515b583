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

"""The configuration that the LXD instance of a server has to have.

Spawn creates an instance with it; a hard reboot restores it, whatever an
operator has changed by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from nova import objects

from nova_lxd_py.virt.guest import disk_view
from nova_lxd_py.virt.guest import flavor as lxd_flavor
from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import roles
from nova_lxd_py.virt.guest import root_quota
from nova_lxd_py.virt.host import cpus
from nova_lxd_py.virt.host import host as lxd_host
from nova_lxd_py.virt.host import numa
from nova_lxd_py.virt.host import passthrough
from nova_lxd_py.virt.lxd import session as lxd
from nova_lxd_py.virt.metadata import cloud_init
from nova_lxd_py.virt.storage import root_disk
from nova_lxd_py.virt.vif import manager as vif_manager
from nova_lxd_py.virt.volume import lxd_devices

#: Keys that LXD itself keeps, or that were decided when the instance was made.
_KEPT_KEYS = ('volatile.', 'image.', 'security.idmap.')
#: Keys of the driver's that describe the LXD instance or a passing state of
#: the server.
_STATE_KEYS = (lxd_guest.KEY_LXD_NAME, lxd_guest.KEY_RESCUED,
               lxd_guest.KEY_SUSPENDED, lxd_guest.KEY_QUIESCED,
               lxd_guest.KEY_RESIZE, lxd_guest.KEY_SERIAL_PORT)

#: Name of the LXD device through which a rescue instance has the server's
#: root disk.
RESCUE_DEVICE = 'rescue'

#: Longest names of tenants to record; LXD takes longer values.
_LONGEST_NAME = 255


@dataclasses.dataclass(frozen=True)
class GuestConfig:
    """Configuration keys and devices of an LXD instance."""

    config: Mapping[str, str]
    devices: Mapping[str, Mapping[str, str]]


class GuestConfigBuilder:
    """Describes the LXD instances of servers on this host.

    :param session: the LXD session.
    :param host: resources of the host.
    :param vifs: describes the LXD devices of ports.
    """

    def __init__(self, session: lxd.Session, host: lxd_host.Host,
                 vifs: vif_manager.VIFManager) -> None:
        self._session = session
        self._options = session.options
        self._host = host
        self._vifs = vifs

    def config(self, flavor: objects.Flavor,
               topology: objects.InstanceNUMATopology | None,
               swap_mb: int | None = None) -> dict[str, str]:
        """Return the LXD configuration for a flavor on this host.

        :param flavor: the flavor.
        :param topology: CPUs and memory pages of the host that Nova's claim
            has chosen for the server, or None.
        :param swap_mb: MiB of swap, if not what the flavor says.
        :returns: LXD configuration keys.
        :raises nova.exception.InvalidInput: if LXD cannot provide what the
            flavor asks for.
        :raises nova.exception.ComputeResourcesUnavailable: if this host
            cannot.
        """
        placement = lxd_flavor.Placement(
            cpus=cpus.cpuset(flavor, topology, cpus.configured(),
                             self._host.processors() if topology
                             else ()),
            huge_pages=numa.huge_page_limits(
                flavor, topology, self._host.has_huge_pages(),
                self._host.huge_page_kb()),
            sized_swap=self._session.has_extension(
                'instance_memory_swap_bytes'),
            kind=self._session.kind)
        return lxd_flavor.instance_config(flavor, self._options, placement,
                                          swap_mb)

    def define(self, instance: objects.Instance, network_info: Any,
               swap_mb: int | None = None,
               name: str | None = None) -> GuestConfig:
        """Describe the LXD instance of a server.

        :param instance: the instance, with the flavor and the NUMA topology
            that it shall have.
        :param network_info: its ports, in the order the guest shall see them.
        :param swap_mb: MiB of swap, if not what the flavor says.
        :param name: LXD's name of the LXD instance, if not that of the
            server's own one.
        :returns: the definition, without what depends on the host's uid
            ranges.
        :raises nova.exception.InvalidInput: if LXD cannot provide what the
            flavor asks for.
        :raises nova.exception.ComputeResourcesUnavailable: if this host
            cannot.
        """
        flavor = instance.flavor
        config = self.config(flavor, instance.numa_topology, swap_mb)
        if self._options.cloud_init_keys:
            config.update(cloud_init.config(instance, network_info))
        config.update(_identity(instance))
        devices = self.flavor_devices(flavor)
        if 'size' in devices[root_disk.DEVICE]:
            config[root_quota.KEY_ROOT_QUOTA] = devices[root_disk.DEVICE][
                'size']
        return GuestConfig(config, {
            **devices, **self._vifs.devices(network_info),
            **self.disk_view(name or roles.lxd_name(instance))})

    def disk_view(self, name: str) -> dict[str, dict[str, str]]:
        """Return the LXD devices that show a guest its own disks only.

        :param name: LXD's name of the instance.
        :returns: LXD devices by name, none if that is not wanted or LXD is on
            another host.
        """
        if not self._options.guest_disk_view or not self._session.is_local:
            return {}
        return disk_view.devices(name)

    def root_device(self, flavor: objects.Flavor) -> dict[str, str]:
        """Return the LXD device of the root disk for a flavor."""
        return lxd_flavor.root_device(flavor, self._options)

    def flavor_devices(self, flavor: objects.Flavor
                       ) -> dict[str, Mapping[str, str]]:
        """Return the LXD devices that follow from a flavor alone.

        :param flavor: the flavor.
        :returns: the root disk and passed-through devices, by name.
        :raises nova.exception.InvalidInput: if the flavor asks for a device
            that the operator does not offer.
        """
        return {root_disk.DEVICE: self.root_device(flavor),
                **passthrough.devices(flavor,
                                      self._options.passthrough_devices)}


def config_changes(guest: lxd_guest.Guest, wanted: GuestConfig,
                   kept_devices: tuple[str, ...] = ()
                   ) -> tuple[dict[str, str | None],
                              dict[str, Mapping[str, str] | None]]:
    """Return the changes that restore the configuration of a guest.

    :param guest: the guest as it is.
    :param wanted: what it should be.
    :param kept_devices: names of devices that are not part of the definition
        but belong to the guest.
    :returns: config and device changes for
        :meth:`nova_lxd_py.virt.guest.guest.Guest.update`.
    """
    config: dict[str, str | None] = dict(wanted.config)
    kept_keys = _STATE_KEYS + \
        (lxd_devices.ROOT_KEYS if lxd_guest.root_volume(guest) else ())
    for key in guest.config:
        if (key not in config and not key.startswith(_KEPT_KEYS) and
                key not in kept_keys):
            config[key] = None
    devices: dict[str, Mapping[str, str] | None] = dict(wanted.devices)
    if guest.role == roles.RESCUE:
        kept_devices += (RESCUE_DEVICE,)
    for name in guest.devices:
        if name not in devices and name not in kept_devices:
            devices[name] = None
    return config, devices


def _identity(instance: objects.Instance) -> dict[str, str]:
    """Return the keys that identify the server and its owner."""
    return {
        lxd_guest.KEY_UUID: instance.uuid,
        lxd_guest.KEY_ROLE: roles.SERVER,
        lxd_guest.KEY_NAME: (instance.display_name or '')[:_LONGEST_NAME],
        lxd_guest.KEY_PROJECT: instance.project_id or '',
        lxd_guest.KEY_USER: instance.user_id or '',
        lxd_guest.KEY_FLAVOR: instance.flavor.name[:_LONGEST_NAME],
        lxd_guest.KEY_IMAGE: instance.image_ref or '',
    }
