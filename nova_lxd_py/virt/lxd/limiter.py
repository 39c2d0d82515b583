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

"""A limit for heavy operations, so that a burst of them is fast.

LXD begins all operations at once. With hundreds it keeps its database busy
until requests time out, and all of them become slow together.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import os
import threading
from typing import Any

from oslo_log import log as logging

LOG = logging.getLogger(__name__)

#: Operations at the same time for each CPU, and their minimum number. An
#: operation mostly waits, for hooks of liblxc and for the kernel.
PER_CPU, LEAST = 4, 8


def default_limit() -> int:
    """Return the limit where ``[lxd] max_concurrent_operations`` is unset."""
    return max(LEAST, PER_CPU * (os.cpu_count() or 1))


def is_heavy(method: str, path: tuple[str, ...], body: Any,
             is_long: bool) -> bool:
    """Return whether a request begins an operation that the limit applies to:
    creating, starting, stopping by force and deleting an LXD instance.

    Operations that mostly wait for something other than LXD do not count,
    since a few of them would block all others: the shutdown of a guest, the
    transfer of an image or of an instance, and copies that may take long.

    :param method: HTTP method in lower case.
    :param path: path segments below ``/1.0``.
    :param body: the content that is sent as JSON.
    :param is_long: whether the caller allows the operation more time than
        ``[lxd] operation_timeout``.
    """
    if is_long or path[:1] != ('instances',):
        return False
    if method == 'delete':
        return len(path) == 2
    if method == 'post':
        return (len(path) == 1 and
                body['source']['type'] in ('image', 'copy', 'none'))
    if method == 'put' and path[2:] == ('state',):
        return body['action'] == 'start' or (
            body['action'] == 'stop' and bool(body.get('force')))
    return False


class OperationLimiter:
    """Limits the number of heavy operations at the same time.

    It cannot deadlock: a thread never waits for a second slot, and none waits
    for longer than an operation may take.

    :param limit: the number; None for :func:`default_limit`.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit or default_limit()
        self._slots = threading.BoundedSemaphore(self.limit)
        self._held = threading.local()

    @contextlib.contextmanager
    def slot(self, what: str, patience: float) -> Iterator[None]:
        """Hold a slot during a ``with`` block.

        :param what: description of the operation for the log.
        :param patience: seconds to wait for a slot. After that the operation
            continues without one, since those that hold them are stuck.
        """
        if getattr(self._held, 'slot', False):
            yield
            return
        acquired = self._slots.acquire(timeout=patience)
        if not acquired:
            LOG.warning('LXD has been busy with %d operations for %d seconds '
                        '([lxd] max_concurrent_operations); starting "%s" '
                        'nevertheless', self.limit, patience, what)
        self._held.slot = True
        try:
            yield
        finally:
            self._held.slot = False
            if acquired:
                self._slots.release()
