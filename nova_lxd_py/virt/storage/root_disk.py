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

"""Quotas of root disks, and what LXD does not bear in them.

Two things can happen on a btrfs pool. A quota set below what a disk holds is
refused by LXD, and stays in force nevertheless: from then on neither the guest
nor LXD itself can write, nor can the quota be raised again. And a guest that
fills its disk keeps LXD, which has a file of its own there, from changing or
starting the instance. So a smaller quota is tried on a copy first, and a full
disk is lent a little space.
"""

from __future__ import annotations

from collections.abc import Mapping
import re
from typing import Any

from nova import objects
from oslo_log import log as logging
from oslo_utils import units

from nova_lxd_py.virt.guest import flavor as lxd_flavor
from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import session as lxd

LOG = logging.getLogger(__name__)

#: LXD's name of the root disk in the driver's instances.
DEVICE = 'root'

#: Bytes that must be free below a smaller quota: the guest goes on writing.
MARGIN = 64 * units.Mi
#: Bytes that a full disk is lent at a time, and how many all in all.
LOAN = 64 * units.Mi
LONGEST_LOAN = 4 * LOAN

#: LXD's units of size.
_UNITS = {'': 1, 'B': 1}
for _power, _letter in enumerate('KMGTPE', 1):
    _UNITS[f'{_letter}iB'] = 1024 ** _power
    _UNITS[f'{_letter if _power > 1 else "k"}B'] = 1000 ** _power

_Devices = Mapping[str, Mapping[str, str] | None]


