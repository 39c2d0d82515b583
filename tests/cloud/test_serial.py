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

"""Serial consoles through nova-serialproxy, as users reach them."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
from typing import Any
import uuid

import websocket

from tests.fixtures import cloud
from tests.fixtures import turns

PASSWORD = 'a Secret of 1 server'


class Terminal(contextlib.AbstractContextManager['Terminal']):
    """A client of nova-serialproxy."""

    def __init__(self, url: str) -> None:
        self._channel = websocket.create_connection(
            url, timeout=10, subprotocols=['binary'], suppress_origin=True)
        self.seen = ''

    def __exit__(self, *exc: Any) -> None:
        self._channel.close(timeout=1)

    def type(self, text: str) -> None:
        self._channel.send_binary(text.encode())

    def expect(self, wanted: str, timeout: float = 60) -> str:
        """Read until a text appears, and return what came before it."""
        deadline = time.monotonic() + timeout
        while wanted not in self.seen:
            self._channel.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                data = self._channel.recv()
            except websocket.WebSocketTimeoutException:
                raise AssertionError(
                    f'No "{wanted}" in {self.seen!r}') from None
            if not data:
                raise AssertionError(f'Closed after {self.seen!r}')
            self.seen += (data.decode(errors='replace')
                          if isinstance(data, bytes) else data)
        before, _, self.seen = self.seen.partition(wanted)
        return before

    def log_in(self) -> None:
        self.expect('login:')
        self.type('root\n')
        self.expect('assword:')
        self.type(f'{PASSWORD}\n')
        # What is typed before the prompt, login discards.
        self.expect('root@')
        self.run('echo $((6 * 7))', '42')

    def run(self, command: str, result: str) -> None:
        """Type a command and wait for its result, not for its echo."""
        self.type(f"{command}; echo 'do''ne'\n")
        self.expect(result)
        self.expect('done')

    def is_closed(self, timeout: float = 30) -> bool:
        self._channel.settimeout(timeout)
        with contextlib.suppress(websocket.WebSocketConnectionClosedException,
                                 ConnectionError):
            while data := self._channel.recv():
                self.seen += str(data)
        return True


class SerialConsoleTest(cloud.CloudTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.server = self.boot(cloud.distribution(), 'lxd.small',
                                admin_password=PASSWORD)

    def url(self) -> str:
        return self.cloud.compute.create_server_remote_console(
            self.server, protocol='serial', type='serial').url

    def refused(self, url: str) -> bool:
        """Whether the URL does not lead to a terminal."""
        try:
            with Terminal(url) as terminal:
                terminal.is_closed()
                return 'login:' not in terminal.seen
        except (websocket.WebSocketException, ConnectionError):
            return True

    def port(self) -> int:
        [instance] = self.host.instances_of(self.server.id)
        return int(instance['config']['user.nova.serial_port'])

    def test_terminal(self) -> None:
        with Terminal(self.url()) as terminal:
            # As a client does that knows the size of its window.
            terminal.type('\x1b[8;50;132t')
            terminal.log_in()
            terminal.run('stty size', '50 132')
            terminal.run('tty', '/dev/pts/')
            terminal.type('\x1b[8;30;100t')
            terminal.run('sleep 1; stty size', '30 100')
            # Another one, at the same time.
            with Terminal(self.url()) as second:
                second.log_in()
                second.run('id -u', '0')
            terminal.run('echo $((7 * 7))', '49')

    def test_wrong_password(self) -> None:
        with Terminal(self.url()) as terminal:
            terminal.expect('login:')
            terminal.type('root\n')
            terminal.expect('assword:')
            terminal.type('something else\n')
            terminal.expect('incorrect')

    def test_tokens(self) -> None:
        url = self.url()
        self.assertTrue(self.refused(
            re.sub(r'token(=|%3D)[0-9a-f-]+', rf'token\g<1>{uuid.uuid4()}',
                   url)))
        self.assertTrue(self.refused(url.partition('?')[0]))
        # A token may be used again as long as it is valid.
        for _time in range(2):
            with Terminal(url) as terminal:
                terminal.expect('login:')

    @turns.alone
    def test_reboot_and_restart(self) -> None:
        url = self.url()
        port = self.port()
        with Terminal(url) as terminal:
            terminal.log_in()
            self.cloud.compute.reboot_server(self.server, 'HARD')
            terminal.log_in()
            self.wait_status(self.server.id, 'ACTIVE')
        cloud.quickstart('restart', 'nova-compute')
        # The earlier token is valid for the same port.
        with Terminal(url) as terminal:
            terminal.log_in()
        self.assertEqual(port, self.port())

    def test_stopped_server_has_none(self) -> None:
        self.cloud.compute.stop_server(self.server)
        self.wait_status(self.server.id, 'SHUTOFF', 90)
        answer = self.cloud.compute.post(
            f'/servers/{self.server.id}/remote-consoles', microversion='2.6',
            json={'remote_console': {'protocol': 'serial', 'type': 'serial'}})
        self.assertEqual(400, answer.status_code, answer.text)
        self.assertIn('serial', json.dumps(answer.json()))

    def test_delete(self) -> None:
        url = self.url()
        port = self.port()
        with Terminal(url) as terminal:
            terminal.log_in()
            self.delete(self.server.id)
            self.assertTrue(terminal.is_closed())
        self.assertTrue(self.refused(url))
        with self.assertRaises(ConnectionRefusedError):
            socket.create_connection(('127.0.0.1', port), timeout=5).close()
