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


"""What a server has in LXD's storage pool besides its root disk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
import contextlib
from typing import Any

from nova import objects
from oslo_log import log as logging

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.metadata import config_drive
from nova_lxd_py.virt.server import rollback
from nova_lxd_py.virt.storage import ephemeral_disks

LOG = logging.getLogger(__name__)

_BlockDeviceInfo = Mapping[str, Any] | None


class LocalDisks:
    """Creates and deletes the config drives and ephemeral disks of servers.

    :param config_drives: the config drives.
    :param ephemeral: the ephemeral disks.
    """

    def __init__(self, config_drives: config_drive.ConfigDriveManager,
                 ephemeral: ephemeral_disks.EphemeralDiskManager) -> None:
        self._config_drives = config_drives
        self._ephemeral = ephemeral

    def check(self, instance: objects.Instance) -> None:
        """Check that an instance can have the config drive it asks for.

        :raises nova.exception.InvalidInput: if the request is invalid.
        :raises nova.exception.ComputeResourcesUnavailable: if this host
            cannot make it.
        """
        self._config_drives.check(instance)

    def create(self, instance: objects.Instance, ports: list[Any],
               injected_files: Iterable[tuple[str, bytes]],
               admin_password: str | None,
               block_device_info: _BlockDeviceInfo,
               undo: rollback.Rollback) -> dict[str, dict[str, str]]:
        """Create the disks of a new instance.

        :param ports: its ports, in the order of the guest's devices.
        :param injected_files: paths and contents for the config drive.
        :param admin_password: password for the config drive.
        :param block_device_info: Nova's description of its disks.
        :param undo: gets the steps that delete them again.
        :returns: LXD devices by name.
        :raises errors.LXDError: if LXD cannot create one.
        """
        undo.step('delete the config drive',
                  lambda: self._config_drives.remove(instance))
        devices = self._config_drives.build(
            instance, ports, injected_files, admin_password)
        undo.step('delete the ephemeral disks',
                  lambda: self._ephemeral.delete(instance))
        return {**devices,
                **self._ephemeral.create(instance, block_device_info)}

    def ensure_config_drive(self, instance: objects.Instance, ports: list[Any]
                            ) -> dict[str, dict[str, str]]:
        """Ensure that an instance has its config drive; recreate a lost one.

        :param ports: its ports, in the order of the guest's devices.
        :returns: LXD devices by name.
        :raises errors.LXDError: if LXD cannot create it.
        """
        return self._config_drives.ensure(instance, ports)

    def ensure_ephemeral(self, instance: objects.Instance,
                         block_device_info: _BlockDeviceInfo
                         ) -> dict[str, dict[str, str]]:
        """Ensure that an instance has its ephemeral disks; recreate lost
        ones.

        :param block_device_info: Nova's description of its disks.
        :returns: LXD devices by name.
        :raises errors.LXDError: if LXD cannot create or grow one.
        """
        return self._ephemeral.ensure(instance, block_device_info)

    def delete_ephemeral(self, instance: objects.Instance,
                         guest: lxd_guest.Guest | None, count: int = 0
                         ) -> None:
        """Delete the ephemeral disks of an instance whose guests are gone.

        A storage pool that no longer exists has none, so that the deletion
        of a server goes on. LXD is not asked where neither the guest nor the
        flavor had any.

        :param guest: what it was, with the devices of that time; None if
            nothing is known of it.
        :param count: number of disks, if that is known; see
            :meth:`.ephemeral_disks.EphemeralDiskManager.find`.
        :raises errors.LXDError: if LXD cannot delete one.
        """
        if guest is not None:
            count = ephemeral_disks.count_of(guest.devices,
                                             ephemeral_disks.DEVICE_PREFIX)
            # A guest that was destroyed without its disks has no devices.
            if not count and not instance.ephemeral_gb:
                return
        with _kept_if_in_use(instance):
            self._ephemeral.delete(instance, count)

    def delete_config_drive(self, instance: objects.Instance,
                            guest: lxd_guest.Guest | None) -> None:
        """Delete the config drive of an instance that no guest has any more.

        LXD is not asked where neither the guest nor Nova had one.

        :param guest: as for :meth:`delete_ephemeral`.
        :raises errors.LXDError: if LXD cannot delete it.
        """
        if (guest is not None and config_drive.DEVICE not in guest.devices and
                not instance.config_drive):
            return
        with _kept_if_in_use(instance):
            self._config_drives.remove(instance)


def is_of(volume: Mapping[str, Any], instance: objects.Instance) -> bool:
    """Return whether a custom volume is one that the driver has created for
    an instance, and no copy of one.

    :param volume: LXD's description of it.
    """
    if volume['config'].get(lxd_guest.KEY_UUID) != instance.uuid:
        return False
    role = volume['config'].get(lxd_guest.KEY_ROLE)
    if role == config_drive.ROLE:
        return volume['name'] == config_drive.volume_name(instance)
    return (role == ephemeral_disks.ROLE and volume['name'].startswith(
        ephemeral_disks.volume_name(instance, '')))


@contextlib.contextmanager
def _kept_if_in_use(instance: objects.Instance) -> Iterator[None]:
    """Keep a volume that another LXD instance uses, such as the copy that an
    operator has made of the server."""
    try:
        yield
    except errors.InvalidRequest as exc:
        if 'in use' not in exc.message:
            raise
        LOG.warning('Keeping a volume of the server, which another LXD '
                    'instance uses: %s', exc, instance=instance)
