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

"""Which processes of a guest use a volume, as root.

A guest sees nothing of a volume that leaves it: what it was writing would be
lost. So the driver looks first, as a virtual machine's guest would be asked.

This module is imported by the privileged daemon: it must not import nova.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import fcntl
import os

from nova_lxd_py.virt import privileged

#: Seconds for a look at all processes of the host.
TIMEOUT = 60

# From linux/nsfs.h.
_NS_GET_PARENT = 0xB702


class _Namespaces:
    """Tells which process id namespaces lie within a guest's."""

    def __init__(self, init: int) -> None:
        self._own = os.stat(f'/proc/{init}/ns/pid').st_ino
        self._known = {self._own: True}

    def hold(self, process: str) -> bool:
        """Whether a process runs in the guest, or in a container in it."""
        inode = os.stat(f'/proc/{process}/ns/pid').st_ino
        if inode not in self._known:
            self._known[inode] = self._lies_within(process)
        return self._known[inode]

    def _lies_within(self, process: str) -> bool:
        descriptor = os.open(f'/proc/{process}/ns/pid',
                             os.O_RDONLY | os.O_CLOEXEC)
        try:
            while os.fstat(descriptor).st_ino != self._own:
                try:
                    parent = fcntl.ioctl(descriptor, _NS_GET_PARENT)
                except OSError:
                    # That was the host's own.
                    return False
                os.close(descriptor)
                descriptor = parent
            return True
        finally:
            os.close(descriptor)


def _links(process: str) -> Iterator[str]:
    """List what a process has open, mapped, or stands in."""
    yield from (f'/proc/{process}/cwd', f'/proc/{process}/root')
    for folder in ('fd', 'map_files'):
        with contextlib.suppress(OSError):
            for name in os.listdir(f'/proc/{process}/{folder}'):
                yield f'/proc/{process}/{folder}/{name}'


def _uses(process: str, device: int, filesystem: int) -> bool:
    for link in _links(process):
        try:
            about = os.stat(link)
        except OSError:
            continue
        if ((device and about.st_rdev == device) or
                (filesystem and about.st_dev == filesystem)):
            return True
    return False


@privileged.context.entrypoint_with_timeout(TIMEOUT)
def users(init: int, device: int, filesystem: int) -> list[int]:
    """Find the processes of a guest that use a volume.

    :param init: process id of the guest's init on the host.
    :param device: number of the block device that they may have open; 0 for
        none.
    :param filesystem: number of the filesystem (``st_dev``) in which they may
        have files open; 0 for none.
    :returns: their process ids on the host; none if the guest is gone.
    """
    for number in (init, device, filesystem):
        if not isinstance(number, int) or number < 0:
            raise ValueError(f'{number!r} is not a number')
    found = []
    try:
        guest = _Namespaces(init)
    except OSError:
        return []
    for process in os.listdir('/proc'):
        if not process.isdecimal():
            continue
        with contextlib.suppress(OSError):
            if guest.hold(process) and _uses(process, device, filesystem):
                found.append(int(process))
    return found
