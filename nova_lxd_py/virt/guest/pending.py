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

"""LXD instances that the driver is creating.

LXD sends an event when it has recorded a new instance. The creator waits for
it instead of polling, and the watcher of the events knows the configuration of
the instance without a request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import contextlib
import threading
import time

from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import operations
from nova_lxd_py.virt.lxd import session as lxd

#: Seconds between requests for the uid range of a new instance if no event
#: comes.
RANGE_POLL = 0.1


class _Pending:
    """One instance that is being created."""

    def __init__(self, config: Mapping[str, str]) -> None:
        self.config = config
        self.seen = threading.Event()


class PendingInstances:
    """Instances that are being created, by name."""

    def __init__(self) -> None:
        self._expected: dict[str, _Pending] = {}

    @contextlib.contextmanager
    def expected(self, name: str, config: Mapping[str, str]
                 ) -> Iterator[threading.Event]:
        """Register an instance that is being created, for the time of a block.

        :param name: name of the LXD instance.
        :param config: its configuration.
        :returns: set once LXD's event has come; never without a connection for
            LXD's events.
        """
        pending = self._expected[name] = _Pending(config)
        try:
            yield pending.seen
        finally:
            if self._expected.get(name) is pending:
                del self._expected[name]

    def expect(self, name: str) -> Mapping[str, str] | None:
        """Record that LXD's event for a new instance has come.

        :param name: name of the LXD instance.
        :returns: its configuration, None if another client creates it.
        """
        pending = self._expected.get(name)
        if pending is None:
            return None
        pending.seen.set()
        return pending.config


def wait_for_range(session: lxd.Session, name: str,
                   operation: operations.Operation, announced: threading.Event,
                   patience: float) -> None:
    """Wait until LXD has recorded the uid range of a new instance, which is
    one of its first steps, or has failed.

    :param session: the LXD session.
    :param name: name of the LXD instance.
    :param operation: the operation that creates it.
    :param announced: the event of :meth:`PendingInstances.expected`.
    :param patience: seconds to wait at most.
    """
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        # LXD sends the event after that. Without a listener it has to be
        # asked, which slows it down.
        if announced.wait(RANGE_POLL):
            announced.clear()
        try:
            info = session.get('instances', name)
            if info['config'].get('volatile.idmap.base'):
                return
        except errors.NotFound:
            pass
        if not operation.is_running():
            return
