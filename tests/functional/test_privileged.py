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


"""Functions that run as root, with the real kernel."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import unittest
from unittest import mock

from nova_lxd_py.virt.privileged import fuser
from nova_lxd_py.virt.privileged import user_namespaces
from tests.fixtures import descriptors
from tests.fixtures import lab_volumes
from tests.fixtures import lxd_daemon

NO_LXD = lxd_daemon.missing()

#: Maps a file in a second process, which does not keep it open.
MAPPING = '''
import ctypes, os, sys, time
if os.fork() == 0:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int,
                          ctypes.c_int, ctypes.c_int, ctypes.c_long]
    file = os.open(sys.argv[1], os.O_RDONLY)
    if libc.mmap(None, 4096, 1, 1, file, 0) == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), 'mmap')
    os.close(file)
    print('ready', flush=True)
time.sleep(1000)
'''


@unittest.skipIf(NO_LXD, NO_LXD or '')
class MappedVolumeTest(unittest.TestCase):
    """Processes that have mapped a device without keeping it open."""

    def setUp(self) -> None:
        super().setUp()
        self.storage = lab_volumes.Storage(lab_volumes.LocalVolume)
        self.storage.setUp()
        self.addCleanup(self.storage.cleanUp)

    def container(self, path: str) -> int:
        """Start processes with process ids of their own, the second of which
        has mapped a file.

        :returns: process id of the first.
        """
        outer = subprocess.Popen(
            ['unshare', '--pid', '--fork', '--kill-child', sys.executable,
             '-c', MAPPING, path], stdout=subprocess.PIPE, text=True)
        assert outer.stdout is not None
        self.addCleanup(outer.stdout.close)
        self.addCleanup(outer.wait)
        self.addCleanup(outer.kill)
        self.assertEqual('ready\n', outer.stdout.readline())
        children = pathlib.Path(f'/proc/{outer.pid}/task/{outer.pid}/children')
        return int(children.read_text())

    def test_mapped(self) -> None:
        device = os.path.realpath(self.storage.volume().data()['device_path'])
        number = os.stat(device).st_rdev
        init = self.container(device)
        using = fuser.find_users(init, number, 0)
        self.assertEqual(1, len(using))
        self.assertNotIn(init, using)
        self.assertEqual([], fuser.find_users(init, number + 1, 0))


@unittest.skipIf(NO_LXD, NO_LXD or '')
class NamespacesTest(unittest.TestCase):
    """User namespaces for mounts are created once per id range."""

    def name(self, base: int) -> str:
        with user_namespaces.user_namespace(base, base, 65536) as namespace:
            return os.readlink(f'/proc/self/fd/{namespace}')

    @staticmethod
    def open_namespaces() -> int:
        """Count the user namespaces that this process has open."""
        return len(descriptors.opened('user:'))

    def test_kept(self) -> None:
        with (mock.patch.object(user_namespaces, '_NAMESPACES_KEPT', 2),
              mock.patch.dict(user_namespaces._namespaces, clear=True)):
            before = self.open_namespaces()
            first = self.name(100000)
            self.assertEqual(first, self.name(100000))
            others = {self.name(base) for base in (200000, 300000)}
            self.assertEqual(3, len({first, *others}))
            self.assertEqual(2, self.open_namespaces() - before)
            for descriptor in user_namespaces._namespaces.values():
                os.close(descriptor)
