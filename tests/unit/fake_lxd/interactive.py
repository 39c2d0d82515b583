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

"""Commands and consoles whose streams are websockets."""

from __future__ import annotations

import secrets
import threading
from typing import Any

from tests.unit.fake_lxd import errors
from tests.unit.fake_lxd import operations
from tests.unit.fake_lxd import routing
from tests.unit.fake_lxd import state
from tests.unit.fake_lxd import wsproto

#: Seconds for which LXD waits for the client's websockets.
_PATIENCE = 5.0

_ENVIRONMENT = {
    'HOME': '/root', 'LANG': 'C.UTF-8', 'USER': 'root',
    'PATH': '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'}


class Streams:
    """The websockets of one operation, as the client brings them.

    :ivar fds: secret by stream name.
    """

    def __init__(self, *names: str) -> None:
        self.fds = {name: secrets.token_hex(32) for name in names}
        self._channels: dict[str, wsproto.WebSocket] = {}
        self._changed = threading.Condition()
        self.ended = threading.Event()

    def name_of(self, secret: str) -> str:
        for name, known in self.fds.items():
            if known == secret:
                return name
        # Not 403, in 5.0.2.
        raise errors.internal('permission denied')

    def serve(self, name: str, channel: wsproto.WebSocket) -> None:
        """Hold the client's connection until the operation has ended."""
        with self._changed:
            self._channels[name] = channel
            self._changed.notify_all()
        self.ended.wait()

    def wait(self, *names: str) -> None:
        with self._changed:
            if not self._changed.wait_for(
                    lambda: set(names) <= set(self._channels), _PATIENCE):
                raise errors.bad_request(
                    'Timed out waiting for websockets to connect')

    def channel(self, name: str) -> wsproto.WebSocket:
        return self._channels[name]

    def send(self, name: str, data: bytes) -> None:
        """Send output; a client that has gone does not matter."""
        try:
            if data:
                self._channels[name].send_binary(data)
        except OSError:
            pass

    def close(self, *names: str) -> None:
        """Tell the end of streams with LXD's empty text message."""
        for name in names:
            try:
                self._channels[name].send_text('')
            except OSError:
                pass


class Stdin:
    """What the client sends, to be read by a command."""

    def __init__(self, channel: wsproto.WebSocket | None = None) -> None:
        self._channel = channel

    def read(self) -> bytes:
        """Read to the end, which is an empty text message."""
        found = b''
        while self._channel is not None:
            message = self._channel.receive()
            if message is None or message == (wsproto.TEXT, b''):
                break
            found += message[1]
        return found


@routing.route('GET', '/1.0/operations/{id_}/websocket')
def connect(daemon, request, id_):
    operation = daemon.operations.find(id_)
    if operation.streams is None:
        raise errors.bad_request("This operation can't be connected to")
    name = operation.streams.name_of(request.query.get('secret', ''))
    return routing.Upgrade(
        lambda channel: operation.streams.serve(name, channel))


def execute(daemon, request, instance: state.Instance, body: dict[str, Any],
            run) -> routing.Response:
    """Run a command on websockets.

    :param run: runs it with a :class:`Stdin`; gives code, output and errors.
    """
    terminal = bool(body.get('interactive'))
    names = ('0', 'control') if terminal else ('0', '1', '2', 'control')
    streams = Streams(*names)
    metadata: dict[str, Any] = {
        'command': list(body['command']),
        'environment': {**_ENVIRONMENT, **(body.get('environment') or {})},
        'fds': dict(streams.fds), 'interactive': terminal}

    def work(operation: operations.Operation) -> None:
        try:
            streams.wait(*(name for name in names if name != 'control'))
            daemon.events.lifecycle(
                'instance-exec', instance.project, instance.path,
                context={'command': metadata['command']})
            try:
                code, out, err = run(Stdin(streams.channel('0')))
            except FileNotFoundError:
                operation.update(**{'return': 127})
                raise errors.bad_request('Command not found') from None
            streams.send('0' if terminal else '1', out)
            streams.send('0' if terminal else '2', err)
            streams.close(*(['0'] if terminal else ['1', '2']))
            operation.update(**{'return': code})
        finally:
            streams.ended.set()

    return daemon.operations.run(
        request, 'Executing command',
        {'containers': [f'/1.0/containers/{instance.name}'],
         'instances': [instance.path]}, work, cls='websocket',
        metadata=metadata, streams=streams)


@routing.route('POST', '/1.0/instances/{name}/console')
def console(daemon, request, name):
    body = request.json()
    kind = body.get('type') or 'console'
    with daemon.store.lock:
        instance = daemon.store.instance(request.project, name)
        if kind not in ('console', 'vga'):
            raise errors.bad_request(f'Unknown console type "{kind}"')
        if not instance.is_running:
            raise errors.bad_request('Instance is not running')
        if instance.status == state.FROZEN:
            raise errors.bad_request('Instance is frozen')
    streams = Streams('0', 'control')

    def work(operation: operations.Operation) -> None:
        try:
            streams.wait('0', 'control')
            daemon.events.lifecycle('instance-console', instance.project,
                                    instance.path, context={'type': kind})
            _show_console(daemon, instance, streams)
        finally:
            streams.ended.set()

    return daemon.operations.run(
        request, 'Showing console',
        {'containers': [f'/1.0/containers/{name}'],
         'instances': [instance.path]}, work, cls='websocket',
        metadata={'fds': dict(streams.fds)}, streams=streams)


def _show_console(daemon, instance: state.Instance, streams: Streams) -> None:
    terminal = instance.terminal
    output = terminal.attach()
    if output is None:
        streams.send('0', b'Error: Failed running forkconsole: "attaching to '
                          b'the container failed"\n')
        streams.close('0')
        return

    def read() -> None:
        while True:
            message = streams.channel('0').receive()
            if message is None:
                terminal.show(None)
                return
            terminal.typed += message[1]
            if daemon.console_handler is not None:
                terminal.show(daemon.console_handler(instance, message[1]))
            else:
                # A terminal echoes.
                terminal.show(message[1])

    threading.Thread(target=read, name='fake-lxd-console',
                     daemon=True).start()
    try:
        while True:
            data = output.get()
            if data is None:
                break
            streams.send('0', data)
        streams.close('0')
    finally:
        terminal.detach()
