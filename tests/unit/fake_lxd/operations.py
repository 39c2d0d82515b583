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

"""Background operations: 202, wait, cancel, and oblivion."""

from __future__ import annotations

from collections.abc import Callable
import threading
import time
from typing import Any
import uuid

from tests.unit.fake_lxd import clock
from tests.unit.fake_lxd import errors
from tests.unit.fake_lxd import faults
from tests.unit.fake_lxd import routing

PENDING, RUNNING, SUCCESS, FAILURE, CANCELLED = 105, 103, 200, 400, 401
_NAMES = {PENDING: 'Pending', RUNNING: 'Running', SUCCESS: 'Success',
          FAILURE: 'Failure', CANCELLED: 'Cancelled'}

Work = Callable[['Operation'], Any]


class Operation:
    """One operation.

    :ivar metadata: what its work tells the client; None until then.
    """

    def __init__(self, registry: Operations, request: routing.Request,
                 description: str, resources: dict[str, list[str]] | None,
                 may_cancel: bool = False, cls: str = 'task') -> None:
        self._registry = registry
        self.id = str(uuid.uuid4())
        self.project = request.project
        self.request = request
        self.description = description
        self.cls = cls
        self.resources = resources
        self.metadata: dict[str, Any] | None = None
        self.may_cancel = may_cancel
        self.err = ''
        self.code = PENDING
        self.created_at = self.updated_at = clock.now()
        self.ended: float | None = None
        self.done = threading.Event()
        self.cancelled = threading.Event()
        self.streams: Any = None

    def as_dict(self) -> dict[str, Any]:
        return {'id': self.id, 'class': self.cls,
                'description': self.description,
                'created_at': self.created_at, 'updated_at': self.updated_at,
                'status': _NAMES[self.code], 'status_code': self.code,
                'resources': self.resources, 'metadata': self.metadata,
                'may_cancel': self.may_cancel, 'err': self.err,
                'location': 'none'}

    def update(self, **metadata: Any) -> None:
        """Show progress, as LXD does while it unpacks or transfers."""
        self.metadata = {**(self.metadata or {}), **metadata}
        self.updated_at = clock.now()
        self._registry.publish(self)

    def enter(self, code: int, err: str = '') -> None:
        self.err = err
        self.code = code
        self._registry.publish(self)
        if code not in (PENDING, RUNNING):
            self.ended = time.monotonic()
            self.done.set()


class Operations:
    """All operations that LXD still remembers.

    :ivar memory: seconds for which an operation is remembered after its end.
    """

    def __init__(self, fault_box: faults.Faults,
                 publish: Callable[[Operation], None]) -> None:
        self._faults = fault_box
        self._lock = threading.Lock()
        self._known: dict[str, Operation] = {}
        self.publish = publish
        self.memory = 5.0
        self.generation = 0

    def run(self, request: routing.Request, description: str,
            resources: dict[str, list[str]] | None, work: Work, *,
            may_cancel: bool = False, cls: str = 'task',
            metadata: dict[str, Any] | None = None,
            streams: Any = None) -> routing.Response:
        """Start an operation.

        :param request: what asked for it.
        :param description: LXD's title of this kind of operation.
        :param resources: what it is about.
        :param work: does it, and raises APIError when it cannot.
        :param streams: its websockets, if it has any.
        :returns: the 202 answer.
        """
        operation = Operation(self, request, description, resources,
                              may_cancel, cls)
        operation.metadata = metadata
        operation.streams = streams
        with self._lock:
            self._known[operation.id] = operation
            generation = self.generation
        operation.enter(PENDING)
        operation.enter(RUNNING)
        answer = routing.json_response(
            202, routing.envelope(
                'async', status='Operation created', status_code=100,
                operation=f'/1.0/operations/{operation.id}',
                metadata=operation.as_dict()),
            {'Location': f'/1.0/operations/{operation.id}'})
        threading.Thread(
            target=self._work, args=(operation, work, generation),
            name=f'fake-lxd-{description}', daemon=True).start()
        return answer

    def _work(self, operation: Operation, work: Work, generation: int) -> None:
        try:
            after = self._strike(operation, generation)
            result = work(operation)
            if result is not None:
                operation.metadata = result
            if after is not None:
                raise errors.bad_request(after.error)
        except errors.Abandoned:
            return
        except errors.APIError as exc:
            code, text = FAILURE, exc.text
        except Exception as exc:  # a bug in the fake must show in the test
            code, text = FAILURE, f'fake LXD: {exc!r}'
        else:
            code, text = SUCCESS, ''
        if operation.cancelled.is_set():
            code, text = CANCELLED, text or 'context canceled'
        if generation == self.generation:
            operation.enter(code, text)

    def _strike(self, operation: Operation, generation: int
                ) -> faults.Fault | None:
        after = None
        for fault in self._faults.take(operation.request, 'operation', 'hang'):
            if fault.kind == 'hang':
                while not fault.released.wait(0.02):
                    self.checkpoint(operation, generation)
                self.checkpoint(operation, generation)
            elif fault.after:
                after = fault
            else:
                raise errors.bad_request(fault.error)
        return after

    def checkpoint(self, operation: Operation, generation: int) -> None:
        """Stop here when the daemon went down or the client cancelled."""
        if generation != self.generation:
            raise errors.Abandoned
        if operation.cancelled.is_set():
            raise errors.bad_request('context canceled')

    def find(self, id_: str) -> Operation:
        with self._lock:
            now = time.monotonic()
            self._known = {
                key: op for key, op in self._known.items()
                if op.ended is None or now - op.ended < self.memory}
            try:
                return self._known[id_]
            except KeyError:
                raise errors.not_found('Operation not found') from None

    def every(self) -> list[Operation]:
        with self._lock:
            return list(self._known.values())

    def forget_all(self) -> None:
        """Lose everything, as a stopping daemon does."""
        with self._lock:
            lost, self._known = self._known, {}
            self.generation += 1
        for operation in lost.values():
            operation.done.set()
            if operation.streams is not None:
                operation.streams.ended.set()


@routing.route('GET', '/1.0/operations')
def list_operations(daemon, request):
    answer: dict[str, list[Any]] = {}
    for operation in daemon.operations.every():
        if operation.project != request.project and not request.query.get(
                'all-projects'):
            continue
        shown = (operation.as_dict() if request.query.get('recursion') == '1'
                 else f'/1.0/operations/{operation.id}')
        answer.setdefault(_NAMES[operation.code].lower(), []).append(shown)
    return routing.sync(answer)


@routing.route('GET', '/1.0/operations/{id_}')
def get_operation(daemon, request, id_):
    return routing.sync(daemon.operations.find(id_).as_dict())


@routing.route('GET', '/1.0/operations/{id_}/wait')
def wait_operation(daemon, request, id_):
    operation = daemon.operations.find(id_)
    timeout = float(request.query.get('timeout') or -1)
    generation = daemon.operations.generation
    operation.done.wait(timeout if timeout >= 0 else None)
    if generation != daemon.operations.generation:
        raise errors.Dropped
    return routing.sync(operation.as_dict())


@routing.route('DELETE', '/1.0/operations/{id_}')
def cancel_operation(daemon, request, id_):
    operation = daemon.operations.find(id_)
    if not operation.may_cancel or operation.ended is not None:
        raise errors.bad_request("This operation can't be cancelled")
    operation.cancelled.set()
    return routing.empty()
