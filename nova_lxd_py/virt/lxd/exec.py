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

"""Execution of commands in guests.

Standard input is sent through a websocket, so that secrets in it are not part
of the arguments, of LXD's log or of an event. Output and run time are limited.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import json
import signal
import threading
import time

from oslo_log import log as logging
import websocket

from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import session as lxd
from nova_lxd_py.virt.lxd import websockets

LOG = logging.getLogger(__name__)

#: Maximum output that is kept, in bytes; the rest is read and discarded.
OUTPUT_LIMIT = 64 * 1024

#: Return codes of a shell in these cases.
NOT_EXECUTABLE = 126
NOT_FOUND = 127

_STDIN, _STDOUT, _STDERR, _CONTROL = '0', '1', '2', 'control'


@dataclasses.dataclass(frozen=True)
class Result:
    """Result of a command.

    :ivar code: its return code; NOT_FOUND if it does not exist in the guest.
    :ivar output: its standard output.
    :ivar errors: its standard error.
    """

    code: int
    output: bytes = b''
    errors: bytes = b''


def run(session: lxd.Session, instance: str, command: Sequence[str],
        stdin: bytes = b'', *, timeout: float = 30,
        environment: Mapping[str, str] | None = None) -> Result:
    """Run a command as root in a running guest.

    :param session: the LXD session.
    :param instance: LXD's name of the instance.
    :param command: program and arguments; no shell is involved.
    :param stdin: its standard input.
    :param timeout: seconds after which the command is killed.
    :param environment: environment variables in addition to those LXD sets.
    :returns: the result.
    :raises errors.InvalidRequest: if the guest is stopped or frozen.
    :raises errors.DeadlineExceeded: if the command exceeds the timeout.
    :raises errors.LXDError: if LXD cannot run the command.
    """
    deadline = time.monotonic() + timeout
    operation = session.submit('post', 'instances', instance, 'exec', body={
        'command': list(command), 'environment': dict(environment or {}),
        'wait-for-websocket': True, 'interactive': False})
    secrets = operation.metadata['metadata']['fds']
    opened: dict[str, websocket.WebSocket] = {}
    readers: dict[str, _Reader] = {}
    try:
        # LXD starts the command once all websockets are connected.
        for name in (_CONTROL, _STDIN, _STDOUT, _STDERR):
            opened[name] = session.websocket(
                'operations', operation.id, 'websocket',
                params={'secret': secrets[name]}, timeout=timeout)
        for name in (_STDOUT, _STDERR):
            readers[name] = _Reader(opened[name])
        _send(opened[_STDIN], stdin)
        for reader in readers.values():
            reader.join(deadline - time.monotonic())
        if any(reader.is_alive() for reader in readers.values()):
            _kill(opened[_CONTROL])
            raise errors.DeadlineExceeded(
                f'{command[0]} did not end within {timeout:.0f} seconds in '
                f'{instance}')
        answer = operation.wait(max(1.0, deadline - time.monotonic()))
        code = int(answer['return'])
    except errors.OperationFailed as exc:
        found = return_code_of(exc)
        if found is None:
            raise
        code = found
    finally:
        for name, channel in opened.items():
            _close(channel)
            if name not in readers:
                websockets.release(channel)
    return Result(code, *(bytes(readers[name].content)
                          for name in (_STDOUT, _STDERR)))


def return_code_of(exc: errors.OperationFailed) -> int | None:
    """Return the return code for an error of LXD about the command itself.

    :param exc: the error. Newer LXD returns the code instead of an error.
    :returns: the return code, or None if the error has another cause.
    """
    text = exc.message.lower()
    if 'command not found' in text:
        return NOT_FOUND
    if 'command not executable' in text:
        return NOT_EXECUTABLE
    return None


class _Reader(threading.Thread):
    """Thread that reads an output stream of a command to its end."""

    def __init__(self, channel: websocket.WebSocket) -> None:
        super().__init__(name='lxd-exec', daemon=True)
        self._channel = channel
        self.content = bytearray()
        self.start()

    def run(self) -> None:
        try:
            self._read()
        finally:
            websockets.release(self._channel)
            # References to the thread may outlive it.
            del self._channel

    def _read(self) -> None:
        while True:
            try:
                opcode, data = self._channel.recv_data()
            except BrokenPipeError:
                # The library could not answer a ping, because LXD has closed
                # its side; data that LXD sent before can still be read.
                continue
            except websockets.ERRORS:
                return
            if opcode != websocket.ABNF.OPCODE_BINARY:
                # An empty text message marks the end of the output.
                return
            self.content += data[:OUTPUT_LIMIT - len(self.content)]


def _send(channel: websocket.WebSocket, content: bytes) -> None:
    """Send a command its standard input, and the end of it."""
    try:
        if content:
            channel.send_binary(content)
        channel.send('')
    except websockets.ERRORS as exc:
        # The command ended without reading all; its return code tells more.
        LOG.debug('A command did not take its whole input: %s',
                  type(exc).__name__)


def _kill(control: websocket.WebSocket) -> None:
    try:
        control.send(json.dumps({'command': 'signal',
                                 'signal': int(signal.SIGKILL)}))
    except websockets.ERRORS as exc:
        LOG.debug('A command could not be killed: %s', exc)


def _close(channel: websocket.WebSocket) -> None:
    with contextlib.suppress(*websockets.ERRORS):
        channel.close(timeout=0)
    # close() does nothing if LXD has sent its close frame first.
    websockets.shutdown(channel)
