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

"""Stands between the driver and a real LXD, and spoils chosen requests.

Every request gets a connection of its own, so that one can be answered with an
error before LXD sees it, or be carried out by LXD while its answer is lost.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
import contextlib
import dataclasses
import enum
import socket
import threading

import fixtures

_ERROR = (b'{"type":"error","error_code":500,'
          b'"error":"spoilt by the test","metadata":null}')


class Spoil(enum.Enum):
    """What may become of a request."""

    REFUSE = 'LXD never sees it, the driver gets an error'
    LOSE_REQUEST = 'LXD never sees it, the driver never hears of it'
    LOSE_ANSWER = 'LXD carries it out, the driver never hears of it'


@dataclasses.dataclass(frozen=True)
class Request:
    """One request that passed by."""

    method: str
    path: str

    def __str__(self) -> str:
        return f'{self.method} {self.path}'


class FaultyProxy(fixtures.Fixture):
    """A unix socket that passes on to LXD's.

    :param upstream: path of LXD's socket.
    :ivar path: path of the proxy's socket.
    :ivar seen: the requests so far.
    """

    def __init__(self, upstream: str) -> None:
        super().__init__()
        self._upstream = upstream
        self._choose: Callable[[Request, int], Spoil | None] = (
            lambda request, number: None)
        self._lock = threading.Lock()
        self.seen: list[Request] = []
        self.spoilt: Request | None = None

    def _setUp(self) -> None:
        folder = self.useFixture(fixtures.TempDir()).path
        self.path = f'{folder}/lxd.socket'
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(self.path)
        self._server.listen(64)
        self._closing = False
        self.addCleanup(self._close)
        threading.Thread(target=self._accept, daemon=True).start()

    def _close(self) -> None:
        self._closing = True
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def spoil(self, number: int, how: Spoil, changes_only: bool = True
              ) -> None:
        """Spoil one request, counted from now.

        :param number: which one, from 0.
        :param how: what becomes of it.
        :param changes_only: count only requests that change something.
        """
        with self._lock:
            self.seen.clear()
            self.spoilt = None
            left = collections.deque([number])

            def choose(request: Request, _number: int) -> Spoil | None:
                if (not left or request.path.startswith('/1.0/events') or
                        (changes_only and request.method == 'GET')):
                    return None
                if left[0] == 0:
                    left.clear()
                    return how
                left[0] -= 1
                return None
            self._choose = choose

    def refuse_from(self, method: str, first: Spoil = Spoil.REFUSE) -> None:
        """Refuse whatever comes, from the next request of a kind on until
        :meth:`behave`, as if LXD crashed then.

        :param method: which request is the first one.
        :param first: what becomes of that one.
        """
        with self._lock:
            self.seen.clear()

            def choose(request: Request, number: int) -> Spoil | None:
                if any(seen.method == method
                       for seen in self.seen[:number - 1]):
                    return Spoil.REFUSE
                return first if request.method == method else None
            self._choose = choose

    def behave(self) -> None:
        """Spoil nothing more, and forget what was seen."""
        with self._lock:
            self.seen.clear()
            self._choose = lambda request, number: None

    def _accept(self) -> None:
        while not self._closing:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,),
                             daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            head = b''
            while b'\r\n\r\n' not in head:
                more = client.recv(65536)
                if not more:
                    return
                head += more
            line, rest = head.split(b'\r\n', 1)
            method, path, _version = line.decode().split(' ', 2)
            request = Request(method, path)
            with self._lock:
                self.seen.append(request)
                how = self._choose(request, len(self.seen))
                if how is not None:
                    self.spoilt = request
            if how is Spoil.LOSE_REQUEST:
                return
            if how is Spoil.REFUSE:
                client.sendall(
                    b'HTTP/1.1 500 Internal Server Error\r\n'
                    b'Content-Type: application/json\r\nConnection: close\r\n'
                    b'Content-Length: %d\r\n\r\n%s' % (len(_ERROR), _ERROR))
                return
            headers, body = rest.split(b'\r\n\r\n', 1)
            if b'upgrade: websocket' not in headers.lower():
                headers = b'\r\n'.join(
                    [entry for entry in headers.split(b'\r\n')
                     if not entry.lower().startswith(b'connection:')] +
                    [b'Connection: close'])
            rest = headers + b'\r\n\r\n' + body
            with socket.socket(socket.AF_UNIX) as upstream:
                upstream.connect(self._upstream)
                upstream.sendall(line + b'\r\n' + rest)
                sender = threading.Thread(
                    target=_pump, args=(client, upstream), daemon=True)
                sender.start()
                _pump(upstream, None if how is Spoil.LOSE_ANSWER else client)
                # An upload may still be under way although LXD has answered.
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)
                sender.join(timeout=5)


def _pump(source: socket.socket, target: socket.socket | None) -> None:
    """Pass bytes on until one side ends; None throws them away."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            if target is not None:
                target.sendall(data)
    if target is not None:
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)
