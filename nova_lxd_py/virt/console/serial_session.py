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

It goes between a TCP connection, normally of nova-serialproxy, and a program
that LXD runs on a terminal of its own in the guest: ``login``, normally. The
connection outlives the program and the guest: while that is down, be it for a
reboot or stopped for longer, it waits for it to run again.

Why not LXD's console, the guest's ``/dev/console``: liblxc's monitor of a
container waits for ever when a connection to the console ends, or merely does
not read, while the guest writes much. From then on every question about that
container waits too, and with it LXD's list of all of them. Any tenant could
bring that about. Besides, that console has a login only if the guest cares to
offer one, it cannot be resized, and LXD 5.0 crashes if its end comes at the
wrong moment.
"""

from __future__ import annotations

from collections.abc import Sequence
import contextlib
import dataclasses
import enum
import json
import socket
import threading
import time

from nova.compute import power_state
from oslo_log import log as logging
import websocket

from nova_lxd_py.virt.console import terminal_size
from nova_lxd_py.virt.guest import events
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import exec as lxd_exec
from nova_lxd_py.virt.lxd import operations
from nova_lxd_py.virt.lxd import session as lxd
from nova_lxd_py.virt.lxd import websockets

LOG = logging.getLogger(__name__)

#: What programs take the terminal for; nearly all are like it.
TERM = 'xterm'
#: Seconds between attempts: first and longest.
RETRY_FIRST, RETRY_LONGEST = 0.2, 2.0
#: Seconds that a program must have run for the next one to start at once.
WORKED = 1.0
#: Seconds to wait for threads and programs to end.
END_TIMEOUT = 5
#: Seconds that a last word may take.
FAREWELL_TIMEOUT = 1
#: Seconds for which a program may leave its input unread. There has to be some
#: such limit: one thread reads from the websocket while another writes to it,
#: which an encrypted one allows only if neither waits for ever.
PATIENCE = 3600

#: States in which LXD runs no program.
_AWAY = {power_state.SHUTDOWN: 'not running', power_state.PAUSED: 'paused',
         power_state.SUSPENDED: 'suspended'}

#: Return codes from here on, and negative ones, are those of programs that
#: were killed.
_KILLED = 128


@dataclasses.dataclass(frozen=True)
class Server:
    """What is needed to know of a server to find it in LXD."""

    uuid: str
    name: str


class _Mode(enum.Enum):
    """What becomes of what is typed."""

    #: It is held until there is a program to read it.
    STARTING = enum.auto()
    #: The program gets it.
    OPEN = enum.auto()
    #: It asks for another program.
    IDLE = enum.auto()
    #: Nobody is there to type to.
    AWAY = enum.auto()


class Session:
    """Serves one TCP connection, in threads of its own.

    :param client: the connection; it is closed in the end.
    :param server: whose console it is.
    :param command: what runs in the guest.
    :param session: the way to LXD.
    :param guests: the driver's LXD instances.
    :param watcher: what is known of their power states.
    """

    def __init__(self, client: socket.socket, server: Server,
                 command: Sequence[str], session: lxd.Session,
                 guests: registry.GuestRegistry, watcher: events.EventWatcher
                 ) -> None:
        self._client = client
        self._server = server
        self._command = list(command)
        self._session = session
        self._guests = guests
        self._watcher = watcher
        self._sizes = terminal_size.TerminalSize()
        self._ended = threading.Event()
        #: Guards what follows, and tells of its changes.
        self._changed = threading.Condition()
        self._mode = _Mode.STARTING
        self._data: websocket.WebSocket | None = None
        self._control: websocket.WebSocket | None = None
        self._said = ''
        self._farewell: str | None = None
        #: The writer's, which ends only after it.
        self._drainer: threading.Thread | None = None
        #: The writer's as well: the websocket that it reads.
        self._read_here: websocket.WebSocket | None = None
        self._reader = threading.Thread(
            target=self._read, daemon=True, name=f'serial-in-{server.name}')
        self._writer = threading.Thread(
            target=self._serve, daemon=True, name=f'serial-out-{server.name}')

    def start(self) -> None:
        """Begin to serve."""
        self._client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A peer whose host has gone must not hold the console for ever.
        self._client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._reader.start()
        self._writer.start()

    def end(self, reason: str | None = None) -> None:
        """Close the connection; may be called again, and by any thread.

        :param reason: what to tell the person at the terminal.
        """
        with self._changed:
            if self._ended.is_set():
                return
            self._ended.set()
            self._farewell = reason
            self._changed.notify_all()
        self._detach()
        if self._writer is threading.current_thread():
            return
        if reason:
            # It says so, unless the other end does not read.
            self._writer.join(FAREWELL_TIMEOUT)
        self._shut_down()

    def _shut_down(self) -> None:
        """Wake up who waits for the connection."""
        with contextlib.suppress(OSError):
            self._client.shutdown(socket.SHUT_RDWR)

    def is_alive(self) -> bool:
        """Whether there is still something of it."""
        return self._writer.is_alive() or self._reader.is_alive()

    def join(self) -> None:
        """Wait until its threads have ended, but not for long."""
        for thread in (self._reader, self._writer):
            if thread is not threading.current_thread():
                thread.join(END_TIMEOUT)

    def _set_mode(self, mode: _Mode) -> None:
        with self._changed:
            self._mode = mode
            self._changed.notify_all()

    # -- from the terminal to the guest --------------------------------------

    def _read(self) -> None:
        try:
            while not self._ended.is_set():
                data = self._client.recv(4096)
                if not data:
                    break
                data, resized = self._sizes.from_terminal(data)
                if resized:
                    self._resize()
                if data:
                    self._to_guest(data)
        except (OSError, EOFError) as exc:
            # The second one is eventlet's, for a socket that is closed.
            LOG.debug('Serial console of %s: %s', self._server.name, exc)
        finally:
            self.end()

    def _to_guest(self, data: bytes) -> None:
        with self._changed:
            while self._mode is _Mode.STARTING and not self._ended.is_set():
                self._changed.wait()
            if self._mode is _Mode.IDLE:
                self._mode = _Mode.STARTING
                self._changed.notify_all()
                return
            channel = self._data
        if channel is None:
            return
        try:
            channel.send_binary(data)
        except websockets.ERRORS as exc:
            LOG.debug('Serial console of %s lost input: %s',
                      self._server.name, exc)
            # Half of it may have gone, and nothing can come after that.
            websockets.shutdown(channel)

    def _resize(self) -> None:
        control = self._control
        if control is None:
            return
        try:
            control.send(json.dumps({'command': 'window-resize', 'args': {
                'width': str(self._sizes.columns),
                'height': str(self._sizes.rows)}}))
        except websockets.ERRORS as exc:
            LOG.debug('Serial console of %s was not resized: %s',
                      self._server.name, exc)

    # -- from the guest to the terminal --------------------------------------

    def _serve(self) -> None:
        pause = RETRY_FIRST
        try:
            while not self._ended.is_set():
                began = time.monotonic()
                code = self._run_once()
                if code is None or not 0 <= code < _KILLED:
                    # The guest has gone down, or LXD; or it will, since
                    # programs are killed first.
                    if time.monotonic() - began > WORKED:
                        pause = RETRY_FIRST
                    self._ended.wait(pause)
                    pause = min(pause * 2, RETRY_LONGEST)
                    continue
                pause = RETRY_FIRST
                if code in (lxd_exec.NOT_FOUND, lxd_exec.NOT_EXECUTABLE):
                    self.end(f'The guest has no program '
                             f'"{self._command[0]}", which would serve here.')
                else:
                    self._idle()
        except Exception:
            LOG.exception('Unexpected error in the serial console of %s',
                          self._server.name)
        finally:
            self.end()
            if self._farewell:
                self._say(self._farewell)
            self._shut_down()
            # Under eventlet nobody else would wake up who still reads.
            self._reader.join(END_TIMEOUT)
            self._client.close()

    def _run_once(self) -> int | None:
        """Run the program, if there is a guest to run it in.

        :returns: its return code, None if it did not come to that.
        """
        try:
            state = self._watcher.power_state(self._server)
            if state in _AWAY:
                self._set_mode(_Mode.AWAY)
                self._say_once(f'The server is {_AWAY[state]}. Waiting for '
                               f'it.')
                return None
            self._set_mode(_Mode.STARTING)
            try:
                operation = self._attach()
                self._pump()
            finally:
                self._detach()
                if self._drainer is not None:
                    self._drainer.join(END_TIMEOUT)
                if self._read_here is not None:
                    websockets.release(self._read_here)
                    self._read_here = None
            if self._ended.is_set():
                return None
            return int(operation.wait(END_TIMEOUT).get('return', _KILLED))
        except errors.NotFound:
            self.end('The server is gone.')
        except errors.OperationFailed as exc:
            code = lxd_exec.code_of(exc)
            if code is not None:
                return code
            LOG.debug('Serial console of %s: %s', self._server.name, exc)
        except (errors.LXDError, *websockets.ERRORS, ValueError) as exc:
            LOG.debug('Serial console of %s: %s', self._server.name, exc)
        return None

    def _attach(self) -> operations.Operation:
        """Start the program in what runs for the server."""
        guest = self._guests.active(self._server)
        rows, columns = self._sizes.rows, self._sizes.columns
        operation = self._session.submit(
            'post', 'instances', guest.name, 'exec', body={
                'command': self._command, 'environment': {'TERM': TERM},
                'interactive': True, 'wait-for-websocket': True,
                'width': columns, 'height': rows})
        self._control = self._channel(operation, 'control')
        self._drainer = threading.Thread(
            target=_drain, args=(self._control,), daemon=True,
            name=f'serial-control-{self._server.name}')
        self._drainer.start()
        # It starts with this one.
        data = self._read_here = self._channel(operation, '0')
        with self._changed:
            self._data = data
            self._mode = _Mode.OPEN
            self._changed.notify_all()
        if self._ended.is_set():
            # It has ended meanwhile, and did not find these to close.
            self._detach()
        elif (rows, columns) != (self._sizes.rows, self._sizes.columns):
            self._resize()
        return operation

    def _channel(self, operation: operations.Operation, name: str
                 ) -> websocket.WebSocket:
        secret = operation.metadata['metadata']['fds'][name]
        return self._session.websocket(
            'operations', operation.id, 'websocket',
            params={'secret': secret}, timeout=PATIENCE)

    def _pump(self) -> None:
        """Pass on what the program writes, until it ends."""
        channel = self._data
        while channel is not None and not self._ended.is_set():
            try:
                opcode, content = channel.recv_data()
            except websocket.WebSocketTimeoutException:
                continue
            if opcode != websocket.ABNF.OPCODE_BINARY:
                return
            self._said = ''
            self._sizes.from_guest(content)
            self._to_terminal(content)

    def _idle(self) -> None:
        """Wait until somebody types, so that nobody's terminal does not keep
        programs running."""
        self._set_mode(_Mode.IDLE)
        self._say('Press Enter to go on.')
        with self._changed:
            while self._mode is _Mode.IDLE and not self._ended.is_set():
                self._changed.wait()

    def _detach(self) -> None:
        """Close the websockets; LXD kills the program."""
        with self._changed:
            opened = self._data, self._control
            self._data = self._control = None
            if self._mode is _Mode.OPEN:
                self._mode = _Mode.STARTING
        for channel in opened:
            if channel is not None:
                # No goodbye: a writer may be held up, and is woken up by
                # this. LXD kills the program when it loses the connection.
                websockets.shutdown(channel)

    def _say_once(self, text: str) -> None:
        if self._said != text:
            self._said = text
            self._say(text)

    def _say(self, text: str) -> None:
        self._to_terminal(f'\r\n[{text}]\r\n'.encode())

    def _to_terminal(self, content: bytes) -> None:
        try:
            self._client.sendall(content)
        except (OSError, EOFError) as exc:
            LOG.debug('Serial console of %s: %s', self._server.name, exc)
            self.end()


def _drain(channel: websocket.WebSocket) -> None:
    """Answer LXD's pings on a websocket on which it says nothing else."""
    try:
        with contextlib.suppress(ValueError, *websockets.ERRORS):
            while channel.connected:
                with contextlib.suppress(websocket.WebSocketTimeoutException):
                    channel.recv_data()
    finally:
        websockets.release(channel)
