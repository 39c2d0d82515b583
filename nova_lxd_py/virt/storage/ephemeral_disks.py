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

"""Ephemeral disks: LXD volumes that live as long as their server.

Each one is a custom volume with a filesystem and a quota of its own, so it is
neither in snapshots of the server nor counted against its root disk. The first
is at ``/mnt`` in the guest, where cloud-init puts it on virtual machines, the
others are at ``/mnt/ephemeral1``, ``/mnt/ephemeral2`` and so on.

A volume's name follows from the server's uuid, and its keys say what it is:
this is all the driver has to know to find it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib import parse

from nova import exception
from nova import objects
from nova.virt import driver as virt_driver
from oslo_concurrency import processutils
from oslo_log import log as logging
from oslo_utils import units

from nova_lxd_py.virt.guest import flavor as lxd_flavor
from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import session as lxd

LOG = logging.getLogger(__name__)

#: Value of KEY_ROLE on the volumes.
ROLE = 'ephemeral'

#: Names of the LXD devices begin so; the driver's own, never a tenant's.
DEVICE_PREFIX = 'ephemeral'

#: Bytes that must be free in a disk that is made smaller.
_SHRINK_MARGIN = 64 * units.Mi

#: Pools whose volumes have a filesystem to choose, and the choices.
_FORMATTING_DRIVERS = frozenset({'ceph', 'lvm'})
_FORMATS = frozenset({'btrfs', 'ext4', 'xfs'})


class EphemeralDisks:
    """Makes, finds and deletes ephemeral disks.

    :param session: the way to LXD.
    """

    def __init__(self, session: lxd.Session) -> None:
        self._session = session
        self._options = session.options
        self._volumes = ('storage-pools', session.options.storage_pool,
                         'volumes', 'custom')

    def create(self, instance: objects.Instance,
               block_device_info: Mapping[str, Any] | None
               ) -> dict[str, dict[str, str]]:
        """Make the disks of a new server, empty whatever there was before.

        :param instance: the server.
        :param block_device_info: Nova's description of its disks.
        :returns: the LXD devices to give to the guest, by name.
        :raises nova.exception.InvalidInput: one is to be encrypted.
        :raises errors.LXDError: LXD cannot make them; what it has made is for
            :meth:`delete` to remove.
        """
        wanted = _wanted(block_device_info)
        if wanted:
            self.delete(instance)
        for number, disk in enumerate(wanted):
            self._create(instance, number, disk)
        return self._devices(instance, range(len(wanted)))

    def ensure(self, instance: objects.Instance,
               block_device_info: Mapping[str, Any] | None
               ) -> dict[str, dict[str, str]]:
        """Find the disks of a server; make what is missing, grow what is too
        small.

        :param instance: the server.
        :param block_device_info: Nova's description of its disks; without it
            the disks that there are will do.
        :returns: the LXD devices to give to the guest, by name.
        :raises errors.LXDError: LXD cannot make or grow one.
        """
        present = self.find(instance)
        wanted = _wanted(block_device_info)
        for number, disk in enumerate(wanted):
            if number in present:
                self._grow(instance, number, disk)
                continue
            LOG.warning('Ephemeral disk %d of this server is gone; giving it '
                        'an empty one', number, instance=instance)
            self._create(instance, number, disk)
        return self._devices(
            instance, sorted({*present, *range(len(wanted))}))

    def follow(self, instance: objects.Instance, before_gb: int,
               after_gb: int) -> None:
        """Resize the only disk of a server, if it is all that the flavor
        gave, as the flavor is changed.

        Nova's own description of the disk stays as it is.

        :param instance: the server, running or not.
        :param before_gb: GiB of the flavor that it had.
        :param after_gb: GiB of the flavor that it gets. A disk that holds too
            much for less is left as it is.
        :raises errors.LXDError: LXD cannot resize it.
        """
        if before_gb == after_gb or self.find(instance) != [0]:
            return
        name = volume_name(instance, 0)
        volume, etag = self._session.get_with_etag(*self._volumes, name)
        if _gibibytes(volume['config'].get('size')) != before_gb:
            return
        if after_gb < before_gb and not self._fits(name, after_gb):
            LOG.warning('Its ephemeral disk holds too much to be made '
                        'smaller, so it stays at %d GiB', before_gb,
                        instance=instance)
            return
        self._set_size(name, volume, etag, f'{after_gb}GiB')
        LOG.info('Resized its ephemeral disk from %(before)d to %(after)d '
                 'GiB', {'before': before_gb, 'after': after_gb},
                 instance=instance)

    def _fits(self, name: str, size_gb: int) -> bool:
        """Whether a volume holds little enough for a smaller quota.

        Some pools keep a quota that is too small, and break the disk.
        """
        try:
            # They count what has left the host's memory only.
            processutils.execute('sync',
                                 timeout=self._options.operation_timeout)
        except (processutils.ProcessExecutionError, OSError) as exc:
            LOG.debug('Nobody knows how much %s holds: %s', name, exc)
            return False
        usage = self._session.get(*self._volumes, name, 'state').get('usage')
        used = (usage or {}).get('used')
        return (used is not None and
                used + _SHRINK_MARGIN <= size_gb * units.Gi)

    def find(self, instance: objects.Instance) -> list[int]:
        """Look which disks a server has, with one request.

        :param instance: the server.
        :returns: their numbers in order.
        """
        prefix = volume_name(instance, '')
        numbers = []
        for url in self._session.get(*self._volumes):
            name = parse.unquote(parse.urlparse(url).path.rpartition('/')[2])
            number = name.removeprefix(prefix)
            if number != name and number.isdecimal():
                numbers.append(int(number))
        return sorted(numbers)

    def delete(self, instance: objects.Instance) -> None:
        """Delete the disks of a server with all that is on them.

        Its guests must be gone, or have lost the devices. Nothing to delete
        is a success.

        :param instance: the server.
        :raises errors.LXDError: LXD cannot delete one.
        """
        for number in self.find(instance):
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
        """Choose the filesystem, where there is a choice."""
        wanted = disk.get('guest_format')
        if not wanted:
            return {}
        driver = self._session.storage_pool()['driver']
        if driver in _FORMATTING_DRIVERS and wanted in _FORMATS:
            return {'block.filesystem': wanted}
        LOG.info('An ephemeral disk was to have the format %(format)s; it '
                 'gets the one that LXD uses on pools of type %(driver)s',
                 {'format': wanted, 'driver': driver},
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
    """Name the volume of an ephemeral disk.

    :param instance: the server.
    :param number: which of its disks, from 0.
    :returns: LXD's name.
    """
    return f'{ROLE}-{instance.uuid}-{number}'


def guest_path(number: int) -> str:
    """Tell where the guest finds an ephemeral disk.

    :param number: which one, from 0.
    :returns: the path of its mount.
    """
    return f'/mnt/ephemeral{number}' if number else '/mnt'


def swap_mb(flavor: objects.Flavor,
            block_device_info: Mapping[str, Any] | None) -> int:
    """Tell how much swap a server may use.

    :param flavor: its flavor.
    :param block_device_info: Nova's description of its disks, in which a
        tenant may have asked for less than the flavor allows.
    :returns: MiB.
    """
    swap = virt_driver.block_device_info_get_swap(block_device_info)
    if virt_driver.swap_is_usable(swap):
        return int(swap['swap_size'])
    return flavor.swap


def _wanted(block_device_info: Mapping[str, Any] | None
            ) -> list[Mapping[str, Any]]:
    """List the ephemeral disks that Nova describes."""
    disks = virt_driver.block_device_info_get_ephemerals(block_device_info)
    for disk in disks:
        if disk.get('encrypted'):
            raise exception.InvalidInput(
                reason='LXD cannot encrypt ephemeral disks')
    return list(disks)


def _size(disk: Mapping[str, Any]) -> str:
    return f'{int(disk["size"])}GiB'


def _gibibytes(size: str | None) -> int:
    """Read a size that :func:`_size` wrote; anything else is too small."""
    number = (size or '').removesuffix('GiB')
    return int(number) if number.isdecimal() else 0
