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

"""What an LXD instance has of its volumes: LXD devices, and configuration keys
for the one that it boots from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import dataclasses
import itertools
import pathlib
import re
import string

from nova import block_device
from nova.compute import power_state
from nova import exception

from nova_lxd_py.virt.guest import disk_view
from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import volume_limits
from nova_lxd_py.virt.lxd import errors

#: Prefix of the names of LXD devices, before the volume's ID.
PREFIX = 'volume-'

#: Key of an LXD device with a mounted volume: path of the block device.
KEY_SOURCE = disk_view.KEY_DEVICE

#: Key of an LXD device: boot ID of the host when it was connected.
KEY_BOOT = 'user.nova.boot'

#: Key of an LXD device: counters of the block device when the volume was
#: attached, see :mod:`.statistics`.
KEY_COUNTERS = 'user.nova.counters'

_LIMITS = (volume_limits.KEY_LIMITS, volume_limits.KEY_ROOT_LIMITS)

#: Configuration key of LXD with options for liblxc.
KEY_RAW = 'raw.lxc'

#: Configuration keys of a guest that boots from a volume.
ROOT_KEYS = (KEY_RAW, lxd_guest.KEY_ROOT_VOLUME, lxd_guest.KEY_ROOT_DEVICE,
             lxd_guest.KEY_ROOT_BOOT, lxd_guest.KEY_ROOT_COUNTERS,
             volume_limits.KEY_ROOT_LIMITS)

#: Changes to these keys when the host is disconnected from the volume.
DISCONNECTED: Mapping[str, str | None] = {
    lxd_guest.KEY_ROOT_DEVICE: None, lxd_guest.KEY_ROOT_BOOT: None,
    lxd_guest.KEY_ROOT_COUNTERS: None, volume_limits.KEY_ROOT_LIMITS: None}

_BOOT_ID = pathlib.Path('/proc/sys/kernel/random/boot_id')

#: Type of the entry for the volume from which a server boots, for which there
#: is no LXD device.
ROOT = 'root'

#: Paths in the guest that tenants may request: names of disks, not /dev/null
#: and the like.
_GUEST_PATH = re.compile(r'/dev/(?:sd|vd|hd|xvd)[a-z]{1,2}(?:[1-9][0-9]?)?')

#: Makes the path of a device one that does not exist on any host.
_MISSING = '.nothing'
#: Messages of LXD where a crash has left the node or the mount of a device.
_LEFTOVER = ('file exists', 'device or resource busy')


@dataclasses.dataclass(frozen=True)
class GuestChanges:
    """What the LXD instance needs for a connected volume.

    :ivar config: LXD configuration keys.
    :ivar devices: LXD devices by name.
    """

    config: dict[str, str] = dataclasses.field(default_factory=dict)
    devices: dict[str, dict[str, str]] = dataclasses.field(
        default_factory=dict)


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
    :returns: LXD devices by Cinder's IDs of the volumes. Copies of a server's
        root disk have empty ones, which do not count. The volume that it has
        booted from is among them, with the type ROOT.
    """
    found: dict[str, Mapping[str, str]] = {
        volume(key): device for key, device in guest.devices.items()
        if key.startswith(PREFIX) and device['type'] != 'none'}
    path = guest.config.get(lxd_guest.KEY_ROOT_DEVICE)
    if path:
        found[guest.config[lxd_guest.KEY_ROOT_VOLUME]] = {
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
    return set(of_guest(guest)) | ({root} if root else set())


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
    return {identifier: device for identifier, device
            in of_guest(guest).items() if is_current(guest, device)}


def keep_counters(guest: lxd_guest.Guest | None, changes: GuestChanges
                  ) -> None:
    """Keep the stored counters of volumes that a guest has had before.

    The guest's usage of a volume is counted from when it was attached, and an
    LXD device that has not changed is not attached again.

    :param guest: the guest, just read; None if it does not exist yet.
    :param changes: what it needs for its connected volumes, which is changed.
    """
    if guest is None:
        return
    for key, device in changes.devices.items():
        _keep_key(KEY_COUNTERS, guest.devices.get(key, {}), device)
    had = {key: guest.config[key] for key in (
        *changes.config, lxd_guest.KEY_ROOT_COUNTERS) if key in guest.config}
    _keep_key(lxd_guest.KEY_ROOT_COUNTERS, had, changes.config)


def _keep_key(key: str, before: Mapping[str, str], after: dict[str, str]
              ) -> None:
    """Copy a key if nothing else differs but limits, which may change."""
    rest = {name: value for name, value in before.items()
            if name not in _LIMITS}
    if key in before and rest == {
            **{name: value for name, value in after.items()
               if name not in _LIMITS}, key: before[key]}:
        after[key] = before[key]


def add(guest: lxd_guest.Guest, key: str, device: Mapping[str, str]) -> None:
    """Add an LXD device to a guest, also where LXD has left the node or the
    mount of an earlier one when it crashed.

    :param guest: the guest.
    :param key: name of the LXD device.
    :param device: the LXD device.
    :raises errors.LXDError: if LXD refuses it.
    """
    try:
        guest.add_devices({key: device})
    except errors.OperationFailed as error:
        if not any(sign in error.message for sign in _LEFTOVER):
            raise
        clear_leftover(guest, key, device)
        guest.add_devices({key: device})


def clear_leftover(guest: lxd_guest.Guest, key: str,
                   device: Mapping[str, str]) -> None:
    """Make LXD remove the node or the mount of a device that it was about to
    add to a guest when it crashed: it would not make it again before the guest
    is restarted.

    :param guest: the guest.
    :param key: name of the LXD device.
    :param device: the LXD device.
    """
    # A device without a source is not made, but removed with all that bears
    # its name.
    guest.add_devices({key: {
        **device, 'source': device['source'] + _MISSING,
        'required': 'false'}})
    guest.update(devices={key: None})


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


def mounted_path(path: str) -> str:
    """Return where the guest finds a mounted volume.

    :param path: device name of the volume, which has been validated.
    :returns: a directory of the same name below ``/mnt``.
    """
    return '/mnt/' + path.removeprefix('/dev/')


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
