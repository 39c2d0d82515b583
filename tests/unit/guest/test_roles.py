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

"""Roles of LXD instances, and their names."""

from __future__ import annotations

from nova import objects
from oslotest import base

from nova_lxd_py.virt.guest import roles

objects.register_all()

_UUID = 'f2a2c4a2-96b5-4a3c-9b0c-7a4e9f0f3d11'


class RolesTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.instance = objects.Instance(id=7, uuid=_UUID)

    def test_own_instance_has_the_name_of_the_server(self) -> None:
        self.assertEqual('instance-00000007', roles.lxd_name(self.instance))

    def test_a_migrated_instance_keeps_its_name(self) -> None:
        for role in (roles.INCOMING, roles.MOVED):
            self.assertEqual(roles.lxd_name(self.instance),
                             roles.lxd_name(self.instance, role))

    def test_auxiliary_instances_have_names_of_their_own(self) -> None:
        names = [roles.lxd_name(self.instance, role)
                 for role in roles.AUXILIARY]
        self.assertEqual(len(names), len(set(names)))
        self.assertNotIn(roles.lxd_name(self.instance), names)
        self.assertIn('instance-00000007-rescue', names)

    def test_names_are_those_of_all_roles_with_the_own_first(self) -> None:
        names = roles.lxd_names(self.instance)
        self.assertEqual(roles.lxd_name(self.instance), names[0])
        self.assertEqual({roles.lxd_name(self.instance, role)
                          for role in roles.AUXILIARY}, set(names[1:]))

    def test_longest_suffix(self) -> None:
        longest = max(roles.lxd_names(self.instance), key=len)
        self.assertEqual(self.instance.name + roles.LONGEST_SUFFIX, longest)
