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

"""The disks that a guest finds in sysfs: its own ones only.

The kernel shows every container all block devices of the host in sysfs, and
with them the files of loop devices, which bear the names of other tenants'
volumes. LXD mounts directories of the host over those parts of a guest's
``/sys``. They hold a copy of what sysfs has of the guest's own disks, under
the names that these have in the guest; ordinary files, so that no mount has to
be made while a guest runs, and nothing has to be restored after a crash.

They are derived from the LXD instance: written at each start and whenever its
devices change. That the files cannot be written keeps no guest from starting.

root in a guest may unmount them again: this is a view, and no barrier.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
import contextlib
import dataclasses
import os
import re
import shutil
import stat
import time

from nova import conf as nova_conf
from oslo_log import log as logging

from nova_lxd_py.virt.guest import root_quota

CONF = nova_conf.CONF
LOG = logging.getLogger(__name__)

#: Directory with one directory for each LXD instance, below Nova's state_path.
DIRECTORY = 'guest-disks'

#: Key of an LXD device with a mounted volume: path of the block device.
KEY_DEVICE = 'user.nova.device'
#: Key of an LXD instance: block device of the volume that it boots from.
KEY_ROOT_DEVICE = 'user.nova.root_device'

#: Where sysfs has block devices without hardware of their own.
_VIRTUAL = '/sys/devices/virtual/block'
#: What is mounted in a guest: directory of the host and path, by the name of
#: the LXD device.
_MOUNTS = {'sysfs-block': ('block', '/sys/block'),
           'sysfs-class': ('class', '/sys/class/block'),
           'sysfs-dev': ('dev', '/sys/dev/block'),
           'sysfs-devices': ('devices', _VIRTUAL)}
#: Directories of links to what is in ``devices``: from where they are mounted.
_LINKS = {'block': '../devices/virtual/block/',
          'class': '../../devices/virtual/block/',
          'dev': '../../devices/virtual/block/'}
#: Directory in which files are written before they are moved.
_STAGING = 'new'

#: Attributes of a block device that guests may read, and values for what the
#: host has no block device of.
_ATTRIBUTES = {
    'size': '0', 'ro': '0', 'removable': '0', 'alignment_offset': '0',
    'discard_alignment': '0', 'queue/rotational': '0',
    'queue/logical_block_size': '512', 'queue/physical_block_size': '512',
    'queue/minimum_io_size': '512', 'queue/optimal_io_size': '0',
    'queue/discard_granularity': '0', 'queue/discard_max_bytes': '0',
    'queue/nr_requests': '128', 'queue/read_ahead_kb': '128',
    'queue/scheduler': 'none', 'queue/zoned': 'none'}

#: Device number of a root disk that is no block device: of those that the
#: kernel has for local use, and no driver of it.
_NO_DEVICE = (60, 0)
_SECTOR = 512

_DISK = re.compile(r'[a-z][a-z0-9]{0,30}')
_NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9_-]{0,127}')

#: Names for the root disk; the first that no volume has.
_ROOT_NAMES = ('sda', 'vda', 'xvda', 'hda')


@dataclasses.dataclass(frozen=True)
class Disk:
    """One disk: its device number and attributes in sysfs."""

    number: tuple[int, int]
    attributes: Mapping[str, str]


_Devices = Mapping[str, Mapping[str, str]]


def directory(name: str) -> str:
    """Return the directory of the host for a guest.

    :param name: LXD's name of the instance.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f'{name!r} is not the name of an LXD instance')
    return os.path.join(CONF.state_path, DIRECTORY, name)


def devices(name: str) -> dict[str, dict[str, str]]:
    """Return the LXD devices that show a guest its disks.

    A directory that is missing at a start, which LXD also does without the
    driver, does not keep the guest from starting.

    :param name: LXD's name of the instance.
    :returns: LXD devices by name; none if the host's kernel has no virtual
        block devices, since a directory to mount the last of them over is
        missing then.
    """
    if not os.path.isdir(_VIRTUAL):
        return {}
    top = directory(name)
    return {key: {'type': 'disk', 'source': os.path.join(top, subdirectory),
                  'path': path, 'readonly': 'true', 'required': 'false'}
            for key, (subdirectory, path) in _MOUNTS.items()}


