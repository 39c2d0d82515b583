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

"""Websockets whose peer has stopped answering."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import gc
import os
import socket
import threading
import time
from typing import Any

import fixtures
from nova.compute import power_state
from oslotest import base
import websocket

from nova_lxd_py import conf
from nova_lxd_py.virt.console import serial_session
from nova_lxd_py.virt.guest import events
from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.lxd import exec as lxd_exec
from nova_lxd_py.virt.lxd import session
from nova_lxd_py.virt.lxd import websockets
from tests.fixtures import session_case

#: A goodbye without a reason.
_CLOSE = b'\x88\x00'


class SilentProxy(fixtures.Fixture):
    """Proxy whose websockets can stop forwarding.

    :param upstream: path of the socket that it leads to.
    :ivar path: path of its own.
    """

    def __init__(self, upstream: str) -> None:
        super().__init__()
        self._upstream = upstream
        self._silent = threading.Event()
        self._open: list[socket.socket] = []
        self._channels: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._closed = False

    def _setUp(self) -> None:
        self.path = f'{self.useFixture(fixtures.TempDir()).path}/socket'
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(self.path)
        self._server.listen(64)
        self.addCleanup(self._close)
        self._start(self._accept)

    def _start(self, function: Callable[..., None],
               *args: socket.socket) -> None:
        thread = threading.Thread(target=function, args=args, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _close(self) -> None:
        # Under eventlet, a thread that waits for a closed socket then waits
        # for the next one with its number: so all threads end before.
        self._closed = True
        with (contextlib.suppress(OSError),
              socket.socket(socket.AF_UNIX) as last):
            last.connect(self.path)
        self._threads[0].join(10)
        self._end(*self._open)
        for thread in self._threads:
            thread.join(10)
        for connection in (self._server, *self._open):
            connection.close()

    @staticmethod
    def _end(*connections: socket.socket) -> None:
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def fall_silent(self) -> None:
        """Stop reading from all websockets."""
        self._silent.set()

    def say_goodbye(self) -> None:
        """Send a close frame on all websockets."""
        for channel in self._channels:
            with contextlib.suppress(OSError):
                channel.sendall(_CLOSE)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _address = self._server.accept()
                if self._closed:
                    client.close()
                    return
                upstream = socket.socket(socket.AF_UNIX)
                upstream.connect(self._upstream)
                self._open += [client, upstream]
                for pair in ((client, upstream), (upstream, client)):
                    self._start(self._pass_on, *pair)

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                if data.startswith(b'HTTP/1.1 101'):
                    self._channels.append(target)
                    # A small buffer, which is not read.
                    target.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
                if source in self._channels and self._silent.is_set():
                    return
                target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)


class HangUpTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        near, self.peer = socket.socketpair()
        self.addCleanup(self.peer.close)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        self.channel = websocket.WebSocket(enable_multithread=True)
        self.channel.sock = near
        self.channel.connected = True
        self.channel.settimeout(60)
        self.addCleanup(self.channel.shutdown)
        self.threads: list[threading.Thread] = []

    def run_in_thread(self, function: Callable[..., Any], *args: Any,
                      **kwargs: Any) -> threading.Thread:
        def call() -> None:
            with contextlib.suppress(*websockets.ERRORS):
                function(*args, **kwargs)

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        self.threads.append(thread)
        time.sleep(0.1)
        self.assertTrue(thread.is_alive())
        return thread

    def wait_for_goodbye(self) -> None:
        """Wait until the library considers the connection closing."""
        deadline = time.monotonic() + 10
        while self.channel.connected and time.monotonic() < deadline:
            time.sleep(0.01)
        self.assertFalse(self.channel.connected)

    def assert_all_end(self) -> None:
        websockets.shutdown(self.channel)
        for thread in self.threads:
            thread.join(5)
            self.assertFalse(thread.is_alive())
        websockets.shutdown(self.channel)

    def test_reader(self) -> None:
        self.run_in_thread(self.channel.recv_data)
        self.assert_all_end()

    def test_goodbye_without_answer(self) -> None:
        thread = self.run_in_thread(self.channel.close, timeout=60)
        self.wait_for_goodbye()
        # This is the reason for shutdown().
        self.channel.abort()
        thread.join(0.2)
        self.assertTrue(thread.is_alive())
        self.assert_all_end()

    def test_answer_to_a_goodbye_that_nobody_reads(self) -> None:
        self.run_in_thread(self.channel.send_binary, bytes(1 << 20))
        self.peer.sendall(_CLOSE)
        self.run_in_thread(self.channel.recv_data)
        self.wait_for_goodbye()
        self.assert_all_end()


class ConsoleTestCase(session_case.SessionTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.create(start=True, **{lxd_guest.KEY_UUID: 'a',
                                   lxd_guest.KEY_ROLE: 'server'})
        self.proxy = self.useFixture(SilentProxy(self.lxd.endpoint))
        self.cfg.config(group='lxd', endpoint=self.proxy.path)
        self.session = session.Session(conf.CONF.lxd)
        self.guests = registry.GuestRegistry(self.session)
        self.watcher = events.EventWatcher(self.session, self.guests,
                                           lambda event: None, 5)
        self.watcher.start()
        self.addCleanup(self.watcher.stop)
        self.server = serial_session.InstanceRef('a', 'c1')
        self.lxd.wait_for(lambda: self.watcher.power_state(self.server) ==
                          power_state.RUNNING)

    def threads(self, *beginnings: str) -> list[str]:
        return [thread.name for thread in threading.enumerate()
                if thread.name.startswith(beginnings)]

    def open_console(self, command: str = 'cat'
                     ) -> tuple[serial_session.SerialSession, socket.socket]:
        with socket.create_server(('127.0.0.1', 0)) as server:
            far = socket.create_connection(server.getsockname())
            near, _address = server.accept()
        self.addCleanup(far.close)
        console = serial_session.SerialSession(
            near, self.server, [command], self.session, self.guests,
            self.watcher)
        console.start()
        self.addCleanup(console.end)
        return console, far


class SilentLXDTestCase(ConsoleTestCase):

    def test_watcher(self) -> None:
        self.proxy.fall_silent()
        self.proxy.say_goodbye()
        began = time.monotonic()
        self.watcher.stop()
        self.assertLess(time.monotonic() - began, 4)
        self.assertEqual([], self.threads('lxd-events'))
        self.watcher.stop()

    def test_serial_console(self) -> None:
        console, far = self.open_console()
        self.lxd.wait_for(lambda: self.threads('serial-control'))
        self.proxy.fall_silent()
        # More than the buffers hold, so that the writer blocks.
        far.settimeout(1)
        with contextlib.suppress(TimeoutError):
            while True:
                far.sendall(bytes(1 << 16))
        self.proxy.say_goodbye()
        time.sleep(0.2)
        began = time.monotonic()
        console.end('Good night.')
        console.join()
        self.assertLess(time.monotonic() - began, 4)
        self.assertFalse(console.is_alive())
        self.assertEqual([], self.threads('serial-'))


class LetGoTestCase(ConsoleTestCase):
    """Sockets are closed without garbage collection."""

    def setUp(self) -> None:
        super().setUp()
        self.addCleanup(gc.enable)
        gc.disable()
        # Sockets by their inode, because descriptors are reused.
        self.opened: list[str] = []
        connect = self.session.websocket

        def remembering(*args: Any, **kwargs: Any) -> websocket.WebSocket:
            channel = connect(*args, **kwargs)
            # The other one is for events, and is always reopened.
            if args[0] == 'operations':
                inode = os.fstat(channel.sock.fileno()).st_ino
                self.opened.append(f'socket:[{inode}]')
            return channel

        self.patch(self.session, 'websocket', remembering)

    def still_open(self) -> set[str]:
        found = set()
        for descriptor in os.listdir('/proc/self/fd'):
            with contextlib.suppress(OSError):
                found.add(os.readlink(f'/proc/self/fd/{descriptor}'))
        return found.intersection(self.opened)

    def test_serial_console_that_is_ended(self) -> None:
        for turn in range(1, 4):
            console, _far = self.open_console()
            self.lxd.wait_for(lambda: len(self.opened) == 2 * turn)
            console.end()
            console.join()
            self.lxd.wait_for(lambda: not self.still_open())

    def test_serial_console_that_is_closed(self) -> None:
        console, far = self.open_console()
        self.lxd.wait_for(lambda: len(self.opened) == 2)
        far.close()
        console.join()
        self.lxd.wait_for(lambda: not self.still_open())

    def test_serial_console_whose_program_ends(self) -> None:
        _console, far = self.open_console('true')
        far.settimeout(5)
        for turn in range(1, 4):
            self.lxd.wait_for(lambda: len(self.opened) == 2 * turn)
            self.lxd.wait_for(lambda: not self.still_open())
            while b'Press Enter' not in far.recv(4096):
                pass
            far.sendall(b'\r')

    def test_commands(self) -> None:
        for _turn in range(3):
            lxd_exec.run(self.session, 'c1', ['true'], timeout=5)
        self.assertEqual(12, len(self.opened))
        self.lxd.wait_for(lambda: not self.still_open())

    def test_commands_whose_websockets_lxd_closes(self) -> None:
        def handler(*_args: Any) -> tuple[int, bytes, bytes]:
            self.proxy.say_goodbye()
            return 0, b'', b''

        self.lxd.daemon.exec_handler = handler
        for _turn in range(3):
            lxd_exec.run(self.session, 'c1', ['true'], timeout=5)
        self.assertEqual(12, len(self.opened))
        self.lxd.wait_for(lambda: not self.still_open())
