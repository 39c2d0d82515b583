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

"""Serial sessions end, and close their websockets."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import Any

import websocket

from nova_lxd_py.virt.console import serial_session
from nova_lxd_py.virt.guest import events
from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from tests.fixtures import websocket_proxy


class ConsoleTestCase(websocket_proxy.ProxyTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.create(start=True, **{lxd_guest.KEY_UUID: 'a',
                                   lxd_guest.KEY_ROLE: 'server'})
        self.guests = registry.GuestRegistry(self.session)
        self.watcher = events.EventWatcher(self.session, self.guests,
                                           lambda event: None, 5)
        self.watcher.start()
        self.addCleanup(self.watcher.stop)
        self.server = serial_session.InstanceRef('a', 'c1')
        self.lxd.wait_for(lambda: self.watcher._connected)

    def threads(self, prefix: str) -> list[str]:
        return [thread.name for thread in threading.enumerate()
                if thread.name.startswith(prefix)]

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
    """LXD has stopped answering."""

    def test_watcher(self) -> None:
        self.proxy.fall_silent()
        self.proxy.close_websockets()
        began = time.monotonic()
        self.watcher.stop()
        self.assertLess(time.monotonic() - began, 4)
        self.assertEqual([], self.threads('lxd-events'))
        self.watcher.stop()

    def test_watcher_that_is_connecting(self) -> None:
        connect, connected = self.session.websocket, threading.Event()

        def late(*args: Any, **kwargs: Any) -> websocket.WebSocket:
            channel = connect(*args, **kwargs)
            connected.set()
            self.watcher._stopping.wait(10)
            # Until stop() waits for the thread.
            time.sleep(0.2)
            return channel

        self.patch(self.session, 'websocket', late)
        self.proxy.fall_silent()
        self.proxy.close_websockets()
        self.assertTrue(connected.wait(10))
        began = time.monotonic()
        self.watcher.stop()
        self.assertLess(time.monotonic() - began, 4)
        self.assertEqual([], self.threads('lxd-events'))

    def test_serial_console(self) -> None:
        console, far = self.open_console()
        self.lxd.wait_for(lambda: self.threads('serial-control'))
        self.proxy.fall_silent()
        # More than the buffers hold, so that the writer blocks.
        far.settimeout(0.3)
        with contextlib.suppress(TimeoutError):
            while True:
                far.sendall(bytes(1 << 16))
        self.proxy.close_websockets()
        time.sleep(0.2)
        began = time.monotonic()
        console.end('Good night.')
        console.join()
        self.assertLess(time.monotonic() - began, 4)
        self.assertFalse(console.is_alive())
        self.assertEqual([], self.threads('serial-'))


class ReleaseTestCase(ConsoleTestCase):
    """Sockets are closed without garbage collection."""

    def setUp(self) -> None:
        super().setUp()
        self.watch_sockets()

    def test_ended_by_the_driver(self) -> None:
        for turn in range(1, 4):
            console, _far = self.open_console()
            self.lxd.wait_for(lambda: len(self.opened) == 2 * turn)
            console.end()
            console.join()
            self.lxd.wait_for(lambda: not self.still_open())

    def test_closed_by_the_client(self) -> None:
        console, far = self.open_console()
        self.lxd.wait_for(lambda: len(self.opened) == 2)
        far.close()
        console.join()
        self.lxd.wait_for(lambda: not self.still_open())

    def test_program_ends(self) -> None:
        _console, far = self.open_console('true')
        far.settimeout(5)
        for turn in range(1, 4):
            self.lxd.wait_for(lambda: len(self.opened) == 2 * turn)
            self.lxd.wait_for(lambda: not self.still_open())
            while b'Press Enter' not in far.recv(4096):
                pass
            far.sendall(b'\r')
