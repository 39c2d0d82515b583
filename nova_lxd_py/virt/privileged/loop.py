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

"""Loop devices for volumes and config drives that are files, as root.

The loop device of a volume has the volume's id as its file name, which
``losetup`` shows, so that the driver finds it by that whatever its number, and
never touches another one. The loop device of a config drive has the instance's
UUID instead. Only devices whose file is below a directory of this nova-compute
count: while a server migrates, another nova-compute on the same machine may
have one for the same volume. Direct I/O is used if the file's filesystem
supports it: the guest caches the data already, and a write that the guest has
seen acknowledged must be on the storage.

This module is imported by the privileged daemon: it must not import nova.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import os
import re
import stat
import struct
import time

from oslo_log import log as logging

from nova_lxd_py.virt import privileged
from nova_lxd_py.virt.privileged import children

LOG = logging.getLogger(__name__)

#: Timeout of one change in seconds; the storage may be slow to answer.
TIMEOUT = 120
#: Seconds after which a child process that makes it is killed.
_DEADLINE = 100

# From linux/loop.h.
_CLR_FD = 0x4C01
_GET_STATUS64 = 0x4C05
_SET_CAPACITY = 0x4C07
_SET_DIRECT_IO = 0x4C08
_CONFIGURE = 0x4C0A
_GET_FREE = 0x4C82
_READ_ONLY = 1
# struct loop_info64: device, inode, rdevice, offset, sizelimit, number,
# encryption type and key size, flags, file name, crypt name, key, init.
_INFO = struct.Struct('=5Q4I64s64s32s2Q')
# struct loop_config: fd, block size, struct loop_info64, reserved.
_CONFIG = struct.Struct(f'=2I{_INFO.size}s64s')

_MAJOR = 7
_LABEL = 'nova:'
_UUID = re.compile(r'[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}')
#: os-brick names the mount point of a share by a checksum of the share.
_SHARE = re.compile(r'(?:/[^/\0]+)+/[0-9a-f]{32}')

#: What the kernel appends to the path of a file that has been deleted.
_DELETED = ' (deleted)'

#: Attempts to get a free loop device before other processes take it.
_ATTEMPTS = 32
#: Seconds to wait for the kernel to release a device.
_PATIENCE = 5.0
#: The same for one that may be in use for long.
_MOMENT = 1.0


@dataclasses.dataclass(frozen=True)
class _Loop:
    path: str
    device: int
    inode: int
    flags: int


def _label(volume_id: str) -> bytes:
    if not isinstance(volume_id, str) or not _UUID.fullmatch(volume_id):
        raise ValueError(f'{volume_id!r} is not the id of a volume')
    return (_LABEL + volume_id).encode('ascii')


@contextlib.contextmanager
def _opened(path: str, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def is_own(file: str, directory: str) -> bool:
    """Return whether the file of a loop device is one of this nova-compute.
    This needs no privileges.

    If the mount with the file is gone, with the container in which
    nova-compute was running or as the share was unmounted, the kernel shows
    the path below that mount; it is the path of no directory then.

    :param file: path of the file, as the kernel shows it.
    :param directory: the directory of this nova-compute that has such files.
    """
    found = os.path.dirname(file)
    return (file.startswith(os.path.realpath(directory) + '/') or
            found == '/' or not os.path.isdir(found))


def _find(label: bytes, directory: str) -> _Loop | None:
    """Find the loop device of a volume whose file is below a directory."""
    return next((device for found, device in _labelled(
        lambda file: is_own(file, directory)) if found == label), None)


def _labelled(wanted: Callable[[str], bool]
              ) -> Iterator[tuple[bytes, _Loop]]:
    """List loop devices with their labels.

    The other ones are not opened: the kernel does not detach a device from
    its file while another process has it open, if only for a moment.

    :param wanted: whether to list a device, by the path of its file.
    """
    for name in os.listdir('/sys/block'):
        file = _backing_file(name)
        if not file or not wanted(file):
            continue
        path = f'/dev/{name}'
        answer = bytearray(_INFO.size)
        try:
            with _opened(path, os.O_RDONLY) as descriptor:
                fcntl.ioctl(descriptor, _GET_STATUS64, answer)
        except OSError as error:
            # Removed meanwhile, or the storage of its file does not answer.
            LOG.debug('Loop device %s cannot be queried: %s', path, error)
            continue
        fields = _INFO.unpack(bytes(answer))
        yield fields[9].rstrip(b'\0'), _Loop(path, fields[0], fields[1],
                                             fields[8])


def _node(number: int) -> str:
    """Return the path of a loop device; create its node if udev did not."""
    path = f'/dev/loop{number}'
    if not os.path.exists(path):
        with contextlib.suppress(FileExistsError):
            os.mknod(path, stat.S_IFBLK | 0o600, os.makedev(_MAJOR, number))
    return path


def _set_up(file: int, label: bytes, read_only: bool) -> str:
    """Configure a free loop device for a file."""
    info = _INFO.pack(0, 0, 0, 0, 0, 0, 0, 0, _READ_ONLY if read_only else 0,
                      label, b'', b'', 0, 0)
    config = bytearray(_CONFIG.pack(file, 0, info, b''))
    mode = os.O_RDONLY if read_only else os.O_RDWR
    for _attempt in range(_ATTEMPTS):
        with _opened('/dev/loop-control', os.O_RDWR) as control:
            path = _node(fcntl.ioctl(control, _GET_FREE))
        with _opened(path, mode) as device:
            try:
                fcntl.ioctl(device, _CONFIGURE, config)
            except OSError as error:
                if error.errno == errno.EBUSY:
                    continue
                raise
            try:
                fcntl.ioctl(device, _SET_DIRECT_IO, 1)
            except OSError as error:
                LOG.info('Loop device %s has no direct I/O and uses the page '
                         'cache of the host: %s', path, error)
        return path
    raise OSError(errno.EBUSY, 'There is no free loop device')


@privileged.context.entrypoint_with_timeout(TIMEOUT)
@children.killable(_DEADLINE)
def attach(path: str, volume_id: str, read_only: bool, directory: str) -> str:
    """Attach a loop device to the file of a volume. Idempotent.

    :param path: path of the file, which must be a regular one.
    :param volume_id: Cinder's id of the volume.
    :param read_only: whether the device is read-only.
    :param directory: the directory of this nova-compute that has such files.
    :returns: path of the loop device.
    :raises OSError: if there is no such file, or the kernel refuses.
    """
    label = _label(volume_id)
    flags = os.O_RDONLY if read_only else os.O_RDWR
    with _opened(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK) as file:
        about = os.fstat(file)
        if not stat.S_ISREG(about.st_mode):
            raise OSError(errno.EINVAL, 'The volume is not a regular file',
                          path)
        found = _find(label, directory)
        if found is None:
            return _set_up(file, label, read_only)
        if (found.device, found.inode) != (about.st_dev, about.st_ino):
            raise OSError(errno.EBUSY, f'{found.path} is attached to another '
                          f'file of the volume', path)
        if bool(found.flags & _READ_ONLY) != bool(read_only):
            raise OSError(errno.EBUSY, f'{found.path} is attached in another '
                          f'access mode', path)
    return found.path


@privileged.context.entrypoint_with_timeout(TIMEOUT)
@children.killable(_DEADLINE)
def detach(volume_id: str, force: bool, directory: str) -> bool:
    """Detach the loop device of a volume.

    :param volume_id: Cinder's id of the volume.
    :param force: if the device is in use, detach it as soon as it is not;
        wait only a moment for that.
    :param directory: the directory of this nova-compute that has its file.
    :returns: whether there was a loop device.
    :raises OSError: with errno EBUSY if it is in use, without force.
    """
    label = _label(volume_id)
    found = _find(label, directory)
    if found is None:
        return False
    if not force:
        # The kernel would defer detaching a device in use, without an error.
        with _opened(found.path, os.O_RDONLY | os.O_EXCL):
            pass
    with _opened(found.path, os.O_RDONLY) as device:
        os.fsync(device)
        with contextlib.suppress(OSError):
            fcntl.ioctl(device, _CLR_FD)
    # A process that looks at all devices, such as udev, blkid or losetup, may
    # have it open.
    deadline = time.monotonic() + (_MOMENT if force else _PATIENCE)
    while _find(label, directory) is not None:
        if time.monotonic() > deadline:
            if force:
                break
            raise OSError(errno.EBUSY, 'The loop device is still in use',
                          found.path)
        time.sleep(0.02)
    return True


@privileged.context.entrypoint_with_timeout(TIMEOUT)
@children.killable(_DEADLINE)
def share_path(volume_id: str, directory: str) -> str | None:
    """Return the mount point of the share with the file of a volume.

    :param volume_id: Cinder's id of the volume.
    :param directory: where os-brick mounts the shares.
    :returns: path of the mount point; None if the file is not on a share, or
        the volume has no loop device.
    """
    found = _find(_label(volume_id), directory)
    return _share(_backing_file(os.path.basename(found.path))
                  ) if found else None


@privileged.context.entrypoint_with_timeout(TIMEOUT)
@children.killable(_DEADLINE)
def volumes(directory: str) -> dict[str, str]:
    """List the volumes with loop devices on shares that are mounted below a
    directory.

    The kernel lists loop devices of all containers, in which files of others
    may have the same paths.

    :param directory: where os-brick mounts the shares.
    :returns: paths of loop devices by volume IDs.
    :raises OSError: if a share does not answer in time.
    """
    def is_below(file: str) -> bool:
        share = _share(file)
        return share is not None and os.path.dirname(share) == directory

    found = {}
    for label, device in _labelled(is_below):
        volume_id = label.decode('ascii', 'replace').removeprefix(_LABEL)
        if (label.startswith(_LABEL.encode()) and _UUID.fullmatch(volume_id)
                and _has_file(device)):
            found[volume_id] = device.path
    return found


def _has_file(device: _Loop) -> bool:
    """Return whether the file of a loop device is one of this container, or
    was one before it was deleted."""
    path = _backing_file(os.path.basename(device.path))
    try:
        about = os.stat(path.removesuffix(_DELETED), follow_symlinks=False)
    except FileNotFoundError:
        return path.endswith(_DELETED)
    return (about.st_dev, about.st_ino) == (device.device, device.inode)


def _share(file: str) -> str | None:
    """Return the mount of the share on which a loop device's file lies."""
    path = os.path.dirname(file)
    return path if _SHARE.fullmatch(path) else None


