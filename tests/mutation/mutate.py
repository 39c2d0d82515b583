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

"""Mutation testing of the driver's packages with cosmic-ray's mutations.

Run by ``./run_tests.sh mutation``, see README.rst. Cosmic-ray itself starts
the tests of each mutant in a new process, which imports Nova for seconds, and
writes the mutants into the tree. Here pytest collects the tests once. For each
mutant its process is forked, the child gives the function in its memory the
mutated code, and runs the tests that reach the mutated line.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable, Iterator
import dataclasses
import functools
import gc
import importlib
import json
import os
import pathlib
import random
import re
import select
import signal
import sys
import time
import traceback
import types
from typing import Any

os.environ['OS_NOVA_DISABLE_EVENTLET_PATCHING'] = '1'

from cosmic_ray import ast as cosmic_ast                # noqa: E402
from cosmic_ray import mutating                         # noqa: E402
from cosmic_ray import plugins                          # noqa: E402
import pytest                                           # noqa: E402

from tests.mutation import operators                    # noqa: E402

REPO = pathlib.Path(__file__).resolve().parents[2]
PACKAGES = ('guest', 'image', 'lxd', 'server', 'volume')
VIRT = 'nova_lxd_py/virt'
RESULTS = REPO / '.venv' / 'mutation-results'

#: Of the tests that reach a line, those that take longer together than so
#: many seconds are left out; those of the module itself come first.
LONGEST = 60

#: Seconds for one test; and for all of a mutant, in addition to several times
#: what they usually take.
PATIENCE = 30


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change of one module."""

    path: str
    operator: str
    occurrence: int
    begin: tuple[int, int]
    end: tuple[int, int]

    @property
    def name(self) -> str:
        path = self.path.removeprefix(f'{VIRT}/')
        return f'{path}:{self.operator.split("/")[1]}:{self.occurrence}'

    @property
    def place(self) -> tuple[Any, ...]:
        """The place of a mutant, without its replacement."""
        kind = self.operator.split('_')[0]
        return self.path, kind, self.begin, self.end

    def code(self) -> str:
        return mutating.mutate_code((REPO / self.path).read_text('utf-8'),
                                    _operators()[self.operator],
                                    self.occurrence)


@functools.cache
def _operators() -> dict[str, Any]:
    classes = {name: plugins.get_operator(name)
               for name in plugins.operator_names()
               if not re.match(operators.EXCLUDED, name)}
    classes |= operators.OPERATORS
    return {name: one() for name, one in classes.items()
            if not one.arguments()}


def modules(package: str) -> list[str]:
    """Return the paths of the modules of a package."""
    return sorted(path.relative_to(REPO).as_posix()
                  for path in (REPO / VIRT / package).glob('*.py'))


def mutants(path: str) -> list[Mutant]:
    """Return the mutants of a module without those that change no behaviour.
    """
    source = (REPO / path).read_text('utf-8')
    skip = operators.NotBehaviour(source)
    nodes = list(cosmic_ast.ast_nodes(cosmic_ast.get_ast(source)))
    found = []
    for name, operator in _operators().items():
        positions = (position for node in nodes
                     for position in operator.mutation_positions(node))
        found += [Mutant(path, name, number, begin, end)
                  for number, (begin, end) in enumerate(positions)
                  if begin not in skip]
    return found


def sample(package: str, count: int, seed: int) -> list[Mutant]:
    """Choose mutants of a package at random, at most one in each place.

    :returns: in random order, so that the first ones are a sample as well.
    """
    rng = random.Random(f'{seed} {package}')
    places: dict[Any, list[Mutant]] = {}
    for path in modules(package):
        for mutant in mutants(path):
            places.setdefault(mutant.place, []).append(mutant)
    chosen: list[Mutant] = []
    for place in rng.sample(sorted(places), len(places)):
        mutant = rng.choice(places[place])
        # Cosmic-ray takes the stars of arguments for operators.
        if len(chosen) < count and _compiles(mutant) and function_of(mutant):
            chosen.append(mutant)
    return chosen


def _compiles(mutant: Mutant) -> bool:
    try:
        compile(mutant.code(), mutant.path, 'exec')
    except SyntaxError:
        return False
    return True


# -- mutants in memory --------------------------------------------------------

def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def function_of(mutant: Mutant) -> tuple[int, int] | None:
    """Return the lines of the outermost function with the mutant in its body.

    :returns: the first and the last line; None if it is in none, so that it
              runs when the module is imported.
    """
    pending: list[Any] = [ast.parse((REPO / mutant.path).read_text('utf-8'))]
    while pending:
        for node in pending.pop().body:
            if isinstance(node, ast.ClassDef):
                pending.append(node)
            elif isinstance(node, ast.FunctionDef):
                first = min([node.lineno, *(
                    each.lineno for each in node.decorator_list)])
                if (node.body[0].lineno <= mutant.begin[0]
                        <= (node.end_lineno or 0)):
                    return first, node.end_lineno or 0
    return None


