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
"""A random campaign against the quickstart cloud, as long as is asked for.

CAMPAIGN_OPERATIONS and CAMPAIGN_SECONDS say how long (1000 operations, one
hour), NOVA_LXD_TEST_SEED repeats an earlier one.
"""

from __future__ import annotations

import os

import pytest

from tests.campaign import campaign
from tests.fixtures import cloud

OPERATIONS = int(os.environ.get('CAMPAIGN_OPERATIONS', '1000'))
SECONDS = float(os.environ.get('CAMPAIGN_SECONDS', '3600'))


class CampaignTest(cloud.CloudTestCase):

    # Also with the time that repairs and the end take.
    @pytest.mark.timeout(SECONDS + 3600)
    def test_campaign(self) -> None:
        report = campaign.Campaign(
            int(os.environ['NOVA_LXD_TEST_SEED']), OPERATIONS, SECONDS).run()
        self.assertEqual([], report.wrong, report)
