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

"""Code in a process that is killed while it runs."""

from __future__ import annotations

import pathlib
import subprocess
import time

import fixtures
from oslotest import base

from tests.fixtures import killed_process


class KilledProcessTest(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.directory = pathlib.Path(
            self.useFixture(fixtures.TempDir()).path)

    def test_programs_end_first(self) -> None:
        """In sessions of their own, as privileged functions start them."""
        begun, ended = self.directory / 'begun', self.directory / 'ended'

        def action() -> None:
            subprocess.Popen(
                ['sh', '-c', f'>{begun}; sleep 0.5; >{ended}'],
                start_new_session=True)
            time.sleep(60)
        self.assertTrue(killed_process.run(action, begun.exists))
        self.assertTrue(ended.exists())

    def test_returns_before(self) -> None:
        self.assertFalse(killed_process.run(lambda: None, lambda: False))
