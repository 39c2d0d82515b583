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

"""Failures on demand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import fnmatch
import threading
from typing import Any

from tests.unit.fake_lxd import errors
from tests.unit.fake_lxd import routing


@dataclasses.dataclass
class Fault:
    """Something that goes wrong for the requests that match.

    :ivar match: shell pattern over "METHOD /path", without the query.
    :ivar where: what the JSON body must hold as well.
    :ivar times: how often it still happens; None is always.
    """

    kind: str
    match: str
    where: Mapping[str, Any]
    times: int | None = 1
    code: int = 500
    error: str = ''
    seconds: float = 0.0
    after: bool = False
    action: Callable[[routing.Request], None] | None = None
    hits: int = 0
    released: threading.Event = dataclasses.field(
        default_factory=threading.Event)

    def matches(self, request: routing.Request) -> bool:
        if self.times == 0:
            return False
        if not fnmatch.fnmatchcase(f'{request.method} {request.path}',
                                   self.match):
            return False
        body = request.json_or_empty() if self.where else {}
        return all(body.get(key) == value
                   for key, value in self.where.items())

    def release(self) -> None:
        """Let go of what hangs, and do not catch anything else."""
        self.times = 0
        self.released.set()


class Faults:
    """The faults that are armed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._armed: list[Fault] = []

    def arm(self, fault: Fault) -> Fault:
        with self._lock:
            self._armed.append(fault)
        return fault

    def clear(self) -> None:
        with self._lock:
            armed, self._armed = self._armed, []
        for fault in armed:
            fault.release()

    def take(self, request: routing.Request, *kinds: str) -> list[Fault]:
        """Use up the faults that apply, in the order they were armed."""
        with self._lock:
            found = [fault for fault in self._armed
                     if fault.kind in kinds and fault.matches(request)]
            for fault in found:
                fault.hits += 1
                if fault.times is not None:
                    fault.times -= 1
            return found

    def on_request(self, request: routing.Request) -> None:
        """Apply what strikes before LXD looks at a request."""
        for fault in self.take(request, 'delay', 'call', 'fail', 'drop'):
            if fault.kind == 'delay':
                fault.released.wait(fault.seconds)
            elif fault.kind == 'call' and fault.action is not None:
                fault.action(request)
            elif fault.kind == 'drop':
                raise errors.Dropped
            elif fault.kind == 'fail':
                raise errors.APIError(fault.code, fault.error)

    def on_response(self, request: routing.Request) -> None:
        """Apply what strikes when LXD has done what was asked."""
        if self.take(request, 'drop-response'):
            raise errors.Dropped
