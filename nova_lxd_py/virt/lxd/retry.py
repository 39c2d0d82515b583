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

"""Retries after transient failures of LXD's daemon.

A burst of requests makes LXD's database time out, and a daemon that starts or
stops refuses all requests for some seconds. LXD says so in an error answer, or
does not accept the connection; neither is a reason to fail an operation of a
server. Nothing is sent again that LXD may have begun, unless the repetition
has the same effect.
"""

from __future__ import annotations

from collections.abc import Callable
import random
import time
from typing import Any, TypeVar

from oslo_log import log as logging

from nova_lxd_py.virt.lxd import errors

LOG = logging.getLogger(__name__)

#: Seconds between attempts: first and longest. They are varied, so that
#: requests that failed together are not repeated together.
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0

_T = TypeVar('_T')


class Outage:
    """The time for which LXD has not been reachable, for all requests.

    Requests wait while LXD restarts. When it is down for longer, each request
    fails at once, since Nova's periodic tasks send many one after the other.

    :param patience: seconds that an outage may last.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._began: float | None = None

    def begin(self) -> None:
        """Record that a connection has failed."""
        if self._began is None:
            self._began = time.monotonic()

    def end(self) -> None:
        """Record that LXD has answered."""
        self._began = None

    @property
    def deadline(self) -> float:
        """Until when to wait for LXD, by the monotonic clock."""
        began = self._began
        return (time.monotonic() if began is None else began) + self._patience


def transient(attempt: Callable[[float], _T], timeout: float, what: str,
              outage: Outage, also: tuple[type[errors.LXDError], ...] = ()
              ) -> _T:
    """Call a function until it does not fail transiently.

    :param attempt: called with the seconds that are left.
    :param timeout: seconds for all attempts and the pauses between them.
    :param what: description of the request for the log.
    :param outage: whether LXD can be reached.
    :param also: errors after which the function may be called again besides
        those that always allow it.
    :returns: the function's result.
    :raises errors.Transient: if it still fails when the time is over.
    :raises errors.Unreachable: if LXD has not been reachable for too long.
    """
    repeated: tuple[type[errors.LXDError], ...] = (
        errors.Transient, errors.ConnectionFailed, *also)
    deadline = time.monotonic() + timeout
    left = timeout
    pause = FIRST_PAUSE
    while True:
        try:
            return attempt(left)
        except repeated as exc:
            wait = pause * random.uniform(0.5, 1)
            end = deadline
            if isinstance(exc, errors.Unreachable):
                end = min(end, outage.deadline)
            now = time.monotonic()
            if end - now <= wait:
                raise
            left = deadline - now - wait
            LOG.log(logging.WARNING if pause == FIRST_PAUSE else logging.DEBUG,
                    'Retrying LXD request "%s" in %.1f seconds after: %s',
                    what, wait, exc)
            time.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE)


def has_same_effect(method: str, body: Any) -> bool:
    """Return whether a request has the same effect once more, also if LXD has
    carried out the one whose answer was lost.

    :param method: HTTP method in lower case.
    :param body: the content that is sent as JSON.
    """
    return method == 'delete' or (
        isinstance(body, dict) and body.get('action') == 'stop' and
        bool(body.get('force')))


def is_repeatable(method: str, body: Any) -> bool:
    """Return whether a request whose operation has failed may be sent again.

    :param method: HTTP method in lower case.
    :param body: the content that is sent as JSON.
    """
    if method == 'post':
        return False
    # LXD refuses to restart an instance that the failed restart has stopped.
    return not isinstance(body, dict) or body.get('action') != 'restart'
