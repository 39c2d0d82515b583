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


"""What has been read from and written to the volumes of servers.

Nova asks for it, for its ``volume.usage`` notifications. The kernel counts the
requests to a block device as long as the device exists, which may be longer
than a volume is attached: loop devices are reused. So the counters at the time
when a volume is attached are stored with its LXD device, and subtracted from
later ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from nova import block_device
from nova import objects
from oslo_log import log as logging

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.volume import device_identity
from nova_lxd_py.virt.volume import lxd_devices

LOG = logging.getLogger(__name__)

#: The unit of the kernel's ``stat`` file, whatever the device's is.
_SECTOR = 512
#: libvirt's value for the number of errors, which its hypervisors and the
#: kernel do not count. Nova ignores it.
_NO_ERRORS_COUNTED = -1


class Counters(NamedTuple):
    """Completed requests to a block device, and their bytes; Nova's names."""

    rd_req: int
    rd_bytes: int
    wr_req: int
    wr_bytes: int

    def since(self, baseline: Counters) -> Counters:
        """Return what has been added to earlier counters of the device.

        :param baseline: the earlier counters.
        :returns: the differences; these counters if they are lower, since the
            device has been recreated then.
        """
        pairs = list(zip(self, baseline, strict=True))
        if any(now < before for now, before in pairs):
            return self
        return Counters(*(now - before for now, before in pairs))


def parse_stat(text: str) -> Counters:
    """Parse the kernel's ``/sys/dev/block/<number>/stat``.

    Its fields are described in the kernel's ``Documentation/block/stat.rst``.
    Newer kernels have more of them, at the end, for discarded sectors and
    flushes.

    :param text: content of the file.
    :raises ValueError: if it is something else.
    """
    fields = [int(word) for word in text.split()]
    if len(fields) < 11:
        raise ValueError(f'not the statistics of a block device: {text!r}')
    (read_requests, _merged, read_sectors, _milliseconds,
     written_requests, _merged, written_sectors) = fields[:7]
    return Counters(read_requests, read_sectors * _SECTOR,
                    written_requests, written_sectors * _SECTOR)


def read(path: str) -> Counters | None:
    """Read the counters of a block device; needs no privileges.

    :param path: path of the device on the host.
    :returns: None if there is no such device, or the kernel has no counters
        of it.
    """
    try:
        return parse_stat(device_identity.statistics(path) or '')
    except (device_identity.WrongDevice, ValueError):
        return None


def store(key: str, path: str) -> dict[str, str]:
    """Return the key of an LXD object that :func:`since_stored` needs.

    :param key: name of the key.
    :param path: path of a block device on the host.
    :returns: the key with the present counters; nothing if there are none.
    """
    counters = read(path)
    return {} if counters is None else {
        key: ' '.join(map(str, counters))}


def since_stored(stored: str | None, path: str) -> Counters | None:
    """Return what has happened to a block device since :func:`store`.

    :param stored: value of the key.
    :param path: path of the device on the host.
    :returns: None if the key is missing, or the device.
    """
    try:
        baseline = Counters(*(int(word) for word in (stored or '').split()))
    except (TypeError, ValueError):
        return None
    counters = read(path)
    return None if counters is None else counters.since(baseline)


class VolumeStatistics:
    """Reads what servers have read from and written to their volumes.

    A volume that is not attached, or whose block device is gone, is left out.

    :param guests: the driver's LXD instances.
    """

    def __init__(self, guests: registry.GuestRegistry) -> None:
        self._guests = guests

    def all(self, host_volumes: Iterable[Mapping[str, Any]]
            ) -> list[dict[str, Any]]:
        """Read the usage of all volumes on the host, with one request to LXD.

        See :meth:`nova.virt.driver.ComputeDriver.get_all_volume_usage`.

        :param host_volumes: ``instance`` and ``instance_bdms``, the block
            device mappings of its volumes, for each instance of the host.
        :returns: for each volume ``volume`` (ID), ``instance``, and since it
            was attached ``rd_req``, ``rd_bytes``, ``wr_req``, ``wr_bytes``.
        :raises errors.LXDError: if LXD does not say which servers it has.
        """
        host_volumes = [each for each in host_volumes if each['instance_bdms']]
        if not host_volumes:
            return []
        guests = {guest.uuid: guest for guest in self._guests.servers()}
        found = []
        for each in host_volumes:
            instance = each['instance']
            guest = guests.get(instance.uuid)
            for bdm in each['instance_bdms']:
                counters = _since_attached(guest, instance, bdm.device_name)
                if counters is None:
                    LOG.debug('No counters of volume %s', bdm.volume_id,
                              instance=instance)
                    continue
                found.append({'volume': bdm.volume_id, 'instance': instance,
                              **counters._asdict()})
        return found

    def of_disk(self, instance: objects.Instance, disk: str
                ) -> list[int] | None:
        """Read the usage of one volume, which is about to be detached.

        See :meth:`nova.virt.driver.ComputeDriver.block_stats`. A failure must
        not keep Nova from detaching the volume.

        :param instance: the instance.
        :param disk: device name of the volume, such as ``sdb``.
        :returns: requests read, bytes read, requests written, bytes written,
            and the number of errors, which is not known; None if there are no
            counters.
        """
        try:
            guest = self._guests.find(instance)
        except errors.LXDError as error:
            LOG.warning('Could not read the counters of %(disk)s: %(error)s',
                        {'disk': disk, 'error': error}, instance=instance)
            return None
        counters = _since_attached(guest, instance, disk)
        return None if counters is None else [*counters, _NO_ERRORS_COUNTED]


def _since_attached(guest: lxd_guest.Guest | None, instance: objects.Instance,
                    disk: str | None) -> Counters | None:
    """Read the counters of the volume that Nova knows by a device name.

    Not by its ID: a volume that Cinder has moved to other storage keeps the ID
    with which the host was connected.
    """
    path = block_device.prepend_dev(disk)
    if guest is None or not path:
        return None
    for device in lxd_devices.connected(guest).values():
        known = device.get('path')
        if device['type'] == lxd_devices.ROOT:
            known = block_device.prepend_dev(instance.root_device_name)
        if known in (path, lxd_devices.mounted_path(path)):
            return since_stored(
                device.get(lxd_devices.KEY_COUNTERS),
                lxd_devices.source(device))
    return None
