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

"""Extra specs of flavors are validated when they are set."""

from __future__ import annotations

from typing import Any

from tests.fixtures import cloud


class ExtraSpecsTest(cloud.CloudTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.flavor = self.admin.compute.create_flavor(
            name=self.unique('specs'), vcpus=1, ram=64, disk=1)
        self.addCleanup(self.admin.compute.delete_flavor, self.flavor.id)

    def set(self, name: str, value: str) -> Any:
        """Set an extra spec, with the microversion that validates them."""
        return self.admin.compute.post(
            f'/flavors/{self.flavor.id}/os-extra_specs',
            json={'extra_specs': {name: value}}, microversion='2.86')

    def assert_refused(self, name: str, value: str, text: str) -> None:
        answer = self.set(name, value)
        self.assertEqual(400, answer.status_code, answer.text)
        self.assertIn(text, answer.json()['badRequest']['message'])

    def test_validated(self) -> None:
        self.assert_refused('lxd:max_processes', 'many',
                            "'many' is not a valid integer value")
        self.assert_refused('lxd:isolatd', 'true',
                            "'lxd:isolatd' does not appear")
        self.assertEqual(200, self.set('lxd:isolated', 'true').status_code)
        flavor = self.admin.compute.get_flavor(
            self.flavor.id, get_extra_specs=True)
        self.assertEqual({'lxd:isolated': 'true'}, flavor.extra_specs)
