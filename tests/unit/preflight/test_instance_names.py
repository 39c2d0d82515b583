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

"""Check of the template for names of instances."""

from __future__ import annotations

from nova import exception
from oslotest import base

from nova_lxd_py.virt.preflight import instance_names


class NameTestCase(base.BaseTestCase):

    def test_good(self) -> None:
        for template in ('instance-%08x', 'nova-%(uuid)s', 'i%d', 'a-%(id)x',
                         'p-%(project_id)s-%(id)d', 'Vm%s'):
            instance_names.check_name_template(template)

    def refusal(self, template: str) -> str:
        return str(self.assertRaises(
            exception.InvalidConfiguration, instance_names.check_name_template,
            template))

    def test_tenants_choice(self) -> None:
        for field in ('display_name', 'hostname', 'key_name', 'metadata'):
            self.assertIn(f'not {field}',
                          self.refusal(f'i-%(id)x-%({field})s'))

    def test_names_lxd_does_not_take(self) -> None:
        for template in ('%(uuid)s', '%d', '-%d', 'instance_%x', 'i.%d',
                         'instance-%08x-', 'i %d', 'ü%d', '%(project_id)s',
                         'i' * 50 + '-%08x', 'a-%(user_id)s-%(id)d'):
            self.assertIn('which produces names such as',
                          self.refusal(template))

    def test_room_for_the_rescue_instance(self) -> None:
        # With "-snapshot" that makes 63 characters.
        instance_names.check_name_template('i' * 45 + '-%08x')
        self.refusal('i' * 46 + '-%08x')

    def test_same_name_for_several(self) -> None:
        for template in ('instance', 'p%(project_id)s'):
            self.assertIn('the same name', self.refusal(template))

    def test_not_a_template(self) -> None:
        for template in ('i%', 'i%(id)', '%(id)y', '%z'):
            self.refusal(template)
