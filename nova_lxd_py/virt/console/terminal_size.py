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

"""Terminal size reports in the input of a serial console.

A serial line does not carry the size of the terminal. Terminals have an escape
sequence that reports it (xterm's window operation 18), and a console client
can send it whenever its window is resized::

    ESC [ 8 ; ROWS ; COLUMNS t

Such a report is removed from the input, unless a program in the guest has
requested it. Newer terminals send a report at each change once a program in
the guest has enabled mode 2048 (in-band resize); it is used and passed on.
"""

from __future__ import annotations

import re

_REPORT = re.compile(
    rb'\x1b\[(?:8;(\d{1,4});(\d{1,4})|48;(\d{1,4});(\d{1,4})(?:;\d{1,6}){0,2})'
    rb't')
#: The beginning of a report at the end of the data. Anything shorter may be a
#: key, such as Escape.
_INCOMPLETE = re.compile(rb'\x1b\[(?:8|48?)(?:;\d{0,6}){0,4}\Z')
#: Sequence with which a program requests one report.
_REQUEST = b'\x1b[18t'

#: Bounds of plausible sizes; other reports are ignored.
_MIN_SIZE, _MAX_SIZE = 1, 1000


class TerminalSize:
    """Follows the size that a terminal reports.

    :ivar rows: number of lines last reported.
    :ivar columns: number of columns last reported.
    """

    def __init__(self, rows: int = 24, columns: int = 80) -> None:
        self.rows = rows
        self.columns = columns
        self._incomplete = b''
        self._requests = 0

    def from_guest(self, data: bytes) -> None:
        """Count the requests for size reports in the guest's output.

        :param data: output of the guest.
        """
        self._requests += data.count(_REQUEST)

    def from_terminal(self, data: bytes) -> tuple[bytes, bool]:
        """Remove size reports from the terminal's input.

        :param data: input from the terminal.
        :returns: the input to pass on, and whether the size has changed.
        """
        before = self.rows, self.columns
        passed = _REPORT.sub(self._process_report, self._incomplete + data)
        self._incomplete = b''
        incomplete = _INCOMPLETE.search(passed)
        if incomplete is not None:
            self._incomplete = incomplete[0]
            passed = passed[:incomplete.start()]
        return passed, (self.rows, self.columns) != before

    def _process_report(self, report: re.Match[bytes]) -> bytes:
        """Take the size from a report.

        :returns: the report if the guest is to get it, else nothing.
        """
        rows, columns = (int(number) for number in report.groups()
                         if number is not None)
        if (_MIN_SIZE <= rows <= _MAX_SIZE and
                _MIN_SIZE <= columns <= _MAX_SIZE):
            self.rows, self.columns = rows, columns
        if report[1] is None:
            # Of mode 2048, which only the guest can enable.
            return report[0]
        if self._requests:
            self._requests -= 1
            return report[0]
        return b''
