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

"""Shutdown of websockets whose peer has stopped answering."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import socket
import threading
import time
from typing import Any

from oslotest import base
import websocket

from nova_lxd_py.virt.lxd import websockets
from tests.fixtures import websocket_proxy


class ShutdownTestCase(base.BaseTestCase):

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

    def wait_for_close(self) -> None:
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

    def test_close_frame_without_answer(self) -> None:
        thread = self.run_in_thread(self.channel.close, timeout=60)
        self.wait_for_close()
        # This is the reason for shutdown().
        self.channel.abort()
        thread.join(0.2)
        self.assertTrue(thread.is_alive())
        self.assert_all_end()

    def test_answer_to_a_close_frame_is_not_read(self) -> None:
        self.run_in_thread(self.channel.send_binary, bytes(1 << 20))
        self.peer.sendall(websocket_proxy.CLOSE)
        self.run_in_thread(self.channel.recv_data)
        self.wait_for_close()
        self.assert_all_end()
