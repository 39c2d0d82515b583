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

"""Which disks of an instance are volumes."""

from __future__ import annotations

from oslotest import base

from nova_lxd_py.virt.volume import server_volumes

DATA, ROOT = {'boot_index': None}, {'boot_index': 0}


class MappingsTestCase(base.BaseTestCase):

    def test_volume_backed(self) -> None:
        info = {'block_device_mapping': [DATA, ROOT]}
        self.assertEqual([DATA, ROOT], server_volumes.mappings(info))
        self.assertIs(ROOT, server_volumes.root_mapping(info))

    def test_no_root_volume(self) -> None:
        for found in (None, {}, {'block_device_mapping': [DATA]}):
            self.assertIsNone(server_volumes.root_mapping(found))

    def test_nothing(self) -> None:
        for found in (None, {}, {'block_device_mapping': []}):
            self.assertEqual([], server_volumes.mappings(found))
