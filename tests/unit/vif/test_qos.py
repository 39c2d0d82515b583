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

from nova import exception
from oslotest import base

from nova_lxd_py.virt.vif import qos
from tests.fixtures import fake_host


class LimitsTestCase(base.BaseTestCase):

    def limits(self, **extra_specs: str) -> qos.Limits:
        return qos.limits(fake_host.make_instance(**{
            f'quota:vif_{key}': value
            for key, value in extra_specs.items()}).flavor)

    def test_none(self) -> None:
        self.assertFalse(self.limits())
        self.assertFalse(self.limits(inbound_average='0'))

    def test_all(self) -> None:
        limits = self.limits(
            inbound_average='10', inbound_peak='20', inbound_burst='30',
            outbound_average='100000', outbound_peak='200000')
        self.assertTrue(limits)
        self.assertEqual(qos.Rate(10_000, 20_000, 30 * 1024), limits.inbound)
        self.assertEqual(qos.Rate(100_000_000, 200_000_000, 5_000_000),
                         limits.outbound)

    def test_one_direction(self) -> None:
        limits = self.limits(outbound_average='10')
        self.assertTrue(limits)
        self.assertIsNone(limits.inbound)
        self.assertEqual(qos.Rate(10_000, 10_000, 65536), limits.outbound)

    def test_peak_below_average(self) -> None:
        limits = self.limits(outbound_average='10', outbound_peak='5')
        self.assertEqual(qos.Rate(10_000, 10_000, 65536), limits.outbound)

    def test_wrong(self) -> None:
        self.assertRaises(exception.InvalidInput, self.limits,
                          inbound_average='fast')
        self.assertRaises(exception.InvalidInput, self.limits,
                          inbound_peak='5')
