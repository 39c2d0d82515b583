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

"""The server side of RFC 6455, as far as LXD uses it."""

from __future__ import annotations

import base64
import hashlib
import socket
import struct
import threading

_GUID = '258EAFA5-E914-47DA-95CA-C5AB0DC85B11'

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10


def accept_key(key: str) -> str:
    digest = hashlib.sha1(  # noqa: S324 - the RFC wants SHA-1
        (key + _GUID).encode(), usedforsecurity=False).digest()
    return base64.b64encode(digest).decode()


class WebSocket:
    """One accepted connection. Sending is safe from several threads."""

    def __init__(self, sock: socket.socket, reader) -> None:
        self._sock = sock
        self._reader = reader
        self._sending = threading.Lock()
        self.closed = False

    def send_text(self, text: str) -> None:
        self._send(TEXT, text.encode())

    def send_binary(self, data: bytes) -> None:
        self._send(BINARY, data)

    def ping(self, data: bytes = b'') -> None:
        self._send(PING, data)

    def _send(self, opcode: int, data: bytes) -> None:
        head = bytes([0x80 | opcode])
        if len(data) < 126:
            head += bytes([len(data)])
        elif len(data) < 65536:
            head += struct.pack('!BH', 126, len(data))
        else:
            head += struct.pack('!BQ', 127, len(data))
        with self._sending:
            self._sock.sendall(head + data)

    def receive(self) -> tuple[int, bytes] | None:
        """Wait for a message, answering pings on the way.

        :returns: opcode and content, or None when the peer has gone.
        """
        kind, content = 0, b''
        while True:
            frame = self._frame()
            if frame is None:
                return None
            final, opcode, data = frame
            if opcode == PING:
                self._send(PONG, data)
            elif opcode == PONG:
                continue
            elif opcode == CLOSE:
                self.close(data[:2])
                return None
            else:
                kind = opcode or kind
                content += data
                if final:
                    return kind, content

    def _frame(self) -> tuple[bool, int, bytes] | None:
        try:
            head = self._exactly(2)
            size = head[1] & 0x7f
            if size == 126:
                size = struct.unpack('!H', self._exactly(2))[0]
            elif size == 127:
                size = struct.unpack('!Q', self._exactly(8))[0]
            mask = self._exactly(4) if head[1] & 0x80 else b'\0\0\0\0'
            data = self._exactly(size)
        except (OSError, ValueError, EOFError):
            self.closed = True
            return None
        clear = bytes(b ^ mask[i % 4] for i, b in enumerate(data))
        return bool(head[0] & 0x80), head[0] & 0x0f, clear

    def _exactly(self, size: int) -> bytes:
        data = self._reader.read(size)
        if len(data) < size:
            raise EOFError
        return data

    def close(self, code: bytes = b'\x03\xe8') -> None:
        """Say goodbye (1000 unless told otherwise)."""
        if not self.closed:
            self.closed = True
            try:
                self._send(CLOSE, code)
            except OSError:
                pass

    def abort(self) -> None:
        """Vanish without a goodbye, as a killed daemon does."""
        self.closed = True
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
