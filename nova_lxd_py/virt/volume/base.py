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

"""How a Cinder volume becomes a block device of the host.

One plugin per family of connection types, see
:mod:`nova_lxd_py.virt.volume.connections` for how it is found. Third parties
can add theirs under the stevedore namespace ``nova_lxd_py.volume``; the name
of the entry point is the ``driver_volume_type`` of Cinder's connection.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

from oslo_config import cfg


#: Key of a connection: path of the block device. Some back ends have a path of
#: their own in the connection's data, which must stay.
DEVICE_PATH = 'lxd_device_path'


class Refused(Exception):
    """A volume cannot be used as it is.

    The message is for the owner of the server: nothing of the host in it.
    """


class VolumePlugin(abc.ABC):
    """What the driver asks of one family of connection types.

    Every method is idempotent, and raises errors as they are: the driver
    converts them to Nova exceptions without the secrets of the storage.

    :param options: the ``[lxd]`` option group.
    """

    def __init__(self, options: cfg.ConfigOpts.GroupAttr) -> None:
        self.options = options

    @abc.abstractmethod
    def connect(self, volume_id: str, connection_info: dict[str, Any]) -> str:
        """Connect the host to a volume.

        :param volume_id: Cinder's ID of the volume.
        :param connection_info: Cinder's description of the connection. What
            :meth:`disconnect` needs may be added to it: Nova stores it as long
            as the volume is attached.
        :returns: path of the block device on the host.
        :raises Exception: if there is no such device afterwards.
        """

    @abc.abstractmethod
    def disconnect(self, volume_id: str, connection_info: dict[str, Any], *,
                   force: bool) -> None:
        """Remove every trace of a volume from the host.

        Nothing uses the device any more.

        :param volume_id: Cinder's ID of the volume.
        :param connection_info: Cinder's description of the connection.
        :param force: the server is being deleted: lose data that could not be
            written rather than keep the device.
        :raises Exception: if something was left behind.
        """

    @abc.abstractmethod
    def extend(self, volume_id: str, connection_info: dict[str, Any]) -> None:
        """Make the host see the new size of a connected volume.

        :param volume_id: Cinder's ID of the volume.
        :param connection_info: Cinder's description of the connection.
        :raises Exception: if the host does not see it.
        """

    def forget(self, volume_id: str) -> None:
        """Remove what can be found of a volume without its connection.

        No guest has the volume, and Nova does not know its connection.

        :param volume_id: Cinder's ID of the volume, perhaps one that another
            plugin has connected.
        :raises Exception: if something was left behind.
        """

    def find_connected(self) -> Mapping[str, str]:
        """List the volumes to which the host is connected, as far as that can
        be told without their connections.

        :meth:`forget` is called for those that no guest has.

        :returns: paths of block devices by Cinder's IDs of the volumes.
        """
        return {}


def device_path(connection_info: Mapping[str, Any]) -> str | None:
    """Return where the block device of a volume was when it was connected.

    :param connection_info: Cinder's description of the connection.
    :returns: a path, which a reboot of the host may have made wrong.
    """
    return connection_info.get(DEVICE_PATH)
