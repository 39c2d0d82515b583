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

"""One connection to the serial console of an instance.

A session relays between a TCP connection, normally of nova-serialproxy, and a
process in the guest, normally ``login``, which LXD's exec API starts on a
pseudo-terminal of its own. The connection survives the process and the guest:
while the instance reboots or is stopped, the session waits until it runs
again.

LXD's console API, the guest's ``/dev/console``, is not used: liblxc's monitor
process of a container blocks for ever if a console client disconnects, or
merely does not read, while the guest writes a lot. Every request about that
container blocks from then on, and with it LXD's list of all instances. Any
tenant could cause that. Besides, that console has a login only if the guest
starts a getty on it, it cannot be resized, and LXD 5.0 crashes if the
connection is closed at the wrong moment.
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

#: Value of TERM for the process in the guest.
TERM = 'xterm'
#: Seconds between attempts to start the process: first and longest delay.
FIRST_RETRY_DELAY, MAX_RETRY_DELAY = 0.2, 2.0
#: Seconds that a process must have run for the delay to start over.
MIN_RUNTIME = 1.0
#: Seconds to wait for threads and processes to end.
END_TIMEOUT = 5
#: Seconds to wait for the terminal to read the final message.
END_MESSAGE_TIMEOUT = 1
#: Seconds for which a process may leave its input unread. The timeout has to
#: be finite: one thread reads from the websocket while another writes to it,
#: and with TLS neither may hold it for ever.
CHANNEL_TIMEOUT = 3600

#: Power states in which LXD cannot run a process in the guest.
_NOT_RUNNING = {power_state.SHUTDOWN: 'not running',
                power_state.PAUSED: 'paused',
                power_state.SUSPENDED: 'suspended'}

#: Exit statuses from here on, and negative ones, mean that the process was
#: killed by a signal.
_KILLED = 128


@dataclasses.dataclass(frozen=True)
class InstanceRef:
    """Identifies an instance, in LXD and as ``instance=`` of log lines."""

    uuid: str
    name: str

    def __getitem__(self, field: str) -> str:
        """Return a field for oslo.log's ``instance_format``."""
        return getattr(self, field)


class _InputMode(enum.Enum):
    """What happens to input from the terminal."""

    #: Held back until a process can read it.
    STARTING = enum.auto()
    #: Passed on to the process.
    OPEN = enum.auto()
    #: Dropped; it makes the session start another process.
    IDLE = enum.auto()
    #: Dropped: the guest does not run.
    NOT_RUNNING = enum.auto()


