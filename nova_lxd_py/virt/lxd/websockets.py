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

"""Connections to LXD's websockets, their exceptions and shutdown."""

from __future__ import annotations

import contextlib
import socket

from oslo_config import cfg
import websocket

from nova_lxd_py.virt.lxd import tls

#: Exceptions of a websocket whose connection is broken; EOFError is
#: eventlet's, for a socket that another thread has closed.
ERRORS = (websocket.WebSocketException, OSError, EOFError)


def connect(endpoint: str, conf: cfg.ConfigOpts.GroupAttr, url: str,
            connect_timeout: float, timeout: float | None
            ) -> websocket.WebSocket:
    """Connect to a websocket of LXD.

    :param endpoint: path of LXD's socket, or https URL.
    :param conf: the ``[lxd]`` option group.
    :param url: URL of the websocket; its host does not matter.
    :param connect_timeout: seconds for the connection and the handshakes.
    :param timeout: seconds for each later read or write; None for no timeout.
    :raises websocket.WebSocketBadStatusException: if LXD refuses the request.
    :raises websocket.WebSocketException: if the handshake fails.
    :raises OSError: if the connection fails.
    :raises errors.PermissionDenied: if a certificate is unusable or wrong.
    """
    with contextlib.ExitStack() as undo:
        if endpoint.startswith('https://'):
            sock: socket.socket = tls.connect(endpoint, conf, connect_timeout)
            undo.callback(sock.close)
        else:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            undo.callback(sock.close)
            sock.settimeout(connect_timeout)
            sock.connect(endpoint)
        channel = websocket.create_connection(
            url, socket=sock, timeout=connect_timeout, suppress_origin=True,
            enable_multithread=True)
        channel.settimeout(timeout)
        undo.pop_all()
    return channel


def shutdown(channel: websocket.WebSocket) -> None:
    """Shut down a websocket that other threads may be reading or writing.

    Those threads are woken up, even one that waits for LXD's close frame: the
    library's ``abort()`` does nothing once either side has begun to close. No
    close frame is sent, because that blocks as long as LXD does not read. The
    call is idempotent.

    The socket itself is closed when its last user releases it: under eventlet,
    a thread that waits for its turn on a closed socket is never woken up.

    :param channel: the websocket.
    """
    connection = channel.sock
    if connection is not None:
        with contextlib.suppress(*ERRORS):
            connection.shutdown(socket.SHUT_RDWR)


def release(channel: websocket.WebSocket) -> None:
    """Release a websocket that is not read any more. Idempotent.

    The websocket object and its buffer reference each other, so that the
    socket would stay open until garbage collection. With the cycle broken, it
    is closed as soon as a thread that may still be writing to it has finished.

    :param channel: the websocket, which has been shut down.
    """
    vars(channel).pop('frame_buffer', None)
