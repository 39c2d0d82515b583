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

"""One connection to the serial console of a server.

It goes between a TCP connection, normally of nova-serialproxy, and LXD's
interactive console. It outlives the guest: while that is down, be it for a
reboot or stopped for longer, the connection waits for it to run again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import threading
import time
from typing import Any

from nova.compute import power_state
from oslo_log import log as logging
import websocket

from nova_lxd_py.virt import errors
from nova_lxd_py.virt import events
from nova_lxd_py.virt import exec as lxd_exec
from nova_lxd_py.virt import instance as lxd_instance
from nova_lxd_py.virt import session as lxd
from nova_lxd_py.virt import terminal

LOG = logging.getLogger(__name__)

#: Seconds for which input is held back after attaching, unless the guest
#: writes something earlier: LXD loses what comes before it is ready, and does
#: not say when that is. On a busy host all takes longer: this many times what
#: the steps before took comes on top.
READY_DELAY, READY_FACTOR = 1.0, 5
#: Seconds between attempts to attach: first and longest.
RETRY_FIRST, RETRY_LONGEST = 0.2, 2.0
#: Seconds that a console must have worked to be tried again at once.
WORKED = 1.0
#: Seconds to wait for threads to end.
END_TIMEOUT = 5

#: States in which LXD has no console to attach to.
_DEAF_STATES = {power_state.SHUTDOWN: 'not running',
                power_state.PAUSED: 'paused',
                power_state.SUSPENDED: 'suspended'}

#: So LXD begins what it says instead of the guest, if it cannot attach.
_LXD_ERROR = b'Error: Failed running forkconsole'


@dataclasses.dataclass(frozen=True)
class Server:
    """What is needed to know of a server to find it in LXD."""

    uuid: str
    name: str


class Session:
    """Serves one TCP connection, in threads of its own.

    :param client: the connection; it is closed in the end.
    :param server: whose console it is.
    :param session: the way to LXD.
    :param guests: the driver's LXD instances.
    :param watcher: what is known of their power states.
    """

    def __init__(self, client: socket.socket, server: Server,
                 session: lxd.Session, guests: lxd_instance.Guests,
                 watcher: events.Watcher) -> None:
        self._client = client
        self._server = server
        self._session = session
        self._guests = guests
        self._watcher = watcher
        self._sizes = terminal.Sizes()
        self._changed = threading.Condition()
        self._ended = threading.Event()
        #: Whether there is nothing to attach to; unknown at first.
        self._absent = False
        #: When LXD takes input, by the monotonic clock.
        self._ready_at = 0.0
        self._data: websocket.WebSocket | None = None
        self._control: websocket.WebSocket | None = None
        self._drain: threading.Thread | None = None
        self._said = ''
        self._resize_wanted = self._is_resizing = False
        #: The guest's process 1 on the host: another one after each start.
        self._pid: int | None = None
        self._threads = [
            threading.Thread(target=target, daemon=True,
                             name=f'serial-{what}-{server.name}')
            for what, target in (('in', self._read), ('out', self._serve))]

    def start(self) -> None:
        """Begin to serve."""
        self._client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A peer whose host has gone must not hold the console for ever.
        self._client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for thread in self._threads:
            thread.start()

    def end(self, reason: str | None = None) -> None:
        """Close the connection; may be called again, and by any thread.

        :param reason: what to tell the person at the terminal.
        """
        with self._changed:
            if self._ended.is_set():
                return
            self._ended.set()
            self._changed.notify_all()
        if reason:
            self._say(reason)
        with contextlib.suppress(OSError):
            self._client.shutdown(socket.SHUT_RDWR)
        self._detach()

    def join(self) -> None:
        """Wait until its threads have ended, but not for long."""
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(END_TIMEOUT)

    # -- from the terminal to the guest --------------------------------------

    def _read(self) -> None:
        try:
            while not self._ended.is_set():
                data = self._client.recv(4096)
                if not data:
                    break
                self._to_guest(data)
        except OSError as exc:
            LOG.debug('Serial console of %s: %s', self._server.name, exc)
        finally:
            self.end()

    def _to_guest(self, data: bytes) -> None:
        data, resized = self._sizes.from_terminal(data)
        if resized:
            self._resize()
        if not data:
            return
        channel = self._ready_channel()
        if channel is None:
            # Nobody is there to type to.
            return
        try:
            channel.send_binary(data)
        except (websocket.WebSocketException, OSError) as exc:
            LOG.debug('Serial console of %s lost input: %s',
                      self._server.name, exc)

    def _ready_channel(self) -> websocket.WebSocket | None:
        """Wait until LXD takes input, or there is nothing to type to."""
        with self._changed:
            while not self._ended.is_set():
                if self._data is None:
                    if self._absent:
                        return None
                    self._changed.wait()
                    continue
                left = self._ready_at - time.monotonic()
                if left <= 0:
                    return self._data
                self._changed.wait(left)
        return None

    def _resize(self) -> None:
        """Make the guest's terminal as large as the one at the other end."""
        with self._changed:
            self._resize_wanted = True
            if self._is_resizing:
                return
            self._is_resizing = True
        threading.Thread(target=self._resize_guest, daemon=True,
                         name=f'serial-size-{self._server.name}').start()

    def _resize_guest(self) -> None:
        """Resize as often as the size has changed meanwhile, no more."""
        while True:
            with self._changed:
                if not self._resize_wanted or self._ended.is_set():
                    self._is_resizing = False
                    return
                self._resize_wanted = False
            rows, columns = self._sizes.rows, self._sizes.columns
            try:
                # LXD has a message for this, which it does not pass on to
                # the consoles of containers.
                lxd_exec.run(
                    self._session, self._guests.active(self._server).name,
                    ['stty', '-F', '/dev/console', 'rows', str(rows),
                     'cols', str(columns)], timeout=END_TIMEOUT)
            except errors.LXDError as exc:
                LOG.debug('Serial console of %s was not resized: %s',
                          self._server.name, exc)

    # -- from the guest to the terminal --------------------------------------

    def _serve(self) -> None:
        pause = RETRY_FIRST
        try:
            while not self._ended.is_set():
                began = time.monotonic()
                try:
                    self._attach()
                    self._pump()
                except errors.NotFound:
                    self.end('The server is gone.')
                    break
                except (errors.LXDError, websocket.WebSocketException,
                        ValueError) as exc:
                    LOG.debug('Serial console of %s: %s', self._server.name,
                              exc)
                finally:
                    self._detach()
                if time.monotonic() - began > WORKED:
                    pause = RETRY_FIRST
                self._ended.wait(pause)
                pause = min(pause * 2, RETRY_LONGEST)
        except OSError as exc:
            LOG.debug('Serial console of %s: %s', self._server.name, exc)
        except Exception:
            LOG.exception('Unexpected error in the serial console of %s',
                          self._server.name)
        finally:
            self.end()
            self._client.close()

    def _attach(self) -> None:
        """Attach to the console of what runs for the server, if anything
        does."""
        state = self._watcher.power_state(self._server)
        if state in _DEAF_STATES:
            self._say_once(f'The server is {_DEAF_STATES[state]}. Waiting '
                           f'for it.')
            with self._changed:
                self._absent = True
                self._changed.notify_all()
            return
        guest = self._guests.active(self._server)
        began = time.monotonic()
        operation = self._session.submit(
            'post', 'instances', guest.name, 'console', body={
                'type': 'console', 'width': self._sizes.columns,
                'height': self._sizes.rows})
        secrets = operation.metadata['metadata']['fds']
        self._control = self._session.websocket(
            'operations', operation.id, 'websocket',
            params={'secret': secrets['control']})
        self._drain = threading.Thread(
            target=_drain, args=(self._control,), daemon=True,
            name=f'serial-control-{self._server.name}')
        self._drain.start()
        # With this one the console begins to work.
        data = self._session.websocket(
            'operations', operation.id, 'websocket',
            params={'secret': secrets['0']})
        with self._changed:
            now = time.monotonic()
            self._ready_at = now + READY_DELAY + READY_FACTOR * (now - began)
            self._data = data
            self._absent = False
            self._changed.notify_all()
        self._catch_up(guest)
        if self._ended.is_set():
            # It has ended meanwhile, and did not find these to close.
            self._detach()

    def _catch_up(self, guest: lxd_instance.Guest) -> None:
        """Show what a guest that has been started anew wrote meanwhile."""
        pid = guest.state()['pid']
        before, self._pid = self._pid, pid
        if before in (None, pid):
            return
        try:
            with self._session.download('instances', guest.name, 'console'
                                        ) as (_headers, chunks):
                for chunk in chunks:
                    self._client.sendall(chunk)
        except errors.OperationFailed as exc:
            LOG.debug('%s has written nothing yet: %s', guest.name, exc)

    def _pump(self) -> None:
        """Pass on what the guest writes, until its console closes."""
        channel = self._data
        first = True
        while channel is not None and not self._ended.is_set():
            opcode, content = channel.recv_data()
            if opcode != websocket.ABNF.OPCODE_BINARY:
                return
            if first:
                if content.startswith(_LXD_ERROR):
                    self._say_once('The console is in use elsewhere. Waiting '
                                   'for it.')
                    return
                first = False
                with self._changed:
                    self._ready_at = 0.0
                    self._changed.notify_all()
            self._said = ''
            self._sizes.from_guest(content)
            self._client.sendall(content)

    def _detach(self) -> None:
        """Close the websockets in the order that LXD bears.

        LXD 5.0 answers the end of the control websocket by writing to the
        other one, and crashes if it is writing to that already. Once the
        other one is closed it closes the control websocket by itself.
        """
        with self._changed:
            control, data, drain = self._control, self._data, self._drain
            self._control = self._data = self._drain = None
        if data is not None:
            _close(data)
            if drain is not None:
                drain.join(END_TIMEOUT)
        if control is not None:
            _close(control)

    def _say_once(self, text: str) -> None:
        if self._said != text:
            self._said = text
            self._say(text)

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._client.sendall(f'\r\n[{text}]\r\n'.encode())


def _close(channel: Any) -> None:
    """Close a websocket that another thread may be reading from."""
    with contextlib.suppress(websocket.WebSocketException, OSError):
        channel.send_close()
    with contextlib.suppress(websocket.WebSocketException, OSError):
        channel.abort()
    with contextlib.suppress(websocket.WebSocketException, OSError):
        channel.shutdown()


def _drain(channel: websocket.WebSocket) -> None:
    """Answer LXD's pings on a websocket on which it says nothing else."""
    with contextlib.suppress(websocket.WebSocketException, OSError,
                             ValueError):
        while channel.connected:
            channel.recv_data()
