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

"""Smaller quotas of root disks.

On a btrfs pool LXD refuses a quota below the usage of a disk, but the quota
takes effect nevertheless. From then on neither the guest nor LXD can write to
the disk, and the quota cannot be raised again. So a smaller quota is tried on
a copy of the instance first. Quotas are made smaller by a resize, and after a
temporary extension (:mod:`nova_lxd_py.virt.guest.root_extension`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nova import objects
from oslo_log import log as logging
from oslo_utils import units

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.guest import roles
from nova_lxd_py.virt.guest import root_quota
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import session as lxd

LOG = logging.getLogger(__name__)

#: Name of the root disk's LXD device.
DEVICE = root_quota.DEVICE

#: Bytes that must remain free below a smaller quota, since the guest may
#: write meanwhile.
SHRINK_MARGIN = 64 * units.Mi
_Devices = Mapping[str, Mapping[str, str] | None]


class RootDiskManager:
    """Updates guests without a quota that their root disks exceed.

    :param session: LXD session.
    :param guests: registry of the driver's LXD instances.
    """

    def __init__(self, session: lxd.Session,
                 guests: registry.GuestRegistry) -> None:
        self._session = session
        self._guests = guests

    def update(self, instance: objects.Instance, guest: lxd_guest.Guest,
               config: Mapping[str, str | None], devices: _Devices) -> None:
        """Update a guest as :meth:`Guest.update` does.

        If the disk holds more than the new quota, the quota is not changed
        and a warning is logged; the next update tries again.

        :param instance: the instance.
        :param guest: its LXD instance, freshly read.
        :param config: as for :meth:`Guest.update`.
        :param devices: as for :meth:`Guest.update`.
        :raises errors.LXDError: if LXD refuses the update; nothing is changed.
        """
        if lxd_guest.root_volume(guest):
            # Booted from a volume: the root disk is empty and not used.
            devices = {name: device for name, device in devices.items()
                       if name != DEVICE}
        devices = self._keep_pool(instance, guest, devices)
        devices = self._keep_quota_if_too_small(instance, guest, devices)
        try:
            guest.update(config, devices)
        except errors.LXDError as exc:
            if (isinstance(exc, errors.DiskFull) or
                    not _shrinks(guest, devices)):
                raise
            # Other pools refuse without side effects, some of them only while
            # the guest runs.
            LOG.info('LXD refused to shrink the root disk: %s', exc,
                     instance=instance)
            guest.update(config, _with_root(
                devices, self._with_present_quota(instance, guest, devices)))

    @staticmethod
    def _keep_pool(instance: objects.Instance, guest: lxd_guest.Guest,
                   devices: _Devices) -> _Devices:
        """Keep a root disk in the pool to which an operator has moved it.

        LXD does not change the pool of a root disk by an update.
        """
        root = devices.get(DEVICE)
        present = guest.devices.get(DEVICE)
        if not root or not present or root['pool'] == present['pool']:
            return devices
        LOG.info('Root disk is in storage pool %(present)s, not in '
                 '%(configured)s ([lxd] storage_pool)',
                 {'present': present['pool'], 'configured': root['pool']},
                 instance=instance)
        return _with_root(devices, {**root, 'pool': present['pool']})

    def _keep_quota_if_too_small(
            self, instance: objects.Instance, guest: lxd_guest.Guest,
            devices: _Devices) -> _Devices:
        """Replace a new quota that the disk exceeds by the present one."""
        if not _shrinks(guest, devices):
            return devices
        root = devices[DEVICE]
        assert root is not None
        if self.fits(instance, guest, root):
            return devices
        return _with_root(devices, self._with_present_quota(instance, guest,
                                                            devices))

    def _with_present_quota(
            self, instance: objects.Instance, guest: lxd_guest.Guest,
            devices: _Devices) -> dict[str, str]:
        """Return the new root disk device with the quota of the present one.
        """
        root = devices[DEVICE]
        assert root is not None
        present = guest.devices[DEVICE]
        LOG.warning('Root disk holds too much for a quota of %(new)s, keeping '
                    '%(present)s; free some space and hard reboot the server '
                    'to try again',
                    {'new': root['size'],
                     'present': present.get('size', 'no quota')},
                    instance=instance)
        kept = {key: value for key, value in root.items() if key != 'size'}
        if 'size' in present:
            kept['size'] = present['size']
        return kept

    def fits(self, instance: objects.Instance, guest: lxd_guest.Guest,
             root: Mapping[str, str]) -> bool:
        """Return whether the content of a root disk fits a smaller quota.

        On btrfs, where setting a quota that is too small does damage, it is
        set on a copy of the instance. The usage that LXD reports would not
        do: it does not include what the disk shares with its image, while the
        quota does. The copy is made in about a second and takes no space.

        :param instance: the instance.
        :param guest: its LXD instance, freshly read.
        :param root: the root disk's LXD device with the new quota.
        :returns: False if it is known not to fit.
        :raises errors.LXDError: if a request fails.
        """
        size = root_quota.size_bytes(root)
        pool = self._session.storage_pool(guest.devices[DEVICE]['pool'])
        if size is None or pool['driver'] != 'btrfs':
            return True
        if size <= SHRINK_MARGIN:
            return False
        self._discard_probe(instance)
        name = roles.lxd_name(instance, roles.PROBE)
        # LXD copies all devices that are not overridden.
        devices: dict[str, Mapping[str, str]] = {
            device: {'type': 'none'} for device in guest.devices}
        devices[DEVICE] = {**guest.devices[DEVICE],
                           'size': f'{size - SHRINK_MARGIN}B'}
        try:
            self._guests.create(
                name, {'type': 'copy', 'source': guest.name,
                       'instance_only': True},
                {lxd_guest.KEY_UUID: instance.uuid,
                 lxd_guest.KEY_ROLE: roles.PROBE,
                 'security.idmap.isolated': 'false'}, devices)
            return True
        except (errors.OperationFailed, errors.InvalidRequest) as exc:
            LOG.debug('Copy of the root disk does not fit the quota: %s', exc,
                      instance=instance)
            return False
        finally:
            self._discard_probe(instance)

    def _discard_probe(self, instance: objects.Instance) -> None:
        probe = self._guests.find(instance, roles.PROBE)
        if probe is not None:
            probe.delete()


def _shrinks(guest: lxd_guest.Guest, devices: _Devices) -> bool:
    """Return whether an update reduces the quota of the root disk."""
    root = devices.get(DEVICE)
    present = guest.devices.get(DEVICE)
    if not root or not present:
        return False
    new = root_quota.size_bytes(root)
    old = root_quota.size_bytes(present)
    return new is not None and (old is None or new < old)


def _with_root(devices: _Devices, root: Mapping[str, str]
               ) -> dict[str, Any]:
    return {**devices, DEVICE: root}
