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

"""Serial consoles of servers on a real LXD."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import Any
import unittest

from nova.compute import task_states
from nova.console import serial as nova_serial
from nova import exception

from tests.functional import busybox_image
from tests.functional import driver_host
from tests.functional import lxd_daemon

NO_LXD = lxd_daemon.missing()

CONF = driver_host.CONF

#: A shell on the console instead of a login.
WITH_SHELL: dict[str, Any] = {'bin/stty': 'busybox', 'etc/inittab': b"""\
::sysinit:/bin/sh -c 'echo booted; /bin/hostname -F /etc/hostname'
console::respawn:/bin/sh
::ctrlaltdel:/bin/reboot
"""}


class Terminal(contextlib.AbstractContextManager['Terminal']):
    """What nova-serialproxy is to the driver: a TCP connection."""

    def __init__(self, console: Any) -> None:
        self.socket = socket.create_connection((console.host, console.port),
                                               timeout=10)
        self.seen = b''

    def __exit__(self, *exc: Any) -> None:
        self.socket.close()

    def type(self, text: str) -> None:
        self.socket.sendall(text.encode())

    def expect(self, text: str, timeout: float = 30) -> bytes:
        """Read until a text comes."""
        deadline = time.monotonic() + timeout
        wanted = text.encode()
        while wanted not in self.seen:
            self.socket.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                data = self.socket.recv(4096)
            except TimeoutError:
                raise AssertionError(f'nothing after {self.seen!r}') from None
            if not data:
                raise AssertionError(f'closed after {self.seen!r}')
            self.seen += data
        before, _, self.seen = self.seen.partition(wanted)
        return before

    def run(self, command: str, result: str) -> None:
        """Type a command and wait for its result, not for its echo."""
        self.type(f"{command}; echo 'do''ne'\n")
        self.expect(result)
        self.expect('done')

    def wake(self, timeout: float = 30) -> None:
        """Type until somebody answers; nobody reads along while a guest is
        down."""
        deadline = time.monotonic() + timeout
        self.seen = b''
        while b'# ' not in self.seen:
            if time.monotonic() > deadline:
                raise AssertionError(f'no prompt in {self.seen!r}')
            self.type('\n')
            self.socket.settimeout(1)
            with contextlib.suppress(TimeoutError):
                self.seen += self.socket.recv(4096)

    def is_closed(self, timeout: float = 10) -> bool:
        self.socket.settimeout(timeout)
        try:
            while True:
                data = self.socket.recv(4096)
                if not data:
                    return True
                self.seen += data
        except ConnectionError:
            return True
        except TimeoutError:
            return False


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
        self.image = self.host.image(busybox_image.unified(WITH_SHELL))
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

    def test_several_in_a_row(self) -> None:
        port = self.console().port
        for _round in range(5):
            console = self.console()
            self.assertEqual(('127.0.0.1', port),
                             (console.host, console.port))
            with Terminal(console) as terminal:
                terminal.run('echo $((6 * 7))', '42')

    def test_later_connection_takes_over(self) -> None:
        console = self.console()
        with Terminal(console) as first:
            first.run('echo $((6 * 7))', '42')
            with Terminal(console) as second:
                second.run('echo $((7 * 7))', '49')
                self.assertTrue(first.is_closed())
                self.assertIn(b'taken over', first.seen)
                second.run('echo $((8 * 8))', '64')

    def test_guest_reboots(self) -> None:
        with Terminal(self.console()) as terminal:
            terminal.run('echo $((6 * 7))', '42')
            terminal.type('reboot\n')
            # What it says while it boots belongs to it.
            terminal.expect('booted', timeout=60)
            terminal.wake()
            terminal.run('echo $((7 * 7))', '49')

    def test_stopped_and_started_meanwhile(self) -> None:
        with Terminal(self.console()) as terminal:
            terminal.run('echo $((6 * 7))', '42')
            self.host.driver.power_off(self.server)
            terminal.expect('not running')
            with self.assertRaises(exception.ConsoleTypeUnavailable):
                self.console()
            self.host.driver.power_on(self.host.context, self.server, [])
            terminal.wake()
            terminal.run('echo $((7 * 7))', '49')
            self.host.driver.reboot(self.host.context, self.server, [],
                                    'HARD')
            terminal.wake()
            terminal.run('echo $((8 * 8))', '64')

    def test_paused(self) -> None:
        self.host.driver.pause(self.server)
        with Terminal(self.console()) as terminal:
            terminal.expect('paused')
            self.host.driver.unpause(self.server)
            terminal.wake()
            terminal.run('echo $((7 * 7))', '49')

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
            terminal.run('echo $((6 * 7))', '42')
            self.destroy(self.server)
            self.assertTrue(terminal.is_closed())
        self.assertEqual(set(), nova_serial.ALLOCATED_PORTS)
        with self.assertRaises(ConnectionRefusedError):
            Terminal(console)
        self.assertEqual([], self.threads())

    def test_ports_of_several_servers(self) -> None:
        other = self.host.spawn(image=self.image)
        first, second = self.console(), self.console(other)
        self.assertNotEqual(first.port, second.port)
        with Terminal(first) as one, Terminal(second) as two:
            one.run('hostname', self.server.name)
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
            terminal.run('echo $((6 * 7))', '42')
        deadline = time.monotonic() + 10
        while len(self.threads()) > 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        self.assertEqual([f'serial-{self.server.name}'], self.threads())


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
                    busybox_image.unified(WITH_SHELL)))
                with Terminal(host.driver.get_serial_console(
                        host.context, server)) as terminal:
                    terminal.run('echo $((6 * 7))', '42')
                    lxd.kill()
                    lxd.start()
                    terminal.run('echo $((7 * 7))', '49')
            finally:
                host.cleanUp()
