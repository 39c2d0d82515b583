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

"""LXD instances that the driver is having made just now.

LXD says in an event when a new instance is written down. Whoever makes it can
wait for that instead of asking again and again, and whoever follows the events
knows whose it is without asking at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import contextlib
import threading
import time

from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import operations
from nova_lxd_py.virt.lxd import session as lxd

#: Seconds between looks at whether a new instance has its uid range, if LXD
#: does not say so itself.
RANGE_POLL = 0.1


class _Arrival:
    """One instance that is to come."""

    def __init__(self, config: Mapping[str, str]) -> None:
        self.config = config
        self.seen = threading.Event()


class PendingInstances:
    """Instances that are being made, by their names."""

    def __init__(self) -> None:
        self._expected: dict[str, _Arrival] = {}

    @contextlib.contextmanager
    def expected(self, name: str, config: Mapping[str, str]
                 ) -> Iterator[threading.Event]:
        """Say that an instance is being made, for the time of a block.

        :param name: LXD's name of it.
        :param config: the configuration that it gets.
        :returns: an event that is set once LXD has said that it is there.
            Without a connection for LXD's events it never is.
        """
        arrival = self._expected[name] = _Arrival(config)
        try:
            yield arrival.seen
        finally:
            if self._expected.get(name) is arrival:
                del self._expected[name]

    def expect(self, name: str) -> Mapping[str, str] | None:
        """Take note that LXD has said that an instance is there.

        :param name: LXD's name of it.
        :returns: its configuration, None for an instance that others make.
        """
        arrival = self._expected.get(name)
        if arrival is None:
            return None
        arrival.seen.set()
        return arrival.config


def wait_for_range(session: lxd.Session, name: str,
                   operation: operations.Operation, announced: threading.Event,
                   patience: float) -> None:
    """Wait until LXD has written down the uid range of a new instance, which
    is one of the first things it does, or has given up.

    :param session: the way to LXD.
    :param name: LXD's name of the instance.
    :param operation: what makes it.
    :param announced: what :meth:`PendingInstances.expected` returned.
    :param patience: seconds to wait at most.
    """
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        # LXD says so after that. If nobody listens, it has to be asked, which
        # costs it time in which it does not work.
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
