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

"""HTTP over a unix socket with persistent connections.

pylxd's own adapter keeps a pool of one connection for each URL, so that most
requests of a busy driver would open a new connection.
"""

from __future__ import annotations

import socket
from typing import Any
from urllib import parse

import requests
from requests import adapters
import urllib3
from urllib3 import connection
from urllib3 import exceptions

#: Connections that are kept open for concurrent requests.
CONNECTIONS = 32


class _Connection(connection.HTTPConnection):

    def __init__(self, path: str, **kwargs: Any) -> None:
        super().__init__('localhost', **kwargs)
        self._path = path

    def connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(self.timeout)
        try:
            sock.connect(self._path)
        except OSError as exc:
            sock.close()
            # Unlike other errors, this one says that nothing was sent. With
            # eventlet the text of its cause does not say what is wrong.
            raise exceptions.NewConnectionError(
                self, f'{type(exc).__name__}: {exc}') from exc
        self.sock = sock


class _Pool(urllib3.HTTPConnectionPool):

    def __init__(self, path: str) -> None:
        super().__init__('localhost', maxsize=CONNECTIONS)
        self._path = path

    def _new_conn(self) -> _Connection:
        return _Connection(self._path, timeout=self.timeout.connect_timeout)


class UnixAdapter(adapters.HTTPAdapter):
    """Transport adapter of requests for ``http+unix://<quoted path>/...``.

    :param path: path of the socket.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        self._pool = _Pool(path)

    def get_connection_with_tls_context(self, request: Any, verify: Any,
                                        proxies: Any = None, cert: Any = None
                                        ) -> _Pool:
        return self._pool

    # The name of this method in requests before 2.32.
    def get_connection(self, url: Any, proxies: Any = None) -> _Pool:
        return self._pool

    def request_url(self, request: Any, proxies: Any) -> str:
        return request.path_url

    def close(self) -> None:
        self._pool.close()


def session(path: str) -> tuple[str, requests.Session]:
    """Create a session with the server that listens on a unix socket.

    :param path: path of the socket; it is not connected yet.
    :returns: the base URL, and the session.
    """
    url = 'http+unix://' + parse.quote(path, safe='')
    http = requests.Session()
    http.mount('http+unix://', UnixAdapter(path))
    return url, http
