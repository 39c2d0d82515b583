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

"""A short campaign: random operations while daemons are killed.

It runs last, since it kills the daemons that the other tests need. A failure
says the seed.
"""

from __future__ import annotations

import pytest

from tests.campaign import campaign
from tests.campaign import plan
from tests.fixtures import cloud

#: What is done and what is killed depends on it.
SEED = 1896
OPERATIONS = 50
#: Seconds after which no further operation begins.
SECONDS = 400 * cloud.PATIENCE
#: Seconds for an operation, which take ten on an idle machine.
TIMEOUT = 60 * cloud.PATIENCE


class CampaignTest(cloud.CloudTestCase):

    alone = True

    # Also with the time that repairs and the end take.
    @pytest.mark.timeout(SECONDS + 900)
    def test_operations_while_daemons_are_killed(self) -> None:
        report = campaign.Campaign(
            SEED, OPERATIONS, SECONDS, servers=6, every=8,
            timeout=TIMEOUT).run()
        self.assertEqual([], report.wrong, report)
        self.assertEqual(OPERATIONS, report.operations.total(), report)
        self.assertEqual(set(plan.DAEMONS), set(report.faults), report)
