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

"""Requests, responses, and which function answers what."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import hashlib
import json
import re
from typing import Any
from urllib import parse

from tests.unit.fake_lxd import errors


@dataclasses.dataclass
class Request:
    """One request as it arrived.

    :ivar path: percent-decoded, without the query.
    :ivar headers: names in lower case.
    """

    method: str
    path: str
    query: dict[str, str]
    headers: Mapping[str, str]
    body: bytes = b''
    trusted: bool = True

    @property
    def project(self) -> str:
        return self.query.get('project') or 'default'

    def json(self) -> dict[str, Any]:
        """Read the body as LXD's Go decoder would."""
        text = self.body.decode('utf-8', 'replace').lstrip()
        if not text:
            raise errors.bad_request('EOF')
        try:
            value = json.loads(text)
        except ValueError as exc:
            raise errors.bad_request(
                f"invalid character '{text[0]}' looking for beginning of "
                f"value") from exc
        if not isinstance(value, dict):
            raise errors.bad_request('json: cannot unmarshal into Go value')
        return value

    def json_or_empty(self) -> Any:
        """Read the body for matching; never fails."""
        try:
            return json.loads(self.body)
        except ValueError:
            return {}

    def check_etag(self, *parts: Any) -> None:
        """Refuse the request when ``If-Match`` names another state."""
        given = self.headers.get('if-match', '').strip('"')
        if given and given != etag(*parts):
            raise errors.APIError(
                412, f"ETag doesn't match: {etag(*parts)} vs {given}")


@dataclasses.dataclass
class Response:
    """What goes back. An iterable body is sent chunked."""

    status: int = 200
    body: bytes | Iterable[bytes] = b''
    headers: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Upgrade:
    """The answer is a websocket, served by ``serve`` until it ends."""

    serve: Callable[[Any], None]


def etag(*parts: Any) -> str:
    text = ''.join(json.dumps(part, sort_keys=True) for part in parts)
    return hashlib.sha256(text.encode()).hexdigest()


def envelope(kind: str, **kwargs: Any) -> dict[str, Any]:
    answer = {'type': kind, 'status': '', 'status_code': 0, 'operation': '',
              'error_code': 0, 'error': '', 'metadata': None}
    answer.update(kwargs)
    return answer


def json_response(status: int, value: Any,
                  headers: Mapping[str, str] | None = None) -> Response:
    return Response(status, json.dumps(value).encode() + b'\n',
                    {'Content-Type': 'application/json', **(headers or {})})


def sync(metadata: Any = None, *, etag_of: tuple[Any, ...] | None = None,
         headers: Mapping[str, str] | None = None) -> Response:
    extra = dict(headers or {})
    if etag_of is not None:
        extra['Etag'] = f'"{etag(*etag_of)}"'
    return json_response(200, envelope(
        'sync', status='Success', status_code=200, metadata=metadata), extra)


def empty() -> Response:
    """LXD's ``EmptySyncResponse``."""
    return sync({})


def created(location: str) -> Response:
    return json_response(
        201, envelope('sync', status='Success', status_code=200),
        {'Location': location})


def content(request: Request, body: bytes, name: str,
            headers: Mapping[str, str] | None = None) -> Response:
    """Send a file, or the part of it that is asked for."""
    found = {'Content-Type': 'application/octet-stream',
             'Content-Disposition': f'inline;filename={name}',
             'Accept-Ranges': 'bytes', **(headers or {})}
    part = re.fullmatch(r'bytes=(\d+)-(\d*)', request.headers.get('range', ''))
    if part is None:
        return Response(200, body, found)
    start = int(part.group(1))
    end = min(int(part.group(2) or len(body)), len(body) - 1)
    if start >= len(body):
        return Response(416, b'invalid range: failed to overlap\n', {
            'Content-Range': f'bytes */{len(body)}'})
    found['Content-Range'] = f'bytes {start}-{end}/{len(body)}'
    return Response(206, body[start:end + 1], found)


def failure(error: errors.APIError) -> Response:
    return json_response(
        error.code, envelope('error', error_code=error.code, error=error.text),
        {'X-Content-Type-Options': 'nosniff'})


Handler = Callable[..., Any]
_ROUTES: list[tuple[str, re.Pattern[str], Handler]] = []


def route(method: str, template: str) -> Callable[[Handler], Handler]:
    """Register a handler, called with daemon, request and the path's parts.

    :param method: HTTP method.
    :param template: path with ``{name}`` for one segment.
    """
    pattern = re.compile(
        re.sub(r'\\\{(\w+)\\\}', r'(?P<\1>[^/]+)', re.escape(template)) + '$')

    def register(function: Handler) -> Handler:
        _ROUTES.append((method, pattern, function))
        return function

    return register


def find(method: str, raw_path: str) -> tuple[Handler, dict[str, str]]:
    """Find the handler of a path that is still percent-encoded."""
    known = False
    for candidate, pattern, handler in _ROUTES:
        match = pattern.match(raw_path)
        if match is None:
            continue
        known = True
        if candidate == method:
            return handler, {key: parse.unquote(value) for key, value
                             in match.groupdict().items()}
    if known:
        raise errors.APIError(501, 'not implemented')
    raise errors.not_found('not found')
