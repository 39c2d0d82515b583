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

"""A Glance that serves images over HTTP, for tests of Nova's own client.

It speaks as much of the images API v2 as a download takes, and can misbehave
in the ways of a broken store or network.
"""

from __future__ import annotations

import hashlib
from http import server
import json
import threading
from typing import Any
import uuid

import fixtures

CHUNK = 64 * 1024

_SCHEMA = {
    'name': 'image',
    'properties': {
        **{name: {'type': ['null', 'string']} for name in (
            'id', 'name', 'status', 'visibility', 'disk_format',
            'container_format', 'owner', 'checksum', 'os_hash_algo',
            'os_hash_value', 'created_at', 'updated_at')},
        **{name: {'type': ['null', 'integer']} for name in (
            'size', 'min_disk', 'min_ram', 'virtual_size')},
        'protected': {'type': 'boolean'},
        'tags': {'type': 'array', 'items': {'type': 'string'}}},
    'additionalProperties': {'type': 'string'}}


class GlanceServer(fixtures.Fixture):
    """A server on a port of the loopback interface.

    :ivar url: for ``[glance] api_servers``.
    :ivar damage: function of an image's bytes that gives what is delivered
        instead; recorded checksum and length stay.
    :ivar downloads: ids of the images whose data was asked for, in order.
    """

    def _setUp(self) -> None:
        self._images: dict[str, tuple[dict[str, Any], bytes]] = {}
        self.damage: Any = None
        self.downloads: list[str] = []
        glance = self

        class Handler(server.BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'

            def do_GET(self) -> None:
                glance._answer(self)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self._server.daemon_threads = True
        self.url = 'http://127.0.0.1:%d' % self._server.server_address[1]
        thread = threading.Thread(target=self._server.serve_forever,
                                  kwargs={'poll_interval': 0.05}, daemon=True)
        thread.start()
        self.addCleanup(thread.join)
        self.addCleanup(self._server.server_close)
        self.addCleanup(self._server.shutdown)

    def add(self, data: bytes, **attributes: Any) -> str:
        """Upload an image.

        :param data: its content.
        :param attributes: more of its attributes, or None for one that it
            shall not have.
        :returns: its id.
        """
        image_id = str(uuid.uuid4())
        image = {
            'id': image_id, 'name': 'image', 'status': 'active',
            'visibility': 'public', 'disk_format': 'raw',
            'container_format': 'bare', 'owner': 'somebody',
            'size': len(data), 'min_disk': 0, 'min_ram': 0,
            'checksum': hashlib.md5(data, usedforsecurity=False).hexdigest(),
            'os_hash_algo': 'sha512',
            'os_hash_value': hashlib.sha512(data).hexdigest(),
            'created_at': '2026-01-01T00:00:00Z',
            'updated_at': '2026-01-01T00:00:00Z', 'protected': False,
            'tags': [], **attributes}
        self._images[image_id] = ({key: value for key, value in image.items()
                                   if value is not None}, data)
        return image_id

    def _answer(self, request: server.BaseHTTPRequestHandler) -> None:
        words = request.path.partition('?')[0].strip('/').split('/')
        if words == ['v2', 'schemas', 'image']:
            self._send(request, _SCHEMA)
        elif words[:2] != ['v2', 'images'] or words[2] not in self._images:
            request.send_error(404)
        elif words[3:] == ['file']:
            self._send_data(request, words[2])
        else:
            self._send(request, self._images[words[2]][0])

    @staticmethod
    def _send(request: server.BaseHTTPRequestHandler, body: Any) -> None:
        content = json.dumps(body).encode()
        request.send_response(200)
        request.send_header('Content-Type', 'application/json')
        request.send_header('Content-Length', str(len(content)))
        request.end_headers()
        request.wfile.write(content)

    def _send_data(self, request: server.BaseHTTPRequestHandler,
                   image_id: str) -> None:
        self.downloads.append(image_id)
        data = self._images[image_id][1]
        request.send_response(200)
        request.send_header('Content-Type', 'application/octet-stream')
        request.send_header('Content-Length', str(len(data)))
        request.end_headers()
        if self.damage is not None:
            data = self.damage(data)
            request.close_connection = True
        try:
            for start in range(0, len(data), CHUNK):
                request.wfile.write(data[start:start + CHUNK])
        except OSError:
            # The client has seen enough.
            request.close_connection = True
