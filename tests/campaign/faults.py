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

"""Daemons of the quickstart cloud, killed in the middle of their work."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import threading
import time

from tests.fixtures import cloud

#: Seconds after the restart of a daemon in which it can still be the reason
#: of a failure: connections are made again, services report again.
AFTERMATH = 20 * cloud.PATIENCE


class Faults:
    """Kills daemons, starts them again and remembers when."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: Daemon, and when it was killed and ready again.
        self._done: list[tuple[str, float, float | None]] = []

    def kill(self, daemon: str, away: float) -> None:
        """Kill a daemon and start it again.

        :param daemon: its name for the quickstart.
        :param away: seconds until it is started again.
        """
        begin = time.monotonic()
        with self._lock:
            self._done.append((daemon, begin, None))
        try:
            for pid in _processes(daemon):
                # The worker may have ended with the one that watches it.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(away)
            cloud.quickstart('restart', daemon)
        finally:
            with self._lock:
                self._done[-1] = (daemon, begin, time.monotonic())

    def wait(self) -> None:
        """Wait until no daemon is away."""
        while True:
            with self._lock:
                if all(until is not None for *_, until in self._done):
                    return
            time.sleep(0.5)

    def count(self) -> dict[str, int]:
        """Count how often each daemon was killed."""
        with self._lock:
            names = [name for name, *_ in self._done]
        return {name: names.count(name) for name in sorted(set(names))}

    def between(self, begin: float, end: float) -> list[str]:
        """List the daemons that were away in a time, by time.monotonic()."""
        with self._lock:
            return [name for name, since, until in self._done
                    if since <= end and
                    (until is None or until + AFTERMATH >= begin)]


def _processes(daemon: str) -> list[int]:
    """Return the process of a daemon, and the worker of one that has one."""
    pid = int((cloud.PREFIX / 'run' / f'{daemon}.pid').read_text().split()[0])
    if daemon != 'ovs-vswitchd':
        return [pid]
    children = pathlib.Path(f'/proc/{pid}/task/{pid}/children').read_text()
    return [pid, *map(int, children.split())]