class RootDiskManager:
    """Changes guests without hurting their root disks.

    :param session: the way to LXD.
    :param guests: the driver's LXD instances.
    """

    def __init__(self, session: lxd.Session,
                 guests: registry.GuestRegistry) -> None:
        self._session = session
        self._options = session.options
        self._guests = guests

    def update(self, instance: objects.Instance, guest: lxd_guest.Guest,
               config: Mapping[str, str | None], devices: _Devices) -> None:
        """Change a guest as :meth:`Guest.update` does.

        A quota that would be smaller than what the disk holds is left at what
        it is, with a warning in the log; the next change tries again.

        :param instance: the server.
        :param guest: its LXD instance, just read.
        :param config: as for :meth:`Guest.update`.
        :param devices: as for :meth:`Guest.update`.
        :raises errors.LXDError: LXD refuses the result; nothing is changed.
        """
        if lxd_guest.root_volume(guest):
            # The root disk is an empty one that nothing is ever written to.
            devices = {name: device for name, device in devices.items()
                       if name != DEVICE}
        fitting = self._fitting(instance, guest, devices)
        try:
            guest.update(config, fitting)
        except errors.LXDError as exc:
            if _is_full(exc):
                self._lend(instance, guest)
                guest.update(config, _with_root(
                    fitting, guest.reload().devices[DEVICE]))
            elif _shrinks(guest, fitting):
                # Other pools refuse without harm, some while it runs only.
                LOG.info('LXD does not make the root disk smaller: %s', exc,
                         instance=instance)
                guest.update(config, _with_root(
                    fitting, self._as_it_is(instance, guest, fitting)))
            else:
                raise

    def start(self, instance: objects.Instance, guest: lxd_guest.Guest
              ) -> None:
        """Start a guest, even one that has filled its disk.

        :param instance: the server.
        :param guest: its LXD instance.
        :raises errors.LXDError: it cannot be started.
        """
        try:
            guest.start()
        except errors.LXDError as exc:
            if not _is_full(exc):
                raise
            self._lend(instance, guest.reload())
            guest.start()

    def _lend(self, instance: objects.Instance, guest: lxd_guest.Guest
              ) -> None:
        """Enlarge a disk that is so full that LXD cannot work with it."""
        root = guest.devices.get(DEVICE) or {}
        size = _size(root)
        own = _size(lxd_flavor.root_device(instance.flavor, self._options))
        if size is None or own is None or size - own >= LONGEST_LOAN:
            raise errors.OperationFailed(
                'The root disk of the server is full, and LXD needs some '
                'space in it: rescue the server to delete files, or give it '
                'a larger flavor')
        LOG.warning('Its root disk is full, which keeps LXD from working '
                    'with it: lending it %d MiB until its next start with '
                    'enough free space', LOAN // units.Mi, instance=instance)
        guest.update(devices={DEVICE: {**root, 'size': f'{size + LOAN}B'}})

    def _fitting(self, instance: objects.Instance, guest: lxd_guest.Guest,
                 devices: _Devices) -> _Devices:
        if not _shrinks(guest, devices):
            return devices
        wanted = devices[DEVICE]
        assert wanted is not None
        if self.fits(instance, guest, wanted):
            return devices
        return _with_root(devices, self._as_it_is(instance, guest, devices))

    def _as_it_is(self, instance: objects.Instance, guest: lxd_guest.Guest,
                  devices: _Devices) -> dict[str, str]:
        """Describe the root disk with the size that it has."""
        wanted = devices[DEVICE]
        assert wanted is not None
        present = guest.devices[DEVICE]
        LOG.warning('Its root disk holds too much for a quota of %s, so the '
                    'quota stays %s; free some space and reboot it hard to '
                    'try again', wanted['size'],
                    present.get('size', 'unlimited'), instance=instance)
        kept = {key: value for key, value in wanted.items() if key != 'size'}
        if 'size' in present:
            kept['size'] = present['size']
        return kept

    def fits(self, instance: objects.Instance, guest: lxd_guest.Guest,
             wanted: Mapping[str, str]) -> bool:
        """Try a quota on a copy of the disk, where it would do harm to try it
        on the disk itself.

        LXD's figure of what is in use leaves out what a disk shares with its
        image, while its quota counts it; only a copy tells. It costs a
        moment and no space.

        :param instance: the server.
        :param guest: its LXD instance, just read.
        :param wanted: the root disk's LXD device with the quota.
        :returns: False where it is known not to fit.
        :raises errors.LXDError: LXD does not answer.
        """
        size = _size(wanted)
        if size is None or self._session.storage_pool()['driver'] != 'btrfs':
            return True
        if size <= MARGIN:
            return False
        self._discard_probe(instance)
        name = lxd_guest.lxd_name(instance, lxd_guest.ROLE_PROBE)
        # LXD takes over all devices that it is not told otherwise of.
        devices: dict[str, Mapping[str, str]] = {
            device: {'type': 'none'} for device in guest.devices}
        devices[DEVICE] = {**guest.devices[DEVICE],
                           'size': f'{size - MARGIN}B'}
        try:
            self._guests.create(
                name, {'type': 'copy', 'source': guest.name,
                       'instance_only': True},
                {lxd_guest.KEY_UUID: instance.uuid,
                 lxd_guest.KEY_ROLE: lxd_guest.ROLE_PROBE,
                 'security.idmap.isolated': 'false'}, devices)
            return True
        except (errors.OperationFailed, errors.InvalidRequest) as exc:
            LOG.debug('A copy of the root disk does not fit: %s', exc,
                      instance=instance)
            return False
        finally:
            self._discard_probe(instance)

    def _discard_probe(self, instance: objects.Instance) -> None:
        probe = self._guests.find(instance, lxd_guest.ROLE_PROBE)
        if probe is not None:
            probe.delete()


def _is_full(exc: errors.LXDError) -> bool:
    return 'quota exceeded' in exc.message.lower()


def _size(device: Mapping[str, str]) -> int | None:
    """Read a quota in bytes; None is no quota."""
    match = re.fullmatch(r'(\d+) ?([A-Za-z]*)', device.get('size', ''))
    if match is None or match[2] not in _UNITS:
        return None
    return int(match[1]) * _UNITS[match[2]]


def _shrinks(guest: lxd_guest.Guest, devices: _Devices) -> bool:
    """Whether a change makes the quota of a root disk smaller."""
    wanted = devices.get(DEVICE)
    present = guest.devices.get(DEVICE)
    if not wanted or not present:
        return False
    after, before = _size(wanted), _size(present)
    return after is not None and (before is None or after < before)


def _with_root(devices: _Devices, root: Mapping[str, str]
               ) -> dict[str, Any]:
    return {**devices, DEVICE: root}
