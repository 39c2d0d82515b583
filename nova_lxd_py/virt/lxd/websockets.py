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

"""What the users of LXD's websockets have in common: errors and the end."""

from __future__ import annotations

import contextlib
import socket

import websocket

#: What using a websocket raises when it, or the way to LXD, breaks; EOFError
#: is eventlet's, for a socket that another thread has closed.
ERRORS = (websocket.WebSocketException, OSError, EOFError)


def shutdown(channel: websocket.WebSocket) -> None:
    """End a websocket that other threads may be reading or writing.

    They are woken up, also one that waits for LXD's part of a goodbye: the
    library's own ``abort()`` does nothing once either side has begun with
    that. Nothing is said, since to say it could take as long as LXD does not
    read. Again is no change.

    The socket is closed when the last of them lets go of it: under eventlet,
    who waits for one that is closed before its turn comes is never woken up.

    :param channel: the websocket.
    """
    connection = channel.sock
    if connection is not None:
        with contextlib.suppress(*ERRORS):
            connection.shutdown(socket.SHUT_RDWR)


def release(channel: websocket.WebSocket) -> None:
    """Free a websocket that nobody reads any more; again is no change.

    The library's object and its buffer hold each other, so that the socket
    would stay open until Python looks for such circles. Without that it is
    closed as soon as who may still be writing to it is done.

    :param channel: the websocket, whose connection has been hung up.
    """
    vars(channel).pop('frame_buffer', None)
