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
"""Notes of volumes that are being attached to running guests.

Nova records a connection only when the driver has attached the volume. If
nova-compute is killed before, nothing says how to disconnect the host: for
iSCSI, Fibre Channel and others the host does not know to which Cinder volume a
device belongs. So the LXD instance has a note of the connection until it has
the volume. Credentials are left out, since disconnecting needs none.
"""

from __future__ import annotations

import json
from typing import Any

from oslo_log import log as logging

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.volume import connections

LOG = logging.getLogger(__name__)

KEY_ATTACHING = 'user.nova.volume_attaching'

_SECRET = ('auth', 'password', 'secret', 'key')


def write(guest: lxd_guest.Guest, connection_info: dict[str, Any]) -> None:
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


def read(guest: lxd_guest.Guest) -> dict[str, Any] | None:
    """Return the connection of the volume that was being attached.

    :param guest: the guest.
    """
    text = guest.config.get(KEY_ATTACHING)
    return json.loads(text) if text else None


def clear(guest: lxd_guest.Guest) -> None:
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
