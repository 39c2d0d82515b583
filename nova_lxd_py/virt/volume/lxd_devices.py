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

"""LXD devices of volumes: their names and paths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import itertools
import pathlib
import re
import string

from nova import block_device
from nova.compute import power_state
from nova import exception

from nova_lxd_py.virt.guest import disk_view
from nova_lxd_py.virt.guest import guest as lxd_guest

#: Prefix of the names of LXD devices, before the volume's ID.
PREFIX = 'volume-'

#: Key of an LXD device with a mounted volume: path of the block device.
KEY_SOURCE = disk_view.KEY_DEVICE

#: Key of an LXD device: boot ID of the host when it was connected.
KEY_BOOT = 'user.nova.boot'

#: Key of an LXD device: counters of the block device when the volume was
#: attached, see :mod:`.io_counters`.
KEY_COUNTERS = 'user.nova.counters'

_BOOT_ID = pathlib.Path('/proc/sys/kernel/random/boot_id')

#: Type of the entry for the volume from which a server boots, for which there
#: is no LXD device.
ROOT = 'root'

#: Paths in the guest that tenants may request: names of disks, not /dev/null
#: and the like.
_GUEST_PATH = re.compile(r'/dev/(?:sd|vd|hd|xvd)[a-z]{1,2}(?:[1-9][0-9]?)?')


def name(identifier: str) -> str:
    """Return the name of the LXD device of a volume.

    :param identifier: Cinder's ID of the volume.
    """
    return PREFIX + identifier


def volume(device: str) -> str:
    """Return which volume an LXD device is.

    :param device: its name, see :func:`name`.
    :returns: Cinder's ID of the volume.
    """
    return device.removeprefix(PREFIX)


def source(device: Mapping[str, str]) -> str:
    """Return the path of the block device of an LXD device on the host."""
    return device.get(KEY_SOURCE) or device['source']


def of_guest(guest: lxd_guest.Guest
             ) -> dict[str, Mapping[str, str]]:
    """Find the volumes that a guest has.

    :param guest: the guest, just read.
    :returns: LXD devices by name. Copies of a server's root disk have empty
        ones of the same names, which do not count. The volume that it has
        booted from is among them, with the type ROOT.
    """
    found: dict[str, Mapping[str, str]] = {
        key: device for key, device in guest.devices.items()
        if key.startswith(PREFIX) and device['type'] != 'none'}
    path = guest.config.get(lxd_guest.KEY_ROOT_DEVICE)
    if path:
        found[name(guest.config[lxd_guest.KEY_ROOT_VOLUME])] = {
            'type': ROOT, 'source': path,
            KEY_BOOT: guest.config.get(lxd_guest.KEY_ROOT_BOOT, ''),
            KEY_COUNTERS: guest.config.get(lxd_guest.KEY_ROOT_COUNTERS, '')}
    return found


def volumes(guest: lxd_guest.Guest | None) -> set[str]:
    """List the volumes of a guest, also while the host is disconnected from
    its root volume.

    :param guest: the guest, just read; None for one that is gone.
    :returns: Cinder's IDs of the volumes.
    """
    if guest is None:
        return set()
    root = lxd_guest.root_volume(guest)
    return {volume(key) for key in of_guest(guest)} | ({root} if root
                                                       else set())


def boot_id() -> str:
    """Return an ID that changes with each boot of the host."""
    return _BOOT_ID.read_text(encoding='ascii').strip()


def is_current(guest: lxd_guest.Guest, device: Mapping[str, str]) -> bool:
    """Whether the block device of an LXD device is still the volume's.

    A reboot of the host ends all connections, after which the block device may
    be another volume's. LXD keeps the device until Nova starts the server and
    connects the volume again.

    :param guest: the guest with the device, just read.
    :param device: the LXD device.
    """
    noted = device.get(KEY_BOOT)
    return (not noted or guest.power_state != power_state.SHUTDOWN or
            noted == boot_id())


def connected(guest: lxd_guest.Guest) -> dict[str, Mapping[str, str]]:
    """Find the volumes to which the host may be connected for a guest.

    :param guest: the guest, just read.
    :returns: those of :func:`of_guest` that :func:`is_current` holds for.
    """
    return {key: device for key, device in of_guest(guest).items()
            if is_current(guest, device)}


def guest_path(mountpoint: str) -> str:
    """Return the path at which the guest finds a volume.

    :param mountpoint: device name that Nova or the tenant chose.
    :returns: the same as an absolute path.
    :raises nova.exception.InvalidDevicePath: if it is no name of a disk.
    """
    path = block_device.prepend_dev(mountpoint) or ''
    if not _GUEST_PATH.fullmatch(path):
        raise exception.InvalidDevicePath(path=mountpoint)
    return path


def choose_path(requested: str | None, taken: Iterable[str | None]) -> str:
    """Choose the device name of a disk that is to be attached.

    :param requested: name that the tenant has requested, if any.
    :param taken: names of the disks that the server has.
    :returns: the requested name, or the first free one of ``/dev/sdX``.
    :raises nova.exception.InvalidDevicePath: if it is no name of a disk.
    :raises nova.exception.DevicePathInUse: if another disk has it.
    """
    used = {block_device.prepend_dev(path) for path in taken if path}
    if requested:
        path = guest_path(requested)
        if path in used:
            raise exception.DevicePathInUse(path=path)
        return path
    letters = string.ascii_lowercase
    for ending in itertools.chain(letters, map(''.join, itertools.product(
            letters, repeat=2))):
        # The first is the root disk's, whatever name Nova gives it.
        if ending != 'a' and f'/dev/sd{ending}' not in used:
            return f'/dev/sd{ending}'
    raise exception.TooManyDiskDevices(maximum=len(used))
