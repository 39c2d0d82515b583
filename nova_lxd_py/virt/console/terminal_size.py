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

"""How large a terminal is, said in the stream itself.

A serial line knows nothing of the size of the terminal at its other end. But
terminals have a sequence with which they report it, and programs that show a
console can send it whenever their window changes::

    ESC [ 8 ; ROWS ; COLUMNS t

It is taken out of the stream, unless the guest itself has asked its terminal
for it. Newer terminals report each change by themselves once a program in the
guest has switched that on (mode 2048); such a report is passed on as well.
"""

from __future__ import annotations

import re

_REPORT = re.compile(
    rb'\x1b\[(?:8;(\d{1,4});(\d{1,4})|48;(\d{1,4});(\d{1,4})(?:;\d{1,6}){0,2})'
    rb't')
#: A report that has begun. Less than this may be a key, such as Escape.
_BEGUN = re.compile(rb'\x1b\[(?:8|48?)(?:;\d{0,6}){0,4}\Z')
#: How a program asks the terminal for one report.
_QUESTION = b'\x1b[18t'

#: Sizes that are believed.
_SMALLEST, _LARGEST = 1, 1000


class TerminalSize:
    """Finds size reports in what a terminal sends.

    :ivar rows: lines of the terminal, as far as known.
    :ivar columns: characters in a line, as far as known.
    """

    def __init__(self, rows: int = 24, columns: int = 80) -> None:
        self.rows = rows
        self.columns = columns
        self._rest = b''
        self._asked = 0

    def from_guest(self, data: bytes) -> None:
        """Notice that the guest asks the terminal for its size.

        :param data: what goes from the guest to the terminal.
        """
        self._asked += data.count(_QUESTION)

    def from_terminal(self, data: bytes) -> tuple[bytes, bool]:
        """Take reports out of what goes to the guest.

        :param data: what comes from the terminal.
        :returns: what to pass on, and whether the size is another one now.
        """
        before = self.rows, self.columns
        passed = _REPORT.sub(self._note, self._rest + data)
        self._rest = b''
        begun = _BEGUN.search(passed)
        if begun is not None:
            self._rest, passed = begun[0], passed[:begun.start()]
        return passed, (self.rows, self.columns) != before

    def _note(self, report: re.Match[bytes]) -> bytes:
        rows, columns = (int(number) for number in report.groups()
                         if number is not None)
        if (_SMALLEST <= rows <= _LARGEST and
                _SMALLEST <= columns <= _LARGEST):
            self.rows, self.columns = rows, columns
        if report[1] is None:
            return report[0]
        if self._asked:
            self._asked -= 1
            return report[0]
        return b''
