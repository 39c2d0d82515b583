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

"""User namespaces for the mounts of guests."""

from __future__ import annotations

import ctypes
import errno
import os
import pathlib
from unittest import mock

from oslotest import base

from nova_lxd_py.virt.privileged import user_namespaces

BASE, SIZE = 1000000, 65536


class NamespaceTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        patch = mock.patch.dict(user_namespaces._namespaces, clear=True)
        patch.start()
        self.addCleanup(patch.stop)
        self.addCleanup(self.close)
        self.before = self.descriptors()

    @staticmethod
    def close() -> None:
        for descriptor in user_namespaces._namespaces.values():
            os.close(descriptor)

    @staticmethod
    def descriptors() -> int:
        return len(list(pathlib.Path('/proc/self/fd').iterdir()))

    def assert_refused(self) -> OSError:
        """Check that nothing is left of a namespace that is refused."""
        def enter() -> None:
            with user_namespaces.user_namespace(BASE, BASE, SIZE):
                self.fail('there is none')
        pids: list[int] = []
        fork = os.fork

        def noted() -> int:
            pid = fork()
            pids.append(pid)
            return pid
        with mock.patch.object(os, 'fork', noted):
            error = self.assertRaises(OSError, enter)
        self.assertEqual({}, user_namespaces._namespaces)
        self.assertEqual(self.before, self.descriptors())
        # The child is gone, not even a zombie.
        self.assertEqual(1, len(pids))
        self.assertRaises(ProcessLookupError, os.kill, pids[0], 0)
        return error

    def test_kernel_has_none(self) -> None:
        def unshare(flags: int) -> int:
            ctypes.set_errno(errno.ENOSPC)
            return -1
        with mock.patch.object(user_namespaces, '_libc') as libc:
            libc.unshare = unshare
            self.assertEqual(errno.ENOSPC, self.assert_refused().errno)

    def test_child_is_killed(self) -> None:
        with mock.patch.object(user_namespaces, '_libc') as libc:
            libc.unshare = lambda flags: os._exit(1)
            self.assertEqual(errno.ESRCH, self.assert_refused().errno)

    def test_ids_that_may_not_be_mapped(self) -> None:
        def unshare(flags: int) -> int:
            # The child stays where it is, whose ids are mapped already.
            return 0
        with mock.patch.object(user_namespaces, '_libc') as libc:
            libc.unshare = unshare
            self.assert_refused()

    def test_mapping(self) -> None:
        if os.geteuid():
            self.skipTest('only root may map the ids of others')
        with user_namespaces.user_namespace(BASE, BASE + SIZE, SIZE) as found:
            kind, own = (os.readlink(f'/proc/self/{name}')
                         for name in (f'fd/{found}', 'ns/user'))
            self.assertTrue(kind.startswith('user:'), kind)
            self.assertNotEqual(own, kind)

    def use(self, base_: int) -> os.stat_result:
        with user_namespaces.user_namespace(base_, base_, SIZE) as found:
            return os.fstat(found)

    def test_kept(self) -> None:
        """Those of many guests are made once, the oldest are closed."""
        made: list[int] = []

        def make(uid_base: int, gid_base: int, size: int) -> int:
            made.append(uid_base)
            return os.open('/proc/self/ns/user', os.O_RDONLY)

        with (mock.patch.object(user_namespaces, '_new_namespace', make),
              mock.patch.object(user_namespaces, '_NAMESPACES_KEPT', 2)):
            for base_ in (1, 2, 1, 3, 2, 1):
                self.use(base_)
            # The first one had to go for the third one.
            self.assertEqual([1, 2, 3, 1], made)
            self.assertEqual(self.before + 2, self.descriptors())

    def test_evicted_while_it_is_used(self) -> None:
        def make(*ids: int) -> int:
            return os.open('/proc/self/ns/user', os.O_RDONLY)

        with (mock.patch.object(user_namespaces, '_new_namespace', make),
              mock.patch.object(user_namespaces, '_NAMESPACES_KEPT', 1),
              user_namespaces.user_namespace(1, 1, SIZE) as found):
            inode = os.fstat(found).st_ino
            self.use(2)
            self.assertEqual(inode, os.fstat(found).st_ino)
