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

"""Network devices and mounts that nobody else on this host sees."""

from __future__ import annotations

import ctypes
import os
import subprocess

import fixtures

# From linux/sched.h. The os module has these from Python 3.12 on.
_CLONE_FS = 0x00000200
_CLONE_NEWNS = 0x00020000
_CLONE_NEWNET = 0x40000000

_LIBC = ctypes.CDLL(None, use_errno=True)

# In the new mount namespace: a sysfs that shows the new network, under the
# control groups as they were.
_MOUNTS = """
mount --make-rprivate /
kept=$(mktemp -d)
mount --rbind /sys/fs/cgroup $kept
mount -t sysfs sysfs /sys
mount --rbind $kept /sys/fs/cgroup
umount -l $kept
rmdir $kept
ip link set lo up
"""


class PrivateNetwork(fixtures.Fixture):
    """A network of our own for this thread and all that it starts later.

    So a test can run switches and make devices beside what runs on the host,
    even a second Open vSwitch with the userspace datapath, which is at home in
    a network namespace only once. Needs root, and no network outside.
    """

    def _setUp(self) -> None:
        for kind, flag in (('net', _CLONE_NEWNET), ('mnt', _CLONE_NEWNS)):
            descriptor = os.open(f'/proc/thread-self/ns/{kind}',
                                 os.O_RDONLY | os.O_CLOEXEC)
            self.addCleanup(os.close, descriptor)
            self._check(_LIBC.unshare(flag))
            self.addCleanup(self._return, descriptor, flag)
        subprocess.run(['sh', '-e', '-c', _MOUNTS], check=True)

    def _return(self, descriptor: int, flag: int) -> None:
        directory = os.getcwd()
        # Threads that were started meanwhile stay behind; share nothing with
        # them, or the kernel refuses.
        self._check(_LIBC.unshare(_CLONE_FS))
        self._check(_LIBC.setns(descriptor, flag))
        # Into a mount namespace one enters by its root.
        os.chdir(directory)

    @staticmethod
    def _check(result: int) -> None:
        if result != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
