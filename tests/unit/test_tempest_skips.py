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

"""tests/tempest: what is run, what is left out and why."""

from __future__ import annotations

import configparser
import re

from oslotest import base

from tests.tempest import configure

# Reviewed one by one. A test that fails belongs mended, not onto this list.
LEFT_OUT = {
    r'tempest\.api\.compute\.' + name for name in (
        r'volumes\.test_attach_volume\.AttachVolumeMultiAttachTest'
        r'\.(test_boot_from_multiattach_volume'
        r'|test_snapshot_volume_backed_multiattach)',
        r'volumes\.test_attach_volume\.AttachVolumeShelveTestJSON'
        r'\.test_attach_volume_shelved_or_offload_server',
        r'admin\.test_create_server\.ServersWithSpecificFlavorTestJSON'
        r'\.test_verify_created_server_ephemeral_disk',
    )
} | {
    r'tempest\.scenario\.test_stamp_pattern\.TestStampPattern'
    r'\.test_stamp_pattern',
    r'tempest\.scenario\.test_network_advanced_server_ops'
    r'\.TestNetworkAdvancedServerOps'
    r'\.test_server_connectivity_(pause_unpause|suspend_resume)',
    r'tempest\.scenario\.test_instances_with_cinder_volumes'
    r'\.TestInstancesWithCinderVolumes'
    r'\.test_instances_with_cinder_volumes_on_all_compute_nodes',
}


class SkipsTestCase(base.BaseTestCase):
    """tests/tempest/skips.yaml."""

    def test_nothing_added_by_the_way(self):
        self.assertEqual(LEFT_OUT, set(configure.skips()))

    def test_each_has_a_reason(self):
        for test, reason in configure.skips().items():
            re.compile(test)
            self.assertGreater(len(reason.split()), 5, test)


class FeaturesTestCase(base.BaseTestCase):
    """The feature flags follow the support matrix."""

    def test_every_row_exists(self):
        features = configure.features()
        self.assertEqual({*configure.FEATURES, 'attach_encrypted_volume'},
                         set(features))
        self.assertTrue(features['resize'])
        self.assertFalse(features['vnc_console'])

    def test_states_are_known(self):
        matrix = configparser.ConfigParser(interpolation=None)
        matrix.read(configure.MATRIX)
        for row in set(configure.FEATURES.values()):
            self.assertIn(matrix[row]['driver.lxd'],
                          ('complete', 'partial', 'missing'), row)
