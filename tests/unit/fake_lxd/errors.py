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

"""How LXD says no."""

from __future__ import annotations


class APIError(Exception):
    """A refusal, with the status code and the words of LXD 5.0.2.

    :param code: HTTP status; a failed operation always ends with 400.
    :param text: LXD's own words.
    """

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


class Dropped(Exception):
    """The connection is to be closed without an answer."""


class Abandoned(BaseException):
    """The daemon went down; whoever is at work for it stops here.

    Not an Exception: no handler may take it for a failure of its own.
    """


def bad_request(text: str) -> APIError:
    return APIError(400, text)


def not_found(text: str) -> APIError:
    return APIError(404, text)


def conflict(text: str) -> APIError:
    return APIError(409, text)


def internal(text: str) -> APIError:
    return APIError(500, text)
