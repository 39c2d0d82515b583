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

"""Counters of block devices."""

from __future__ import annotations

from oslotest import base

from nova_lxd_py.virt.volume import statistics
from tests.fixtures import fake_block_devices
from tests.fixtures import memory_cinder

#: Of a loop device, by Linux 6.1: with discards and flushes.
NEW = ('     137       12     6098       20      516      480    8264     2028'
       '        0     1052     2057        0        0        0        0       '
       ' 5        9\n')
#: Of a disk, by Linux 4.17 and earlier.
OLD = ('  446216   784926  9550688  4382310   124847   312726  5165084  '
       '23221090        0  1670380  27618780\n')

COUNTED = statistics.Counters(137, 6098 * 512, 516, 8264 * 512)


class CountersTestCase(base.BaseTestCase):

    def test_parse(self) -> None:
        self.assertEqual(COUNTED, statistics.parse_stat(NEW))
        self.assertEqual(
            statistics.Counters(446216, 9550688 * 512, 124847, 5165084 * 512),
            statistics.parse_stat(OLD))

    def test_parse_something_else(self) -> None:
        for text in ('', '1 2 3\n', NEW.replace('516', 'x'), '8:0\n'):
            self.assertRaises(ValueError, statistics.parse_stat, text)

    def test_since(self) -> None:
        later = statistics.Counters(140, 6098 * 512 + 1536, 516, 8264 * 512)
        self.assertEqual(statistics.Counters(3, 1536, 0, 0),
                         later.since(COUNTED))

    def test_since_recreated(self) -> None:
        """A new device counts from zero; some of it may exceed the old one."""
        new = statistics.Counters(1, 512, 900, 9000 * 512)
        self.assertEqual(new, new.since(COUNTED))


class StoredTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.host = self.useFixture(fake_block_devices.BlockDevices())
        self.device = self.host.add_device(memory_cinder.Disk(1 << 30))
        self.host.set_attribute(self.device, 'stat', NEW)

    def test_read(self) -> None:
        self.assertEqual(COUNTED, statistics.read(self.device.path))

    def test_missing_device(self) -> None:
        stored = statistics.store('key', self.device.path)
        self.host.remove_device(self.device)
        self.assertIsNone(statistics.read(self.device.path))
        self.assertEqual({}, statistics.store('key', self.device.path))
        self.assertIsNone(statistics.since_stored(stored['key'],
                                                  self.device.path))

    def test_no_block_device(self) -> None:
        for path in ('/proc/self/stat', '/', ''):
            self.assertIsNone(statistics.read(path))

    def test_no_counters(self) -> None:
        self.host.set_attribute(self.device, 'stat', '')
        self.assertIsNone(statistics.read(self.device.path))

    def test_stored(self) -> None:
        stored = statistics.store('key', self.device.path)
        self.assertEqual(['key'], list(stored))
        later = COUNTED._replace(wr_req=517, wr_bytes=8272 * 512)
        self.host.set_attribute(self.device, 'stat', NEW.replace(
            '516', '517').replace('8264', '8272'))
        self.assertEqual(later, statistics.read(self.device.path))
        self.assertEqual(
            statistics.Counters(0, 0, 1, 4096),
            statistics.since_stored(stored['key'], self.device.path))

    def test_nothing_stored(self) -> None:
        """What was counted before cannot be told from what was after."""
        for stored in (None, '', '1 2 3', '1 2 3 x', '1 2 3 4 5'):
            self.assertIsNone(statistics.since_stored(stored,
                                                      self.device.path))
