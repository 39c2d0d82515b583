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

"""Which mode a volume is attached in. See :mod:`.modes` for what they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import os
from typing import Any

from nova import exception
from nova import objects
from oslo_config import cfg

from nova_lxd_py import extra_specs
from nova_lxd_py.virt.volume import base
from nova_lxd_py.virt.volume import connections
from nova_lxd_py.virt.volume import lxd_devices
from nova_lxd_py.virt.volume import modes

#: Key of metadata by which tenants and administrators choose a mode.
METADATA = 'lxd_volume_mode'


class ModeSelection:
    """The modes, and the choice among them.

    :param options: the ``[lxd]`` option group.
    """

    def __init__(self, options: cfg.ConfigOpts.GroupAttr) -> None:
        self._options = options
        self.block = modes.BlockMode(options)
        self.filesystem = modes.FilesystemMode(options)
        self.root = modes.RootMode(options)
        self._by_name: dict[str, modes.Mode] = {
            mode.name: mode for mode in (self.block, self.filesystem,
                                         self.root)}

    def of(self, connection_info: Mapping[str, Any]) -> modes.Mode:
        """Return the mode in which a volume has been attached."""
        return self._by_name[connection_info.get(modes.KEY_MODE, modes.BLOCK)]

    def choose(self, instance: objects.Instance,
               connection_info: Mapping[str, Any],
               ask_cinder: Callable[[], Mapping[str, Any]]) -> modes.Mode:
        """Choose the mode of a data volume, unless it has one already.

        The metadata of the volume takes precedence over that of the instance,
        then come the extra spec of its flavor, the property of its image and
        ``[lxd] volume_mode``.

        :param instance: the instance that is to have the volume.
        :param connection_info: Cinder's description of the connection.
        :param ask_cinder: returns Cinder's description of the volume.
        :raises nova.exception.VolumeAttachFailed: if there is no such mode.
        """
        if connection_info.get(modes.KEY_MODE) in (modes.BLOCK,
                                                   modes.FILESYSTEM):
            return self.of(connection_info)
        if not self._options.volume_filesystems:
            return self.block
        metadata = ask_cinder().get('volume_metadata') or {}
        name = (metadata.get(METADATA) or
                instance.metadata.get(METADATA) or
                instance.flavor.extra_specs.get(extra_specs.VOLUME_MODE) or
                instance.system_metadata.get(f'image_{METADATA}') or
                self._options.volume_mode)
        if name not in (modes.BLOCK, modes.FILESYSTEM):
            raise exception.VolumeAttachFailed(
                volume_id=connections.volume_id(connection_info),
                reason=f'{METADATA} is "{name}", which is neither '
                       f'"{modes.BLOCK}" nor "{modes.FILESYSTEM}"')
        return self._by_name[name]

    def unmount(self, identifier: str,
                connection_info: Mapping[str, Any] | None, force: bool
                ) -> None:
        """Unmount a volume, if it is mounted.

        :param identifier: Cinder's ID of the volume.
        :param connection_info: Cinder's description of the connection; None if
            only the ID of the volume is known.
        :param force: even while something uses it.
        :raises OSError: if something uses it, without force.
        """
        known = connection_info and self.of(connection_info)
        if known is not self.root:
            # Also a block device: an earlier process may have mounted it
            # before that was recorded. Where nothing is known, this unmounts
            # it after an interrupted first boot as well.
            self.filesystem.unmount(identifier, force)
        if not known or known is self.root:
            self.root.unmount(identifier, force)

    def mounted(self) -> set[str]:
        """List the volumes that are mounted on the host.

        :returns: Cinder's IDs of the volumes.
        """
        found = set()
        with open('/proc/self/mountinfo', encoding='utf-8') as stream:
            for line in stream:
                path = line.split()[4]
                identifier = os.path.basename(path)
                if connections.UUID.fullmatch(identifier) and path in (
                        self.filesystem.target(identifier),
                        self.root.target(identifier)):
                    found.add(identifier)
        return found


def connection_of(identifier: str, device: Mapping[str, str]
                  ) -> dict[str, Any]:
    """Describe the connection of a volume by its LXD device.

    :param identifier: Cinder's ID of the volume.
    :param device: the LXD device, see :func:`.lxd_devices.of_guest`.
    :returns: as much as a mode needs for a connected volume.
    """
    return {connections.LOCAL_ID: identifier,
            modes.KEY_MODE: {'disk': modes.FILESYSTEM,
                             lxd_devices.ROOT: modes.ROOT}.get(
                                 device['type'], modes.BLOCK),
            base.DEVICE_PATH: lxd_devices.source(device),
            'data': {'access_mode': 'ro' if device.get('readonly') == 'true'
                     else 'rw'}}
