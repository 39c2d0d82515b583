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
stops refuses all requests for some seconds. LXD says so in an error answer,
which is no reason to fail an operation of a server.
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


def transient(attempt: Callable[[float], _T], timeout: float, what: str
              ) -> _T:
    """Call a function until it does not fail transiently.

    :param attempt: called with the seconds that are left.
    :param timeout: seconds for all attempts and the pauses between them.
    :param what: description of the request for the log.
    :returns: the function's result.
    :raises errors.Transient: if it still fails when the time is over.
    """
    deadline = time.monotonic() + timeout
    left = timeout
    pause = FIRST_PAUSE
    while True:
        try:
            return attempt(left)
        except errors.Transient as exc:
            wait = pause * random.uniform(0.5, 1)
            left = deadline - time.monotonic() - wait
            if left <= 0:
                raise
            LOG.debug('Retrying LXD request "%s" in %.1f seconds after: %s',
                      what, wait, exc)
            time.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE)


def is_repeatable(method: str, body: Any) -> bool:
    """Return whether a request whose operation has failed may be sent again.

    :param method: HTTP method in lower case.
    :param body: the content that is sent as JSON.
    """
    if method == 'post':
        return False
    # LXD refuses to restart an instance that the failed restart has stopped.
    return not isinstance(body, dict) or body.get('action') != 'restart'
