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

"""Conversion of failed connections to :mod:`.errors`."""

from __future__ import annotations

import requests
from urllib3 import exceptions
import websocket

from nova_lxd_py.virt.lxd import errors

#: Exceptions of the HTTP and websocket libraries for a failed connection.
ALL = (requests.exceptions.RequestException, OSError,
       websocket.WebSocketException)


def _origin(exc: BaseException) -> BaseException | None:
    """Return the error with which a connection could not be made."""
    reason = getattr(exc.args[0] if exc.args else None, 'reason', None)
    return (reason if isinstance(reason, exceptions.NewConnectionError)
            else None)


def is_unsent(exc: BaseException) -> bool:
    """Return whether no connection was made, so that LXD cannot have got the
    request.

    :param exc: one of :data:`ALL`.
    """
    if isinstance(exc, requests.exceptions.ConnectTimeout):
        return True
    return (isinstance(exc, requests.exceptions.ConnectionError) and
            _origin(exc) is not None)


def convert(exc: BaseException, what: str, endpoint: str, certificate: str,
            reads: bool = False) -> errors.LXDError:
    """Create the error for a failed connection.

    :param exc: one of :data:`ALL`.
    :param what: description of the request for the message.
    :param endpoint: path or https URL of LXD.
    :param certificate: path of the certificate that LXD has to present.
    :param reads: whether the request changes nothing.
    """
    origin = _origin(exc)
    # With eventlet an error says ENOENT, without a text.
    text = str(exc) if origin is None else repr(origin.__cause__ or origin)
    kind = (errors.ConnectionFailed if reads or is_unsent(exc)
            else errors.Unreachable)
    if isinstance(exc, (requests.exceptions.ReadTimeout,
                        websocket.WebSocketTimeoutException)) or (
            not isinstance(exc, requests.exceptions.ConnectTimeout) and
            'timed out' in text):
        return errors.DeadlineExceeded(
            f'LXD at {endpoint} did not answer "{what}" in time')
    if 'Permission denied' in text or 'PermissionError' in text:
        return errors.PermissionDenied(
            f'nova-compute has no permission to use the LXD socket '
            f'{endpoint}: add its user to the group that owns the socket, '
            f'and restart nova-compute')
    if 'No such file' in text or 'FileNotFoundError' in text:
        return kind(
            f'There is no LXD socket at {endpoint}: start LXD, or set [lxd] '
            f'endpoint')
    if 'Fingerprints did not match' in text:
        return errors.PermissionDenied(
            f'The server at {endpoint} does not present the certificate in '
            f'{certificate}')
    return kind(
        f'LXD at {endpoint} does not answer ({what}): {text}')
