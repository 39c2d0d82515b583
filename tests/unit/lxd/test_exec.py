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

"""Websockets of commands in instances."""

from __future__ import annotations

from typing import Any

from nova_lxd_py.virt.lxd import exec as lxd_exec
from tests.fixtures import websocket_proxy


class ReleaseTestCase(websocket_proxy.ProxyTestCase):
    """Sockets are closed without garbage collection."""

    def setUp(self) -> None:
        super().setUp()
        self.create(start=True)
        self.watch_sockets()

    def test_output(self) -> None:
        self.lxd.daemon.exec_handler = lambda *args: (3, b'out' * 9, b'err')
        self.assertEqual(
            lxd_exec.Result(3, b'out' * 9, b'err'),
            lxd_exec.run(self.session, 'c1', ['true'], timeout=5))

    def test_end_of_the_input(self) -> None:
        """Commands that read all of it come to an end."""
        self.lxd.daemon.exec_handler = lambda *args: (0, args[-1].read(), b'')
        self.assertEqual(b'abc', lxd_exec.run(
            self.session, 'c1', ['cat'], b'abc', timeout=3).output)

    def test_output_without_end(self) -> None:
        """What is too much is dropped, and the command goes on."""
        self.lxd.daemon.exec_handler = lambda *args: (
            0, b'x' * (lxd_exec.OUTPUT_LIMIT + 9), b'')
        found = lxd_exec.run(self.session, 'c1', ['true'], timeout=5)
        self.assertEqual((0, b'x' * lxd_exec.OUTPUT_LIMIT),
                         (found.code, found.output))

    def test_ended_by_the_client(self) -> None:
        for _turn in range(3):
            lxd_exec.run(self.session, 'c1', ['true'], timeout=5)
        self.assertEqual(12, len(self.opened))
        self.lxd.wait_for(lambda: not self.still_open())

    def test_lxd_closes_websockets(self) -> None:
        def handler(*_args: Any) -> tuple[int, bytes, bytes]:
            self.proxy.close_websockets()
            return 0, b'', b''

        self.lxd.daemon.exec_handler = handler
        for _turn in range(3):
            lxd_exec.run(self.session, 'c1', ['true'], timeout=5)
        self.assertEqual(12, len(self.opened))
        self.lxd.wait_for(lambda: not self.still_open())
