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

"""Isolation of the user ids of instances, by their flavor."""

from __future__ import annotations

from nova import exception
from nova import objects
from oslotest import base

from nova_lxd_py.virt.guest import isolation

objects.register_all()

ISOLATION = isolation.Isolation


class IsolationTestCase(base.BaseTestCase):

    def decide(self, mode: str = 'auto', free_ranges: int = 10,
               shift_is_free: bool = False, can_clone: bool = False,
               **specs: str) -> isolation.Isolation:
        flavor = objects.Flavor(name='m1.small', extra_specs={
            f'lxd:{key}': value for key, value in specs.items()})
        return isolation.select(
            flavor, mode, free_ranges=free_ranges,
            shift_is_free=shift_is_free, can_clone=can_clone)

    def test_auto(self) -> None:
        self.assertEqual(ISOLATION.SERVER, self.decide())
        self.assertEqual(ISOLATION.PROJECT, self.decide(can_clone=True))
        self.assertEqual(ISOLATION.SERVER, self.decide(
            can_clone=True, shift_is_free=True))

    def test_configured(self) -> None:
        for mode in ('server', 'project', 'off'):
            self.assertEqual(mode, self.decide(mode, can_clone=True))

    def test_flavor_goes_first(self) -> None:
        for mode in ('auto', 'server', 'project', 'off'):
            self.assertEqual(ISOLATION.SERVER, self.decide(
                mode, can_clone=True, isolated='true'))
            self.assertEqual(ISOLATION.OFF, self.decide(
                mode, isolated='false'))
            self.assertEqual(ISOLATION.PRIVILEGED, self.decide(
                mode, privileged_allowed='true'))

    def test_no_ranges(self) -> None:
        for mode in ('auto', 'server', 'project', 'off'):
            self.assertEqual(ISOLATION.OFF, self.decide(mode, free_ranges=0))

    def test_no_ranges_though_required(self) -> None:
        """Another host may have free ranges."""
        error = self.assertRaises(
            exception.ComputeResourcesUnavailable, self.decide,
            free_ranges=0, isolated='true')
        self.assertIn('/etc/subuid', str(error))

    def test_config(self) -> None:
        for kind, value in (
                (ISOLATION.SERVER, 'true'), (ISOLATION.PROJECT, 'true'),
                (ISOLATION.OFF, 'false'), (ISOLATION.PRIVILEGED, 'false')):
            self.assertEqual({'security.idmap.isolated': value},
                             isolation.config(kind))
