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

"""Limits of what a guest reads from and writes to its volumes.

They are stored with the LXD devices of the volumes. LXD does not know them:
they are written to the guest's control group, which each start recreates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TYPE_CHECKING

from oslo_log import log as logging

from nova_lxd_py.virt.guest import disk_view
from nova_lxd_py.virt.privileged import block_limits

if TYPE_CHECKING:
    from nova_lxd_py.virt.guest import guest as lxd_guest

LOG = logging.getLogger(__name__)

#: Key of the LXD device of a volume: its limits, see
#: :func:`.block_limits.set_limits`.
KEY_LIMITS = 'user.nova.limits'
#: Key of an LXD instance: those of the volume that it boots from.
KEY_ROOT_LIMITS = 'user.nova.root_limits'


def find(config: Mapping[str, str], devices: Mapping[str, Mapping[str, str]]
         ) -> dict[str, str]:
    """Find the limits of a guest.

    :param config: configuration keys of its LXD instance.
    :param devices: its LXD devices.
    :returns: limits by the paths of block devices on the host.
    """
    found = {device.get(disk_view.KEY_DEVICE) or device['source']:
             device[KEY_LIMITS] for device in devices.values()
             if device.get(KEY_LIMITS)}
    root = config.get(disk_view.KEY_ROOT_DEVICE)
    if root and config.get(KEY_ROOT_LIMITS):
        found[root] = config[KEY_ROOT_LIMITS]
    return found


def apply(guest: lxd_guest.Guest, before: Mapping[str, Any] | None = None
          ) -> None:
    """Apply the limits of a guest, if it runs.

    Errors are logged only: a host that cannot limit it must not keep a server
    from its volumes.

    :param guest: the guest, just read or changed.
    :param before: LXD's description of it before the change; None if its
        control group may be a new one.
    """
    changes = find(guest.config, guest.devices)
    if before is not None:
        had = find(before['config'], before['devices'])
        changes = {path: changes.get(path, '') for path in had | changes
                   if had.get(path) != changes.get(path)}
    if not changes:
        return
    try:
        init = guest.state()['pid']
        if init <= 0:
            return
        for path, limits in changes.items():
            block_limits.set_limits(guest.container, init, path, limits)
    # Not only of LXD and the kernel: the privileged daemon may be gone.
    except Exception as error:
        LOG.warning('Could not apply the QoS limits of volumes to %(guest)s: '
                    '%(error)s', {'guest': guest.name, 'error': error},
                    instance_uuid=guest.uuid)