class SerialSession:
    """Serves one TCP connection, in two threads.

    :param client: socket of the connection; closed when the session ends.
    :param instance: the instance whose console it is.
    :param command: command to run in the guest.
    :param session: LXD session.
    :param guests: registry of the driver's LXD instances.
    :param watcher: knows the power state of each instance.
    """

    def __init__(self, client: socket.socket, instance: InstanceRef,
                 command: Sequence[str], session: lxd.Session,
                 guests: registry.GuestRegistry, watcher: events.EventWatcher
                 ) -> None:
        self._client = client
        self._instance = instance
        self._command = list(command)
        self._session = session
        self._guests = guests
        self._watcher = watcher
        self._sizes = terminal_size.TerminalSize()
        self._ended = threading.Event()
        #: Guards the input mode and the two websockets.
        self._changed = threading.Condition()
        self._mode = _InputMode.STARTING
        self._data: websocket.WebSocket | None = None
        self._control: websocket.WebSocket | None = None
        self._last_message = ''
        self._end_message: str | None = None
        #: Used by the writer thread only, which waits for it before it ends.
        self._drainer: threading.Thread | None = None
        #: Used by the writer thread only: the websocket that it reads from.
        self._data_to_release: websocket.WebSocket | None = None
        self._reader = threading.Thread(
            target=self._read, daemon=True,
            name=f'serial-in-{instance.name}')
        self._writer = threading.Thread(
            target=self._serve, daemon=True,
            name=f'serial-out-{instance.name}')

    def start(self) -> None:
        """Start the threads."""
        self._client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A peer whose host is down must not hold the session for ever.
        self._client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._reader.start()
        self._writer.start()

    def end(self, reason: str | None = None) -> None:
        """Close the connection. Idempotent, and safe in any thread.

        :param reason: message to print on the terminal.
        """
        with self._changed:
            if self._ended.is_set():
                return
            self._ended.set()
            self._end_message = reason
            self._changed.notify_all()
        self._detach()
        if self._writer is threading.current_thread():
            return
        if reason:
            # Time to print the message, which takes longer only if the peer
            # does not read.
            self._writer.join(END_MESSAGE_TIMEOUT)
        self._shutdown_client()

    def _shutdown_client(self) -> None:
        """Interrupt the threads that wait for the connection."""
        with contextlib.suppress(OSError):
            self._client.shutdown(socket.SHUT_RDWR)

    def is_alive(self) -> bool:
        """Return whether one of the threads is running."""
        return self._writer.is_alive() or self._reader.is_alive()

    def join(self) -> None:
        """Wait for the threads to end, at most END_TIMEOUT for each."""
        for thread in (self._reader, self._writer):
            if thread is not threading.current_thread():
                thread.join(END_TIMEOUT)

    def _set_mode(self, mode: _InputMode) -> None:
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
            # eventlet raises EOFError for a socket that is closed.
            LOG.debug('Serial console was disconnected: %s', exc,
                      instance=self._instance)
        finally:
            self.end()

    def _to_guest(self, data: bytes) -> None:
        with self._changed:
            while (self._mode is _InputMode.STARTING and
                    not self._ended.is_set()):
                self._changed.wait()
            if self._mode is _InputMode.IDLE:
                self._mode = _InputMode.STARTING
                self._changed.notify_all()
                return
            channel = self._data
        if channel is None:
            return
        try:
            channel.send_binary(data)
        except websockets.ERRORS as exc:
            LOG.debug('Serial console lost input: %s', exc,
                      instance=self._instance)
            # A partial frame may have been sent, so the websocket cannot be
            # used any more.
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
            LOG.debug('Serial console could not be resized: %s', exc,
                      instance=self._instance)

    # -- from the guest to the terminal --------------------------------------

    def _serve(self) -> None:
        delay = FIRST_RETRY_DELAY
        try:
            while not self._ended.is_set():
                start = time.monotonic()
                code = self._run_once()
                if code is None or not 0 <= code < _KILLED:
                    # The guest or LXD has stopped, or the guest is stopping,
                    # which kills its processes first.
                    if time.monotonic() - start > MIN_RUNTIME:
                        delay = FIRST_RETRY_DELAY
                    self._ended.wait(delay)
                    delay = min(delay * 2, MAX_RETRY_DELAY)
                    continue
                delay = FIRST_RETRY_DELAY
                if code in (lxd_exec.NOT_FOUND, lxd_exec.NOT_EXECUTABLE):
                    self.end(f'The guest has no program '
                             f'"{self._command[0]}" for the serial console.')
                else:
                    self._idle()
        except Exception:
            LOG.exception('Serial console failed unexpectedly',
                          instance=self._instance)
        finally:
            self.end()
            if self._end_message:
                self._print(self._end_message)
            self._shutdown_client()
            # Closing the socket would not wake up the reader under eventlet.
            self._reader.join(END_TIMEOUT)
            self._client.close()

    def _run_once(self) -> int | None:
        """Run the process in the guest and relay until it ends.

        :returns: the exit status, or None if the process was not started or
            its status is not known.
        """
        try:
            state = self._watcher.power_state(self._instance)
            if state in _NOT_RUNNING:
                self._set_mode(_InputMode.NOT_RUNNING)
                self._print_once(f'The server is {_NOT_RUNNING[state]}. '
                                 f'Waiting for it to run.')
                return None
            self._set_mode(_InputMode.STARTING)
            try:
                operation = self._attach()
                self._relay_output()
            finally:
                self._detach()
                if self._drainer is not None:
                    self._drainer.join(END_TIMEOUT)
                if self._data_to_release is not None:
                    websockets.release(self._data_to_release)
                    self._data_to_release = None
            if self._ended.is_set():
                return None
            return int(operation.wait(END_TIMEOUT).get('return', _KILLED))
        except errors.NotFound:
            self.end('The server has been deleted.')
        except errors.OperationFailed as exc:
            code = lxd_exec.return_code_of(exc)
            if code is not None:
                return code
            LOG.debug('Serial console could not run its command: %s', exc,
                      instance=self._instance)
        except (errors.LXDError, *websockets.ERRORS, ValueError) as exc:
            LOG.debug('Serial console lost the connection to LXD: %s', exc,
                      instance=self._instance)
        return None

    def _attach(self) -> operations.Operation:
        """Start the process in the guest, or in the rescue guest if active.

        :returns: LXD's operation, which ends with the process.
        """
        guest = self._guests.active(self._instance)
        rows, columns = self._sizes.rows, self._sizes.columns
        operation = self._session.submit(
            'post', 'instances', guest.name, 'exec', body={
                'command': self._command, 'environment': {'TERM': TERM},
                'interactive': True, 'wait-for-websocket': True,
                'width': columns, 'height': rows})
        self._control = self._channel(operation, 'control')
        self._drainer = threading.Thread(
            target=_drain, args=(self._control,), daemon=True,
            name=f'serial-control-{self._instance.name}')
        self._drainer.start()
        # LXD starts the process when this one is connected as well.
        data = self._data_to_release = self._channel(operation, '0')
        with self._changed:
            self._data = data
            self._mode = _InputMode.OPEN
            self._changed.notify_all()
        if self._ended.is_set():
            # end() was called before it could find these websockets.
            self._detach()
        elif (rows, columns) != (self._sizes.rows, self._sizes.columns):
            self._resize()
        return operation

    def _channel(self, operation: operations.Operation, name: str
                 ) -> websocket.WebSocket:
        secret = operation.metadata['metadata']['fds'][name]
        return self._session.websocket(
            'operations', operation.id, 'websocket',
            params={'secret': secret}, timeout=CHANNEL_TIMEOUT)

    def _relay_output(self) -> None:
        """Relay the output of the process to the terminal until it ends."""
        channel = self._data
        while channel is not None and not self._ended.is_set():
            try:
                opcode, content = channel.recv_data()
            except websocket.WebSocketTimeoutException:
                continue
            if opcode != websocket.ABNF.OPCODE_BINARY:
                return
            self._last_message = ''
            self._sizes.from_guest(content)
            self._to_terminal(content)

    def _idle(self) -> None:
        """Wait for input before the process is started again.

        A terminal that nobody looks at must not keep starting processes.
        """
        self._set_mode(_InputMode.IDLE)
        self._print('Press Enter to continue.')
        with self._changed:
            while self._mode is _InputMode.IDLE and not self._ended.is_set():
                self._changed.wait()

    def _detach(self) -> None:
        """Close the websockets, whereupon LXD kills the process."""
        with self._changed:
            opened = self._data, self._control
            self._data = self._control = None
            if self._mode is _InputMode.OPEN:
                self._mode = _InputMode.STARTING
        for channel in opened:
            if channel is not None:
                # Without a close frame: another thread may be blocked in a
                # write, and this interrupts it. LXD kills the process when
                # the connection is lost.
                websockets.shutdown(channel)

    def _print_once(self, text: str) -> None:
        if self._last_message != text:
            self._last_message = text
            self._print(text)

    def _print(self, text: str) -> None:
        """Print a message of the driver on the terminal."""
        self._to_terminal(f'\r\n[{text}]\r\n'.encode())

    def _to_terminal(self, content: bytes) -> None:
        try:
            self._client.sendall(content)
        except (OSError, EOFError) as exc:
            LOG.debug('Serial console was disconnected: %s', exc,
                      instance=self._instance)
            self.end()


def _drain(channel: websocket.WebSocket) -> None:
    """Answer LXD's pings on the control websocket, which carries no data."""
    try:
        with contextlib.suppress(ValueError, *websockets.ERRORS):
            while channel.connected:
                with contextlib.suppress(websocket.WebSocketTimeoutException):
                    channel.recv_data()
    finally:
        websockets.release(channel)
