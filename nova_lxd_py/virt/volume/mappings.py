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

"""Nova's description of the volumes of an instance.

``block_device_info`` is what Nova passes to most methods of a driver, see
:func:`nova.virt.driver.get_block_device_info`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nova import context as nova_context
from nova import exception
from nova import objects
from nova.virt import driver as virt_driver

BlockDeviceInfo = Mapping[str, Any] | None


def volumes(block_device_info: BlockDeviceInfo) -> list[Any]:
    """List the block device mappings of volumes.

    :param block_device_info: Nova's description of the disks.
    """
    return list(virt_driver.block_device_info_get_mapping(block_device_info))


def root(block_device_info: BlockDeviceInfo) -> Any | None:
    """Return the mapping of the volume that an instance boots from.

    :param block_device_info: Nova's description of the disks.
    :returns: the mapping, None if the root disk is not a volume.
    """
    return next(filter(is_root, volumes(block_device_info)), None)


def data(block_device_info: BlockDeviceInfo) -> list[Any]:
    """List the mappings of volumes that an instance does not boot from.

    :param block_device_info: Nova's description of the disks.
    """
    return [volume for volume in volumes(block_device_info)
            if not is_root(volume)]


def is_root(volume: Mapping[str, Any]) -> bool:
    """Whether an instance boots from a volume.

    :param volume: the mapping of the volume.
    """
    return volume.get('boot_index') == 0


def recorded(context: nova_context.RequestContext, instance_uuid: str,
             identifier: str) -> objects.BlockDeviceMapping | None:
    """Look up Nova's record of a volume at an instance.

    :param context: for the request to Nova's database; one of an administrator
        if the instance may be in another project.
    :param instance_uuid: UUID of the instance.
    :param identifier: Cinder's ID of the volume.
    :returns: the record, None if there is none.
    """
    try:
        return objects.BlockDeviceMapping.get_by_volume_and_instance(
            context, identifier, instance_uuid)
    except exception.VolumeBDMNotFound:
        return None
