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

"""Root filesystems on volumes: unpacked to and mounted for guests, as root.

A volume that a server boots from has a filesystem, and in that a folder with
the server's root. The folder gets its name when it is complete: without it
the filesystem is one that an interrupted first boot has left. A filesystem
that is a server's root as a whole will do as well.

What is on a volume was written by tenants. So no link in it is ever followed
by the host: the mount of a guest's root is made from an open folder, and has
nothing above it.

This module is imported by the privileged daemon: it must not import nova.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import errno
import hashlib
import os
import shutil
import stat

from nova_lxd_py.virt import privileged
from nova_lxd_py.virt.privileged import command
from nova_lxd_py.virt.privileged import mounts
from nova_lxd_py.virt.privileged import user_namespaces
from nova_lxd_py.virt.privileged import validation

#: Seconds for reading an image on a volume.
READ_TIMEOUT = 3600

#: Folder of a volume with the root of a server.
FOLDER = 'rootfs'
#: Folder of a volume in which that is unpacked.
STAGING = 'nova-unpack'

#: What :func:`examine` may find.
READY, UNFINISHED, OTHER = 'ready', 'unfinished', 'other'

#: Names of folders or links that any root of a Linux system has.
_WHOLE = ('etc', 'sbin')

#: Bytes that are cleared at the beginning of a volume.
_HEAD = 1 << 20
#: Bytes to read at a time.
CHUNK = 4 << 20

_WRAPPER = 'root-'

_OPEN_FOLDER = (os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def wrapper(identifier: str) -> str:
    """Name the folder in which the mount of a root is.

    :param identifier: Cinder's id of the volume.
    """
    return _WRAPPER + identifier


def _root_target(target: str) -> str:
    validation.checked_target(target)
    folder, identifier = os.path.split(target)
    if os.path.basename(folder) != wrapper(identifier):
        raise ValueError(f'{target!r} is not a folder for a root')
    return target


# -- what is on a volume ----------------------------------------------------

@privileged.context.entrypoint_with_timeout(READ_TIMEOUT)
def holds(device: str, size: int, checksum: str) -> bool:
    """Whether a volume begins with just the bytes of an image.

    :param device: path of the volume's block device.
    :param size: bytes of the image.
    :param checksum: MD5 of the image in hexadecimal, as Cinder knows it.
    :raises OSError: it cannot be read.
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
        # The guest's data should not have to make room for it.
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return digest.hexdigest()


@privileged.context.entrypoint_with_timeout(command.TIMEOUT)
def read(device: str, position: int, size: int) -> bytes:
    """Read a part of the image that a volume holds.

    :param device: path of the volume's block device.
    :param position: of its first byte.
    :param size: bytes, CHUNK at most.
    :raises OSError: it cannot be read.
    """
    if not isinstance(position, int) or position < 0 or size > CHUNK:
        raise ValueError(f'{size!r} bytes from {position!r} are no part')
    with open(validation.checked_device(device), 'rb', buffering=0) as stream:
        stream.seek(position)
        return stream.read(size)


@privileged.context.entrypoint_with_timeout(READ_TIMEOUT)
def blank(device: str, size: int, checksum: str) -> None:
    """Remove the image that a volume holds, and nothing else.

    :param device: path of the volume's block device.
    :param size: as for :func:`holds`.
    :param checksum: as for :func:`holds`.
    :raises OSError: the volume holds something else, or cannot be written.
    """
    path = os.path.realpath(validation.checked_device(device))
    if _digest(path, size) != checksum:
        raise OSError(errno.EBUSY, 'It holds something else than its image')
    command.run('wipefs', '--all', '--quiet', path)
    with open(path, 'r+b', buffering=0) as stream:
        stream.write(bytes(_HEAD))
        os.fsync(stream.fileno())


@contextlib.contextmanager
def _mounted(device: str, kind: str, target: str, flags: int
             ) -> Iterator[int]:
    """Mount a volume for a moment, and open its topmost folder."""
    _attach(device, kind, target, flags)
    try:
        folder = os.open(target, _OPEN_FOLDER)
        try:
            yield folder
        finally:
            os.close(folder)
    finally:
        mounts.detach_mounts(target, False)


def _attach(device: str, kind: str, target: str, flags: int) -> None:
    mounts.make_directory(target)
    mounts.detach_mounts(target, False)
    mounts.attach_plain(device, kind, target, flags)


def _is(folder: int, name: str, *kinds: int) -> bool:
    try:
        about = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return stat.S_IFMT(about.st_mode) in kinds


def _find(folder: int) -> str:
    if _is(folder, FOLDER, stat.S_IFDIR):
        return READY
    if _is(folder, STAGING, stat.S_IFDIR):
        return UNFINISHED
    if all(_is(folder, name, stat.S_IFDIR, stat.S_IFLNK) for name in _WHOLE):
        return READY
    # Interrupted before anything was unpacked.
    if not set(os.listdir(folder)) - {'lost+found'}:
        return UNFINISHED
    return OTHER


@privileged.context.entrypoint_with_timeout(command.TIMEOUT)
def examine(device: str, kind: str, target: str) -> str:
    """Tell whether a server can boot from the filesystem of a volume.

    A journal that was left is replayed by the kernel.

    :param device: path of the volume's block device.
    :param kind: the filesystem's name.
    :param target: a folder to mount it at meanwhile.
    :returns: READY, UNFINISHED for what a first boot left that was
        interrupted, or OTHER.
    :raises OSError: it cannot be mounted.
    """
    with _mounted(device, kind, validation.checked_target(target),
                  mounts.MS_RDONLY | mounts.MS_NOSUID | mounts.MS_NODEV |
                  mounts.MS_NOEXEC) as folder:
        return _find(folder)


