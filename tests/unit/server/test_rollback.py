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

from __future__ import annotations

import fixtures
from nova import objects
from oslotest import base

from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.server import rollback


class UndoTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        objects.register_all()
        self.done: list[str] = []
        self.instance = objects.Instance(
            uuid='5f6e1b3a-0000-4000-8000-000000000001')
        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.server.rollback.INTERVAL', 0.01))
        self.log = self.useFixture(fixtures.FakeLogger())

    def build(self, *steps) -> None:
        """Take some steps, then fail."""
        with rollback.Rollback(self.instance) as undone:
            for number, step in enumerate(steps):
                undone.step(f'undo step {number}', step)
            raise ValueError('the reason')

    def test_last_first(self) -> None:
        self.assertRaisesRegex(
            ValueError, 'the reason', self.build,
            lambda: self.done.append('first'),
            lambda: self.done.append('second'))
        self.assertEqual(['second', 'first'], self.done)

    def test_all_went_well(self) -> None:
        with rollback.Rollback(self.instance) as undone:
            undone.step('undo it', lambda: self.done.append('undone'))
            undone.forget()
        self.assertEqual([], self.done)

    def test_one_that_fails_stops_no_other(self) -> None:
        def broken() -> None:
            raise errors.OperationFailed('no space')

        self.assertRaisesRegex(
            ValueError, 'the reason', self.build,
            lambda: self.done.append('first'), broken)
        self.assertEqual(['first'], self.done)
        self.assertIn('Could not undo step 1', self.log.output)

    def test_waits_for_lxd(self) -> None:
        def comes_back() -> None:
            self.done.append('try')
            if len(self.done) < 4:
                raise errors.Unreachable('connection refused')

        self.assertRaises(ValueError, self.build, comes_back)
        self.assertEqual(4, len(self.done))
        self.assertNotIn('Could not', self.log.output)

    def test_waits_once_for_all(self) -> None:
        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.server.rollback.PATIENCE', 0.1))

        def stays_away() -> None:
            self.done.append('try')
            raise errors.Unreachable('connection refused')

        self.assertRaises(ValueError, self.build, stays_away, stays_away)
        self.assertIn('Could not undo step 1', self.log.output)
        self.assertIn('Could not undo step 0', self.log.output)
        # The second one gets no time of its own.
        self.assertEqual(1, self.log.output.count('waiting up to'))
