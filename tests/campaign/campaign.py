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
"""A random campaign: many operations at once, with daemons that are killed.

What has to hold: an operation that no fault has interrupted succeeds; one that
was interrupted leaves a server that goes on, or an error that a hard reboot, a
rebuild or an operator's reset of the state repairs; no data is lost; and when
everything is deleted the host is as it was before.
"""

from __future__ import annotations

import collections
from concurrent import futures
import contextlib
import dataclasses
import threading
import time

from tests.campaign import actions
from tests.campaign import census
from tests.campaign import faults
from tests.campaign import plan
from tests.campaign import project
from tests.campaign import repair
from tests.fixtures import cloud

#: How often a repair is tried that other faults interrupt.
REPAIRS = 3
#: Seconds between such repairs, in which services connect again.
PAUSE = 5
#: Seconds after which nothing of deleted servers is left.
CLEAN_TIMEOUT = 120 * cloud.PATIENCE


@dataclasses.dataclass
class Report:
    """What a campaign has done and found.

    :ivar seconds: how long it took, without the comparison at its end.
    :ivar operations: how often each was done.
    :ivar faults: how often each daemon was killed.
    :ivar interrupted: operations that failed with the daemon that was killed.
    :ivar repairs: how they were repaired.
    :ivar wrong: what must not be.
    """

    seed: int
    seconds: float = 0
    operations: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter)
    faults: dict[str, int] = dataclasses.field(default_factory=dict)
    interrupted: list[str] = dataclasses.field(default_factory=list)
    repairs: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter)
    wrong: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        def counts(numbers: dict[str, int]) -> str:
            return ', '.join(f'{name} {count}' for name, count in
                             sorted(numbers.items())) or 'none'
        return '\n'.join((
            f'NOVA_LXD_TEST_SEED={self.seed}: '
            f'{self.operations.total()} operations in {self.seconds:.0f} s',
            f'operations: {counts(self.operations)}',
            f'killed: {counts(self.faults)}',
            f'interrupted: {len(self.interrupted)}', *self.interrupted,
            f'repaired: {counts(self.repairs)}',
            f'wrong: {len(self.wrong)}', *self.wrong))


