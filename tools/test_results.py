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

"""Evaluate the JUnit files of run_tests.sh.

``counts FILE...`` prints the numbers of passed, failed and skipped tests,
``durations FILE...`` the seconds of all tests, the longest first,
``failures FILE...`` the names of failed tests and their errors, and
``skips FILE...`` the reasons of skipped tests, with their numbers.
"""

from __future__ import annotations

import collections
import pathlib
import re
import sys
from xml.etree import ElementTree


# Of the report of a failed test, and of the log before it.
_LINES = 8
_LINE_LENGTH = 300
# Of the tests after these only the names: one fault often fails many.
_REPORTS = 8
# What pytest begins the lines of an exception with.
_EXCEPTION = 'E  '
_WARNINGS = re.compile(r'\b(WARNING|ERROR|CRITICAL)\b')
_PLACE = re.compile(r'\S+\.py:\d+: ')


def _cases(paths: list[str]) -> list[tuple[str, ElementTree.Element]]:
    return [(pathlib.Path(path).stem, case) for path in paths
            for case in ElementTree.parse(path).getroot().iter('testcase')]


def counts(paths: list[str]) -> list[str]:
    """Count the tests: a test whose teardown fails is not passed.

    :param paths: JUnit files.
    """
    outcomes: dict[tuple[str, ...], str] = {}
    for stage, case in _cases(paths):
        key = stage, case.get('classname', ''), case.get('name', '')
        for outcome in ('failure', 'error', 'skipped'):
            if case.find(outcome) is not None:
                outcomes[key] = outcome
                break
        else:
            outcomes.setdefault(key, 'passed')
    found = collections.Counter(outcomes.values())
    return [f'{found["passed"]} {found["failure"] + found["error"]} '
            f'{found["skipped"]}']


def durations(paths: list[str]) -> list[str]:
    """Return a line for each test with its seconds and its stage.

    :param paths: JUnit files.
    """
    found = sorted(((float(case.get('time', 0)), stage,
                     f'{case.get("classname")}.{case.get("name")}')
                    for stage, case in _cases(paths)), reverse=True)
    return [f'{seconds:8.2f} {stage:12} {name}'
            for seconds, stage, name in found]


def _shortened(lines: list[str]) -> list[str]:
    return [f'    {line[:_LINE_LENGTH]}' for line in lines[-_LINES:]]


def _report(case: ElementTree.Element, failed: ElementTree.Element
            ) -> list[str]:
    """Return the error of a test, where it came up, and the log's warnings."""
    lines = (failed.text or failed.get('message') or '').splitlines()
    log = [line for output in case.iter('system-out')
           for line in (output.text or '').splitlines()
           if _WARNINGS.search(line)]
    return _shortened([line for line in lines
                       if line.startswith(_EXCEPTION) or _PLACE.match(line)] or
                      lines) + _shortened(log)


def failures(paths: list[str]) -> list[str]:
    """Return the names of failed tests, and then what the first ones report.

    The output of a long run is often cut to its end, where the summary stands:
    a few lines of each test tell more than all lines of the last.

    :param paths: JUnit files.
    """
    names, reports = [], []
    for stage, case in _cases(paths):
        for outcome in ('failure', 'error'):
            if (failed := case.find(outcome)) is None:
                continue
            name = f'{stage}: {case.get("classname")}.{case.get("name")}'
            names.append(name)
            if len(names) <= _REPORTS:
                reports += ['', name, *_report(case, failed)]
    return names + reports


def skips(paths: list[str]) -> list[str]:
    """Return a line for each reason of skipped tests, with its number.

    :param paths: JUnit files.
    """
    reasons = collections.Counter(
        skipped.get('message') or '' for _stage, case in _cases(paths)
        if (skipped := case.find('skipped')) is not None)
    return [f'{number:5} {reason}' for reason, number in
            reasons.most_common()]


if __name__ == '__main__':
    command = {'counts': counts, 'durations': durations,
               'failures': failures, 'skips': skips}
    for line in command[sys.argv[1]](sys.argv[2:]):
        print(line)
