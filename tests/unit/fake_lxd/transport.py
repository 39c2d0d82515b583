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

"""HTTP/1.1 over a unix socket (or TLS), one thread a connection."""

from __future__ import annotations

from http import server as http_server
import os
import socket
import socketserver
import ssl
import threading
import time
from typing import Any
from urllib import parse

from tests.unit.fake_lxd import errors
from tests.unit.fake_lxd import routing
from tests.unit.fake_lxd import wsproto


class Handler(http_server.BaseHTTPRequestHandler):
    """Reads requests and writes what the daemon answers."""

    protocol_version = 'HTTP/1.1'
    server_version = 'fake-lxd'
    server: Any

    def address_string(self) -> str:
        return '@'

    def log_message(self, *args: Any) -> None:
        pass

    def send_response(self, code: int, message: str | None = None) -> None:
        # LXD names no server software.
        self.send_response_only(code, message)
        self.send_header('Date', self.date_time_string())

    def handle(self) -> None:
        self.server.track(self.connection)
        try:
            super().handle()
        except (OSError, errors.Dropped):
            self.close_connection = True
        finally:
            self.server.untrack(self.connection)

    def _answer(self) -> None:
        daemon = self.server.daemon
        raw_path, _, query = self.path.partition('?')
        request = routing.Request(
            self.command, parse.unquote(raw_path),
            dict(parse.parse_qsl(query, keep_blank_values=True)),
            {key.lower(): value for key, value in self.headers.items()},
            trusted=self.server.is_trusted(self.connection))
        try:
            request.body = self._read_body()
        except ValueError:
            # LXD notices too that the stream broke off, and then there is
            # nobody left to answer.
            daemon.log_request(request, broken=True)
            raise errors.Dropped from None
        response = daemon.answer(request, raw_path)
        if isinstance(response, routing.Upgrade):
            self._upgrade(response)
            return
        self._write(response)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer
    do_HEAD = _answer

    def _read_body(self) -> bytes:
        if self.headers.get('Transfer-Encoding', '').lower() == 'chunked':
            content = []
            while True:
                line = self.rfile.readline(1024)
                if not line:
                    raise ValueError('unexpected EOF')
                size = int(line.split(b';')[0], 16)
                chunk = self.rfile.read(size)
                ending = self.rfile.readline(3)
                if len(chunk) < size or ending not in (b'\r\n', b'\n'):
                    raise ValueError('unexpected EOF')
                if not size:
                    return b''.join(content)
                content.append(chunk)
        size = int(self.headers.get('Content-Length') or 0)
        body = self.rfile.read(size)
        if len(body) < size:
            raise ValueError('unexpected EOF')
        return body

    def _write(self, response: routing.Response) -> None:
        self.send_response(response.status)
        for key, value in response.headers.items():
            self.send_header(key, value)
        whole = isinstance(response.body, bytes)
        if whole:
            self.send_header('Content-Length', str(len(response.body)))
        else:
            self.send_header('Transfer-Encoding', 'chunked')
        self.end_headers()
        if self.command == 'HEAD':
            return
        if whole:
            self.wfile.write(response.body)
            return
        for chunk in response.body:
            if chunk:
                self.wfile.write(b'%x\r\n%s\r\n' % (len(chunk), chunk))
        self.wfile.write(b'0\r\n\r\n')

    def _upgrade(self, upgrade: routing.Upgrade) -> None:
        self.close_connection = True
        key = self.headers.get('Sec-WebSocket-Key')
        upgrades = self.headers.get('Upgrade', '').lower()
        if upgrades != 'websocket' or not key:
            self._write(routing.Response(
                400, b'Bad Request\n',
                {'Content-Type': 'text/plain; charset=utf-8'}))
            return
        # As gorilla/websocket's default check does in LXD.
        origin = self.headers.get('Origin')
        if origin and parse.urlparse(origin).netloc != self.headers['Host']:
            self._write(routing.Response(403, b'Forbidden\n'))
            return
        self.send_response_only(101)
        self.send_header('Upgrade', 'websocket')
        self.send_header('Connection', 'Upgrade')
        self.send_header('Sec-WebSocket-Accept', wsproto.accept_key(key))
        self.end_headers()
        upgrade.serve(wsproto.WebSocket(self.connection, self.rfile))


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: Any, daemon: Any) -> None:
        self.daemon = daemon
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        super().__init__(address, Handler)

    def track(self, sock: socket.socket) -> None:
        with self._lock:
            self._open.add(sock)

    def untrack(self, sock: socket.socket) -> None:
        with self._lock:
            self._open.discard(sock)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass

    def is_trusted(self, sock: socket.socket) -> bool:
        return True

    def begin(self) -> None:
        # A short poll makes shutdown() quick; it costs nothing at rest that
        # a test suite would notice.
        threading.Thread(target=self.serve_forever, args=(0.02,),
                         name='fake-lxd', daemon=True).start()

    def end(self) -> None:
        """Stop listening and cut every connection."""
        self.shutdown()
        self.server_close()
        with self._lock:
            connections = list(self._open)
        for sock in connections:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        deadline = time.monotonic() + 2
        while self._open and time.monotonic() < deadline:
            time.sleep(0.005)


class UnixServer(_Server):
    """Listens where LXD's socket would be."""

    address_family = socket.AF_UNIX

    def server_bind(self) -> None:
        if os.path.exists(self.server_address):
            os.unlink(self.server_address)
        self.socket.bind(self.server_address)
        os.chmod(self.server_address, 0o660)

    def get_request(self) -> tuple[socket.socket, Any]:
        sock, _address = self.socket.accept()
        return sock, ('@', 0)

    def end(self) -> None:
        super().end()
        if os.path.exists(self.server_address):
            os.unlink(self.server_address)


class TLSServer(_Server):
    """Listens on a port of the loopback device.

    :param certificate: paths of the server's certificate and key.
    :param clients: certificates by path, and whether LXD trusts them. Others
        fail in the handshake, which they would not with LXD.
    """

    def __init__(self, daemon: Any, certificate: tuple[str, str],
                 clients: dict[str, bool]) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(*certificate)
        # Python verifies a certificate or does not tell of it.
        self._context.verify_mode = ssl.CERT_OPTIONAL
        self._trusted = set()
        for path, trusted in clients.items():
            self._context.load_verify_locations(path)
            if trusted:
                with open(path) as source:
                    self._trusted.add(
                        ssl.PEM_cert_to_DER_cert(source.read()))
        super().__init__(('127.0.0.1', 0), daemon)

    @property
    def endpoint(self) -> str:
        return f'https://127.0.0.1:{self.server_address[1]}'

    def get_request(self) -> tuple[socket.socket, Any]:
        sock, address = self.socket.accept()
        # The handshake happens in the connection's own thread.
        return self._context.wrap_socket(
            sock, server_side=True, do_handshake_on_connect=False), address

    def is_trusted(self, sock: socket.socket) -> bool:
        shown = sock.getpeercert(binary_form=True)  # type: ignore
        return shown in self._trusted