def is_part(name: str) -> bool:
    """Return whether an LXD device is one of :func:`devices`."""
    return name in _MOUNTS


def find(config: Mapping[str, str], lxd_devices: _Devices
         ) -> dict[str, Disk]:
    """Find the disks of a guest.

    :param config: configuration keys of its LXD instance.
    :param lxd_devices: its LXD devices.
    :returns: disks by their names in the guest: block devices, volumes that
        the host mounts for it, and its root disk if that has a quota or is a
        volume. Block devices that are gone are left out.
    """
    found = {}
    for device in lxd_devices.values():
        source = device.get(KEY_DEVICE)
        if device['type'] == 'unix-block':
            source = device.get('source')
        name = device.get('path', '').removeprefix('/dev/').removeprefix(
            '/mnt/')
        if source and _DISK.fullmatch(name):
            disk = _of_host(source)
            if disk is not None:
                found[name] = disk
    root = _root(config)
    if root is not None:
        for name in _ROOT_NAMES:
            if name not in found:
                return {name: root, **found}
    return found


def _root(config: Mapping[str, str]) -> Disk | None:
    """Return the root disk: a volume, or a part of LXD's storage pool."""
    if config.get(KEY_ROOT_DEVICE):
        return _of_host(config[KEY_ROOT_DEVICE])
    size = root_quota.size_bytes(
        {'size': config.get(root_quota.KEY_ROOT_QUOTA, '')})
    if not size:
        return None
    return Disk(_NO_DEVICE, {**_ATTRIBUTES, 'size': str(size // _SECTOR)})


def _of_host(path: str) -> Disk | None:
    """Read what sysfs has of a block device; None if there is no such one."""
    try:
        about = os.stat(path)
        if not stat.S_ISBLK(about.st_mode):
            return None
        number = (os.major(about.st_rdev), os.minor(about.st_rdev))
        return Disk(number, _read(number, 'size'))
    except OSError as error:
        LOG.debug('Guests do not see %s: %s', path, error)
        return None


def _read(number: tuple[int, int], required: str) -> dict[str, str]:
    """Read the attributes of a block device.

    :raises OSError: if a required one is missing.
    """
    found = dict(_ATTRIBUTES)
    for key in _ATTRIBUTES:
        try:
            with open(f'/sys/dev/block/{number[0]}:{number[1]}/{key}',
                      encoding='utf-8') as stream:
                found[key] = stream.read().strip()
        except OSError:
            if key == required:
                raise
    return found


def show(name: str, config: Mapping[str, str], lxd_devices: _Devices,
         uuid: str = '') -> None:
    """Show a guest the disks that it has now. Idempotent.

    Errors are logged only.

    :param name: LXD's name of the instance.
    :param config: its configuration keys.
    :param lxd_devices: its LXD devices. Without those of :func:`devices`
        nothing is done, as for copies of servers, and for guests that have
        not been started since the driver was upgraded.
    :param uuid: UUID of the Nova instance, for the log.
    """
    if not any(is_part(key) and device['type'] == 'disk'
               for key, device in lxd_devices.items()):
        return
    try:
        _write(directory(name), find(config, lxd_devices))
    except OSError as error:
        LOG.warning('Could not show its disks to %(guest)s: %(error)s',
                    {'guest': name, 'error': error}, instance_uuid=uuid)


def update_sizes(name: str, uuid: str = '') -> None:
    """Show a guest the sizes that its block devices have by now. Errors are
    logged only.

    :param name: LXD's name of the instance.
    :param uuid: UUID of the Nova instance, for the log.
    """
    top = os.path.join(directory(name), 'devices')
    with contextlib.suppress(FileNotFoundError):
        for disk in os.listdir(top):
            try:
                with open(os.path.join(top, disk, 'dev'),
                          encoding='ascii') as stream:
                    major, _, minor = stream.read().strip().partition(':')
                number = (int(major), int(minor))
                if number != _NO_DEVICE:
                    _put(os.path.join(top, disk, 'size'),
                         _read(number, 'size')['size'] + '\n',
                         os.path.join(directory(name), _STAGING))
            except (OSError, ValueError) as error:
                LOG.warning('Could not show the size of its disk %(disk)s to '
                            '%(guest)s: %(error)s',
                            {'disk': disk, 'guest': name, 'error': error},
                            instance_uuid=uuid)


def remove(name: str) -> None:
    """Remove the directory of a guest that is gone. Idempotent.

    :param name: LXD's name of the instance.
    """
    shutil.rmtree(directory(name), ignore_errors=True)


def sweep(names: Collection[str], min_age: float) -> None:
    """Remove the directories of guests that are gone.

    :param names: LXD's names of the instances that there are.
    :param min_age: seconds since the last change; a younger one may belong to
        an instance that is being created.
    """
    with (contextlib.suppress(FileNotFoundError),
          os.scandir(os.path.join(CONF.state_path, DIRECTORY)) as entries):
        for entry in entries:
            if (entry.name not in names and _NAME.fullmatch(entry.name) and
                    time.time() - entry.stat().st_mtime >= min_age):
                LOG.info('Removing the disks in sysfs of %s, which is gone',
                         entry.name)
                remove(entry.name)


def _write(top: str, disks: Mapping[str, Disk]) -> None:
    """Make a directory show exactly these disks.

    A disk appears when all of it is there, and disappears before any of it
    does.
    """
    staging = os.path.join(top, _STAGING)
    for path in (staging, *(os.path.join(top, subdirectory) for
                            subdirectory, _path in _MOUNTS.values())):
        _make_directory(path)
    shown = os.path.join(top, 'devices')
    numbers = {f'{disk.number[0]}:{disk.number[1]}': name
               for name, disk in disks.items()}
    for subdirectory, wanted in (('dev', numbers), ('class', disks),
                                 ('block', disks)):
        for link in os.listdir(os.path.join(top, subdirectory)):
            if link not in wanted:
                os.unlink(os.path.join(top, subdirectory, link))
    for name in os.listdir(shown):
        if name not in disks:
            shutil.rmtree(os.path.join(shown, name))
    for name, disk in disks.items():
        for key, value in _files(name, disk).items():
            path = os.path.join(shown, name, key)
            _make_directory(os.path.dirname(path))
            _put(path, f'{value}\n', staging)
    for subdirectory, targets in (
            ('dev', numbers), ('class', {name: name for name in disks}),
            ('block', {name: name for name in disks})):
        for link, target in targets.items():
            _link(_LINKS[subdirectory] + target,
                  os.path.join(top, subdirectory, link), staging)


def _files(name: str, disk: Disk) -> dict[str, str]:
    major, minor = disk.number
    return {**disk.attributes, 'dev': f'{major}:{minor}',
            'uevent': f'MAJOR={major}\nMINOR={minor}\nDEVNAME={name}\n'
                      f'DEVTYPE=disk'}


def _make_directory(path: str) -> None:
    """Make a directory that every user of a guest can read, whatever the
    umask of nova-compute."""
    if not os.path.isdir(path):
        os.makedirs(path, exist_ok=True)
        os.chmod(path, 0o755)


def _put(path: str, content: str, staging: str) -> None:
    """Write a file unless it has the content; readers never see a part."""
    with contextlib.suppress(FileNotFoundError):
        with open(path, encoding='utf-8') as present:
            if present.read() == content:
                return
    temporary = os.path.join(staging, 'file')
    with open(temporary, 'w', encoding='utf-8') as stream:
        stream.write(content)
        os.fchmod(stream.fileno(), 0o644)
    os.replace(temporary, path)


def _link(target: str, path: str, staging: str) -> None:
    with contextlib.suppress(OSError):
        if os.readlink(path) == target:
            return
    temporary = os.path.join(staging, 'link')
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    os.symlink(target, temporary)
    os.replace(temporary, path)
