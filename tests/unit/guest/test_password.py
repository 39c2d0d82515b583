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

"""Passwords of administrators, with an LXD in memory."""

from __future__ import annotations

from typing import Any

import ddt
from nova import exception
from nova import objects

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import password
from nova_lxd_py.virt.guest import registry
from tests.fixtures import session_case

objects.register_all()

UUID = '5f6e1b3a-0000-4000-8000-000000000001'
NAME = 'instance-00000001'


@ddt.ddt
class PasswordTestCase(session_case.SessionTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.create(NAME, start=True, **{lxd_guest.KEY_UUID: UUID,
                                         lxd_guest.KEY_ROLE: 'server'})
        self.guests = registry.GuestRegistry(self.session)
        self.passwords = password.AdminPassword(self.session, self.guests)
        self.instance = objects.Instance(
            id=1, uuid=UUID, vm_state='active', image_ref='',
            system_metadata={})
        self.code: int | None = 0
        self.commands: list[tuple[list[str], bytes]] = []
        self.lxd.daemon.exec_handler = self.run_in_guest

    def run_in_guest(self, _instance: Any, command: list[str],
                     _environment: Any, stdin: Any
                     ) -> tuple[int, bytes, bytes]:
        if self.code is None:
            raise FileNotFoundError(command[0])
        self.commands.append((command, stdin.read()))
        return self.code, b'', b''

    def change(self, new: str = 'secret') -> None:
        self.passwords.change(self.instance, new)

    def give(self, new: str | None = 'secret', enabled: bool = True
             ) -> list[str]:
        """Give the password that Nova has chosen.

        :returns: what was logged.
        """
        self.cfg.config(group='lxd', inject_password=enabled)
        with self.assertLogs('nova_lxd_py', 'DEBUG') as logs:
            # Another line of the log, since there must be one.
            password.LOG.debug('Giving a password')
            self.passwords.give(self.instance, self.guests.of(
                self.instance)[0], new)
        return [line for line in logs.output if 'WARNING' in line]

    def test_by_standard_input(self) -> None:
        """Arguments can be seen by all users of the guest."""
        self.change()
        self.assertEqual([(['chpasswd'], b'root:secret\n')], self.commands)

    def test_user_of_the_image(self) -> None:
        self.instance.system_metadata = {'image_os_admin_user': 'ubuntu'}
        self.change('a:b \u20ac')
        self.assertEqual('ubuntu:a:b \u20ac\n'.encode(), self.commands[0][1])

    @ddt.data('x\nroot:x', 'x\rroot:x', 'x\0')
    def test_password_with_a_second_line(self, new: str) -> None:
        self.assertRaises(exception.InstancePasswordSetFailed, self.change,
                          new)
        self.assertEqual([], self.commands)

    @ddt.data('a:b', 'a\nb', '-x', '1a', 'a b', 'a' * 33)
    def test_user_that_is_none(self, user: str) -> None:
        self.instance.system_metadata = {'image_os_admin_user': user}
        self.assertRaises(exception.InstancePasswordSetFailed, self.change)
        self.assertEqual([], self.commands)

    def test_image_without_the_program(self) -> None:
        self.code = None
        self.assertRaises(exception.SetAdminPasswdNotSupported, self.change)
        self.assertRegex(self.give()[0], 'has no chpasswd')

    def test_the_guest_refuses(self) -> None:
        self.code = 7
        error = self.assertRaises(exception.InstancePasswordSetFailed,
                                  self.change)
        self.assertIn('returned 7', str(error))
        # No second attempt, since the root disk is not full.
        self.assertEqual(1, len(self.commands))
        self.assertRegex(self.give()[0], 'returned 7')

    def test_stopped(self) -> None:
        self.session.put('instances', NAME, 'state', body={
            'action': 'stop', 'force': True})
        self.assertRaises(exception.InstanceAgentNotEnabled, self.change)
        self.assertEqual([], self.commands)

    def test_given(self) -> None:
        self.assertEqual([], self.give())
        self.assertEqual([(['chpasswd'], b'root:secret\n')], self.commands)

    @ddt.data((None, True), ('', True), ('secret', False))
    @ddt.unpack
    def test_not_given(self, new: str | None, enabled: bool) -> None:
        self.assertEqual([], self.give(new, enabled))
        self.assertEqual([], self.commands)

    def test_lxd_fails(self) -> None:
        """The server runs; only its password is not set."""
        self.lxd.fail_next('POST', f'/1.0/instances/{NAME}/exec', times=None)
        self.assertRegex(self.give()[0], 'could not be set')
