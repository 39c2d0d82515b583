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

"""Usage of attached volumes, for Nova's ``volume.usage`` notifications."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nova import block_device
from nova import objects
from oslo_log import log as logging

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.volume import io_counters
from nova_lxd_py.virt.volume import lxd_devices
from nova_lxd_py.virt.volume import mounted_modes

LOG = logging.getLogger(__name__)

#: libvirt's value for the number of errors, which its hypervisors and the
#: kernel do not count. Nova ignores it.
_NO_ERRORS_COUNTED = -1


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
                found.append({
                    'volume': bdm.volume_id, 'instance': instance,
                    'rd_req': counters.read_requests,
                    'rd_bytes': counters.read_bytes,
                    'wr_req': counters.written_requests,
                    'wr_bytes': counters.written_bytes})
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
        return None if counters is None else [
            counters.read_requests, counters.read_bytes,
            counters.written_requests, counters.written_bytes,
            _NO_ERRORS_COUNTED]


def _since_attached(guest: lxd_guest.Guest | None, instance: objects.Instance,
                    disk: str | None) -> io_counters.Counters | None:
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
        if known in (path, mounted_modes.guest_directory(path)):
            return io_counters.since_stored(
                device.get(lxd_devices.KEY_COUNTERS),
                lxd_devices.source(device))
    return None
