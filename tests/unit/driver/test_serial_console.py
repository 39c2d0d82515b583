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

"""Serial consoles, through the driver and a TCP connection as Nova's proxy
makes it."""

from __future__ import annotations

import os
import socket
import threading
from typing import Any

import fixtures
from nova.compute import power_state
from nova.console import serial as nova_serial
from nova import exception
from nova import objects

from nova_lxd_py.virt.console import serial_session
from tests.fixtures import driver_host
from tests.fixtures import fake_driver_host
from tests.fixtures.fake_lxd import interactive
from tests.fixtures.fake_lxd import state


# A port that is free while the driver restarts must not be taken by a process
# that runs the same tests meanwhile; those that begin together have numbers
# close to each other.
FIRST_PORT = 20000 + os.getpid() % 100 * 100
PORTS = f'{FIRST_PORT}:{FIRST_PORT + 99}'


class Terminal:
    """A TCP client as nova-serialproxy is one."""

    def __init__(self, console: Any) -> None:
        self.socket = socket.create_connection(
            (console.host, console.port), timeout=10)
        self.seen = b''

    def type(self, text: str) -> None:
        self.socket.sendall(text.encode())

    def expect(self, text: str) -> bytes:
        """Read until a text appears, and return what came before it."""
        wanted = text.encode()
        while wanted not in self.seen:
            data = self.socket.recv(4096)
            if not data:
                raise AssertionError(f'closed after {self.seen!r}')
            self.seen += data
        before, _, self.seen = self.seen.partition(wanted)
        return before

    def expect_end(self) -> bytes:
        """Read until the connection is closed."""
        while data := self.socket.recv(4096):
            self.seen += data
        return self.seen


