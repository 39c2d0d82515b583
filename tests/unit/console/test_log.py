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

"""Console logs, with an LXD in memory."""

from __future__ import annotations

from nova import objects

from nova_lxd_py.virt.console import log
from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.lxd import errors
from tests.fixtures import session_case

objects.register_all()

UUID = '5f6e1b3a-0000-4000-8000-000000000001'
NAME = 'instance-00000001'


class ConsoleLogTestCase(session_case.SessionTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.create(NAME, start=True, **{lxd_guest.KEY_UUID: UUID,
                                         lxd_guest.KEY_ROLE: 'server'})
        self.log = log.ConsoleLog(self.session,
                                  registry.GuestRegistry(self.session))

    def output(self, written: bytes | None = None) -> bytes:
        self.lxd.instance(NAME).console = written
        return self.log.output(
            objects.Instance(id=1, uuid=UUID, vm_state='active'))

    def test_all(self) -> None:
        self.assertEqual(b'booted\n', self.output(b'booted\n'))

    def test_nothing_was_written(self) -> None:
        """LXD answers with an error then."""
        self.assertEqual(b'', self.output())

    def test_end(self) -> None:
        """It begins with a whole line."""
        line = b'x' * 99 + b'\n'
        found = self.output(line * (5 * log.MAX_CONSOLE_BYTES // len(line)))
        self.assertLessEqual(len(found), log.MAX_CONSOLE_BYTES)
        self.assertGreaterEqual(len(found), log.MAX_CONSOLE_BYTES - len(line))
        self.assertEqual(b'', found.replace(line, b''))

    def test_lxd_fails(self) -> None:
        self.lxd.fail_next('GET', f'/1.0/instances/{NAME}/console')
        self.assertRaises(errors.OperationFailed, self.output, b'booted\n')
