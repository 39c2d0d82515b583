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

"""User namespaces, which define the id mapping of idmapped mounts.

This module is imported by the privileged daemon: it must not import nova.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import ctypes
import errno
import os
import signal
import threading

# From linux/sched.h.
_CLONE_NEWUSER = 0x10000000

#: Lifetime of a child that creates a namespace, in case it is not killed.
_LIFETIME = 300

#: Open user namespaces by uid base, gid base and size.
_namespaces: dict[tuple[int, int, int], int] = {}
_making = threading.Lock()
_NAMESPACES_KEPT = 32

_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def user_namespace(uid_base: int, gid_base: int, size: int) -> Iterator[int]:
    """Open a user namespace with the id mapping of a guest.

    :param uid_base: host uid of root in the guest.
    :param gid_base: host gid of root in the guest.
    :param size: number of mapped ids in both ranges.
    :returns: a context manager that yields the file descriptor.
    :raises OSError: if the kernel refuses.
    """
    # Namespaces are cached, since many guests of a host have the same mapping
    # and creating one takes longer than a mount.
    key = uid_base, gid_base, size
    with _making:
        if key not in _namespaces:
            _namespaces[key] = _new_namespace(*key)
            if len(_namespaces) > _NAMESPACES_KEPT:
                os.close(_namespaces.pop(next(iter(_namespaces))))
        # Another thread may evict and close it.
        descriptor = os.dup(_namespaces[key])
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _new_namespace(uid_base: int, gid_base: int, size: int) -> int:
    # A process must enter the namespace for its maps to be written. Forking
    # is the fastest way to get one; the child does nothing else.
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        try:
            failed = _libc.unshare(_CLONE_NEWUSER) and ctypes.get_errno()
            os.write(writing, bytes([failed]))
            if not failed:
                # The parent kills it long before.
                signal.alarm(_LIFETIME)
                signal.pause()
        finally:
            os._exit(0)
    try:
        os.close(writing)
        # A child that was killed has written nothing.
        [failed] = os.read(reading, 1) or [errno.ESRCH]
        if failed:
            raise OSError(failed, 'The kernel refuses a user namespace: '
                          f'{os.strerror(failed)}')
        directory = f'/proc/{process}'
        for name, base in (('uid', uid_base), ('gid', gid_base)):
            with open(f'{directory}/{name}_map', 'w',
                      encoding='ascii') as stream:
                stream.write(f'0 {base} {size}')
        return os.open(f'{directory}/ns/user', os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(reading)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
