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
"""Background operations of LXD, which continue after it has answered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import contextlib
import time
from typing import Any, Protocol

from oslo_log import log as logging

from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import responses

LOG = logging.getLogger(__name__)

#: Maximum time of one wait request, in seconds, so that progress is reported
#: and a dead peer is detected.
WAIT_SLICE = 15
#: The same with a progress callback.
PROGRESS_SLICE = 5

Progress = Callable[[Mapping[str, Any]], None]


class Requests(Protocol):
    """The part of :class:`.session.Session` that operations need."""

    def get(self, *path: str, params: Mapping[str, Any] | None = None,
            timeout: float | None = None) -> Any:
        """Read an object."""

    def delete(self, *path: str, **kwargs: Any) -> Any:
        """Delete an object."""


class Operation:
    """A background operation of LXD.

    :param requests: the LXD session.
    :param what: description of the operation for errors.
    :param metadata: metadata of LXD's answer that started it.
    :ivar id: LXD's id of the operation.
    :ivar metadata: the metadata that LXD returned last.
    """

    def __init__(self, requests: Requests, what: str,
                 metadata: Mapping[str, Any]) -> None:
        self._requests = requests
        self._what = what
        self.metadata = metadata
        self.id: str = metadata['id']

    def wait(self, timeout: float, progress: Progress | None = None
             ) -> dict[str, Any]:
        """Wait until the operation has finished.

        :param timeout: seconds to wait; then the operation is cancelled.
        :param progress: called with the operation's metadata between waits.
        :returns: the metadata of the finished operation; may be empty.
        :raises errors.LXDError: if it failed, was lost, or timed out.
        """
        longest = WAIT_SLICE if progress is None else PROGRESS_SLICE
        deadline = time.monotonic() + timeout
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                self.cancel()
                raise errors.DeadlineExceeded(
                    f'LXD did not finish "{self._what}" within '
                    f'{timeout:.0f} seconds')
            slice_ = max(1, min(longest, int(left + 0.999)))
            try:
                self.metadata = self._requests.get(
                    'operations', self.id, 'wait',
                    params={'timeout': slice_}, timeout=slice_ + 10)
            except errors.NotFound as exc:
                raise errors.OperationLost(
                    f'LXD no longer knows the operation "{self._what}"; it '
                    f'may have restarted meanwhile') from exc
            code = self.metadata['status_code']
            if code == 200:
                return self.metadata.get('metadata') or {}
            if code >= 400:
                text = self.metadata.get('err') or self.metadata['status']
                raise responses.from_text(self._what, text, code, failed=True)
            if progress is not None:
                progress(self.metadata)

    def is_running(self) -> bool:
        """Return whether the operation is still running.

        :returns: False if it has succeeded, failed or been forgotten.
        :raises errors.LXDError: if the request fails.
        """
        try:
            self.metadata = self._requests.get('operations', self.id)
        except errors.NotFound:
            return False
        # LXD's codes below 200 are states of an operation under way.
        return self.metadata['status_code'] < 200

    def wait_or_log(self, timeout: float) -> None:
        """Wait until the operation has finished, and ignore its result.

        :param timeout: maximum seconds to wait; it is not cancelled.
        """
        with contextlib.suppress(errors.LXDError):
            self._requests.get('operations', self.id, 'wait',
                               params={'timeout': int(timeout) + 1},
                               timeout=timeout + 10)

    def cancel(self) -> None:
        """Request cancellation of the operation, which LXD may not support."""
        try:
            self._requests.delete('operations', self.id)
        except errors.LXDError as exc:
            LOG.debug('Cancelling LXD operation "%s" failed: %s',
                      self._what, exc)


def wait_for_all(requests: Requests, list_timeout: float, timeout: float
                 ) -> None:
    """Wait for LXD's running operations after an answer was lost.

    One of them may be the one that was requested. A caller that cleans up
    after the failure must not look before LXD has finished.

    :param requests: the LXD session.
    :param list_timeout: seconds to wait for the list of operations.
    :param timeout: seconds to wait for all of them; most are unrelated, and
        may take longer.
    """
    with contextlib.suppress(errors.LXDError):
        running = requests.get('operations', params={'recursion': 1},
                               timeout=list_timeout)
        deadline = time.monotonic() + timeout
        for operation in running.get('running', ()):
            left = deadline - time.monotonic()
            if operation['class'] == 'task' and left > 0:
                Operation(requests, operation['description'], operation
                          ).wait_or_log(left)
