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
"""Rollback of completed steps when a later step fails."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import time
from typing import Any

from nova import objects
from oslo_log import log as logging

from nova_lxd_py.virt.lxd import errors

LOG = logging.getLogger(__name__)

#: Seconds to wait for an LXD that does not answer, all steps together. A
#: restart takes some; afterwards, Nova does not know that the server was here.
PATIENCE = 120.0
#: Seconds between attempts.
INTERVAL = 1.0

#: What removes the leftovers of a build; a server that was built on another
#: host may exist for long.
_REMEDY = ('Nova does it when the server has been deleted ([DEFAULT] '
           'running_deleted_instance_action)')


class Rollback:
    """Undoes registered steps, the last first, unless :meth:`forget` is
    called.

    Errors meanwhile are logged only: the error that led here has to stay the
    one raised.

    :param instance: the instance.
    :param operation: what has failed then, for the log.
    :param remedy: what does it where this cannot, for the log.
    """

    def __init__(self, instance: objects.Instance, operation: str = 'build',
                 remedy: str = _REMEDY) -> None:
        self._instance = instance
        self._operation = operation
        self._remedy = remedy
        self._stack = contextlib.ExitStack()
        self._deadline: float | None = None

    def __enter__(self) -> Rollback:
        self._stack.__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._stack.__exit__(*exc_info)

    def step(self, what: str, action: Callable[[], None]) -> None:
        """Register how to undo the next step.

        :param what: completes "could not" in the log.
        :param action: undoes it; may be called more than once.
        """
        self._stack.callback(self._attempt, what, action)

    def forget(self) -> None:
        """Keep everything, since all steps have succeeded."""
        self._stack.pop_all()

    def _attempt(self, what: str, action: Callable[[], None]) -> None:
        while True:
            try:
                action()
                return
            except (errors.Unreachable, errors.OperationLost):
                if self._is_over():
                    LOG.exception('Could not %s after a failed %s, since LXD '
                                  'does not answer; %s', what,
                                  self._operation, self._remedy,
                                  instance=self._instance)
                    return
            except Exception:
                LOG.exception('Could not %s after a failed %s; %s', what,
                              self._operation, self._remedy,
                              instance=self._instance)
                return
            time.sleep(INTERVAL)

    def _is_over(self) -> bool:
        now = time.monotonic()
        if self._deadline is None:
            LOG.warning('LXD does not answer; waiting up to %d seconds to '
                        'roll back a failed %s', PATIENCE, self._operation,
                        instance=self._instance)
            self._deadline = now + PATIENCE
        return now > self._deadline
