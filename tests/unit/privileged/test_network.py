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

import os

from oslotest import base

from nova_lxd_py.virt.privileged import network
from tests.fixtures import fake_host

OUTER, INNER = 'tap01234567-89', 'tin01234567-89'
MAC = 'fa:16:3e:00:00:01'


class InputTestCase(base.BaseTestCase):
    """The daemon changes only devices of ports."""

    def setUp(self) -> None:
        super().setUp()
        self.host = self.useFixture(fake_host.FakeHost())

    def test_names_of_other_devices(self) -> None:
        for name in ('eth0', 'br-int', 'tap0', 'tap01234567-8', 'tap../../x',
                     'tap01234567-89\n', 'TAP01234567-89', '',
                     None, 7, ['tap01234567-89'], b'tap01234567-89'):
            for call in (
                    lambda: network.delete_device(name),
                    lambda: network.set_mtu(name, 1500),
                    lambda: network.set_alias(name, 'x'),
                    lambda: network.add_to_bridge(name, 'br0'),
                    lambda: network.disable_checksum_offload(name),
                    lambda: network.join(name, INNER),
                    lambda: network.join(INNER, name),
                    lambda: network.set_limit(name, 1, 1, 1),
                    lambda: network.remove_limit(name),
                    lambda: network.block(name),
                    lambda: network.unblock(name),
                    lambda: network.create_veth(name, INNER, MAC, 1500,
                                                False),
                    lambda: network.create_veth(OUTER, name, MAC, 1500,
                                                False)):
                self.assertRaises(ValueError, call)
        self.assertEqual([], self.host.calls)

    def test_other_arguments(self) -> None:
        self.host.add(OUTER)
        for call in (
                lambda: network.create_veth(OUTER, INNER, 'x', 1500, False),
                lambda: network.create_veth(OUTER, INNER, MAC + '\n', 1500,
                                            False),
                lambda: network.set_mtu(OUTER, 10),
                lambda: network.set_mtu(OUTER, '1500'),
                lambda: network.set_alias(OUTER, ''),
                lambda: network.set_alias(OUTER, 'a\nb'),
                lambda: network.set_alias(OUTER, 'a' * 256),
                lambda: network.set_alias(OUTER, 7),
                lambda: network.add_to_bridge(OUTER, '../x'),
                lambda: network.add_to_bridge(OUTER, 'a' * 16),
                lambda: network.set_limit(OUTER, 0, 1, 1),
                lambda: network.set_limit(OUTER, 1, 2 ** 70, 1),
                lambda: network.set_limit(OUTER, 1, 1, '1')):
            self.assertRaises(ValueError, call)
        self.assertEqual([], self.host.calls)


class DeviceTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.host = self.useFixture(fake_host.FakeHost())

    def ipv6_is_off(self, name: str) -> bool:
        return os.path.exists(self.host.ipv6 / name / 'disable_ipv6') and (
            self.host.ipv6 / name / 'disable_ipv6').read_text() == '1'

    def make(self, routed: bool = False) -> None:
        for name in (OUTER, INNER):
            (self.host.ipv6 / name).mkdir(parents=True)
            (self.host.ipv6 / name / 'disable_ipv6').write_text('0')
        network.create_veth(OUTER, INNER, MAC, 1400, routed)

    def test_create_veth(self) -> None:
        self.make()
        outer, inner = self.host.device(OUTER), self.host.device(INNER)
        self.assertEqual((True, 1400, None), (outer.up, outer.mtu,
                                              outer.address))
        self.assertEqual((False, 1400, MAC), (inner.up, inner.mtu,
                                              inner.address))
        self.assertTrue(self.ipv6_is_off(OUTER))
        self.assertTrue(self.ipv6_is_off(INNER))

    def test_create_routed_veth(self) -> None:
        self.make(routed=True)
        self.assertFalse(self.ipv6_is_off(OUTER))

    def test_kernel_without_ipv6(self) -> None:
        network.create_veth(OUTER, INNER, MAC, 1400, False)
        self.assertFalse(self.ipv6_is_off(OUTER))

    def test_create_veth_twice(self) -> None:
        network.create_veth(OUTER, INNER, MAC, 1400, False)
        # OSError, not an exception of the netlink library.
        self.assertRaises(FileExistsError, network.create_veth, OUTER,
                          INNER, MAC, 1400, False)

    def test_delete_device(self) -> None:
        network.create_veth(OUTER, INNER, MAC, 1400, False)
        self.assertTrue(network.delete_device(INNER))
        self.assertEqual(set(), self.host.names())
        self.assertFalse(network.delete_device(INNER))

    def test_missing_device(self) -> None:
        self.assertRaises(FileNotFoundError, network.set_mtu, OUTER, 1400)
        self.assertRaises(OSError, network.disable_checksum_offload, OUTER)

    def test_join_twice(self) -> None:
        self.host.add(OUTER)
        self.host.add(INNER)
        network.join(OUTER, INNER)
        network.join(OUTER, INNER)
        for name, other in ((OUTER, INNER), (INNER, OUTER)):
            device = self.host.device(name)
            self.assertTrue(device.up)
            self.assertEqual(
                [self.host.device(other).index],
                [each['action']['ifindex'] for each in device.filters])

    def test_limits(self) -> None:
        device = self.host.add(OUTER)
        network.remove_limit(OUTER)
        network.set_limit(OUTER, 1000, 2000, 4096)
        network.set_limit(OUTER, 3000, 4000, 8192)
        self.assertEqual((3000, 4000, 8192), tuple(
            device.qdiscs['htb'][key] for key in ('rate', 'ceil', 'burst')))
        network.remove_limit(OUTER)
        self.assertEqual({}, device.qdiscs)

    def test_kernel_without_traffic_control(self) -> None:
        self.host.add(OUTER)
        self.host.lacks = {'htb'}
        self.assertRaises(FileNotFoundError, network.set_limit, OUTER,
                          1000, 1000, 4096)

    def test_block(self) -> None:
        self.host.add(OUTER)
        for _time in range(2):
            network.block(OUTER)
            self.assertEqual({OUTER}, self.host.blocked())
        for _time in range(2):
            network.unblock(OUTER)
            self.assertEqual(set(), self.host.blocked())

    def test_block_keeps_other_qdiscs(self) -> None:
        device = self.host.add(OUTER)
        network.set_limit(OUTER, 1000, 2000, 4096)
        before = dict(device.qdiscs)
        self.assertRaises(FileExistsError, network.block, OUTER)
        network.unblock(OUTER)
        self.assertEqual(before, device.qdiscs)

    def test_block_of_a_missing_device(self) -> None:
        self.assertRaises(FileNotFoundError, network.block, OUTER)
        network.unblock(OUTER)

    def test_block_by_a_kernel_without_qdiscs(self) -> None:
        self.host.add(OUTER)
        self.host.lacks = {'blackhole'}
        self.assertRaises(OSError, network.block, OUTER)
        network.unblock(OUTER)
