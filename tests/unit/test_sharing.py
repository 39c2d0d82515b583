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

"""Test files that several processes share."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import fixtures
from oslotest import base

ROOT = pathlib.Path(__file__).resolve().parents[2]


class SharingTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.directory = pathlib.Path(self.useFixture(fixtures.TempDir()).path)
        self.share = self.directory / 'share'
        self.share.mkdir()

    def write(self, name: str, tests: int) -> None:
        path = self.directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(''.join(
            f'def test_{number}():\n    pass\n' for number in range(tests)))

    def run_tests(self) -> str:
        return subprocess.run(
            [sys.executable, '-m', 'pytest', '-q', '-p', 'tests.conftest',
             '-p', 'no:cacheprovider', '--rootdir', self.directory,
             self.directory], cwd=ROOT, capture_output=True, text=True,
            env={**os.environ, 'NOVA_LXD_TEST_SHARE': str(self.share),
                 'PYTHONPATH': str(ROOT)}).stdout

    def test_file_of_another_process_between_directories(self) -> None:
        for name, tests in (('one/test_a.py', 3), ('one/test_b.py', 2),
                            ('two/test_c.py', 1)):
            self.write(name, tests)
        (self.share / 'one.test_b.py').touch()
        self.assertIn('4 passed', self.run_tests())
        self.assertEqual(
            {'one.test_a.py', 'one.test_b.py', 'two.test_c.py'},
            {path.name for path in self.share.iterdir()})
        # There is nothing left for a further process.
        self.assertNotIn('passed', self.run_tests())
