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

"""Volumes that os-brick connects as block devices: iSCSI, FC and so on."""

from __future__ import annotations

from typing import Any

from nova import utils
from os_brick import exception as brick_exception
from os_brick.initiator import connector as brick_connector
from oslo_log import log as logging

from nova_lxd_py.virt.volume import base

LOG = logging.getLogger(__name__)

#: Key of a connection: os-brick's description of the device.
_DEVICE_INFO = 'lxd_device_info'


class BlockDevicePlugin(base.VolumePlugin):
    """Delegates to os-brick's connector of the same name."""

    #: Additional arguments for os-brick's connector.
    arguments: dict[str, Any] = {}

    def connect(self, volume_id: str, connection_info: dict[str, Any]) -> str:
        """See :meth:`.base.VolumePlugin.connect`."""
        info = self._connector(connection_info).connect_volume(
            connection_info['data'])
        # Only plain text: it goes to Nova's database with the connection.
        connection_info[_DEVICE_INFO] = {
            key: value for key, value in info.items()
            if isinstance(value, str)}
        return info['path']

    def disconnect(self, volume_id: str, connection_info: dict[str, Any], *,
                   force: bool) -> None:
        """See :meth:`.base.VolumePlugin.disconnect`."""
        try:
            self._connector(connection_info).disconnect_volume(
                connection_info['data'], connection_info.get(_DEVICE_INFO),
                force=force)
        except brick_exception.VolumeDeviceNotFound:
            LOG.debug('Volume %s has no device on this host any more',
                      volume_id)

    def extend(self, volume_id: str, connection_info: dict[str, Any]) -> None:
        """See :meth:`.base.VolumePlugin.extend`."""
        if not self._connector(connection_info).extend_volume(
                connection_info['data']):
            raise brick_exception.BrickException(
                'the device does not report its size')

    def _connector(self, connection_info: dict[str, Any]) -> Any:
        return brick_connector.InitiatorConnector.factory(
            connection_info['driver_volume_type'], utils.get_root_helper(),
            use_multipath=self.options.volume_use_multipath,
            device_scan_attempts=self.options.volume_scan_attempts,
            conn=connection_info['data'], **self.arguments)


class RBDPlugin(BlockDevicePlugin):
    """Ceph volumes, through the kernel's rbd driver.

    The host needs ceph-common, and its kernel must support the image features
    of the volumes.
    """

    arguments = {'do_local_attach': True}
