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

"""The inspection of an image beside its transfer."""

from __future__ import annotations

import threading

from oslotest import base

from nova_lxd_py.virt.image import format_inspector
from nova_lxd_py.virt.image import inspection
from nova_lxd_py.virt.lxd import errors


class _Inspector:
    """Takes its time, as with an image that unpacks to much more."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.go_on = threading.Event()
        self.error: Exception | None = None

    def feed(self, part: bytes) -> None:
        self.go_on.wait(30)
        if self.error is not None:
            raise self.error
        self.parts.append(part)

    def finish(self) -> str:
        return 'content'


class InspectionTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.patch(inspection, 'PATIENCE', 0.01)
        self.inspector = _Inspector()
        self.addCleanup(self.inspector.go_on.set)
        self.inspection = inspection.Inspection(self.inspector, 'x')
        self.addCleanup(self.inspection.cancel)

    def test_slower_than_the_transfer(self) -> None:
        """Nothing is lost, and only so much is kept in memory."""
        parts = [b'%d' % number for number in range(inspection.BACKLOG + 9)]
        threading.Timer(0.2, self.inspector.go_on.set).start()
        for part in parts:
            self.inspection.feed(part)
        self.assertEqual('content', self.inspection.finish(30))
        self.assertEqual(parts, self.inspector.parts)

    def test_takes_too_long(self) -> None:
        self.inspection.feed(b'x')
        self.assertRaises(errors.DeadlineExceeded, self.inspection.finish,
                          0.05)

    def test_refused_while_it_is_full(self) -> None:
        self.inspector.error = format_inspector.UnacceptableImage('no')
        threading.Timer(0.2, self.inspector.go_on.set).start()
        self.assertIs(self.inspector.error, self.assertRaises(
            format_inspector.UnacceptableImage, self.feed_for_ever))
        self.assertRaises(format_inspector.UnacceptableImage,
                          self.inspection.finish, 30)

    def feed_for_ever(self) -> None:
        while True:
            self.inspection.feed(b'x')

    def test_cancelled(self) -> None:
        thread = self.inspection._thread
        self.inspection.cancel()
        thread.join(30)
        self.assertFalse(thread.is_alive())
