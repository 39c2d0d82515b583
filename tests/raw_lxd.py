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

"""LXD's REST API without anything between it and the test."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import dataclasses
from http import client as http_client
import json
import socket
from typing import Any
from urllib import parse

import websocket


@dataclasses.dataclass
class Answer:
    """One response.

    :ivar body: decoded JSON, or bytes where it is none.
    :ivar headers: names in lower case.
    :ivar operation: how the operation that it began ended, once waited for.
    """

    status: int
    headers: dict[str, str]
    body: Any
    operation: dict[str, Any] | None = None

    @property
    def metadata(self) -> Any:
        return self.body['metadata'] if isinstance(self.body, dict) else None

    @property
    def error(self) -> str:
        """LXD's complaint, of the request or of its operation."""
        if self.operation is not None:
            return self.operation['err']
        if isinstance(self.body, dict):
            return self.body.get('error', '')
        return ''


def connect(path: str, timeout: float = 60) -> socket.socket:
    """Connect to a unix socket."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(timeout)
    sock.connect(path)
    return sock


class _Connection(http_client.HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__('lxd', timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = connect(self._path, self.timeout)


class Client:
    """Sends requests to a socket, each on a connection of its own.

    :param path: the unix socket.
    :param project: added to each request that does not name one itself
        (None for a request that must not).
    """

    def __init__(self, path: str, project: str | None = None,
                 timeout: float = 60) -> None:
        self.path = path
        self.project = project
        self.timeout = timeout

    def _url(self, path: str, params: Mapping[str, Any] | None) -> str:
        query = dict(params or {})
        query.setdefault('project', self.project)
        if query['project'] is None:
            del query['project']
        glue = '&' if '?' in path else '?'
        return path + (glue + parse.urlencode(query) if query else '')

    def request(self, method: str, path: str, body: Any = None, *,
                headers: Mapping[str, str] | None = None,
                params: Mapping[str, Any] | None = None) -> Answer:
        """Send one request and read its answer.

        :param path: from ``/`` on; may have a query.
        :param body: bytes, an iterable of bytes (sent chunked), or what to
            send as JSON.
        """
        if not (body is None or isinstance(body, bytes)
                or (isinstance(body, Iterable)
                    and not isinstance(body, (dict, list, str)))):
            body = json.dumps(body).encode()
        connection = _Connection(self.path, self.timeout)
        try:
            connection.request(method, self._url(path, params), body,
                               dict(headers or {}))
            response = connection.getresponse()
            content: Any = response.read()
            found = {key.lower(): value
                     for key, value in response.getheaders()}
        finally:
            connection.close()
        if found.get('content-type') == 'application/json' and content:
            content = json.loads(content)
        return Answer(response.status, found, content)

    def call(self, method: str, path: str, body: Any = None, **kwargs: Any
             ) -> Answer:
        """Send a request, and wait for the operation that it may begin."""
        answer = self.request(method, path, body, **kwargs)
        if isinstance(answer.body, dict) and answer.body.get(
                'type') == 'async':
            waited = self.request(
                'GET', answer.body['operation'] + '/wait',
                params={'timeout': int(self.timeout)})
            answer.operation = waited.metadata
        return answer

    def must(self, method: str, path: str, body: Any = None, **kwargs: Any
             ) -> Any:
        """Like :meth:`call` for what cannot fail.

        :returns: the answer's metadata, or the operation's.
        """
        answer = self.call(method, path, body, **kwargs)
        if answer.status >= 400 or (answer.operation or {}).get(
                'status_code', 200) != 200:
            raise AssertionError(
                f'{method} {path}: {answer.status} {answer.error}')
        if answer.operation is not None:
            return answer.operation['metadata']
        if isinstance(answer.body, dict):
            return answer.metadata
        return answer.body

    def events(self, **params: Any) -> websocket.WebSocket:
        """Open the events websocket."""
        return self.websocket('/1.0/events', **params)

    def websocket(self, path: str, **params: Any) -> websocket.WebSocket:
        """Open a websocket."""
        return websocket.create_connection(
            'ws://lxd' + self._url(path, params),
            socket=connect(self.path, self.timeout),
            timeout=self.timeout, suppress_origin=True)