class Campaign:
    """Runs operations of several servers at once.

    :param seed: of all random numbers.
    :param operations: how many.
    :param seconds: when it ends at the latest.
    :param servers: how many there are at a time.
    :param workers: how many are worked on at a time.
    :param every: average number of operations between two faults.
    :param timeout: seconds in which an operation of a server ends.
    """

    def __init__(self, seed: int, operations: int, seconds: float = 3600,
                 servers: int = 10, workers: int = 6, every: int = 10,
                 timeout: float = project.TIMEOUT) -> None:
        self._timeout = timeout
        self._operations = operations
        self._seconds = seconds
        self._workers = workers
        self._slots = [plan.Slot(number, seed) for number in range(servers)]
        self._fault_plan = plan.FaultPlan(seed, every)
        self._faults = faults.Faults()
        self._host = cloud.Host()
        self._lock = threading.Lock()
        self.report = Report(seed)

    def run(self) -> Report:
        """Run it, delete everything and compare the host with before."""
        print(f'\nNOVA_LXD_TEST_SEED={self.report.seed}', flush=True)
        placement = cloud.connect(cloud.ADMIN_CLOUD).placement
        before = self._census(placement)
        project_ = project.Project(len(self._slots))
        self._actions = actions.Actions(project_, self._timeout)
        self._repair = repair.Repair(project_, self._actions)
        begin = time.monotonic()
        try:
            self._work()
        finally:
            self.report.seconds = time.monotonic() - begin
            self.report.faults = self._faults.count()
            self.report.wrong += project_.delete()
            if project_.resets:
                self.report.repairs['volume reset at the end'] = (
                    project_.resets)
            if project_.allocations:
                self.report.repairs['allocation of a resize deleted'] = (
                    project_.allocations)
        # What a crash leaves is removed when nova-compute starts.
        cloud.quickstart('restart', 'nova-compute')
        self.report.wrong += self._compare(before, placement)
        print(self.report, flush=True)
        return self.report

    def _work(self) -> None:
        deadline = time.monotonic() + self._seconds
        began = 0
        free = list(self._slots)
        running: dict[futures.Future[None], plan.Slot] = {}
        fault: futures.Future[None] | None = None
        with futures.ThreadPoolExecutor(self._workers + 1) as pool:
            while True:
                more = (began < self._operations and
                        time.monotonic() < deadline)
                while more and free and len(running) < self._workers:
                    # In turn, so that the order is the same each time.
                    slot = free.pop(0)
                    running[pool.submit(self._step, slot)] = slot
                    began += 1
                    more = began < self._operations
                if began >= self._fault_plan.next_at and (
                        fault is None or fault.done()):
                    if fault is not None:
                        fault.result()
                    daemon, away = self._fault_plan.take()
                    _note(f'killing {daemon} for {away:.1f} s')
                    fault = pool.submit(self._faults.kill, daemon, away)
                if fault is not None and fault.done():
                    # Without the daemon there is no point in going on.
                    fault.result()
                if not running:
                    break
                done, _ = futures.wait(
                    running, timeout=1,
                    return_when=futures.FIRST_COMPLETED)
                for one in done:
                    free.append(running.pop(one))
                    one.result()
            if fault is not None:
                fault.result()

    def _step(self, slot: plan.Slot) -> None:
        """Do the next operation of a server, and repair what a fault has
        made of it."""
        operation = plan.choose(slot)
        begin = time.monotonic()
        before, server = slot.status, slot.server
        failure = ''
        stuck = False
        lost: list[str] = []
        try:
            self._actions.perform(slot, operation)
            lost = self._actions.check(slot)
        except Exception as error:
            stuck = isinstance(error, project.Stuck)
            failure = f'{type(error).__name__}: {error}'
        end = time.monotonic()
        reasons = self._faults.between(begin, end)
        title = (f'{slot.number} {operation.name} of {server or slot.server} '
                 f'({before}, {end - begin:.0f} s)')
        _note(f'{title}: {failure or slot.status}')
        with self._lock:
            self.report.operations[operation.name] += 1
        self._wrong(title, lost)
        if not failure:
            return
        if reasons:
            with self._lock:
                self.report.interrupted.append(
                    f'{title}: {failure} [{", ".join(reasons)}]')
        else:
            self._wrong(title, [f'{failure} although no daemon was away'])
        self._mend(slot, operation, title, stuck)

    def _wrong(self, title: str, texts: list[str]) -> None:
        for text in texts:
            _note(f'WRONG: {title}: {text}')
            with self._lock:
                self.report.wrong.append(f'{title}: {text}')

    def _mend(self, slot: plan.Slot, operation: plan.Operation, title: str,
              stuck: bool) -> None:
        how: list[str] = []
        for attempt in range(REPAIRS):
            self._faults.wait()
            begin = time.monotonic()
            try:
                how += self._repair.run(slot, operation, stuck)
                if attempt:
                    how += self._repair.reboot(slot)
                lost = self._actions.check(slot)
                break
            except Exception as error:
                failure = f'{type(error).__name__}: {error}'
            _note(f'{title}: to be repaired again after {failure}')
            # A hard reboot is the last resort, unless another daemon was
            # killed meanwhile.
            if attempt and not self._faults.between(begin, time.monotonic()):
                attempt = REPAIRS - 1
            if attempt == REPAIRS - 1:
                how.append('gave up')
                lost = [f'not repaired: {failure}']
                with contextlib.suppress(Exception):
                    self._repair.give_up(slot)
                break
            time.sleep(PAUSE)
        _note(f'{title}: {", ".join(how) or "nothing to repair"}')
        with self._lock:
            self.report.repairs.update(how)
        self._wrong(title, lost)

    def _census(self, placement: object) -> census.Census:
        """List what the host has when nothing of earlier tests vanishes."""
        deadline = time.monotonic() + CLEAN_TIMEOUT
        found = census.take(self._host, placement)
        while time.monotonic() < deadline:
            time.sleep(2)
            again = census.take(self._host, placement)
            if again == found:
                break
            found = again
        return found

    def _compare(self, before: census.Census, placement: object) -> list[str]:
        deadline = time.monotonic() + CLEAN_TIMEOUT
        while True:
            found = census.difference(before, census.take(
                self._host, placement))
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(2)


def _note(text: str) -> None:
    # In one piece, whatever other threads print.
    print(f'{time.strftime("%H:%M:%S")} {text}\n', end='', flush=True)
