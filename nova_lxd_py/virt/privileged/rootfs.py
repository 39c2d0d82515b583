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

"""Root filesystems on volumes: unpacked, and mounted for guests, as root.

A boot volume has a filesystem with the instance's root in a directory. The
directory is renamed to its final name when it is complete: without it, the
first boot of the volume was interrupted. A filesystem whose top level is a
root filesystem is supported as well.

The content of a volume is written by tenants. Therefore the host never follows
a symbolic link in it: the mount of a guest's root is cloned from an open
directory, and contains nothing above that.

This module is imported by the privileged daemon: it must not import nova.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import errno
import functools
import hashlib
import os
import shutil
import stat

from nova_lxd_py.virt import privileged
from nova_lxd_py.virt.privileged import children
from nova_lxd_py.virt.privileged import command
from nova_lxd_py.virt.privileged import mounts
from nova_lxd_py.virt.privileged import validation

#: Timeout for reading the image on a volume, in seconds.
READ_TIMEOUT = 3600
_READ_DEADLINE = 3500

#: Directory on a volume with the root filesystem of an instance.
ROOT_DIRECTORY = 'rootfs'
#: Directory on a volume in which the root filesystem is unpacked.
STAGING = 'nova-unpack'

#: Results of :func:`root_state`.
READY, UNFINISHED, OTHER = 'ready', 'unfinished', 'other'

#: Directories or links that every Linux root filesystem has.
_WHOLE = ('etc', 'sbin')

#: Bytes to zero at the beginning of a volume.
_HEAD = 1 << 20
#: Bytes per read.
CHUNK = 4 << 20

_WRAPPER = 'root-'

_OPEN_DIRECTORY = (os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def mount_parent(identifier: str) -> str:
    """Return the name of the directory with the mount point of a root.

    :param identifier: Cinder's id of the volume.
    """
    return _WRAPPER + identifier


def _root_target(target: str) -> str:
    validation.checked_target(target)
    directory, identifier = os.path.split(target)
    if os.path.basename(directory) != mount_parent(identifier):
        raise ValueError(f'{target!r} is not the mount point of a root')
    return target


# -- what is on a volume ----------------------------------------------------

@privileged.context.entrypoint_with_timeout(READ_TIMEOUT)
@children.killable(_READ_DEADLINE)
def contains_image(device: str, size: int, checksum: str) -> bool:
    """Return whether a volume begins with exactly the bytes of an image.

    :param device: path of the volume's block device.
    :param size: size of the image in bytes.
    :param checksum: MD5 of the image in hexadecimal, as Cinder records it.
    :raises OSError: if the volume cannot be read.
    """
    return _digest(validation.checked_device(device), size) == checksum


def _digest(path: str, size: int) -> str:
    if not isinstance(size, int) or size <= 0:
        raise ValueError(f'{size!r} is not a size')
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, 'rb', buffering=0) as stream:
        while size > 0:
            chunk = stream.read(min(CHUNK, size))
            if not chunk:
                return ''
            digest.update(chunk)
            size -= len(chunk)
        # Do not let the data displace other data from the page cache.
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return digest.hexdigest()


@privileged.context.entrypoint_with_timeout(command.TIMEOUT)
@children.killable(command.DEADLINE)
def read(device: str, position: int, size: int) -> bytes:
    """Read a part of the image on a volume.

    :param device: path of the volume's block device.
    :param position: offset of the part in bytes.
    :param size: length of the part in bytes, at most CHUNK.
    :raises OSError: if the volume cannot be read.
    """
    if not isinstance(position, int) or position < 0 or (
            not isinstance(size, int) or not 0 <= size <= CHUNK):
        raise ValueError(f'{size!r} bytes at {position!r} cannot be read')
    with open(validation.checked_device(device), 'rb', buffering=0) as stream:
        stream.seek(position)
        return stream.read(size)


@privileged.context.entrypoint_with_timeout(READ_TIMEOUT)
@children.killable(_READ_DEADLINE)
def wipe_image(device: str, size: int, checksum: str) -> None:
    """Remove the image on a volume, and nothing else.

    :param device: path of the volume's block device.
    :param size: size of the image in bytes.
    :param checksum: MD5 of the image in hexadecimal.
    :raises OSError: if the volume contains other data, or cannot be written.
    """
    path = os.path.realpath(validation.checked_device(device))
    if _digest(path, size) != checksum:
        raise OSError(errno.EBUSY, 'The volume contains other data than its '
                      'image')
    command.run('wipefs', '--all', '--quiet', path)
    with open(path, 'r+b', buffering=0) as stream:
        stream.write(bytes(_HEAD))
        os.fsync(stream.fileno())


@contextlib.contextmanager
def _mounted(device: str, kind: str, target: str, flags: int
             ) -> Iterator[int]:
    """Mount a volume temporarily, and open its top-level directory."""
    _attach(device, kind, target, flags)
    try:
        directory = os.open(target, _OPEN_DIRECTORY)
        try:
            yield directory
        finally:
            os.close(directory)
    finally:
        mounts.detach_mounts(target, False)


def _attach(device: str, kind: str, target: str, flags: int,
            discard: bool = False) -> None:
    mounts.make_directory(target)
    mounts.detach_mounts(target, False)
    mounts.attach_plain(device, kind, target, flags, discard)


def _is(directory: int, name: str, *kinds: int) -> bool:
    try:
        about = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return stat.S_IFMT(about.st_mode) in kinds


def _find(directory: int) -> str:
    if _is(directory, ROOT_DIRECTORY, stat.S_IFDIR):
        return READY
    if _is(directory, STAGING, stat.S_IFDIR):
        return UNFINISHED
    if all(_is(directory, name, stat.S_IFDIR, stat.S_IFLNK)
           for name in _WHOLE):
        return READY
    # The first boot was interrupted before anything was unpacked.
    if not set(os.listdir(directory)) - {'lost+found'}:
        return UNFINISHED
    return OTHER


@privileged.context.entrypoint_with_timeout(command.TIMEOUT)
@children.killable(command.DEADLINE)
def root_state(device: str, kind: str, target: str) -> str:
    """Check whether an instance can boot from the filesystem of a volume.

    The kernel replays the journal of the filesystem.

    :param device: path of the volume's block device.
    :param kind: name of the filesystem.
    :param target: temporary mount point.
    :returns: READY, UNFINISHED if the first boot was interrupted, or OTHER.
    :raises OSError: if it cannot be mounted.
    """
    with _mounted(device, kind, validation.checked_target(target),
                  mounts.MS_RDONLY | mounts.MS_NOSUID | mounts.MS_NODEV |
                  mounts.MS_NOEXEC) as directory:
        return _find(directory)


# -- unpacking --------------------------------------------------------------

@privileged.context.entrypoint_with_timeout(command.TIMEOUT)
@children.killable(command.DEADLINE)
def open_staging(device: str, kind: str, target: str) -> str:
    """Mount a volume with an empty directory for LXD to unpack an image to.

    :param device: path of the volume's block device.
    :param kind: name of the filesystem.
    :param target: path of the mount point.
    :returns: path of the directory.
    :raises OSError: if it cannot be mounted, or contains a root already.
    """
    _attach(device, kind, validation.checked_target(target),
            mounts.MS_NOSUID | mounts.MS_NODEV)
    with contextlib.ExitStack() as undo:
        undo.callback(mounts.detach_mounts, target, True)
        if os.path.lexists(f'{target}/{ROOT_DIRECTORY}'):
            raise FileExistsError(errno.EEXIST, 'The volume contains a root '
                                  'filesystem already')
        _clear(target)
        os.mkdir(f'{target}/{STAGING}', mode=0o711)
        undo.pop_all()
    return f'{target}/{STAGING}'


def _clear(target: str) -> None:
    if os.path.lexists(f'{target}/{STAGING}'):
        # Never follows a link, and refuses a link in place of the directory.
        shutil.rmtree(f'{target}/{STAGING}')


@privileged.context.entrypoint_with_timeout(command.TIMEOUT)
@children.killable(command.DEADLINE)
def complete(target: str) -> None:
    """Turn what LXD has unpacked into the root filesystem of the volume.

    :param target: path of the mount point.
    :raises OSError: unless exactly one container has been unpacked.
    """
    containers = f'{validation.checked_target(target)}/{STAGING}/containers'
    names = os.listdir(containers)
    if len(names) != 1:
        raise OSError(errno.ENOENT, f'Expected one unpacked container, found '
                      f'{len(names)}')
    directory = os.open(f'{containers}/{names[0]}', _OPEN_DIRECTORY)
    try:
        if not _is(directory, ROOT_DIRECTORY, stat.S_IFDIR):
            raise FileNotFoundError(errno.ENOENT, 'The unpacked container has '
                                    'no root filesystem')
        # All data must be on the storage before the final name is.
        mounts.sync_filesystem(directory)
        os.rename(ROOT_DIRECTORY, f'{target}/{ROOT_DIRECTORY}',
                  src_dir_fd=directory)
        mounts.sync_filesystem(directory)
    finally:
        os.close(directory)


@privileged.context.entrypoint_with_timeout(command.TIMEOUT)
@children.killable(command.DEADLINE)
def close_staging(target: str) -> None:
    """Remove the staging directory and unmount the volume. Idempotent.

    :param target: path of the mount point.
    :raises OSError: if it is in use.
    """
    if mounts.is_mounted(validation.checked_target(target)):
        _clear(target)
        mounts.detach_mounts(target, False)
    with contextlib.suppress(OSError):
        os.rmdir(target)


# -- the root of a guest ----------------------------------------------------

@privileged.context.entrypoint_with_timeout(command.TIMEOUT)
def mount(device: str, kind: str, target: str, discard: bool, uid_base: int,
          gid_base: int, size: int) -> None:
    """Mount the root filesystem of a volume with the ids of a guest.

    A mount that exists at the mount point is unmounted first. The mount allows
    setuid programs, which a system needs. Therefore the directory above the
    mount point is accessible to the guest's root user only.

    :param device: path of the volume's block device.
    :param kind: name of the filesystem.
    :param target: path of the mount point.
    :param discard: see :func:`.mounts.attach_plain`.
    :param uid_base: host uid of root in the guest.
    :param gid_base: host gid of root in the guest.
    :param size: number of mapped ids in both ranges; 0 disables mapping.
    :raises FileNotFoundError: if there is no complete root filesystem on it.
    :raises OSError: if the kernel refuses.
    """
    validation.check_ids(uid_base, gid_base, size)
    directory = os.path.dirname(_root_target(target))
    os.makedirs(os.path.dirname(directory), mode=0o711, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory, mode=0o100)
    os.chown(directory, uid_base if size else 0, -1, follow_symlinks=False)
    mounts.with_namespace(
        functools.partial(_place, device, kind, target, bool(discard)),
        uid_base, gid_base, size)


def _place(device: str, kind: str, target: str, discard: bool,
           namespace: int | None) -> None:
    _attach(device, kind, target, mounts.MS_NOSUID | mounts.MS_NODEV, discard)
    with contextlib.ExitStack() as stack:
        stack.callback(mounts.detach_mounts, target, True)
        source = os.open(target, _OPEN_DIRECTORY)
        stack.callback(os.close, source)
        if _find(source) != READY:
            raise FileNotFoundError(errno.ENOENT, 'The volume contains no '
                                    'complete root filesystem')
        if _is(source, ROOT_DIRECTORY, stat.S_IFDIR):
            source = os.open(ROOT_DIRECTORY, _OPEN_DIRECTORY, dir_fd=source)
            stack.callback(os.close, source)
        tree = mounts.clone_tree(source)
    try:
        attributes = mounts.MountAttributes(attr_clr=mounts.MOUNT_ATTR_NOSUID)
        if namespace is not None:
            attributes.attr_set = mounts.MOUNT_ATTR_IDMAP
            attributes.userns_fd = namespace
        mounts.set_attributes(tree, attributes)
        mounts.place_tree(tree, target)
    finally:
        os.close(tree)


@privileged.context.entrypoint_with_timeout(command.TIMEOUT)
@children.killable(command.DEADLINE)
def unmount(target: str, force: bool) -> bool:
    """Unmount the root filesystem of a guest. Idempotent.

    :param target: path of the mount point.
    :param force: if it is in use, unmount it lazily (``MNT_DETACH``).
    :returns: whether it was mounted.
    :raises OSError: with errno EBUSY if it is in use, without force.
    """
    found = mounts.detach_mounts(_root_target(target), force)
    for directory in (target, os.path.dirname(target)):
        with contextlib.suppress(OSError):
            os.rmdir(directory)
    return found
