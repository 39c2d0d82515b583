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
"""Operations that LXD goes on with after it has answered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import contextlib
import time
from typing import Any, Protocol

from oslo_log import log as logging

from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import responses

LOG = logging.getLogger(__name__)

#: Longest single wait for an operation, so that progress can be shown and a
#: dead peer is noticed.
WAIT_SLICE = 15
#: The same for a caller that wants to show the progress.
PROGRESS_SLICE = 5

Progress = Callable[[Mapping[str, Any]], None]


class Requests(Protocol):
    """What an operation needs of :class:`.session.Session`."""

    def get(self, *path: str, params: Mapping[str, Any] | None = None,
            timeout: float | None = None) -> Any:
        """Ask LXD for something."""

    def delete(self, *path: str, **kwargs: Any) -> Any:
        """Have LXD delete something."""


class Operation:
    """One background operation of LXD.

    :param requests: the way to LXD.
    :param what: names the operation in errors.
    :param metadata: what LXD answered when it began.
    :ivar id: LXD's id of the operation.
    :ivar metadata: what LXD said of it last.
    """

    def __init__(self, requests: Requests, what: str,
                 metadata: Mapping[str, Any]) -> None:
        self._requests = requests
        self._what = what
        self.metadata = metadata
        self.id: str = metadata['id']

    def wait(self, timeout: float, progress: Progress | None = None
             ) -> dict[str, Any]:
        """Wait until LXD has finished.

        :param timeout: seconds to wait; the operation is cancelled then.
        :param progress: called with the operation's metadata between waits.
        :returns: the operation's own metadata (may be empty).
        :raises errors.LXDError: when it failed, was lost, or took too long.
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
        """Ask whether LXD is still at it.

        :returns: False once it has succeeded, failed or been forgotten.
        :raises errors.LXDError: LXD does not say.
        """
        try:
            self.metadata = self._requests.get('operations', self.id)
        except errors.NotFound:
            return False
        # Below 200 are its states on the way to an end.
        return self.metadata['status_code'] < 200

    def wait_or_log(self, timeout: float) -> None:
        """Wait until LXD has finished, whatever comes of it.

        :param timeout: seconds to wait at most; nothing is cancelled.
        """
        with contextlib.suppress(errors.LXDError):
            self._requests.get('operations', self.id, 'wait',
                               params={'timeout': int(timeout) + 1},
                               timeout=timeout + 10)

    def cancel(self) -> None:
        """Ask LXD to give up; success is not guaranteed."""
        try:
            self._requests.delete('operations', self.id)
        except errors.LXDError as exc:
            LOG.debug('LXD operation "%s" could not be cancelled: %s',
                      self._what, exc)