def apply(mutant: Mutant, lines: tuple[int, int],
          functions: dict[tuple[str, str, int], list[Any]]) -> None:
    """Give the functions of this process the code of a mutant.

    :param lines: of :func:`function_of`.
    :param functions: all that there are, by file, name and first line.
    """
    path = str(REPO / mutant.path)
    module = compile(mutant.code(), path, 'exec', dont_inherit=True)
    applied = 0
    for code in _codes(module):
        if code.co_firstlineno == lines[0] and code is not module:
            for function in functions.get(
                    (path, code.co_qualname, lines[0]), ()):
                if not code.co_freevars:
                    # super() was taken away, but the function has its cell.
                    code = code.replace(
                        co_freevars=function.__code__.co_freevars)
                function.__code__ = code
                applied += 1
    if not applied:
        raise LookupError(f'There is no function for {mutant.name}')


def all_functions() -> dict[tuple[str, str, int], list[Any]]:
    found: dict[tuple[str, str, int], list[Any]] = {}
    for one in gc.get_objects():
        if isinstance(one, types.FunctionType):
            code = one.__code__
            found.setdefault((code.co_filename, code.co_qualname,
                              code.co_firstlineno), []).append(one)
    return found


def in_child(function: Callable[[], int], output: pathlib.Path,
             seconds: float) -> int | None:
    """Run a function in a forked process.

    :returns: what it returns, or None if it took longer than the time given.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    pid = os.fork()
    if not pid:
        code = 70
        try:
            os.setsid()
            with output.open('w') as file:
                for number in (1, 2):
                    os.dup2(file.fileno(), number)
            code = function()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    descriptor = os.pidfd_open(pid)
    try:
        ended = select.select([descriptor], [], [], seconds)[0]
        # With whatever the tests have started.
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    finally:
        os.close(descriptor)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status if ended else None


# -- tests --------------------------------------------------------------------

class Reach:
    """Which tests run a line, from measurements that are kept in a file.

    :ivar durations: of all measured tests, in seconds.
    """

    def __init__(self, file: pathlib.Path):
        self._file = file
        known = {'lines': {}, 'durations': {}}
        if file.exists():
            known = json.loads(file.read_text())
        self.lines: dict[str, dict[str, list[str]]] = known['lines']
        self.durations: dict[str, float] = known['durations']

    def forget(self) -> None:
        self.lines.clear()
        self.durations.clear()

    def add(self, data: Any, durations: dict[str, float]) -> None:
        """Remember what coverage has measured."""
        for file in data.measured_files():
            path = pathlib.Path(file).relative_to(REPO).as_posix()
            lines = self.lines.setdefault(path, {})
            for line, names in data.contexts_by_lineno(file).items():
                lines[str(line)] = sorted(
                    {*lines.get(str(line), ()), *filter(None, names)})
        self.durations.update(durations)
        self._file.write_text(json.dumps(
            {'lines': self.lines, 'durations': self.durations}))

    def tests(self, mutant: Mutant) -> list[str]:
        """Return the tests of a mutant, those of its module first."""
        lines = self.lines.get(mutant.path, {})
        names: set[str] = set()
        for line in range(mutant.begin[0], mutant.end[0] + 1):
            names.update(lines.get(str(line), ()))
        names &= self.durations.keys()
        module = pathlib.PurePath(mutant.path)
        mirror = f'tests/unit/{module.parent.name}/test_{module.stem}'
        chosen, seconds = [], 0.0
        for name in sorted(names, key=lambda name: (
                not name.startswith(mirror), self.durations[name])):
            seconds += self.durations[name]
            if seconds > LONGEST:
                break
            chosen.append(name)
        return chosen

    def seconds(self, tests: list[str]) -> float:
        return sum(self.durations.get(name, 1) for name in tests)


class Runner:
    """A plugin of pytest: runs the collected tests with mutants."""

    def __init__(self, args: argparse.Namespace):
        self._args = args
        self._reach = Reach(RESULTS / 'reach.json')
        self._failed = False
        self._functions: dict[tuple[str, str, int], list[Any]] = {}
        #: Whether a mutant has survived.
        self.survived = False

    def pytest_runtest_logreport(self, report: Any) -> None:
        self._failed = self._failed or report.failed

    def pytest_runtestloop(self, session: Any) -> bool:
        self._items = {item.nodeid: item for item in session.items}
        if not self._args.reuse and not self._args.tests:
            self._reach.forget()
        unknown = [name for name in self._items
                   if name not in self._reach.durations]
        if unknown and not self._args.tests:
            self._measure(unknown)
        for package in self._args.packages or PACKAGES:
            for path in modules(package):
                # Plugins may be imported by the tests only.
                importlib.import_module(
                    path.removesuffix('.py').replace('/', '.'))
        os.nice(19 - os.nice(0))
        self._functions = all_functions()
        gc.freeze()
        print(f'\nSeed: {self._args.seed}', flush=True)
        for package in self._args.packages or PACKAGES:
            self._package(package)
        return True

    def _run(self, names: list[str]) -> Iterator[str]:
        """Run tests while none fails."""
        for number, name in enumerate(names):
            item = self._items[name]
            following = names[number + 1:number + 2]
            item.config.hook.pytest_runtest_protocol(
                item=item, nextitem=self._items[following[0]]
                if following else None)
            yield name
            if self._failed:
                return

    def _measure(self, names: list[str]) -> None:
        os.environ['COVERAGE_CORE'] = 'ctrace'
        import coverage
        begun = time.monotonic()

        def child() -> int:
            tracer = coverage.Coverage(
                data_file=None, source=[str(REPO / VIRT)],
                messages=False)
            durations = {}
            tracer.start()
            tracer.switch_context(names[0])
            since = time.monotonic()
            for name, after in zip(self._run(names), [*names[1:], ''],
                                   strict=False):
                durations[name] = time.monotonic() - since
                since = time.monotonic()
                tracer.switch_context(after)
                if self._failed:
                    print(f'\nFailed: {name}')
                    del durations[name]
                    self._failed = False
            tracer.stop()
            self._reach.add(tracer.get_data(), durations)
            return 0

        log = RESULTS / 'measure.log'
        if in_child(child, log, 7200) != 0:
            raise SystemExit(f'Cannot measure: {log}')
        self._reach = Reach(RESULTS / 'reach.json')
        print(f'\nMeasured {len(names)} tests in '
              f'{time.monotonic() - begun:.0f} s.', flush=True)
        for name in names:
            if name not in self._reach.durations:
                print(f'Left out, as it fails without a mutation: {name}')

    def _package(self, package: str) -> None:
        counts: dict[str, int] = {}
        if self._args.only:
            chosen = [mutant for path in modules(package)
                      for mutant in mutants(path)
                      if mutant.name in self._args.only]
        else:
            chosen = sample(package, self._args.count, self._args.seed)
        for number, mutant in enumerate(chosen, 1):
            begun = time.monotonic()
            tests = list(self._items) if self._args.tests else [
                name for name in self._reach.tests(mutant)
                if name in self._items]
            outcome = self._test(mutant, tests)
            counts[outcome] = counts.get(outcome, 0) + 1
            if outcome in ('survived', 'unreached', 'error'):
                self.survived = True
                print(f'{outcome}: {mutant.name} ({len(tests)} tests, '
                      f'{time.monotonic() - begun:.0f} s)\n  '
                      f'{describe(mutant)}', flush=True)
            if number == len(chosen) or number % 20 == 0:
                print(f'{package}: {number} mutants, ' + ', '.join(
                    f'{count} {name}' for name, count
                    in sorted(counts.items())), flush=True)

    def _test(self, mutant: Mutant, tests: list[str]) -> str:
        """Run tests with a mutant.

        :returns: ``killed``, ``timeout`` (which is as good), or ``survived``;
                  ``unreached`` if no test runs the line, ``error`` if the
                  mutant cannot be put in place.
        """
        lines = function_of(mutant)
        if not tests or lines is None:
            return 'unreached'

        def child() -> int:
            apply(mutant, lines, self._functions)
            for _name in self._run(tests):
                pass
            return 1 if self._failed else 0

        log = RESULTS / 'logs' / mutant.name.replace('/', '.')
        code = in_child(child, log,
                        3 * self._reach.seconds(tests) + 2 * PATIENCE)
        names = {None: 'timeout', 0: 'survived', 70: 'error'}
        return names.get(code, 'killed')


def describe(mutant: Mutant) -> str:
    """Return the changed line, before and after."""
    before = (REPO / mutant.path).read_text('utf-8').splitlines()
    after = mutant.code().splitlines()
    number = next((number for number, (one, other)
                   in enumerate(zip(before, after, strict=False))
                   if one != other), len(after) - 1)
    return (f'{mutant.path}:{number + 1}\n    - {before[number].strip()}\n'
            f'    + {after[number].strip()}')


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('packages', nargs='*', metavar='package',
                        help=f'of {", ".join(PACKAGES)} (default: all)')
    parser.add_argument('--count', type=int, default=100,
                        help='mutants of each package (default: %(default)s)')
    parser.add_argument('--seed', type=int,
                        default=random.SystemRandom().randrange(1 << 31))
    parser.add_argument('--reuse', action='store_true',
                        help='use the measurement of the last run')
    parser.add_argument('--only', metavar='name', nargs='+', default=[],
                        help='run these mutants, by their names')
    parser.add_argument('--tests', nargs='+', default=[],
                        help='tests to run in place of those that reach the '
                             'line')
    return parser.parse_args()


def main() -> int:
    args = parse()
    RESULTS.mkdir(parents=True, exist_ok=True)
    runner = Runner(args)
    os.chdir(REPO)
    code = pytest.main(
        ['-q', '-s', '-p', 'no:cacheprovider', '-p', 'no:warnings',
         f'--timeout={PATIENCE}', *(args.tests or [
             'tests/unit/driver',
             *(f'tests/unit/{package}'
               for package in args.packages or PACKAGES)])],
        plugins=[runner])
    return int(code) or (runner.survived and bool(args.only))


if __name__ == '__main__':
    sys.exit(main())
