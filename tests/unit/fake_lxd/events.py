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

"""The events websocket."""

from __future__ import annotations

import json
import threading
from typing import Any
from urllib import parse

from tests.unit.fake_lxd import clock
from tests.unit.fake_lxd import errors
from tests.unit.fake_lxd import routing
from tests.unit.fake_lxd import wsproto

TYPES = ('logging', 'operation', 'lifecycle')
REQUESTOR = {'username': 'root', 'protocol': 'unix', 'address': '@'}


class Hub:
    """Hands every event to the websockets that asked for its kind."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: list[tuple[wsproto.WebSocket, set[str],
                                    str | None]] = []
        self.sent: list[dict[str, Any]] = []
        #: Set while events get lost (they still happen).
        self.muted = False

    @property
    def listeners(self) -> int:
        with self._lock:
            return len(self._listeners)

    def publish(self, kind: str, project: str, metadata: Any) -> None:
        event = {'type': kind, 'timestamp': clock.now(), 'metadata': metadata,
                 'location': 'none', 'project': project}
        with self._lock:
            self.sent.append(event)
            if self.muted:
                return
            listeners = list(self._listeners)
        text = json.dumps(event) + '\n'
        for channel, kinds, only in listeners:
            if kind in kinds and only in (None, project):
                try:
                    channel.send_text(text)
                except OSError:
                    self.remove(channel)

    def lifecycle(self, action: str, project: str, path: str, *,
                  context: dict[str, Any] | None = None,
                  by_api: bool = False) -> None:
        """Publish a lifecycle event.

        :param path: of what it is about, without project.
        :param by_api: whether LXD names a requestor. It does not for what a
            guest did itself, and for some actions (creation, deletion and
            update of instances) it never does.
        """
        source = path
        if project != 'default':
            source += '?' + parse.urlencode({'project': project})
        metadata: dict[str, Any] = {'action': action, 'source': source}
        if context:
            metadata['context'] = context
        if by_api:
            metadata['requestor'] = dict(REQUESTOR)
        self.publish('lifecycle', project, metadata)

    def add(self, channel: wsproto.WebSocket, kinds: set[str],
            only: str | None) -> None:
        with self._lock:
            self._listeners.append((channel, kinds, only))

    def remove(self, channel: wsproto.WebSocket) -> None:
        with self._lock:
            self._listeners = [entry for entry in self._listeners
                               if entry[0] is not channel]

    def close_all(self, goodbye: bool = False) -> None:
        with self._lock:
            listeners, self._listeners = self._listeners, []
        for channel, _kinds, _only in listeners:
            if goodbye:
                # The client hangs up then.
                channel.close()
            else:
                channel.abort()


@routing.route('GET', '/1.0/events')
def events(daemon, request):
    wanted = request.query.get('type') or ','.join(TYPES)
    kinds = set(wanted.split(','))
    for kind in wanted.split(','):
        if kind not in TYPES:
            raise errors.internal(f'"{kind}" isn\'t a supported event type')
    everything = request.query.get('all-projects') in ('true', '1')
    if everything and request.query.get('project'):
        raise errors.internal(
            'Cannot specify a project when requesting all projects')
    only = None if everything else request.project

    def serve(channel: wsproto.WebSocket) -> None:
        daemon.events.add(channel, kinds, only)
        try:
            while channel.receive() is not None:
                pass
        finally:
            daemon.events.remove(channel)

    return routing.Upgrade(serve)
