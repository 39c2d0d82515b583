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

"""Detection of processes of a guest that use a volume, as root.

LXD removes a volume from a guest even while processes use it, and their data
is lost. So the driver checks before it detaches a volume, as the guest of a
virtual machine would be asked.

This module is imported by the privileged daemon: it must not import nova.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import ctypes
import errno
import fcntl
import itertools
import os
import re

from nova_lxd_py.virt import privileged
from nova_lxd_py.virt.privileged import children

#: Timeout of a scan of all processes of the host, in seconds.
TIMEOUT = 60
#: Seconds after which the child process that scans is killed.
_DEADLINE = 45

#: Maximum number of links and mappings of a guest's processes that are
#: examined. It takes a few seconds; a guest can have any number of them.
_MOST_LINKS = 500_000
#: Maximum number of a guest's processes among which its init is looked for.
_MOST_MEMBERS = 20_000

#: Mount points of cgroup v2, alone and beside cgroup v1.
_HIERARCHIES = ('/sys/fs/cgroup', '/sys/fs/cgroup/unified')
_GROUPS = 500
_NAME = re.compile(r'[^/\s]{1,255}')

# From linux/nsfs.h.
_NS_GET_PARENT = 0xB702

# From linux/fcntl.h and linux/stat.h.
_AT_FDCWD, _AT_STATX_DONT_SYNC = -100, 0x4000
_STATX_TYPE = 1

_libc = ctypes.CDLL(None, use_errno=True)


class _Statx(ctypes.Structure):
    _fields_ = [('before', ctypes.c_uint64 * 16),
                ('rdev_major', ctypes.c_uint32),
                ('rdev_minor', ctypes.c_uint32),
                ('dev_major', ctypes.c_uint32),
                ('dev_minor', ctypes.c_uint32),
                ('after', ctypes.c_uint64 * 14)]


def _devices(path: str) -> tuple[int, int]:
    """Return st_dev and st_rdev of a file.

    Unlike stat(2), it does not ask the server of a FUSE or network filesystem,
    which belongs to the guest and may never answer.

    :raises OSError: if there is no such file.
    """
    found = _Statx()
    if _libc.statx(_AT_FDCWD, os.fsencode(path), _AT_STATX_DONT_SYNC,
                   _STATX_TYPE, ctypes.byref(found)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return (os.makedev(found.dev_major, found.dev_minor),
            os.makedev(found.rdev_major, found.rdev_minor))


class _Namespaces:
    """Membership of processes in the pid namespaces of a guest.

    :param init: process id of the guest's init on the host.
    """

    def __init__(self, init: int) -> None:
        self._own = os.stat(f'/proc/{init}/ns/pid').st_ino
        self._known = {os.readlink(f'/proc/{init}/ns/pid'): True}

    def contains(self, process: str) -> bool:
        """Return whether a process runs in the guest or a container in it."""
        # The link is read, not followed, as there may be thousands of them.
        name = os.readlink(f'/proc/{process}/ns/pid')
        if name not in self._known:
            self._known[name] = self._lies_within(process)
        return self._known[name]

    def _lies_within(self, process: str) -> bool:
        descriptor = os.open(f'/proc/{process}/ns/pid',
                             os.O_RDONLY | os.O_CLOEXEC)
        try:
            while os.fstat(descriptor).st_ino != self._own:
                try:
                    parent = fcntl.ioctl(descriptor, _NS_GET_PARENT)
                except OSError:
                    # This was the namespace of the host.
                    return False
                os.close(descriptor)
                descriptor = parent
            return True
        finally:
            os.close(descriptor)


class _TooMany(OSError):
    """The guest has more open files than are examined."""


def _links(process: str) -> Iterator[str]:
    """List the links of a process to files."""
    yield f'/proc/{process}/cwd'
    yield f'/proc/{process}/root'
    with contextlib.suppress(OSError), os.scandir(
            f'/proc/{process}/fd') as entries:
        for entry in entries:
            yield entry.path


class _Use:
    """Detection of the use of a volume by a process.

    :param device: device number of the block device; 0 for none.
    :param filesystem: device number of the filesystem (``st_dev``); 0 for
        none.
    """

    def __init__(self, device: int, filesystem: int) -> None:
        self._device = device
        self._filesystem = filesystem
        self._others: set[str] = set()
        self._examined = 0

    def by(self, process: str) -> bool:
        """Return whether a process uses the volume.

        It does if it has it open or mapped, or has its working or root
        directory on it.
        """
        return any(self._leads(link) for link in _links(process)) or (
            self._mapped(process))

    def _leads(self, link: str) -> bool | None:
        """Return whether a link leads to the volume; None if it is gone."""
        self._examined += 1
        if self._examined > _MOST_LINKS:
            raise _TooMany(errno.E2BIG, 'The processes of the guest have too '
                           'many open files')
        try:
            filesystem, device = _devices(link)
        except OSError:
            return None
        return bool(self._device and device == self._device or
                    self._filesystem and filesystem == self._filesystem)

    def _mapped(self, process: str) -> bool:
        """Return whether a process has mapped a file of the volume.

        Processes map the same libraries in several parts, so that each file
        is examined only once.
        """
        with open(f'/proc/{process}/maps', encoding='utf-8',
                  errors='surrogateescape') as stream:
            for line in stream:
                area, _access, _offset, file = line.split(None, 3)
                if file in self._others or file.split()[1] == '0':
                    continue
                first, last = (int(end, 16) for end in area.split('-'))
                found = self._leads(
                    f'/proc/{process}/map_files/{first:x}-{last:x}')
                if found:
                    return True
                if found is not None:
                    self._others.add(file)
        return False


def _members(container: str) -> Iterator[str]:
    """List the processes in the control groups of a container."""
    for hierarchy in _HIERARCHIES:
        # The guest can create any number of groups below its own.
        for directory, _directories, _files in itertools.islice(
                os.walk(f'{hierarchy}/lxc.payload.{container}'), _GROUPS):
            with (contextlib.suppress(OSError),
                  open(f'{directory}/cgroup.procs',
                       encoding='ascii') as stream):
                yield from stream.read().split()


def _is_first(process: str) -> bool:
    """Return whether a process is the init of a container on the host."""
    with open(f'/proc/{process}/status', encoding='utf-8',
              errors='replace') as stream:
        for line in stream:
            if line.startswith('NSpid:'):
                return line.split()[2:] == ['1']
    return False


def _has(process: str, volume: str, filesystem: int) -> bool:
    """Return whether a volume is mounted in the namespace of a process."""
    # LXD mounts the node of a block device from a file of this name.
    node = f'unix.volume--{volume.replace("-", "--")}.'
    number = f'{os.major(filesystem)}:{os.minor(filesystem)}'
    with open(f'/proc/{process}/mountinfo', encoding='utf-8',
              errors='replace') as stream:
        for line in stream:
            _mount, _parent, device, root = line.split()[:4]
            if (device == number if filesystem else
                    root.rpartition('/')[2].startswith(node)):
                return True
    return False


@privileged.context.entrypoint_with_timeout(TIMEOUT)
@children.killable(_DEADLINE)
def find_init(container: str, volume: str, filesystem: int) -> int:
    """Find the init process of a guest with a volume.

    It is looked up in the control group that LXC creates for a container of
    this name, which is faster than LXD's instance state.

    :param container: LXC's name of the container.
    :param volume: Cinder's id of the volume.
    :param filesystem: device number of the filesystem (``st_dev``) that is
        mounted in the guest; 0 if it has the block device.
    :returns: its process id on the host; 0 if there is none that sees the
        volume.
    """
    for text in (container, volume):
        if not isinstance(text, str) or not _NAME.fullmatch(text):
            raise ValueError(f'{text!r} is not a name')
    if not isinstance(filesystem, int) or filesystem < 0:
        raise ValueError(f'{filesystem!r} is not a number')
    for process in itertools.islice(_members(container), _MOST_MEMBERS):
        with contextlib.suppress(OSError):
            if _is_first(process):
                return (int(process) if _has(process, volume, filesystem)
                        else 0)
    return 0


@privileged.context.entrypoint_with_timeout(TIMEOUT)
@children.killable(_DEADLINE)
def find_users(init: int, device: int, filesystem: int) -> list[int]:
    """Find the processes of a guest that use a volume.

    :param init: process id of the guest's init on the host.
    :param device: device number of the block device; 0 for none.
    :param filesystem: device number of the filesystem (``st_dev``); 0 for
        none.
    :returns: process ids on the host; empty if the guest has stopped.
    :raises OSError: with errno E2BIG if its processes have too many open
        files; with errno ETIMEDOUT if the scan takes too long.
    """
    for number in (init, device, filesystem):
        if not isinstance(number, int) or number < 0:
            raise ValueError(f'{number!r} is not a number')
    found = []
    use = _Use(device, filesystem)
    try:
        guest = _Namespaces(init)
    except OSError:
        return []
    for process in os.listdir('/proc'):
        if not process.isdecimal():
            continue
        try:
            if guest.contains(process) and use.by(process):
                found.append(int(process))
        except _TooMany as error:
            raise OSError(*error.args) from None
        except OSError:
            # The process has ended.
            continue
    return found
