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

"""Ephemeral disks: LXD custom volumes that are deleted with their instance.

Each one has its own filesystem and quota, so it is neither part of snapshots
nor counted against the root disk. The first is mounted at ``/mnt`` in the
guest, where cloud-init mounts it on virtual machines, the others at
``/mnt/ephemeral1``, ``/mnt/ephemeral2`` and so on.

A volume's name is derived from the instance's uuid, and its keys say what it
is: the driver needs no other record to find it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import contextlib
import itertools
import os
from typing import Any

from nova import exception
from nova import objects
from nova.virt import driver as virt_driver
from oslo_log import log as logging
from oslo_utils import units

from nova_lxd_py.virt.guest import flavor as lxd_flavor
from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import root_check
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import session as lxd
from nova_lxd_py.virt.privileged import command
from nova_lxd_py.virt.privileged import mounts

LOG = logging.getLogger(__name__)

#: Value of KEY_ROLE on the volumes.
ROLE = 'ephemeral'

#: Prefix of the LXD devices' names. Tenants cannot choose device names.
DEVICE_PREFIX = 'ephemeral'

#: Bytes that must remain free in a disk that is shrunk.
_SHRINK_MARGIN = 64 * units.Mi

#: Pool drivers whose volumes have a configurable filesystem, and its values.
_FORMATTING_DRIVERS = frozenset({'ceph', 'lvm'})
_FORMATS = frozenset({'btrfs', 'ext4', 'xfs'})


class EphemeralDiskManager:
    """Creates, finds, resizes and deletes ephemeral disks.

    :param session: LXD session.
    """

    def __init__(self, session: lxd.Session) -> None:
        self._session = session
        self._options = session.options
        self._volumes = ('storage-pools', session.options.storage_pool,
                         'volumes', 'custom')

    def create(self, instance: objects.Instance,
               block_device_info: Mapping[str, Any] | None
               ) -> dict[str, dict[str, str]]:
        """Create the disks of a new instance, replacing leftovers.

        :param instance: the instance.
        :param block_device_info: Nova's block device info.
        :returns: the LXD devices to add to the guest, by name.
        :raises nova.exception.InvalidInput: if a disk is to be encrypted.
        :raises errors.LXDError: if LXD cannot create a disk. Those created
            before are left for :meth:`delete`.
        """
        requested = _requested(block_device_info)
        if requested:
            self.delete(instance, len(requested))
        for number, disk in enumerate(requested):
            self._create(instance, number, disk)
        return self._devices(instance, range(len(requested)))

    def ensure(self, instance: objects.Instance,
               block_device_info: Mapping[str, Any] | None
               ) -> dict[str, dict[str, str]]:
        """Find the disks of an instance, create missing and grow small ones.

        :param instance: the instance.
        :param block_device_info: Nova's block device info; with None, the
            existing disks are used as they are.
        :returns: the LXD devices to add to the guest, by name.
        :raises nova.exception.InvalidInput: if a disk is to be encrypted.
        :raises errors.LXDError: if LXD cannot create or grow a disk.
        """
        requested = _requested(block_device_info)
        present = self.find(instance, len(requested))
        for number, disk in enumerate(requested):
            if number in present:
                self._grow(instance, number, disk)
                continue
            LOG.warning('Ephemeral disk %d is missing, creating an empty one',
                        number, instance=instance)
            self._create(instance, number, disk)
        return self._devices(
            instance, sorted({*present, *range(len(requested))}))

    def resize(self, instance: objects.Instance, old_gb: int, new_gb: int
               ) -> None:
        """Resize the default ephemeral disk of an instance with its flavor.

        Only if it is the instance's only one and has the size of the old
        flavor. Nova does not update the block device mapping of the disk.

        :param instance: the instance, running or not.
        :param old_gb: ``ephemeral_gb`` of the old flavor, in GiB.
        :param new_gb: ``ephemeral_gb`` of the new flavor, in GiB. A disk that
            holds more than that keeps its size.
        :raises errors.LXDError: if LXD cannot resize the disk.
        """
        if old_gb == new_gb or self.find(instance) != [0]:
            return
        name = volume_name(instance, 0)
        volume, etag = self._session.get_with_etag(*self._volumes, name)
        if _gibibytes(volume['config'].get('size')) != old_gb:
            return
        if new_gb < old_gb and not self._fits(instance, name, new_gb):
            LOG.warning('Ephemeral disk holds too much to be shrunk to '
                        '%(new)d GiB, keeping %(old)d GiB',
                        {'new': new_gb, 'old': old_gb}, instance=instance)
            return
        self._set_size(name, volume, etag, f'{new_gb}GiB')
        LOG.info('Resized ephemeral disk from %(old)d to %(new)d GiB',
                 {'old': old_gb, 'new': new_gb}, instance=instance)

    def _fits(self, instance: objects.Instance, name: str, size_gb: int
              ) -> bool:
        """Return whether the content of a volume fits a smaller quota.

        Some pool drivers accept a quota below the usage, and the disk cannot
        be written to any more.
        """
        try:
            # The usage does not include dirty pages.
            self._sync(name)
        # Not only OSError: the privileged daemon may be gone.
        except Exception as exc:
            LOG.warning('Usage of LXD volume %(name)s is not known: '
                        '%(error)s', {'name': name, 'error': exc},
                        instance=instance)
            return False
        usage = self._session.get(*self._volumes, name, 'state').get('usage')
        used = (usage or {}).get('used')
        return (used is not None and
                used + _SHRINK_MARGIN <= size_gb * units.Gi)

    def _sync(self, name: str) -> None:
        """Write the dirty data of a volume to its storage.

        :raises OSError: if it cannot be written, or not in time.
        """
        directory = os.path.join(
            root_check.lxd_directory(self._session), 'storage-pools',
            self._options.storage_pool, 'custom',
            f'{self._session.project}_{name}')
        timeout = min(self._options.operation_timeout, command.DEADLINE)
        if os.path.isabs(directory):
            with contextlib.suppress(FileNotFoundError):
                mounts.sync_pool(directory, timeout)
                return
        # The LXD snap has a mount namespace of its own.
        mounts.sync_host(timeout)

    def find(self, instance: objects.Instance, count: int = 0) -> list[int]:
        """Find the ephemeral disks of an instance by their names: a list of
        all volumes would grow with the number of instances.

        The numbers of disks have a gap only if somebody has deleted one by
        hand.

        :param instance: the instance.
        :param count: number of disks that it should have; all of these are
            looked for, and after them up to the first that is missing.
        :returns: the numbers of the disks in ascending order.
        :raises errors.LXDError: if a request fails.
        """
        numbers: list[int] = []
        for number in itertools.count():
            try:
                self._session.get(*self._volumes,
                                  volume_name(instance, number))
            except errors.NotFound:
                if number >= count:
                    break
            else:
                numbers.append(number)
        return numbers

    def delete(self, instance: objects.Instance, count: int = 0) -> None:
        """Delete the ephemeral disks of an instance. Idempotent.

        No guest may have the devices any more.

        :param instance: the instance.
        :param count: see :meth:`find`.
        :raises errors.LXDError: if LXD cannot delete a disk.
        """
        # An interruption must not leave a gap.
        for number in reversed(self.find(instance, count)):
            try:
                self._session.delete(*self._volumes,
                                     volume_name(instance, number))
            except errors.NotFound:
                continue
            LOG.debug('Deleted ephemeral disk %d', number, instance=instance)

    # -- one volume ---------------------------------------------------------

    def _create(self, instance: objects.Instance, number: int,
                disk: Mapping[str, Any]) -> None:
        config = {
            'size': _size(disk),
            lxd_guest.KEY_UUID: instance.uuid,
            lxd_guest.KEY_ROLE: ROLE,
            lxd_guest.KEY_PROJECT: instance.project_id or '',
        }
        config.update(self._format(instance, disk))
        self._session.post(*self._volumes, body={
            'name': volume_name(instance, number), 'type': 'custom',
            'content_type': 'filesystem', 'config': config,
            'description': f'Ephemeral disk {number} of a server'})

    def _format(self, instance: objects.Instance, disk: Mapping[str, Any]
                ) -> dict[str, str]:
        """Return the volume configuration for the requested filesystem."""
        requested = disk.get('guest_format')
        if not requested:
            return {}
        driver = self._session.storage_pool()['driver']
        if driver in _FORMATTING_DRIVERS and requested in _FORMATS:
            return {'block.filesystem': requested}
        LOG.info('Ephemeral disk does not get the requested format '
                 '%(format)s but the one of storage driver %(driver)s',
                 {'format': requested, 'driver': driver},
                 instance=instance)
        return {}

    def _grow(self, instance: objects.Instance, number: int,
              disk: Mapping[str, Any]) -> None:
        name = volume_name(instance, number)
        volume, etag = self._session.get_with_etag(*self._volumes, name)
        size = _size(disk)
        if _gibibytes(volume['config'].get('size')) >= _gibibytes(size):
            return
        self._set_size(name, volume, etag, size)
        LOG.info('Grew ephemeral disk %d to %s', number, size,
                 instance=instance)

    def _set_size(self, name: str, volume: Mapping[str, Any], etag: str,
                  size: str) -> None:
        self._session.put(*self._volumes, name, etag=etag, body={
            'description': volume.get('description', ''),
            'config': {**volume['config'], 'size': size}})

    def _devices(self, instance: objects.Instance, numbers: Any
                 ) -> dict[str, dict[str, str]]:
        return {
            f'{DEVICE_PREFIX}{number}': {
                'type': 'disk', 'pool': self._options.storage_pool,
                'source': volume_name(instance, number),
                'path': guest_path(number),
                **lxd_flavor.disk_limits(instance.flavor)}
            for number in numbers}


def volume_name(instance: objects.Instance, number: int | str) -> str:
    """Return the name of the volume of an ephemeral disk.

    :param instance: the instance.
    :param number: number of the disk, from 0.
    :returns: the LXD volume's name.
    """
    return f'{ROLE}-{instance.uuid}-{number}'


def count_of(names: Iterable[str], prefix: str) -> int:
    """Return the number of ephemeral disks, by the numbers in names.

    :param names: names of LXD devices or volumes; others are ignored.
    :param prefix: beginning of a name, before the number.
    :returns: the highest number plus one, 0 if there is none.
    """
    numbers = [name.removeprefix(prefix) for name in names
               if name.startswith(prefix)]
    return max((int(number) + 1 for number in numbers
                if number.isdecimal()), default=0)


def guest_path(number: int) -> str:
    """Return the mount point of an ephemeral disk in the guest.

    :param number: number of the disk, from 0.
    :returns: the absolute path.
    """
    return f'/mnt/ephemeral{number}' if number else '/mnt'


def swap_mb(flavor: objects.Flavor,
            block_device_info: Mapping[str, Any] | None) -> int:
    """Return how much swap an instance may use.

    :param flavor: flavor of the instance.
    :param block_device_info: Nova's block device info, in which a tenant may
        have requested less than the flavor allows.
    :returns: MiB.
    """
    swap = virt_driver.block_device_info_get_swap(block_device_info)
    if virt_driver.swap_is_usable(swap):
        return int(swap['swap_size'])
    return flavor.swap


def _requested(block_device_info: Mapping[str, Any] | None
               ) -> list[Mapping[str, Any]]:
    """List the ephemeral disks in Nova's block device info.

    :raises nova.exception.InvalidInput: if a disk is to be encrypted.
    """
    disks = virt_driver.block_device_info_get_ephemerals(block_device_info)
    for disk in disks:
        if disk.get('encrypted'):
            raise exception.InvalidInput(
                reason='LXD cannot encrypt ephemeral disks')
    return list(disks)


def _size(disk: Mapping[str, Any]) -> str:
    return f'{int(disk["size"])}GiB'


def _gibibytes(size: str | None) -> int:
    """Parse a size that :func:`_size` formatted; anything else counts as 0."""
    number = (size or '').removesuffix('GiB')
    return int(number) if number.isdecimal() else 0
