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

"""Summarize the results of tempest.

``stestr last --subunit | summary.py FILE`` prints the counts by class, the
failures with their last line and the skips by reason, and writes FILE in the
format of JUnit for run_tests.sh.
"""

from __future__ import annotations

import collections
import dataclasses
import re
import sys
from typing import Any, BinaryIO
from xml.etree import ElementTree

import subunit
import testtools

# Status of a test that has not ended.
FAILED = ('fail', 'uxsuccess', 'inprogress', 'unknown')


@dataclasses.dataclass(frozen=True)
class Result:
    """One test, or the set-up of a class that ended without running any."""

    name: str
    status: str
    details: str
    seconds: float

    @property
    def group(self) -> str:
        """Module and class, without the common prefix."""
        name = re.sub(r'^\w+ \((.*)\)$', r'\1', self.name)
        name = re.sub(r'\[.*$', '', name)
        words = name.split('.')
        if words and words[-1].startswith('test_'):
            words.pop()
        return '.'.join(words).removeprefix('tempest.')

    @property
    def short(self) -> str:
        return re.sub(r'\[.*?\]', '', self.name).removeprefix('tempest.')


def read(stream: BinaryIO) -> list[Result]:
    """Read the results from a stream of subunit, version 2."""
    found: list[Result] = []

    def take(test: dict[str, Any]) -> None:
        if test['status'] == 'exists':
            return
        started, ended = test['timestamps']
        found.append(Result(
            test['id'], test['status'], _details(test['details']),
            (ended - started).total_seconds() if started and ended else 0.0))

    result = testtools.StreamToDict(take)
    result.startTestRun()
    try:
        subunit.ByteStreamToStreamResult(
            stream, non_subunit_name='stdout').run(result)
    finally:
        result.stopTestRun()
    return found


def _details(details: dict[str, Any]) -> str:
    wanted = [content.as_text() for name, content in details.items()
              if name == 'reason' or name.startswith('traceback')]
    return '\n'.join(text.strip() for text in wanted)


def cause(details: str) -> str:
    """Return the message at the end of a traceback, on one line."""
    lines = details.rstrip().splitlines()
    for number in range(len(lines) - 1, -1, -1):
        if re.match(r'[\w.]+(Exception|Error|Timeout|Mismatch\w*|[A-Z]\w+)'
                    r'\b.*', lines[number]):
            return ' '.join(' '.join(lines[number:]).split())[:400]
    return ' '.join(lines[-1:])[:400]


def report(results: list[Result]) -> str:
    """Format the summary for the terminal."""
    out: list[str] = []
    groups: dict[str, collections.Counter[str]] = {}
    seconds: collections.Counter[str] = collections.Counter()
    for one in results:
        kind = kind_of(one)
        groups.setdefault(one.group, collections.Counter())[kind] += 1
        seconds[one.group] += round(one.seconds)
    width = max((len(group) for group in groups), default=0)
    out.append(f'{"":{width}}  passed failed skipped  seconds')
    for group, counter in sorted(groups.items()):
        out.append(f'{group:{width}}  {counter["passed"]:6} '
                   f'{counter["failed"]:6} {counter["skipped"]:7}  '
                   f'{seconds[group]:7}')
    reasons = collections.Counter(
        cause(one.details) or 'no reason given'
        for one in results if kind_of(one) == 'skipped')
    if reasons:
        out += ['', 'Skipped:']
        out += [f'{count:5}  {reason}'
                for reason, count in reasons.most_common()]
    failures = [one for one in results if kind_of(one) == 'failed']
    if failures:
        out += ['', 'Failed:']
        out += [f'  {one.short}\n      {cause(one.details)}'
                for one in sorted(failures, key=lambda one: one.short)]
    total = collections.Counter(kind_of(one) for one in results)
    out += ['', f'{total["passed"]} passed, {total["failed"]} failed, '
                f'{total["skipped"]} skipped']
    return '\n'.join(out)


def kind_of(one: Result) -> str:
    if one.status in FAILED:
        return 'failed'
    return 'skipped' if one.status == 'skip' else 'passed'


def junit(results: list[Result]) -> ElementTree.Element:
    suite = ElementTree.Element('testsuite', name='tempest', errors='0')
    for one in results:
        case = ElementTree.SubElement(
            suite, 'testcase', classname=one.group, name=one.short,
            time=f'{one.seconds:.3f}')
        kind = kind_of(one)
        if kind != 'passed':
            ElementTree.SubElement(
                case, {'failed': 'failure'}.get(kind, kind),
                message=cause(one.details))
    total = collections.Counter(kind_of(one) for one in results)
    suite.set('tests', str(len(results)))
    suite.set('failures', str(total['failed']))
    suite.set('skipped', str(total['skipped']))
    return suite


def main() -> None:
    results = read(sys.stdin.buffer)
    if not results:
        sys.exit('tempest ran no test.')
    print(report(results))
    ElementTree.ElementTree(junit(results)).write(sys.argv[1])


if __name__ == '__main__':
    main()