class SerialConsoleTest(fake_driver_host.FakeDriverTestCase):

    def setUp(self) -> None:
        # Before the driver is made.
        cfg = driver_host.CONF
        for name, value in (('enabled', True), ('port_range', PORTS),
                            ('proxyclient_address', '127.0.0.1')):
            cfg.set_override(name, value, 'serial_console')
            self.addCleanup(cfg.clear_override, name, 'serial_console')
        for name in ('FIRST_RETRY_DELAY', 'MAX_RETRY_DELAY'):
            self.useFixture(fixtures.MockPatchObject(
                serial_session, name, 0.02))
        super().setUp()
        self.addCleanup(nova_serial.ALLOCATED_PORTS.clear)
        self.code = 0
        self.lxd.daemon.exec_handler = self._shell
        self.server = self.host.spawn(power_on=True)

    def _shell(self, instance: state.Instance, command: list[str],
               environment: dict[str, str], stdin: interactive.Stdin
               ) -> tuple[int, bytes, bytes]:
        """A login that takes one line."""
        if command != ['login']:
            raise FileNotFoundError(command[0])
        line = stdin.read_line()
        return self.code, b'welcome ' + line, b''

    def open(self, server: objects.Instance | None = None) -> Any:
        return self.driver.get_serial_console(self.context,
                                              server or self.server)

    def connect(self) -> Terminal:
        terminal = Terminal(self.open())
        self.addCleanup(terminal.socket.close)
        return terminal

    def test_port_stays(self) -> None:
        console = self.open()
        self.assertEqual('127.0.0.1', console.host)
        self.assertEqual(console.port, self.open().port)
        self.assertEqual(str(console.port),
                         self.config(self.server)['user.nova.serial_port'])
        self.driver.reboot(self.context, self.server, [], 'HARD')
        self.assertEqual(console.port, self.open().port)
        self.host.restart_driver()
        other = self.open(self.host.spawn())
        self.assertEqual(console.port, self.open().port)
        self.assertNotEqual(console.port, other.port)

    def test_port_is_taken_meanwhile(self) -> None:
        console = self.open()
        self.driver.cleanup_host('testhost')
        with socket.create_server((console.host, console.port)):
            self.host.driver = self.host.start_driver()
            again = self.open()
        self.assertNotEqual(console.port, again.port)
        self.assertEqual(str(again.port),
                         self.config(self.server)['user.nova.serial_port'])

    def test_port_goes_with_the_server(self) -> None:
        console = self.open()
        self.driver.destroy(self.context, self.server, [])
        self.assertRaises(ConnectionRefusedError, Terminal, console)
        self.assertNotIn((console.host, console.port),
                         nova_serial.ALLOCATED_PORTS)

    def test_no_port_is_free(self) -> None:
        def none(host: str) -> int:
            raise exception.SocketPortRangeExhaustedException(host=host)
        self.useFixture(fixtures.MonkeyPatch(
            'nova.console.serial.acquire_port', none))
        self.assertRaises(exception.SocketPortRangeExhaustedException,
                          self.open)

    def test_port_that_another_process_takes_first(self) -> None:
        taken = socket.create_server(('127.0.0.1', 0))
        self.addCleanup(taken.close)
        real = nova_serial.acquire_port
        answers = [taken.getsockname()[1]]
        self.useFixture(fixtures.MonkeyPatch(
            'nova.console.serial.acquire_port',
            lambda host: answers.pop() if answers else real(host)))
        self.assertNotEqual(taken.getsockname()[1], self.open().port)

    def test_lxd_does_not_keep_the_port(self) -> None:
        self.lxd.fail_next('PUT', f'/1.0/instances/{self.server.name}')
        console = self.open()
        self.assertEqual(console.port, self.open().port)

    def test_not_offered(self) -> None:
        self.driver.power_off(self.server)
        self.assertRaises(exception.ConsoleTypeUnavailable, self.open)
        driver_host.CONF.set_override('enabled', False, 'serial_console')
        self.driver.power_on(self.context, self.server, [])
        self.assertRaises(exception.ConsoleTypeUnavailable, self.open)

    def test_unknown_server(self) -> None:
        self.assertRaises(exception.InstanceNotFound, self.open,
                          self.host.instance(self.host.image()))

    # -- what happens on a connection ---------------------------------------

    def test_login(self) -> None:
        terminal = self.connect()
        terminal.type('me\n')
        terminal.expect('welcome me')
        # It ended; a key begins the next one.
        terminal.expect('Press Enter to continue.')
        terminal.type('\n')
        self.lxd.wait_for(lambda: len(self.lxd.daemon.exec_log) == 2)
        terminal.type('you\n')
        terminal.expect('welcome you')

    def test_no_such_program(self) -> None:
        def handler(*args: Any) -> Any:
            raise FileNotFoundError('login')
        self.lxd.daemon.exec_handler = handler
        self.assertIn(b'no program "login"', self.connect().expect_end())

    def test_deleted_meanwhile(self) -> None:
        terminal = self.connect()
        self.lxd.wait_for(lambda: self.lxd.daemon.exec_log)
        self.driver.destroy(self.context, self.server, [])
        self.assertIn(b'has been deleted', terminal.expect_end())

    def test_stopped_meanwhile(self) -> None:
        terminal = self.connect()
        self.lxd.wait_for(lambda: self.lxd.daemon.exec_log)
        self.driver.power_off(self.server)
        self.code = -1
        terminal.type('x\n')
        terminal.expect('not running')
        self.code = 0
        self.driver.power_on(self.context, self.server, [])
        self.lxd.wait_for(lambda: len(self.lxd.daemon.exec_log) >= 2)

    def test_paused(self) -> None:
        self.driver.pause(self.server)
        terminal = self.connect()
        terminal.expect('paused')
        self.driver.unpause(self.server)
        self.lxd.wait_for(lambda: self.lxd.daemon.exec_log)

    def test_compute_service_stops(self) -> None:
        terminal = self.connect()
        self.lxd.wait_for(lambda: self.lxd.daemon.exec_log)
        self.driver.cleanup_host('testhost')
        self.assertIn(b'stopping', terminal.expect_end())
        self.assert_state(power_state.RUNNING, self.server)

    def test_lxd_is_gone_for_a_while(self) -> None:
        terminal = self.connect()
        self.lxd.wait_for(lambda: self.lxd.daemon.exec_log)
        self.lxd.restart()
        self.lxd.wait_for(lambda: len(self.lxd.daemon.exec_log) >= 2)
        terminal.type('me\n')
        terminal.expect('welcome me')

    def test_too_many_connections(self) -> None:
        terminals = [self.connect() for _number in range(9)]
        self.assertIn(b'too many connections', terminals[0].expect_end())

    def test_client_goes(self) -> None:
        terminal = self.connect()
        self.lxd.wait_for(lambda: self.lxd.daemon.exec_log)
        terminal.socket.close()
        self.lxd.wait_for(lambda: not [
            thread for thread in threading.enumerate()
            if thread.name.startswith('serial-in-')])

    def test_console_log(self) -> None:
        self.assertIn('booted', self.driver.get_console_output(
            self.context, self.server))
