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

"""Session with an LXD server.

No other module imports pylxd. It adds to pylxd's transport what a compute
driver needs: timeouts for every request and operation, errors that distinguish
conditions that can be recovered from (:mod:`nova_lxd_py.virt.lxd.errors`),
retries after transient failures (:mod:`nova_lxd_py.virt.lxd.retry`),
optimistic locking by ETag, and streams.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
import contextlib
import os
import threading
import time
from typing import Any
from urllib import parse

from oslo_config import cfg
from oslo_log import log as logging
import pylxd
from pylxd import exceptions as pylxd_exceptions
import requests
import websocket

from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import limiter
from nova_lxd_py.virt.lxd import operations
from nova_lxd_py.virt.lxd import responses
from nova_lxd_py.virt.lxd import retry
from nova_lxd_py.virt.lxd import server_kind
from nova_lxd_py.virt.lxd import streams
from nova_lxd_py.virt.lxd import tls
from nova_lxd_py.virt.lxd import transport_errors
from nova_lxd_py.virt.lxd import unix_adapter
from nova_lxd_py.virt.lxd import websockets

LOG = logging.getLogger(__name__)

#: Seconds for opening a connection to LXD, which is on this host or near.
CONNECT_TIMEOUT = 10

#: Errors after which it is unknown whether LXD has carried out a request.
_LOST = (errors.Unreachable, errors.OperationLost)


class Session:
    """A thread-safe session with one LXD server, bound to one project.

    :param conf: the ``[lxd]`` option group.
    """

    def __init__(self, conf: cfg.ConfigOpts.GroupAttr) -> None:
        #: The ``[lxd]`` option group.
        self.options = conf
        self._client: pylxd.Client | None = None
        self._connecting = threading.Lock()
        self.project: str = conf.project
        #: Default timeout of an operation, in seconds.
        self.operation_timeout: float = conf.operation_timeout
        self.server: dict[str, Any] = {}
        self._pools: dict[str, dict[str, Any]] = {}
        self._outage = retry.Outage(conf.request_timeout)
        self._limiter = limiter.OperationLimiter(
            conf.max_concurrent_operations)
        #: Number of requests sent, for diagnosis and benchmarks.
        self.request_count = 0

    # -- connection ---------------------------------------------------------

    @property
    def endpoint(self) -> str:
        """The configured or detected endpoint: a path or an https URL."""
        if self.options.endpoint:
            return self.options.endpoint.removeprefix('unix://')
        for path in server_kind.WELL_KNOWN_SOCKETS:
            if os.path.exists(path):
                return path
        return server_kind.WELL_KNOWN_SOCKETS[1]

    @property
    def is_local(self) -> bool:
        """Whether LXD is reached through a unix socket."""
        return not self.endpoint.startswith('https://')

    def connect(self) -> None:
        """Connect to LXD and read the description of the server.

        :raises errors.Unreachable: if nothing answers at the endpoint.
        :raises errors.PermissionDenied: if LXD does not trust nova-compute.
        """
        with self._connecting:
            if self._client is None:
                self._client = self._new_client()
            self.server = self.get()
        if self.server.get('auth') != 'trusted':
            raise errors.PermissionDenied(
                f'LXD at {self.endpoint} does not trust nova-compute: add its '
                f'certificate with "{server_kind.LXD.client} config trust '
                f'add" or "{server_kind.INCUS.client} config trust '
                f'add-certificate", or give its user access to the socket')

    def _new_client(self) -> pylxd.Client:
        endpoint = self.endpoint
        if self.is_local:
            url, http = unix_adapter.session(endpoint)
        else:
            tls.check_files(self.options)
            url = endpoint.rstrip('/')
            http = pylxd.client.get_session_for_url(
                url, verify=self.options.server_certificate,
                cert=(self.options.client_certificate,
                      self.options.client_key))
        # Otherwise requests would replace the pinned certificate by
        # REQUESTS_CA_BUNDLE, and use the proxies of the environment.
        http.trust_env = False
        try:
            return pylxd.Client(
                endpoint=url, session=http,
                timeout=(CONNECT_TIMEOUT, self.options.request_timeout))
        except (pylxd_exceptions.ClientConnectionFailed,
                *transport_errors.ALL) as exc:
            raise self._transport_error('connect', exc) from exc
        except (pylxd_exceptions.LXDAPIException, LookupError, TypeError,
                ValueError) as exc:
            raise self._not_lxd('connect') from exc

    @property
    def kind(self) -> server_kind.ServerKind:
        """The kind of the server; LXD until connected."""
        return server_kind.identify(self.server)

    def has_extension(self, name: str) -> bool:
        """Return whether the server has an API extension.

        :param name: name as in LXD's ``doc/api-extensions.md``.
        """
        return name in self.server.get('api_extensions', ())

    def storage_pool(self, name: str = '') -> dict[str, Any]:
        """Return the properties of a storage pool that never change, cached.

        :param name: name of the pool, by default ``[lxd] storage_pool``.
        :returns: LXD's description, such as its ``driver``.
        :raises errors.LXDError: if the request fails.
        """
        name = name or self.options.storage_pool
        if name not in self._pools:
            self._pools[name] = self.get('storage-pools', name)
        return self._pools[name]

    # -- requests -----------------------------------------------------------

    def get(self, *path: str, params: Mapping[str, Any] | None = None,
            timeout: float | None = None) -> Any:
        """Read an object.

        :param path: path segments below ``/1.0``.
        :param params: query parameters.
        :param timeout: seconds to wait for the answer.
        :returns: the ``metadata`` of LXD's answer.
        :raises errors.LXDError: if the request fails.
        """
        return self._decoded('get', path, self._request(
            'get', path, params=params, timeout=timeout))['metadata']

    def get_with_etag(self, *path: str) -> tuple[Any, str]:
        """Read an object in order to change it.

        :param path: path segments below ``/1.0``.
        :returns: its metadata, and the ETag for :meth:`put` or :meth:`patch`.
        :raises errors.LXDError: if the request fails.
        """
        response = self._request('get', path)
        answer = self._decoded('get', path, response)
        return answer['metadata'], response.headers.get('ETag', '')

    def post(self, *path: str, **kwargs: Any) -> Any:
        """Create an object, and wait for it. See :meth:`_modify`."""
        return self._modify('post', path, **kwargs)

    def put(self, *path: str, **kwargs: Any) -> Any:
        """Replace an object, and wait for it. See :meth:`_modify`."""
        return self._modify('put', path, **kwargs)

    def patch(self, *path: str, **kwargs: Any) -> Any:
        """Change an object, and wait for it. See :meth:`_modify`."""
        return self._modify('patch', path, **kwargs)

    def delete(self, *path: str, **kwargs: Any) -> Any:
        """Delete an object, and wait for it. See :meth:`_modify`."""
        return self._modify('delete', path, **kwargs)

    def submit(self, method: str, *path: str, **kwargs: Any
               ) -> operations.Operation:
        """Start an operation without waiting for it.

        :param method: ``post``, ``put``, ``patch`` or ``delete``.
        :param path: path segments below ``/1.0``.
        :param kwargs: ``body``, ``params`` and ``etag`` as in :meth:`_modify`.
        :returns: the running operation.
        :raises errors.LXDError: if LXD refuses the request.
        """
        answer = self._decoded(method, path,
                               self._request(method, path, **kwargs))
        return operations.Operation(self, responses.describe(method, path),
                                    answer['metadata'])

    def _modify(self, method: str, path: tuple[str, ...], *,
                body: Any = None, params: Mapping[str, Any] | None = None,
                etag: str | None = None, timeout: float | None = None,
                progress: operations.Progress | None = None) -> Any:
        """Send a change and wait for the operation that it may start.

        :param body: content to send as JSON.
        :param params: query parameters.
        :param etag: fail if the object's ETag is not this one.
        :param timeout: seconds that an operation may take, by default
            ``[lxd] operation_timeout``.
        :param progress: see :meth:`Operation.wait`.
        :returns: the metadata of the answer, or of the finished operation.
        :raises errors.LXDError: if the request or the operation fails.
        """
        what = responses.describe(method, path)
        attempts = 0

        def attempt(left: float) -> Any:
            nonlocal attempts
            attempts += 1
            try:
                answer = self._decoded(method, path, self._request(
                    method, path, body=body, params=params, etag=etag,
                    # PATCH is synchronous: LXD answers when the change is
                    # done.
                    timeout=timeout and left if method == 'patch' else None))
                if answer.get('type') != 'async':
                    return answer.get('metadata')
                return operations.Operation(
                    self, what, answer['metadata']).wait(left, progress)
            except errors.NotFound:
                if method == 'delete' and attempts > 1:
                    # Deleted by the attempt that failed.
                    return None
                raise

        patience = timeout or self.operation_timeout
        with contextlib.ExitStack() as held:
            if limiter.is_heavy(method, path, body,
                                patience > self.operation_timeout):
                held.enter_context(self.slot(what))
            if not retry.is_repeatable(method, body):
                return attempt(patience)
            return retry.transient(
                attempt, patience, what, self._outage,
                _LOST if retry.has_same_effect(method, body) else ())

    def slot(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Return a context manager that counts for the limit of heavy
        operations. Requests other than :meth:`submit` use it themselves.

        :param what: description of the operation for the log.
        """
        return self._limiter.slot(what, self.operation_timeout)

    def _request(self, method: str, path: tuple[str, ...], *,
                 data: Any = None, timeout: float | None = None,
                 **kwargs: Any) -> requests.Response:
        """Send a request, again after a transient failure. See :meth:`_send`.
        """
        if self._client is None:
            self.connect()
        timeout = timeout or self.options.request_timeout

        def attempt(left: float) -> requests.Response:
            return self._send(method, path, data=data, timeout=left, **kwargs)

        if data is not None and not isinstance(data, bytes):
            # A stream cannot be sent twice.
            return attempt(timeout)
        # An error in LXD's answer means that it has begun nothing, or has
        # reverted what it had begun.
        return retry.transient(attempt, timeout,
                               responses.describe(method, path),
                               self._outage)

    def _send(self, method: str, path: tuple[str, ...], *,
              timeout: float, body: Any = None, data: Any = None,
              params: Mapping[str, Any] | None = None,
              headers: Mapping[str, str] | None = None,
              etag: str | None = None, stream: bool = False,
              send_timeout: float | None = None) -> requests.Response:
        assert self._client is not None
        node = self._client.api
        for segment in path:
            node = node[parse.quote(str(segment), safe='')]
        kwargs: dict[str, Any] = {
            'params': {'project': self.project, **(params or {})},
            'timeout': (send_timeout or CONNECT_TIMEOUT, timeout)}
        sent = self.kind.own_headers(headers or {})
        if etag:
            sent['If-Match'] = etag
        if sent:
            kwargs['headers'] = sent
        if body is not None:
            kwargs['json'] = body
        if data is not None:
            kwargs['data'] = data
        if stream:
            kwargs['stream'] = True
        if method == 'get':
            # pylxd would decode the answer, which may be a long list, only to
            # check its type, as _decoded() does.
            kwargs['is_api'] = False
        self.request_count += 1
        what = responses.describe(method, path)
        try:
            response = getattr(node, method)(**kwargs)
        except pylxd_exceptions.LXDAPIException as exc:
            self._outage.end()
            raise responses.from_response(what, exc.response) from None
        except transport_errors.ALL as exc:
            error = self._transport_error(what, exc, reads=method == 'get')
            if isinstance(error, errors.Unreachable):
                self._outage.begin()
            if method != 'get' and not isinstance(error,
                                                  errors.ConnectionFailed):
                # LXD may have accepted the request nevertheless.
                self.wait_for_operations()
            raise error from exc
        self._outage.end()
        return response

    def wait_for_operations(self) -> None:
        """Wait until LXD has finished the operations that it runs now, for at
        most ``[lxd] request_timeout``; their results and errors are ignored.
        """
        operations.wait_for_all(self, CONNECT_TIMEOUT,
                                self.options.request_timeout)

    def _decoded(self, method: str, path: tuple[str, ...],
                 response: requests.Response) -> dict[str, Any]:
        """Decode an answer, whose content is in LXD's ``metadata`` member."""
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if (not isinstance(answer, dict) or 'metadata' not in answer or
                response.status_code == 200 and answer.get('type') != 'sync'):
            raise self._not_lxd(responses.describe(method, path))
        return answer

    # -- streams ------------------------------------------------------------

    def upload(self, *path: str, chunks: Iterable[bytes],
               headers: Mapping[str, str] | None = None,
               timeout: float | None = None,
               progress: operations.Progress | None = None) -> dict[str, Any]:
        """Send a stream, for example an image, without buffering it.

        :param path: path segments below ``/1.0``.
        :param chunks: the content; exceptions that it raises are passed on.
        :param headers: HTTP headers that LXD defines for this upload, by the
            names that LXD gives them.
        :param timeout: seconds that the transfer and the subsequent operation
            may take together, by default ``[lxd] image_timeout``.
        :param progress: see :meth:`Operation.wait`.
        :returns: metadata of the operation.
        :raises errors.LXDError: if the transfer or the operation fails.
        """
        timeout = timeout or self.options.image_timeout
        began = time.monotonic()
        source = streams.UploadSource(chunks, began + timeout)
        try:
            # In urllib3, the timeout for the connection is also the one for
            # each write to it, and LXD may pause for longer, for example
            # while its storage is slow.
            answer = self._decoded('post', path, self._request(
                'post', path, data=iter(source), headers=headers,
                timeout=timeout, send_timeout=timeout))
        except errors.LXDError:
            # An exception of the source breaks the connection: raise it.
            if source.error is not None:
                raise source.error from None
            raise
        if answer.get('type') != 'async':
            return answer.get('metadata') or {}
        left = max(1.0, timeout - (time.monotonic() - began))
        return operations.Operation(self, responses.describe('post', path),
                                    answer['metadata']).wait(left, progress)

    @contextlib.contextmanager
    def download(self, *path: str, params: Mapping[str, Any] | None = None,
                 chunk_size: int = 1 << 20, timeout: float | None = None,
                 ) -> Iterator[tuple[Mapping[str, str], Iterator[bytes]]]:
        """Receive a stream.

        :param path: path segments below ``/1.0``.
        :param params: query parameters.
        :param chunk_size: maximum number of bytes of a chunk.
        :param timeout: seconds to wait for the answer, and for each chunk.
        :returns: a context manager that yields the headers and the chunks.
        :raises errors.LXDError: if the request fails, also while reading.
        """
        response = self._request('get', path, params=params, stream=True,
                                 timeout=timeout)
        what = responses.describe('get', path)

        def body() -> Iterator[bytes]:
            try:
                yield from response.iter_content(chunk_size)
            except transport_errors.ALL as exc:
                raise self._transport_error(what, exc) from exc

        try:
            yield self.kind.lxd_headers(response.headers), body()
        finally:
            response.close()

    def write_file(self, instance: str, path: str, content: bytes, *,
                   mode: int = 0o644, uid: int = 0, gid: int = 0,
                   kind: str = 'file') -> None:
        """Write a file into an instance through LXD.

        LXD resolves the path inside the guest's root, so that symbolic links
        cannot lead out of it.

        :param instance: LXD's name of the instance.
        :param path: absolute path in the guest.
        :param content: the content; empty for a directory.
        :param mode: permission bits.
        :param uid: owner in the guest.
        :param gid: group in the guest.
        :param kind: ``file`` or ``directory``.
        :raises errors.LXDError: if the request fails.
        """
        self._request('post', ('instances', instance, 'files'),
                      data=content, params={'path': path},
                      headers={'X-LXD-type': kind,
                               'X-LXD-mode': f'{mode:04o}',
                               'X-LXD-uid': str(uid),
                               'X-LXD-gid': str(gid),
                               'Content-Type': 'application/octet-stream'})

    def websocket(self, *path: str, params: Mapping[str, Any] | None = None,
                  timeout: float | None = None) -> websocket.WebSocket:
        """Connect to a websocket of LXD.

        :param path: path segments below ``/1.0``.
        :param params: query parameters.
        :param timeout: seconds for each later read or write; None means no
            timeout, which is suitable only for a thread of its own.
        :returns: the connected websocket.
        :raises errors.LXDError: if the connection fails.
        """
        query = parse.urlencode({'project': self.project, **(params or {})})
        where = '/1.0/' + '/'.join(parse.quote(p, safe='') for p in path)
        self.request_count += 1
        what = responses.describe('websocket', path)
        try:
            return websockets.connect(self.endpoint, self.options,
                                      f'ws://lxd{where}?{query}',
                                      CONNECT_TIMEOUT, timeout)
        except websocket.WebSocketBadStatusException as exc:
            body = getattr(exc, 'resp_body', None) or b''
            raise responses.from_text(
                what, responses.error_text(body) or str(exc),
                exc.status_code) from exc
        except transport_errors.ALL as exc:
            raise self._transport_error(what, exc) from exc

    # -- errors -------------------------------------------------------------

    def _not_lxd(self, what: str) -> errors.LXDError:
        return errors.Unreachable(
            f'The server at {self.endpoint} does not answer like LXD '
            f'({what}): check [lxd] endpoint')

    def _transport_error(self, what: str, exc: BaseException,
                         reads: bool = False) -> errors.LXDError:
        return transport_errors.convert(
            exc, what, self.endpoint, self.options.server_certificate, reads)
