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
"""Tests of what a random campaign chooses and counts."""

from __future__ import annotations

from oslotest import base

from tests.campaign import actions
from tests.campaign import campaign
from tests.campaign import census
from tests.campaign import faults
from tests.campaign import plan


def walk(slot: plan.Slot, steps: int) -> list[str]:
    """Choose operations, and follow them as the cloud would."""
    done = []
    for _step in range(steps):
        operation = plan.choose(slot)
        done.append(operation.name)
        slot.status = plan.status_after(slot, operation)
        if operation.name == 'attach_volume' and not slot.free():
            slot.volumes.append(plan.Volume(str(len(done)), 'loop', 'block'))
        if operation.name == 'attach_volume':
            slot.free()[0].path = plan.PATHS[len(slot.attached())]
        elif operation.name == 'detach_volume':
            slot.attached()[0].path = None
        elif operation.name == 'extend_volume':
            slot.extendable()[0].size += 1
        elif operation.name == 'attach_port':
            slot.port = 'port'
        elif operation.name == 'detach_port':
            slot.port = None
        elif operation.name == 'delete':
            slot.port = None
            for volume in slot.volumes:
                volume.path = None
    return done


class PlanTestCase(base.BaseTestCase):

    def test_every_operation_is_chosen_and_possible(self):
        done = walk(plan.Slot(0, 1), 3000)
        self.assertEqual({operation.name for operation in plan.OPERATIONS},
                         set(done))

    def test_seed_repeats_the_choices(self):
        self.assertEqual(walk(plan.Slot(3, 14), 100),
                         walk(plan.Slot(3, 14), 100))
        self.assertNotEqual(walk(plan.Slot(3, 14), 100),
                            walk(plan.Slot(4, 14), 100))
        self.assertNotEqual(walk(plan.Slot(3, 14), 100),
                            walk(plan.Slot(3, 15), 100))

    def test_every_status_can_be_left(self):
        for status in (None, *plan.STATUSES):
            slot = plan.Slot(0, 1, status=status)
            self.assertTrue([
                operation for operation in plan.possible(slot)
                if plan.status_after(slot, operation) != status])

    def test_volume_backed_server_is_not_rescued(self):
        slot = plan.Slot(0, 1, status=plan.ACTIVE, from_volume=True)
        self.assertNotIn('rescue', [
            operation.name for operation in plan.possible(slot)])

    def test_actions_know_every_operation(self):
        for operation in plan.OPERATIONS:
            self.assertTrue(callable(getattr(actions.Actions,
                                             operation.name)))


class FaultPlanTestCase(base.BaseTestCase):

    def test_each_daemon_in_turn(self):
        found = plan.FaultPlan(14, 10)
        at = [found.next_at]
        names = []
        for _fault in range(8):
            name, away = found.take()
            names.append(name)
            at.append(found.next_at)
            self.assertTrue(0 <= away <= 3)
        for half in (names[:4], names[4:]):
            self.assertEqual(set(plan.DAEMONS), set(half))
        distances = [after - before for before, after in zip(at, at[1:])]
        self.assertTrue(all(5 <= distance <= 15 for distance in distances),
                        distances)


class FaultsTestCase(base.BaseTestCase):

    def test_between(self):
        found = faults.Faults()
        found._done = [('lxd', 100.0, 105.0), ('mariadb', 200.0, None)]
        self.assertEqual([], found.between(50, 99))
        self.assertEqual(['lxd'], found.between(50, 101))
        self.assertEqual(['lxd'], found.between(
            105 + faults.AFTERMATH, 150))
        self.assertEqual([], found.between(106 + faults.AFTERMATH, 150))
        self.assertEqual(['mariadb'], found.between(900, 901))
        self.assertEqual({'lxd': 1, 'mariadb': 1}, found.count())


class ReportTestCase(base.BaseTestCase):

    def test_difference(self):
        before = {'mount': frozenset({'/a', '/b'}), 'loop': frozenset()}
        after = {'mount': frozenset({'/a'}), 'loop': frozenset({'/x'})}
        self.assertEqual(['loop /x is left', 'mount /b is gone'],
                         census.difference(before, after))
        self.assertEqual([], census.difference(before, before))

    def test_text_has_the_seed_and_what_is_wrong(self):
        report = campaign.Report(14)
        report.operations['stop'] += 2
        report.wrong.append('server 3 is lost')
        text = str(report)
        self.assertIn('NOVA_LXD_TEST_SEED=14: 2 operations', text)
        self.assertIn('wrong: 1\nserver 3 is lost', text)
