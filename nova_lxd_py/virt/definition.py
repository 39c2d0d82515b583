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

"""What the LXD instance of a server has to look like.

Spawn makes an instance after this picture; a hard reboot puts it right again
after the same picture, whatever has been done to it by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from nova import objects
from oslo_config import cfg

from nova_lxd_py.virt import cloudinit
from nova_lxd_py.virt import flavor as lxd_flavor
from nova_lxd_py.virt import instance as lxd_instance
from nova_lxd_py.virt.vif import manager as vif_manager

#: Keys that LXD itself keeps, or that were decided when the instance was made.
_KEPT_KEYS = ('volatile.', 'image.', 'security.idmap.')
#: Keys of the driver's that describe a passing state of the server.
_STATE_KEYS = (lxd_instance.KEY_RESCUED, lxd_instance.KEY_SUSPENDED,
               lxd_instance.KEY_QUIESCED,
               lxd_instance.KEY_RESIZE, lxd_instance.KEY_SERIAL_PORT)

#: Through this device a rescue instance has the server's root disk.
RESCUE_DEVICE = 'rescue'

#: LXD takes longer values, but nothing that a tenant names should.
_LONGEST_NAME = 255


@dataclasses.dataclass(frozen=True)
class Definition:
    """Configuration keys and devices of an LXD instance."""

    config: Mapping[str, str]
    devices: Mapping[str, Mapping[str, str]]


def define(instance: objects.Instance, image_meta: objects.ImageMeta,
           network_info: Any, vifs: vif_manager.VIFManager,
           options: cfg.ConfigOpts.GroupAttr,
           swap_mb: int | None = None) -> Definition:
    """Describe the LXD instance of a server.

    :param instance: the server, with the flavor that it shall have.
    :param image_meta: its image.
    :param network_info: its ports, in the order the guest shall see them.
    :param vifs: knows the LXD devices of ports.
    :param options: the ``[lxd]`` option group.
    :param swap_mb: MiB of swap, if not what the flavor says.
    :returns: the definition, without what depends on the host's uid ranges.
    :raises nova.exception.InvalidInput: the flavor asks for what LXD cannot
        give.
    """
    config = lxd_flavor.instance_config(instance.flavor, options,
                                        swap_mb=swap_mb)
    if options.cloud_init_keys:
        config.update(cloudinit.config(instance, network_info))
    config.update(_identity(instance))
    devices: dict[str, Mapping[str, str]] = {
        'root': lxd_flavor.root_device(instance.flavor, options)}
    devices.update(vifs.devices(network_info))
    return Definition(config, devices)


def corrections(guest: lxd_instance.Guest, wanted: Definition,
                kept_devices: tuple[str, ...] = ()
                ) -> tuple[dict[str, str | None],
                           dict[str, Mapping[str, str] | None]]:
    """Find what has to change for a guest to fit its definition.

    :param guest: the guest as it is.
    :param wanted: what it should be.
    :param kept_devices: names of devices that are not part of the definition
        but belong to the guest.
    :returns: config and device changes for
        :meth:`nova_lxd_py.virt.instance.Guest.update`.
    """
    config: dict[str, str | None] = dict(wanted.config)
    for key in guest.config:
        if (key not in config and not key.startswith(_KEPT_KEYS) and
                key not in _STATE_KEYS):
            config[key] = None
    devices: dict[str, Mapping[str, str] | None] = dict(wanted.devices)
    if guest.role == lxd_instance.ROLE_RESCUE:
        kept_devices += (RESCUE_DEVICE,)
    for name in guest.devices:
        if name not in devices and name not in kept_devices:
            devices[name] = None
    return config, devices


def _identity(instance: objects.Instance) -> dict[str, str]:
    """Write down whose instance it is, as plain data."""
    return {
        lxd_instance.KEY_UUID: instance.uuid,
        lxd_instance.KEY_ROLE: lxd_instance.ROLE_SERVER,
        lxd_instance.KEY_NAME: (instance.display_name or '')[:_LONGEST_NAME],
        lxd_instance.KEY_PROJECT: instance.project_id or '',
        lxd_instance.KEY_USER: instance.user_id or '',
        lxd_instance.KEY_FLAVOR: instance.flavor.name[:_LONGEST_NAME],
        lxd_instance.KEY_IMAGE: instance.image_ref or '',
    }
