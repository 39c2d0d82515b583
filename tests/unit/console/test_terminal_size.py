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

"""Sizes that terminals report on a serial console."""

from __future__ import annotations

import ddt
from oslotest import base

from nova_lxd_py.virt.console import terminal_size

REPORT = b'\x1b[8;50;132t'


@ddt.ddt
class TerminalSizeTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.size = terminal_size.TerminalSize()

    def assert_size(self, rows: int, columns: int) -> None:
        self.assertEqual((rows, columns), (self.size.rows, self.size.columns))

    def test_input_is_passed(self) -> None:
        self.assertEqual((b'ls\r\x1b[A', False),
                         self.size.from_terminal(b'ls\r\x1b[A'))
        self.assert_size(24, 80)

    def test_report_is_removed(self) -> None:
        self.assertEqual((b'ls\r', True),
                         self.size.from_terminal(b'ls' + REPORT + b'\r'))
        self.assert_size(50, 132)
        self.assertEqual((b'', False), self.size.from_terminal(REPORT))

    def test_report_that_the_guest_has_requested(self) -> None:
        """It gets as many as it has requested."""
        self.size.from_guest(b'$ \x1b[18t')
        self.assertEqual((REPORT, True),
                         self.size.from_terminal(REPORT + REPORT))
        self.assert_size(50, 132)

    def test_report_of_a_mode_that_only_the_guest_enables(self) -> None:
        report = b'\x1b[48;50;132;1000;2000t'
        self.assertEqual((report, True), self.size.from_terminal(report))
        self.assert_size(50, 132)

    @ddt.data(*range(3, len(REPORT)))
    def test_report_in_two_parts(self, length: int) -> None:
        first = self.size.from_terminal(b'x' + REPORT[:length])
        self.assertEqual((b'x', False), first)
        self.assertEqual((b'y', True),
                         self.size.from_terminal(REPORT[length:] + b'y'))

    @ddt.data(b'\x1b', b'\x1b[')
    def test_keys_are_not_kept_back(self, key: bytes) -> None:
        self.assertEqual((key, False), self.size.from_terminal(key))

    @ddt.data(b'\x1b[8;0;80t', b'\x1b[8;24;0t', b'\x1b[8;1001;80t',
              b'\x1b[8;24;9999t')
    def test_impossible_size(self, report: bytes) -> None:
        self.assertEqual((b'', False), self.size.from_terminal(report))
        self.assert_size(24, 80)
