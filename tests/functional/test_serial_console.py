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

"""Serial consoles of instances on a real LXD."""

from __future__ import annotations

import contextlib
import gc
import socket
import threading
import time
from typing import Any
import unittest

from nova.compute import task_states
from nova.console import serial as nova_serial
from nova import exception

from nova_lxd_py.virt.console import serial
from tests.fixtures import busybox_image
from tests.fixtures import descriptors
from tests.fixtures import driver_host
from tests.fixtures import lxd_daemon
from tests.fixtures import serial_terminal

NO_LXD = lxd_daemon.missing()

CONF = driver_host.CONF

#: Seconds after which an operation is blocked, even on a busy machine.
BLOCKED = 45

LOGIN = serial_terminal.LOGIN
Terminal = serial_terminal.Terminal


@unittest.skipIf(NO_LXD, NO_LXD or '')
class SerialConsoleTest(unittest.TestCase):

    def setUp(self) -> None:
        super().setUp()
        for name, value in (('enabled', True),
                            ('proxyclient_address', '127.0.0.1'),
                            ('port_range', '14000:14020')):
            CONF.set_override(name, value, 'serial_console')
            self.addCleanup(CONF.clear_override, name, 'serial_console')
        self.host = driver_host.DriverHost()
        self.host.setUp()
        self.addCleanup(self.host.cleanUp)
        self.addCleanup(nova_serial.ALLOCATED_PORTS.clear)
        self.image = self.host.image(busybox_image.unified(
            {'bin/login': LOGIN}))
        self.server = self.host.spawn(image=self.image)

    def console(self, server: Any = None) -> Any:
        return self.host.driver.get_serial_console(
            self.host.context, server or self.server)

    def destroy(self, server: Any) -> None:
        server.task_state = task_states.DELETING
        self.host.driver.destroy(self.host.context, server, [])

    def threads(self) -> list[str]:
        return [thread.name for thread in threading.enumerate()
                if thread.name.startswith('serial-')]

    def wait_for_threads(self, names: list[str]) -> None:
        """Wait until only the threads with some names are left."""
        deadline = time.monotonic() + 60
        while self.threads() != names and time.monotonic() < deadline:
            time.sleep(0.1)
        self.assertEqual(names, self.threads())

    def test_terminal(self) -> None:
        with Terminal(self.console()) as terminal:
            # Input before the process has started is not lost.
            terminal.type('me\n')
            terminal.expect('welcome me')
            terminal.run('busybox tty', '/dev/pts/')
            terminal.run('busybox stty size', '24 80')
            terminal.run('echo $TERM; id -u', 'xterm')

    def test_resized_by_the_terminal(self) -> None:
        with Terminal(self.console()) as terminal:
            terminal.log_in()
            terminal.type('\x1b[8;50;132t')
            terminal.expect_size(50, 132)
            # In pieces.
            for columns in range(90, 121):
                terminal.type('\x1b[8;3')
                terminal.type(f'0;{columns}t')
            terminal.expect_size(30, 120)
            terminal.type('exit\n')
            terminal.expect('Press Enter')
            terminal.type('\n')
            terminal.log_in()
            terminal.run('busybox stty size', '30 120')

    def test_size_is_set_when_the_process_starts(self) -> None:
        for rows in range(30, 35):
            with Terminal(self.console()) as terminal:
                terminal.type(f'\x1b[8;{rows};132t')
                terminal.log_in()
                terminal.expect_size(rows, 132)

    def test_resized_in_the_guest(self) -> None:
        with Terminal(self.console()) as terminal:
            terminal.log_in()
            terminal.run('busybox stty rows 40 columns 90', 'rows')
            terminal.run('busybox stty size', '40 90')

    def test_several_in_a_row(self) -> None:
        port = self.console().port
        for _round in range(5):
            console = self.console()
            self.assertEqual(('127.0.0.1', port),
                             (console.host, console.port))
            with Terminal(console) as terminal:
                terminal.log_in()
                terminal.run('echo $((6 * 7))', '42')

    def test_several_at_once(self) -> None:
        console = self.console()
        with Terminal(console) as first, Terminal(console) as second:
            for terminal in (first, second):
                terminal.log_in()
            first.run('tty=$(busybox tty); echo $((6 * 7))', '42')
            second.run('echo $((7 * 7))', '49')
            second.type('exit\n')
            first.run('test $tty = $(busybox tty) && echo $((8 * 8))', '64')

    def test_too_many_at_once(self) -> None:
        console = self.console()
        with contextlib.ExitStack() as stack:
            terminals = [stack.enter_context(Terminal(console))
                         for _number in range(serial.MAX_SESSIONS)]
            for terminal in terminals:
                terminal.log_in()
            with Terminal(console) as last:
                last.log_in()
                self.assertTrue(terminals[0].is_closed())
                self.assertIn(b'too many', terminals[0].seen)
                terminals[1].run('echo $((6 * 7))', '42')

    def test_process_is_killed_when_the_connection_closes(self) -> None:
        with Terminal(self.console()) as terminal:
            terminal.log_in()
            terminal.run('sleep 4321 & echo $((6 * 7))', '42')
            terminal.type('sleep 4322\n')
            terminal.expect('sleep 4322')
        self.wait_until_nobody_is_logged_in()

    def wait_until_nobody_is_logged_in(self) -> None:
        deadline = time.monotonic() + 60
        while 'login' in self.host.run(self.server, 'ps'):
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.2)

    def test_logged_out(self) -> None:
        with Terminal(self.console()) as terminal:
            terminal.log_in()
            terminal.type('exit\n')
            terminal.expect('Press Enter')
            self.assertNotIn('login', self.host.run(self.server, 'ps'))
            terminal.type('\r')
            terminal.log_in()

    @staticmethod
    def sockets() -> int:
        """Count the open sockets of this process."""
        return len(descriptors.opened('socket:'))

    def test_nothing_stays_open(self) -> None:
        console = self.console()
        rounds = 5

        def one() -> None:
            with Terminal(console) as terminal:
                for _turn in range(2):
                    terminal.log_in()
                    terminal.type('exit\n')
                    terminal.expect('Press Enter')
                    terminal.type('\n')

        one()
        gc.collect()
        self.addCleanup(gc.enable)
        gc.disable()
        before = self.sockets()
        for _round in range(rounds):
            one()
        deadline = time.monotonic() + 60
        # The number of HTTP connections to LXD may vary.
        while self.sockets() >= before + rounds:
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.2)

    def test_guest_reboots(self) -> None:
        with Terminal(self.console()) as terminal:
            begun = terminal.log_in()
            terminal.type('reboot\n')
            terminal.log_in(previous=begun)
            terminal.run('echo $((7 * 7))', '49')

    def test_stopped_and_started_meanwhile(self) -> None:
        with Terminal(self.console()) as terminal:
            terminal.log_in()
            self.host.driver.power_off(self.server)
            terminal.expect('not running')
            with self.assertRaises(exception.ConsoleTypeUnavailable):
                self.console()
            self.host.driver.power_on(self.host.context, self.server, [])
            terminal.log_in()
            self.host.driver.reboot(self.host.context, self.server, [],
                                    'HARD')
            terminal.log_in()

    def test_paused(self) -> None:
        self.host.driver.pause(self.server)
        with Terminal(self.console()) as terminal:
            terminal.expect('paused')
            self.host.driver.unpause(self.server)
            terminal.log_in()

    def test_image_without_login(self) -> None:
        server = self.host.spawn(image=self.host.image())
        with Terminal(self.console(server)) as terminal:
            self.assertTrue(terminal.is_closed())
            self.assertIn(b'no program "login"', terminal.seen)

    def test_rescued(self) -> None:
        self.host.driver.power_off(self.server)
        self.host.driver.rescue(
            self.host.context, self.server, [], self.image, None, None, None)
        with Terminal(self.console()) as terminal:
            terminal.log_in()
            terminal.run('hostname', self.server.name + '-rescue')

    def assert_not_blocked(self) -> None:
        """Check that the console blocks neither LXD nor the instance."""
        began = time.monotonic()
        self.host.lxd_instances()
        self.host.driver.get_info(self.server, use_cache=False)
        self.host.run(self.server, 'true')
        self.assertLess(time.monotonic() - began, BLOCKED)

    def assert_destroyed_at_once(self) -> None:
        began = time.monotonic()
        self.destroy(self.server)
        self.assertLess(time.monotonic() - began, BLOCKED)
        self.wait_for_threads([])

    def test_much_output(self) -> None:
        size = 6_000_000
        with Terminal(self.console()) as terminal:
            terminal.log_in()
            terminal.type(f"yes | head -c {size}; echo 'do''ne'\n")
            terminal.expect('y\r\n')
            got = 0
            while b'done' not in terminal.seen:
                got += max(0, len(terminal.seen) - 8)
                terminal.seen = terminal.seen[-8:]
                terminal.socket.settimeout(30)
                terminal.seen += terminal.socket.recv(65536)
            got += terminal.seen.index(b'done')
            # Each line ends in two characters.
            self.assertLess(abs(got - size * 3 // 2), 1000)
            self.assert_not_blocked()
            terminal.run('echo $((6 * 7))', '42')

    def test_terminal_that_does_not_read(self) -> None:
        with Terminal(self.console()) as terminal:
            terminal.log_in()
            terminal.type('yes\n')
            time.sleep(3)
            self.assert_not_blocked()
            self.assert_destroyed_at_once()

    def test_closed_in_the_middle_of_much_output(self) -> None:
        for _round in range(3):
            with Terminal(self.console()) as terminal:
                terminal.log_in()
                terminal.type('yes\n')
                terminal.expect('y\r\ny\r\n')
        self.assert_not_blocked()
        self.wait_until_nobody_is_logged_in()
        self.assert_destroyed_at_once()

    def test_program_that_does_not_read(self) -> None:
        with Terminal(self.console()) as terminal:
            terminal.log_in()
            terminal.run('busybox stty raw -echo', '')
            terminal.type('exec sleep 1000\r\n')
            terminal.socket.settimeout(2)
            with self.assertRaises(TimeoutError):
                while True:
                    terminal.socket.sendall(b'x' * 65536)
            self.assert_not_blocked()
            self.assert_destroyed_at_once()

    def test_switched_off(self) -> None:
        CONF.set_override('enabled', False, 'serial_console')
        with self.assertRaises(exception.ConsoleTypeUnavailable):
            self.console()

    def test_unknown_server(self) -> None:
        with self.assertRaises(exception.InstanceNotFound):
            self.console(self.host.instance(self.image))

    def test_bound_to_the_address_only(self) -> None:
        port = self.console().port
        with open('/proc/net/tcp') as listing:
            local = [line.split()[1] for line in listing.readlines()[1:]
                     if line.split()[3] == '0A']
        self.assertIn(f'0100007F:{port:04X}', local)
        self.assertNotIn(f'00000000:{port:04X}', local)

    def test_deleted_during_a_session(self) -> None:
        console = self.console()
        with Terminal(console) as terminal:
            terminal.log_in()
            self.destroy(self.server)
            self.assertTrue(terminal.is_closed())
        self.assertEqual(set(), nova_serial.ALLOCATED_PORTS)
        with self.assertRaises(ConnectionRefusedError):
            Terminal(console)
        self.wait_for_threads([])

    def test_ports_of_several_servers(self) -> None:
        other = self.host.spawn(image=self.image)
        first, second = self.console(), self.console(other)
        self.assertNotEqual(first.port, second.port)
        with Terminal(first) as one, Terminal(second) as two:
            one.log_in()
            one.run('hostname', self.server.name)
            two.log_in()
            two.run('hostname', other.name)
        self.destroy(self.server)
        self.assertEqual({('127.0.0.1', second.port)},
                         nova_serial.ALLOCATED_PORTS)

    def test_no_port_left(self) -> None:
        CONF.set_override('port_range', '14040:14041', 'serial_console')
        self.console()
        other = self.host.spawn(image=self.image)
        with self.assertRaises(exception.SocketPortRangeExhaustedException):
            self.console(other)
        self.destroy(self.server)
        self.assertEqual(14040, self.console(other).port)

    def test_same_port_after_a_restart(self) -> None:
        other = self.host.spawn(image=self.image)
        first, second = self.console(), self.console(other)
        with Terminal(first) as terminal:
            terminal.log_in()
            self.host.driver.cleanup_host(CONF.host)
            self.assertTrue(terminal.is_closed())
        self.wait_for_threads([])
        nova_serial.ALLOCATED_PORTS.clear()
        self.host.restart_driver()
        self.assertEqual({('127.0.0.1', first.port),
                          ('127.0.0.1', second.port)},
                         nova_serial.ALLOCATED_PORTS)
        # A third one, whose console is requested first, must not get theirs.
        third = self.host.spawn(image=self.image)
        self.assertNotIn(self.console(third).port,
                         (first.port, second.port))
        self.assertEqual(second.port, self.console(other).port)
        self.assertEqual(first.port, self.console().port)
        with Terminal(self.console()) as terminal:
            terminal.log_in()
        # Deleted without a request for its console since the restart.
        self.host.restart_driver()
        self.destroy(self.server)
        self.assertNotIn(('127.0.0.1', first.port),
                         nova_serial.ALLOCATED_PORTS)

    def test_port_is_taken_after_a_restart(self) -> None:
        first = self.console()
        self.host.driver.cleanup_host(CONF.host)
        with socket.socket() as thief:
            thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            thief.bind(('127.0.0.1', first.port))
            thief.listen()
            self.host.restart_driver()
            self.assertNotEqual(first.port, self.console().port)

    def test_hard_reboot_keeps_the_port(self) -> None:
        port = self.console().port
        self.host.driver.reboot(self.host.context, self.server, [], 'HARD')
        self.host.restart_driver()
        self.assertEqual(port, self.console().port)

    def test_at_once(self) -> None:
        consoles: list[Any] = []
        threads = [threading.Thread(
            target=lambda: consoles.append(self.console()))
            for _number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(1, len({console.port for console in consoles}))
        self.assertEqual(1, len(self.threads()))

    def test_nothing_is_left_of_many_connections(self) -> None:
        console = self.console()
        for _round in range(30):
            Terminal(console).__exit__()
        with Terminal(console) as terminal:
            terminal.log_in()
        self.wait_for_threads([f'serial-{self.server.name}'])


@unittest.skipIf(NO_LXD, NO_LXD or '')
class RestartTest(unittest.TestCase):

    def test_lxd_restarts(self) -> None:
        for name, value in (('enabled', True), ('port_range', '14020:14030')):
            CONF.set_override(name, value, 'serial_console')
            self.addCleanup(CONF.clear_override, name, 'serial_console')
        with lxd_daemon.RealLXD() as lxd:
            host = driver_host.DriverHost(lxd)
            host.setUp()
            try:
                server = host.spawn(image=host.image(
                    busybox_image.unified({'bin/login': LOGIN})))
                with Terminal(host.driver.get_serial_console(
                        host.context, server)) as terminal:
                    terminal.log_in()
                    lxd.kill()
                    lxd.start()
                    terminal.log_in()
            finally:
                host.cleanUp()
