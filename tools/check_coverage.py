#!/usr/bin/env python3
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

"""Check the line coverage of each package by the unit tests.

Reads the report of ``coverage json`` and prints the share of lines of each
package. Fails if one is below the goal, or below what it must keep where the
goal is not reached yet.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import sys

#: Line coverage in percent that a package needs.
GOAL = 85.0

#: Packages below the goal, and the coverage that they must keep. To be raised,
#: and removed when the goal is reached.
KEEP: dict[str, float] = {
}

#: Tests of their own, which run against a cloud.
_TESTS = 'nova_lxd_py/tempest/tests/'


def shares(report: str) -> dict[str, float]:
    """Compute the share of lines that were run.

    :param report: path of the report.
    :returns: percent by package.
    """
    files = json.loads(pathlib.Path(report).read_text('utf-8'))['files']
    lines: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for name, entry in files.items():
        if name.startswith(_TESTS):
            continue
        package = lines[pathlib.PurePath(name).parent.as_posix()]
        package[0] += entry['summary']['covered_lines']
        package[1] += entry['summary']['num_statements']
    return {package: 100 * covered / total
            for package, (covered, total) in sorted(lines.items()) if total}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('report', help='file that "coverage json" has written')
    found = shares(parser.parse_args().report)
    failed = False
    for package, share in found.items():
        wanted = KEEP.get(package, GOAL)
        mark = ''
        if share < wanted:
            failed, mark = True, f'  below {wanted:.0f} %'
        elif package in KEEP and share >= GOAL:
            failed, mark = True, '  has reached the goal: remove it from KEEP'
        print(f'{package:32} {share:5.1f} %{mark}')
    return failed


if __name__ == '__main__':
    sys.exit(main())