# -- unpacking --------------------------------------------------------------

@privileged.context.entrypoint_with_timeout(command.TIMEOUT)
def open_staging(device: str, kind: str, target: str) -> str:
    """Mount a volume for LXD to unpack an image to.

    :param device: path of the volume's block device.
    :param kind: the filesystem's name.
    :param target: the folder to mount it at.
    :returns: path of an empty folder on it.
    :raises OSError: it cannot be mounted, or there is a root on it already.
    """
    _attach(device, kind, validation.checked_target(target),
            mounts.MS_NOSUID | mounts.MS_NODEV)
    with contextlib.ExitStack() as undo:
        undo.callback(mounts.detach_mounts, target, True)
        if os.path.lexists(f'{target}/{FOLDER}'):
            raise FileExistsError(errno.EEXIST, 'It has a root already')
        _clear(target)
        os.mkdir(f'{target}/{STAGING}', mode=0o711)
        undo.pop_all()
    return f'{target}/{STAGING}'


def _clear(target: str) -> None:
    if os.path.lexists(f'{target}/{STAGING}'):
        # Never follows a link; refuses a link in place of the folder.
        shutil.rmtree(f'{target}/{STAGING}')


@privileged.context.entrypoint_with_timeout(command.TIMEOUT)
def complete(target: str) -> None:
    """Make what LXD has unpacked the root that a server boots from.

    :param target: where the volume is mounted.
    :raises OSError: there is not just one container in the workshop.
    """
    containers = f'{validation.checked_target(target)}/{STAGING}/containers'
    names = os.listdir(containers)
    if len(names) != 1:
        raise OSError(errno.ENOENT, f'There are {len(names)} containers and '
                      f'not one')
    folder = os.open(f'{containers}/{names[0]}', _OPEN_FOLDER)
    try:
        if not _is(folder, FOLDER, stat.S_IFDIR):
            raise FileNotFoundError(errno.ENOENT, 'It has no root filesystem')
        # All of it has to be there before its name is.
        mounts.sync_filesystem(folder)
        os.rename(FOLDER, f'{target}/{FOLDER}', src_dir_fd=folder)
        mounts.sync_filesystem(folder)
    finally:
        os.close(folder)


@privileged.context.entrypoint_with_timeout(command.TIMEOUT)
def close_staging(target: str) -> None:
    """Clear up after unpacking and unmount the volume; again is a success.

    :param target: where it is mounted.
    :raises OSError: something uses it.
    """
    if mounts.is_mounted(validation.checked_target(target)):
        _clear(target)
        mounts.detach_mounts(target, False)
    with contextlib.suppress(OSError):
        os.rmdir(target)


# -- the root of a guest ----------------------------------------------------

@privileged.context.entrypoint_with_timeout(command.TIMEOUT)
def mount(device: str, kind: str, target: str, uid_base: int, gid_base: int,
          size: int) -> None:
    """Mount the root on a volume with the ids of a guest.

    What is mounted there already is unmounted before. Programs may change
    their user there, as a system's programs have to; so the folder above is
    closed to all but the guest's own root.

    :param device: path of the volume's block device.
    :param kind: the filesystem's name.
    :param target: the folder to mount it at.
    :param uid_base: user of the host that is root in the guest.
    :param gid_base: group of the host that is root's in the guest.
    :param size: how many ids follow in both; 0 does not map them.
    :raises FileNotFoundError: there is no complete root on it.
    :raises OSError: the kernel refuses.
    """
    validation.check_ids(uid_base, gid_base, size)
    folder = os.path.dirname(_root_target(target))
    os.makedirs(os.path.dirname(folder), mode=0o711, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, mode=0o100)
    os.chown(folder, uid_base if size else 0, -1, follow_symlinks=False)
    _attach(device, kind, target, mounts.MS_NOSUID | mounts.MS_NODEV)
    with contextlib.ExitStack() as stack:
        stack.callback(mounts.detach_mounts, target, True)
        source = os.open(target, _OPEN_FOLDER)
        stack.callback(os.close, source)
        if _find(source) != READY:
            raise FileNotFoundError(errno.ENOENT, 'There is no complete root '
                                    'filesystem on it')
        if _is(source, FOLDER, stat.S_IFDIR):
            source = os.open(FOLDER, _OPEN_FOLDER, dir_fd=source)
            stack.callback(os.close, source)
        tree = mounts.clone_tree(source)
    try:
        attributes = mounts.MountAttributes(attr_clr=mounts.MOUNT_ATTR_NOSUID)
        with contextlib.ExitStack() as stack:
            if size:
                attributes.attr_set = mounts.MOUNT_ATTR_IDMAP
                attributes.userns_fd = stack.enter_context(
                    user_namespaces.user_namespace(uid_base, gid_base, size))
            mounts.set_attributes(tree, attributes)
        mounts.place_tree(tree, target)
    finally:
        os.close(tree)


@privileged.context.entrypoint_with_timeout(command.TIMEOUT)
def unmount(target: str, force: bool) -> bool:
    """Unmount the root of a guest; again is a success.

    :param target: where it is mounted.
    :param force: if something uses it still, have it go as soon as that ends.
    :returns: whether it was mounted.
    :raises OSError: something uses it (errno EBUSY), without force.
    """
    found = mounts.detach_mounts(_root_target(target), force)
    for folder in (target, os.path.dirname(target)):
        with contextlib.suppress(OSError):
            os.rmdir(folder)
    return found
