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

"""Front-end QoS specs of volume types."""

from __future__ import annotations

from typing import Any

import fixtures
from nova import exception
from oslotest import base

from nova_lxd_py.virt.volume import qos
from tests.fixtures import fake_host
from tests.fixtures import memory_cinder


class QoSTest(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.volume = memory_cinder.Volume('iscsi', 1 << 30)
        self.log = self.useFixture(fixtures.FakeLogger())

    def limits(self, **specs: Any) -> str:
        connection = self.volume.connection(qos_specs=specs)
        qos.check(fake_host.make_instance(), connection)
        return qos.limits(connection)

    def test_directions(self) -> None:
        # Cinder passes strings, and numbers for specs with _per_gb.
        self.assertEqual(
            'rbps=1 wbps=2 riops=3 wiops=4',
            self.limits(read_bytes_sec='1', write_bytes_sec=2,
                        read_iops_sec='3', write_iops_sec=4))
        self.assertEqual('wbps=2000000', self.limits(
            write_bytes_sec='2000000'))
        self.assertEqual('', self.log.output)

    def test_total(self) -> None:
        self.assertEqual('rbps=8 wbps=8 riops=9 wiops=9', self.limits(
            total_bytes_sec='8', total_iops_sec='9'))

    def test_total_and_direction(self) -> None:
        """The lower one."""
        self.assertEqual('rbps=10 wbps=9', self.limits(
            total_bytes_sec='10', read_bytes_sec='11', write_bytes_sec='9'))

    def test_unlimited(self) -> None:
        self.assertEqual('', self.limits())
        self.assertEqual('', self.limits(total_bytes_sec='0',
                                         read_iops_sec=0))
        self.assertEqual('rbps=5', self.limits(
            read_bytes_sec='5', total_bytes_sec='0'))
        self.assertEqual('', qos.limits(self.volume.connection()))
        self.assertEqual('', qos.limits(self.volume.connection(
            qos_specs=None)))

    def test_large(self) -> None:
        """cgroup v1 would take the lower 32 bits of a number of requests."""
        self.assertEqual('riops=4294967295', self.limits(
            read_iops_sec=str(2 ** 32 + 1)))
        self.assertEqual('rbps=4294967297', self.limits(
            read_bytes_sec=str(2 ** 32 + 1)))

    def test_not_a_number(self) -> None:
        for value in ('many', '-1', '1.5', '', '1 wbps=1', '1_0', '\u0661',
                      '9' * 19, None, True):
            error = self.assertRaises(
                exception.VolumeAttachFailed, self.limits,
                total_iops_sec=value)
            self.assertIn('total_iops_sec', str(error))

    def test_unsupported(self) -> None:
        self.assertEqual('riops=5', self.limits(
            read_iops_sec='5', read_iops_sec_max='50', size_iops_sec='4096',
            back_end_spec='x'))
        self.assertIn('read_iops_sec_max, size_iops_sec of volume ' +
                      self.volume.id, self.log.output)
        self.assertNotIn('back_end_spec', self.log.output)