def _backing_file(name: str) -> str:
    with contextlib.suppress(OSError):
        with open(f'/sys/block/{name}/loop/backing_file',
                  encoding='utf-8') as stream:
            return stream.read().strip()
    return ''


def is_used_below(directory: str) -> bool:
    """Return whether there is a loop device for a file below a directory. This
    needs no privileges.

    :param directory: path of the directory.
    """
    return any(_backing_file(name).startswith(f'{directory}/')
               for name in os.listdir('/sys/block'))


@privileged.context.entrypoint_with_timeout(TIMEOUT)
@children.killable(_DEADLINE)
def update_size(volume_id: str, directory: str) -> None:
    """Update the size of a volume's loop device to the size of its file.

    :param volume_id: Cinder's id of the volume.
    :param directory: the directory of this nova-compute that has its file.
    :raises OSError: if there is no loop device, or the kernel refuses.
    """
    found = _find(_label(volume_id), directory)
    if found is None:
        raise FileNotFoundError(errno.ENOENT, 'The volume has no loop device')
    with _opened(found.path, os.O_RDONLY) as device:
        fcntl.ioctl(device, _SET_CAPACITY)


@privileged.context.entrypoint_with_timeout(TIMEOUT)
@children.killable(_DEADLINE)
def release_share(path: str) -> bool:
    """Unmount a share unless a loop device uses it.

    :param path: mount point that os-brick has chosen.
    :returns: whether it was unmounted.
    :raises OSError: if the kernel refuses, other than because the share is in
        use or not mounted.
    """
    if (not isinstance(path, str) or not _SHARE.fullmatch(path) or
            os.path.normpath(path) != path):
        raise ValueError(f'{path!r} is not the mount point of a share')
    if is_used_below(path):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(path), 0):
        number = ctypes.get_errno()
        # In use, not mounted, or removed already.
        if number in (errno.EBUSY, errno.EINVAL, errno.ENOENT):
            return False
        raise OSError(number, os.strerror(number), path)
    with contextlib.suppress(OSError):
        os.rmdir(path)
    return True
