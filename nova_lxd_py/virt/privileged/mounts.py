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

"""Filesystems on volumes: created, mounted for guests and grown, as root.

Ids of a guest are mapped to a range of host ids, which differs between
instances. The mount for a guest is idmapped: files of root on the volume
belong to root in the guest, and the guest creates files with its own ids. The
volume itself does not contain host ids, so that it can be attached to any
instance.

This module is imported by the privileged daemon: it must not import nova.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import ctypes
import errno
import functools
import os
import re
import time

from nova_lxd_py.virt import privileged
from nova_lxd_py.virt.privileged import children
from nova_lxd_py.virt.privileged import command
from nova_lxd_py.virt.privileged import superblock
from nova_lxd_py.virt.privileged import user_namespaces
from nova_lxd_py.virt.privileged import validation

#: Supported filesystems, and the commands that create them. They neither
#: discard blocks nor write to the whole of a large volume.
MAKERS = {'ext4': ('mkfs.ext4', '-q', '-E', 'root_owner=0:0,nodiscard'),
          'xfs': ('mkfs.xfs', '-q', '-K')}
#: Maximum number of characters of a label; XFS allows no more.
LABEL_LENGTH = 12

#: Seconds to wait until a filesystem that has shut itself down is not mounted
#: anywhere any more, and between attempts.
_SHUT_DOWN_TIMEOUT = 15
_SHUT_DOWN_POLL = 0.2
#: Data for mount(2). A clone of a volume has the same UUID as the volume.
_MOUNT_DATA = {'ext4': 'errors=remount-ro', 'xfs': 'nouuid'}

#: Directories of storage pools and of the volumes in them.
_POOL = re.compile(r'(?:/[^/\0]+)*/storage-pools(?:/[^/\0]+)+')

# From linux/mount.h.
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH = 1, 4
_AT_EMPTY_PATH, _AT_FDCWD = 0x1000, -100
MOUNT_ATTR_NOSUID, MOUNT_ATTR_IDMAP = 0x2, 0x00100000
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
def make_filesystem(device: str, kind: str, label: str) -> None:
    """Create a filesystem on an empty volume.

    :param device: path of its block device.
    :param kind: one of MAKERS.
    :param label: label of up to LABEL_LENGTH letters, digits and dashes.
    :raises OSError: if the volume is not empty, or cannot be written to.
    """
    maker = MAKERS[_kind(kind)]
    if not isinstance(label, str) or not re.fullmatch(
            rf'[a-z0-9-]{{1,{LABEL_LENGTH}}}', label):
        raise ValueError(f'{label!r} is not a label')
    path = os.path.realpath(validation.checked_device(device))
    # Without -F and -f both programs refuse if they find a signature.
    command.run(*maker, '-L', label, path)


def clone_tree(directory: int) -> int:
    """Clone the mount of an open directory, without attaching the clone.

    :param directory: file descriptor of the directory.
    :returns: file descriptor of the detached mount.
    :raises OSError: if the kernel refuses.
    """
    return _checked(_libc.syscall(
        _SYS_OPEN_TREE, directory, b'',
        _OPEN_TREE_CLONE | _AT_EMPTY_PATH | os.O_CLOEXEC), 'open_tree')


def set_attributes(tree: int, attributes: MountAttributes) -> None:
    """Change attributes of a mount with mount_setattr(2).

    :param tree: file descriptor of the mount.
    :param attributes: attributes to change.
    :raises OSError: if the kernel refuses.
    """
    _checked(_libc.syscall(
        _SYS_MOUNT_SETATTR, tree, b'', _AT_EMPTY_PATH,
        ctypes.byref(attributes), ctypes.sizeof(attributes)),
        'mount_setattr')


def place_tree(tree: int, target: str) -> None:
    """Attach a detached mount.

    :param tree: file descriptor of the mount.
    :param target: path of the mount point.
    :raises OSError: if the kernel refuses.
    """
    _checked(_libc.syscall(
        _SYS_MOVE_MOUNT, tree, b'', _AT_FDCWD, os.fsencode(target),
        _MOVE_MOUNT_F_EMPTY_PATH), 'move_mount')


def _map_ids(target: str, namespace: int) -> None:
    """Replace a mount by an idmapped one."""
    directory = os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        tree = clone_tree(directory)
    finally:
        os.close(directory)
    try:
        set_attributes(tree, MountAttributes(
            attr_set=MOUNT_ATTR_IDMAP, userns_fd=namespace))
        _checked(_libc.umount2(os.fsencode(target), _UMOUNT_NOFOLLOW),
                 'umount')
        place_tree(tree, target)
    finally:
        os.close(tree)


def is_mounted(target: str) -> bool:
    """Return whether a directory is a mount point."""
    with open('/proc/self/mountinfo', encoding='utf-8') as stream:
        return any(line.split()[4] == target for line in stream)


def attach_plain(device: str, kind: str, target: str, flags: int,
                 discard: bool = False) -> None:
    """Mount a filesystem without mapping ids.

    :param device: path of the volume's block device.
    :param kind: one of MAKERS.
    :param target: path of the mount point.
    :param flags: flags for mount(2).
    :param discard: whether the device is told of blocks that become free;
        ignored by the kernel if it does not support that.
    :raises OSError: with errno EPERM if the superblock has a feature that
        must not be mounted; with errno EIO if the filesystem has shut itself
        down and is still mounted elsewhere; if the kernel refuses.
    """
    path = os.path.realpath(validation.checked_device(device))
    kind = _kind(kind)
    _check_superblock(path, kind)
    data = _MOUNT_DATA[kind] + (',discard' if discard else '')
    deadline = time.monotonic() + _SHUT_DOWN_TIMEOUT
    while True:
        _checked(_libc.mount(
            os.fsencode(path), os.fsencode(target), kind.encode('ascii'),
            ctypes.c_ulong(flags), data.encode('ascii')), 'mount')
        if not _has_shut_down(target):
            return
        # The kernel has mounted the same broken filesystem again, since it is
        # in another mount namespace: for a moment in that of a process of LXD
        # in the guest that has just stopped, or of a guest that is starting.
        _checked(_libc.umount2(os.fsencode(target), _MNT_DETACH), 'umount')
        if time.monotonic() > deadline:
            raise OSError(
                errno.EIO, 'The filesystem has shut itself down after an '
                'error of the storage, and a process on the host has it '
                'mounted still; end the processes with its device in '
                '/proc/<pid>/mountinfo', target)
        time.sleep(_SHUT_DOWN_POLL)


def _has_shut_down(target: str) -> bool:
    try:
        os.stat(target)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return True
    return False


def _check_superblock(path: str, kind: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        feature = superblock.refusal(descriptor, kind)
    finally:
        os.close(descriptor)
    if feature:
        raise OSError(errno.EPERM, f'{kind} with {feature} is not mounted')


def detach_mounts(target: str, force: bool) -> bool:
    """Unmount all that is mounted at a directory.

    :param target: path of the directory.
    :param force: if it is in use, unmount it lazily (``MNT_DETACH``).
    :returns: whether anything was mounted.
    :raises OSError: with errno EBUSY if it is in use, without force.
    """
    found = False
    while is_mounted(target):
        found = True
        if force:
            # A lazy unmount may complete after the device has gone.
            with contextlib.suppress(OSError):
                _sync_directory(target)
        _checked(_libc.umount2(
            os.fsencode(target),
            _UMOUNT_NOFOLLOW | (_MNT_DETACH if force else 0)), 'umount')
    return found


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        sync_filesystem(descriptor)
    finally:
        os.close(descriptor)


def sync_filesystem(descriptor: int) -> None:
    """Write the dirty data of a filesystem to its device.

    :param descriptor: file descriptor of any file on the filesystem.
    :raises OSError: if it cannot be written.
    """
    _checked(_libc.syncfs(descriptor), 'syncfs')


def _check_deadline(deadline: float) -> float:
    if not 0 < deadline <= command.DEADLINE:
        raise ValueError(f'{deadline!r} is not a deadline in seconds')
    return deadline


@privileged.context.entrypoint_with_timeout(command.TIMEOUT)
def sync(target: str, deadline: float) -> None:
    """Write the dirty data of a mounted volume to its storage.

    :param target: path of the mount point. Without a mount, nothing is done.
    :param deadline: seconds after which to give up, at most DEADLINE.
    :raises OSError: if it cannot be written, or not in time.
    """
    validation.checked_target(target)

    def write() -> None:
        # The directory below belongs to a filesystem of the host.
        if is_mounted(target):
            _sync_directory(target)

    children.run(_check_deadline(deadline), write, name='syncfs')


@privileged.context.entrypoint_with_timeout(command.TIMEOUT)
def sync_device(device: str, deadline: float) -> None:
    """Write the cached data of a block device to its storage.

    :param device: path of the block device.
    :param deadline: seconds after which to give up, at most DEADLINE.
    :raises OSError: if it cannot be written, or not in time.
    """
    path = validation.checked_device(device)

    def write() -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    children.run(_check_deadline(deadline), write, name='fsync')


@privileged.context.entrypoint_with_timeout(command.TIMEOUT)
def sync_pool(pool: str, deadline: float) -> None:
    """Write the dirty data of an LXD storage pool or volume to its storage.

    :param pool: directory of the pool or volume below LXD's data directory.
    :param deadline: seconds after which to give up, at most DEADLINE.
    :raises OSError: if it cannot be written, or not in time.
    """
    if (not isinstance(pool, str) or not _POOL.fullmatch(pool) or
            os.path.normpath(pool) != pool):
        raise ValueError(f'{pool!r} is not the directory of a storage pool')
    children.run(_check_deadline(deadline),
                 functools.partial(_sync_directory, pool), name='syncfs')


@privileged.context.entrypoint_with_timeout(command.TIMEOUT)
def sync_host(deadline: float) -> None:
    """Write the dirty data of all filesystems of the host to their storage.

    :param deadline: seconds after which to give up, at most DEADLINE.
    :raises OSError: if it cannot be written in time.
    """
    children.run(_check_deadline(deadline), os.sync, name='sync')


def make_directory(target: str) -> None:
    """Create a mount point that is inaccessible until it is mounted.

    :param target: path of the mount point.
    """
    os.makedirs(os.path.dirname(validation.checked_target(target)), mode=0o711,
                exist_ok=True)
    # A guest that is given the directory itself cannot write to it.
    with contextlib.suppress(FileExistsError):
        os.mkdir(target, mode=0o000)


@privileged.context.entrypoint_with_timeout(command.TIMEOUT)
def create_mount_point(target: str) -> None:
    """Create a mount point that is inaccessible until it is mounted.

    :param target: path of the mount point.
    """
    make_directory(target)


@privileged.context.entrypoint_with_timeout(command.TIMEOUT)
def mount(device: str, kind: str, target: str, read_only: bool,
          discard: bool, uid_base: int, gid_base: int, size: int) -> None:
    """Mount the filesystem of a volume with the ids of a guest.

    A mount that exists at the mount point is unmounted first. The kernel
    replays the journal of the filesystem; it is not repaired otherwise.

    :param device: path of the volume's block device.
    :param kind: one of MAKERS.
    :param target: path of the mount point, which ends with the volume's id.
    :param read_only: whether the mount is read-only.
    :param discard: see :func:`attach_plain`.
    :param uid_base: host uid of root in the guest.
    :param gid_base: host gid of root in the guest.
    :param size: number of mapped ids in both ranges; 0 disables mapping, for a
        privileged guest.
    :raises OSError: if the kernel refuses.
    """
    validation.check_ids(uid_base, gid_base, size)
    path = os.path.realpath(validation.checked_device(device))
    kind = _kind(kind)
    make_directory(target)
    flags = MS_NOSUID | MS_NODEV | (MS_RDONLY if read_only else 0)

    def place(namespace: int | None) -> None:
        detach_mounts(validation.checked_target(target), False)
        attach_plain(path, kind, target, flags, bool(discard))
        if namespace is not None:
            try:
                _map_ids(target, namespace)
            except OSError:
                _libc.umount2(os.fsencode(target), _MNT_DETACH)
                raise

    with_namespace(place, uid_base, gid_base, size)


def with_namespace(function: Callable[[int | None], None], uid_base: int,
                   gid_base: int, size: int) -> None:
    """Call a function in a child process, with a user namespace of a guest.

    :param function: the function; it gets the namespace's file descriptor, or
        None if ids are not mapped.
    :param uid_base: host uid of root in the guest.
    :param gid_base: host gid of root in the guest.
    :param size: number of mapped ids in both ranges; 0 disables mapping.
    :raises OSError: if the function fails, or does not finish in time.
    """
    if not size:
        children.run(command.DEADLINE, functools.partial(function, None),
                     name='mount')
        return
    # Opened in the daemon, which caches namespaces.
    with user_namespaces.user_namespace(uid_base, gid_base,
                                        size) as namespace:
        children.run(command.DEADLINE, functools.partial(function, namespace),
                     keep=(namespace,), name='mount')


@privileged.context.entrypoint_with_timeout(command.TIMEOUT)
@children.killable(command.DEADLINE)
def unmount(target: str, force: bool) -> bool:
    """Unmount the filesystem of a volume.

    :param target: path of the mount point.
    :param force: if it is in use, unmount it lazily (``MNT_DETACH``).
    :returns: whether it was mounted.
    :raises OSError: with errno EBUSY if it is in use, without force.
    """
    found = detach_mounts(validation.checked_target(target), force)
    with contextlib.suppress(OSError):
        os.rmdir(target)
    return found


@privileged.context.entrypoint_with_timeout(command.TIMEOUT)
@children.killable(command.DEADLINE)
def is_in_use(device: str) -> bool:
    """Return whether the kernel uses a device, for example as a filesystem.

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
    """Grow a mounted filesystem to the size of its volume.

    :param device: path of the volume's block device.
    :param kind: one of MAKERS.
    :param target: path of the mount point.
    :raises OSError: if the kernel refuses.
    """
    path = os.path.realpath(validation.checked_device(device))
    if not is_mounted(validation.checked_target(target)):
        raise FileNotFoundError(errno.ENOENT, 'The volume is not mounted',
                                target)
    if _kind(kind) == 'xfs':
        command.run('xfs_growfs', '-d', target)
    else:
        command.run('resize2fs', path)
