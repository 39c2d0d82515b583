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
