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

"""Check for processes of a guest before a volume is detached."""

from __future__ import annotations

import errno
import os
import types

import fixtures
from nova.compute import power_state
from nova import exception
from oslotest import base

from nova_lxd_py.virt.privileged import fuser
from nova_lxd_py.virt.volume import in_use


class InUseTestCase(base.BaseTestCase):

    def check(self, answer: object) -> None:
        def find_users(init: int, device: int, filesystem: int) -> object:
            self.assertEqual(os.stat(directory).st_dev, filesystem)
            if isinstance(answer, Exception):
                raise answer
            return answer

        directory = self.useFixture(fixtures.TempDir()).path
        self.useFixture(fixtures.MockPatchObject(
            fuser, 'find_users', find_users))
        self.use({'type': 'disk', 'source': directory}).check()

    def use(self, device: dict[str, str], found: object = 1, pid: int = 1,
            state: int = power_state.RUNNING) -> in_use.VolumeUse:
        def find_init(*args: object) -> object:
            if isinstance(found, Exception):
                raise found
            return found

        with fixtures.MockPatchObject(fuser, 'find_init', find_init):
            return in_use.VolumeUse(
                types.SimpleNamespace(
                    name='guest', uuid='', power_state=state,
                    container='p_guest', state=lambda: {'pid': pid}),
                'volume', device, '/dev/sdb')

    def init_process(self, *args: object) -> int:
        return self.use({'type': 'unix-block', 'source': '/dev/sdb'},
                        *args)._init

    def test_init(self) -> None:
        """LXD is asked where the host does not show it."""
        running = power_state.RUNNING
        self.assertEqual(4711, self.init_process(4711, 1, running))
        for found in (0, PermissionError()):
            self.assertEqual(42, self.init_process(found, 42, running))
            # It has ended meanwhile.
            self.assertEqual(0, self.init_process(found, -1, running))
        self.assertEqual(0, self.init_process(4711, 1, power_state.SHUTDOWN))

    def test_unused(self) -> None:
        self.check([])

    def test_used(self) -> None:
        self.assertRaises(exception.DeviceDetachFailed, self.check, [1, 2])

    def test_filesystem_that_has_shut_itself_down(self) -> None:
        """It does not even say what it is."""
        def stat(path: str) -> os.stat_result:
            raise OSError(errno.EIO, 'Input/output error', path)

        with fixtures.MonkeyPatch('os.stat', stat):
            error = self.assertRaises(
                exception.DeviceDetachFailed,
                self.use({'type': 'disk', 'source': '/mnt'}).check)
        self.assertIn('shut itself down', str(error))

    def test_too_many_files(self) -> None:
        """A guest whose use cannot be determined keeps its volume."""
        error = self.assertRaises(
            exception.DeviceDetachFailed, self.check,
            OSError(errno.E2BIG, 'The processes of the guest have too many '
                    'open files'))
        self.assertIn('too many open files', str(error))
