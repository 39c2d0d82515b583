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

"""Filesystems on volumes: made, mounted for a guest and grown, as root.

A guest's ids are others on the host, and other ones for each server. The mount
that a guest gets maps them: what is root's on the volume is root's in the
guest, and what the guest writes is written with its own ids. Nothing on the
volume is changed for that, so the next server finds it as this one left it.

This module is imported by the privileged daemon: it must not import nova.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re

from nova_lxd_py.virt import privileged
from nova_lxd_py.virt.privileged import command
from nova_lxd_py.virt.privileged import user_namespaces
from nova_lxd_py.virt.privileged import validation

#: Filesystems that can be had, and how each is made. Nothing is discarded
#: and the whole of a large volume is not written.
MAKERS = {'ext4': ('mkfs.ext4', '-q', '-E', 'root_owner=0:0,nodiscard'),
          'xfs': ('mkfs.xfs', '-q', '-K')}
#: Data for mount(2). A copy of a volume has the same UUID as the volume.
_MOUNT_DATA = {'ext4': 'errors=remount-ro', 'xfs': 'nouuid'}

# From linux/mount.h.
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH = 1, 4
_AT_EMPTY_PATH, _AT_FDCWD = 0x1000, -100
MOUNT_ATTR_NOSUID, MOUNT_ATTR_IDMAP = 0x2, 0x00100000
# From linux/fs.h.
_FIFREEZE, _FITHAW = 0xc0045877, 0xc0045878
# The same on every architecture.
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_MOUNT_SETATTR = 428, 429, 442

_libc = ctypes.CDLL(None, use_errno=True)


class MountAttributes(ctypes.Structure):
    _fields_ = [('attr_set', ctypes.c_uint64), ('attr_clr', ctypes.c_uint64),
                ('propagation', ctypes.c_uint64),
                ('userns_fd', ctypes.c_uint64)]


def _kind(name: str) -> str:
    if name not in MAKERS:
        raise ValueError(f'{name!r} is not a filesystem for volumes')
    return name


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f'{what}: {os.strerror(number)}')
    return result


@privileged.context.entrypoint_with_timeout(command.TIMEOUT)
def make(device: str, kind: str, label: str) -> None:
    """Make a filesystem on an empty volume.

    :param device: path of its block device.
    :param kind: one of MAKERS.
    :param label: up to 12 letters and digits.
    :raises OSError: if there is anything on it, or it cannot be written.
    """
    maker = MAKERS[_kind(kind)]
    if not isinstance(label, str) or not re.fullmatch(r'[a-z0-9-]{1,12}',
                                                      label):
        raise ValueError(f'{label!r} is not a label')
    path = os.path.realpath(validation.checked_device(device))
    # Without -F and -f both refuse where they find something.
    command.run(*maker, '-L', label, path)


def clone_tree(folder: int) -> int:
    """Make another mount of an open folder, which is nowhere yet.

    :param folder: descriptor of the folder.
    :returns: descriptor of the mount.
    :raises OSError: the kernel refuses.
    """
    return _checked(_libc.syscall(
        _SYS_OPEN_TREE, folder, b'',
        _OPEN_TREE_CLONE | _AT_EMPTY_PATH | os.O_CLOEXEC), 'open_tree')


def set_attributes(tree: int, attributes: MountAttributes) -> None:
    """Change a mount.

    :param tree: descriptor of the mount.
    :param attributes: what to change.
    :raises OSError: the kernel refuses.
    """
    _checked(_libc.syscall(
        _SYS_MOUNT_SETATTR, tree, b'', _AT_EMPTY_PATH,
        ctypes.byref(attributes), ctypes.sizeof(attributes)),
        'mount_setattr')


def place_tree(tree: int, target: str) -> None:
    """Put a mount where it is to be found.

    :param tree: descriptor of the mount.
    :param target: the folder.
    :raises OSError: the kernel refuses.
    """
    _checked(_libc.syscall(
        _SYS_MOVE_MOUNT, tree, b'', _AT_FDCWD, os.fsencode(target),
        _MOVE_MOUNT_F_EMPTY_PATH), 'move_mount')


def _map_ids(target: str, uid_base: int, gid_base: int, size: int) -> None:
    """Put a mount with mapped ids in place of a plain one."""
    folder = os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        tree = clone_tree(folder)
    finally:
        os.close(folder)
    try:
        with user_namespaces.user_namespace(
                uid_base, gid_base, size) as namespace:
            set_attributes(tree, MountAttributes(
                attr_set=MOUNT_ATTR_IDMAP, userns_fd=namespace))
        _checked(_libc.umount2(os.fsencode(target), _UMOUNT_NOFOLLOW),
                 'umount')
        place_tree(tree, target)
    finally:
        os.close(tree)


def is_mounted(target: str) -> bool:
    """Whether something is mounted at a folder."""
    with open('/proc/self/mountinfo', encoding='utf-8') as stream:
        return any(line.split()[4] == target for line in stream)


def attach_plain(device: str, kind: str, target: str, flags: int) -> None:
    """Mount a filesystem as it is.

    :param device: path of the volume's block device.
    :param kind: one of MAKERS.
    :param target: the folder.
    :param flags: for mount(2).
    :raises OSError: the kernel refuses.
    """
    path = os.path.realpath(validation.checked_device(device))
    kind = _kind(kind)
    _checked(_libc.mount(
        os.fsencode(path), os.fsencode(target), kind.encode('ascii'),
        ctypes.c_ulong(flags), _MOUNT_DATA[kind].encode('ascii')), 'mount')


def detach_mounts(target: str, force: bool) -> bool:
    """Unmount whatever is mounted at a folder.

    :param target: the folder.
    :param force: if something uses it still, have it go as soon as that ends.
    :returns: whether there was anything.
    :raises OSError: something uses it (errno EBUSY), without force.
    """
    found = False
    while is_mounted(target):
        found = True
        if force:
            # Where something keeps it, its device may go before it does.
            with contextlib.suppress(OSError):
                _sync_folder(target)
        _checked(_libc.umount2(
            os.fsencode(target),
            _UMOUNT_NOFOLLOW | (_MNT_DETACH if force else 0)), 'umount')
    return found


def _sync_folder(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        sync_filesystem(descriptor)
    finally:
        os.close(descriptor)


def sync_filesystem(descriptor: int) -> None:
    """Write all that a filesystem has in the host's memory.

    :param descriptor: of anything on it.
    :raises OSError: it could not be written.
    """
    _checked(_libc.syncfs(descriptor), 'syncfs')


def make_directory(target: str) -> None:
    """Make the folder of a mount, which nobody can use before.

    :param target: the folder.
    """
    os.makedirs(os.path.dirname(validation.checked_target(target)), mode=0o711,
                exist_ok=True)
    # A guest that got the bare folder could not write to it.
    with contextlib.suppress(FileExistsError):
        os.mkdir(target, mode=0o000)


@privileged.context.entrypoint_with_timeout(command.TIMEOUT)
def prepare(target: str) -> None:
    """Make the folder of a mount, which nobody can use before.

    :param target: the folder.
    """
    make_directory(target)


@privileged.context.entrypoint_with_timeout(command.TIMEOUT)
def mount(device: str, kind: str, target: str, read_only: bool,
          uid_base: int, gid_base: int, size: int) -> None:
    """Mount the filesystem of a volume with the ids of a guest.

    What is mounted there already is unmounted before. A journal that was left
    is replayed by the kernel; nothing else is repaired.

    :param device: path of the volume's block device.
    :param kind: one of MAKERS.
    :param target: the folder, which ends with the volume's id.
    :param read_only: whether nothing may be written to it.
    :param uid_base: user of the host that is root in the guest.
    :param gid_base: group of the host that is root's in the guest.
    :param size: how many ids follow in both; 0 does not map them, for a guest
        with the ids of the host.
    :raises OSError: if the kernel refuses.
    """
    validation.check_ids(uid_base, gid_base, size)
    path = os.path.realpath(validation.checked_device(device))
    kind = _kind(kind)
    make_directory(target)
    detach_mounts(validation.checked_target(target), False)
    flags = MS_NOSUID | MS_NODEV | (MS_RDONLY if read_only else 0)
    attach_plain(path, kind, target, flags)
    if size:
        try:
            _map_ids(target, uid_base, gid_base, size)
        except OSError:
            _libc.umount2(os.fsencode(target), _MNT_DETACH)
            raise


@privileged.context.entrypoint_with_timeout(command.TIMEOUT)
def unmount(target: str, force: bool) -> bool:
    """Unmount the filesystem of a volume.

    :param target: the folder.
    :param force: if something uses it still, have it go as soon as that ends.
    :returns: whether it was mounted.
    :raises OSError: if something uses it (errno EBUSY), without force.
    """
    found = detach_mounts(validation.checked_target(target), force)
    with contextlib.suppress(OSError):
        os.rmdir(target)
    return found


@privileged.context.entrypoint_with_timeout(command.TIMEOUT)
def is_held(device: str) -> bool:
    """Whether a filesystem or anything else of the kernel uses a device.

    :param device: path of the block device.
    """
    try:
        os.close(os.open(validation.checked_device(device),
                         os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return True
        raise
    return False


@privileged.context.entrypoint_with_timeout(command.TIMEOUT)
def grow(device: str, kind: str, target: str) -> None:
    """Have a mounted filesystem fill its volume.

    :param device: path of the volume's block device.
    :param kind: one of MAKERS.
    :param target: where it is mounted.
    :raises OSError: if the kernel refuses.
    """
    path = os.path.realpath(validation.checked_device(device))
    if not is_mounted(validation.checked_target(target)):
        raise FileNotFoundError(errno.ENOENT, 'It is not mounted', target)
    if _kind(kind) == 'xfs':
        command.run('xfs_growfs', '-d', target)
    else:
        command.run('resize2fs', path)


@privileged.context.entrypoint_with_timeout(command.TIMEOUT)
def freeze(target: str) -> bool:
    """Bring a filesystem to rest, so that its device can be copied.

    :param target: where it is mounted.
    :returns: whether it is mounted at all.
    :raises OSError: if the kernel refuses.
    """
    return _freeze(target, _FIFREEZE, errno.EBUSY)


@privileged.context.entrypoint_with_timeout(command.TIMEOUT)
def thaw(target: str) -> bool:
    """Let a filesystem be written to again; again is no change.

    :param target: where it is mounted.
    :returns: whether it is mounted at all.
    :raises OSError: if the kernel refuses.
    """
    return _freeze(target, _FITHAW, errno.EINVAL)


def _freeze(target: str, request: int, already: int) -> bool:
    if not is_mounted(validation.checked_target(target)):
        return False
    descriptor = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, request, 0)
    except OSError as error:
        if error.errno != already:
            raise
    finally:
        os.close(descriptor)
    return True
