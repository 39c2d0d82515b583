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

"""Conversion of LXD's error answers to :mod:`.errors`."""

from __future__ import annotations

import json

import requests

from nova_lxd_py.virt.lxd import errors


def describe(method: str, path: tuple[str, ...]) -> str:
    """Describe a request for error messages."""
    return f'{method} {"/".join(path) or "server"}'


def error_text(body: bytes | str) -> str:
    """Return the error text in the body of an answer; '' if there is none."""
    try:
        return json.loads(body).get('error', '')
    except (ValueError, AttributeError):
        return ''


def from_response(what: str, response: requests.Response) -> errors.LXDError:
    """Create the error for an HTTP response.

    :param what: description of the request for the message.
    :param response: the response.
    """
    text = error_text(response.content) or response.reason or 'no reason'
    return from_text(what, text, response.status_code)


#: Parts of error texts of LXD 5.0 to 6.x and Incus for conditions that have
#: no status code of their own. The first match wins.
_BY_TEXT: tuple[tuple[str, type[errors.LXDError]], ...] = (
    ('failed to begin transaction', errors.Transient),
    ('database is locked', errors.Transient),
    ('daemon setup in progress', errors.Transient),
    ('already exists', errors.AlreadyExists),
    ('already in use', errors.AlreadyExists),
    ('is busy running', errors.Busy),
    ('operation in progress', errors.Busy),
    ('instance not found', errors.InstanceNotFound),
)

_BY_CODE: dict[int, type[errors.LXDError]] = {
    401: errors.PermissionDenied,
    403: errors.PermissionDenied,
    404: errors.NotFound,
    409: errors.AlreadyExists,
    412: errors.PreconditionFailed,
    503: errors.Transient,
}


def from_text(what: str, text: str, code: int, failed: bool = False
              ) -> errors.LXDError:
    """Create the error for an answer of LXD.

    :param what: description of the request for the message.
    :param text: LXD's error text.
    :param code: LXD's status code.
    :param failed: whether it is the result of an operation, where 400 stands
        for any failure and 401 for cancelled.
    """
    message = f'LXD: {text} ({what})'
    lowered = text.lower()
    for phrase, kind in _BY_TEXT:
        if phrase in lowered:
            return kind(message, code)
    if failed:
        return errors.OperationFailed(message, code)
    if code in _BY_CODE:
        return _BY_CODE[code](message, code)
    if 400 <= code < 500:
        return errors.InvalidRequest(message, code)
    return errors.OperationFailed(message, code)
