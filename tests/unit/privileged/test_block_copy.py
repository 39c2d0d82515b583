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

"""Copies to volumes."""

from __future__ import annotations

import os
from unittest import mock

from nova_lxd_py.virt.privileged import block_copy
from tests.fixtures import mounts_case


class CopyTest(mounts_case.MountsTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.source, self.other = (self.kernel.target(name)
                                   for name in ('a', 'b'))
        self.data = b'x' * 1000 + bytes(3 << 20) + b'y' * 1000
        for path, data in ((self.source, self.data),
                           (self.other, bytes(len(self.data)))):
            with open(path, 'wb') as stream:
                stream.write(data)
        # Plain files are block devices here.
        self.numbers = mock.patch.object(block_copy.stat, 'S_ISBLK',
                                         lambda mode: True)
        self.numbers.start()
        self.addCleanup(self.numbers.stop)
        real = os.fstat
        patched = mock.patch.object(
            block_copy.os, 'fstat', lambda fd: mock.Mock(
                st_mode=real(fd).st_mode, st_rdev=real(fd).st_ino))
        patched.start()
        self.addCleanup(patched.stop)

    def test_copy(self) -> None:
        written = block_copy.copy(self.source, self.other, 0, len(self.data))
        with open(self.other, 'rb') as stream:
            self.assertEqual(self.data, stream.read())
        # What is blank on both is not written.
        self.assertLess(written, 3 << 20)

    def test_part(self) -> None:
        block_copy.copy(self.source, self.other, 500, 100)
        with open(self.other, 'rb') as stream:
            self.assertEqual(bytes(500) + b'x' * 100 + bytes(400),
                             stream.read(1000))

    def test_end(self) -> None:
        self.assertRaises(OSError, block_copy.copy, self.source, self.other,
                          len(self.data), 1)

    def test_arguments(self) -> None:
        for offset, length in ((-1, 1), (0, -1), ('0', 1)):
            self.assertRaises(ValueError, block_copy.copy, self.source,
                              self.other, offset, length)
        self.assertRaises(ValueError, block_copy.copy, 'relative',
                          self.other, 0, 1)
        self.numbers.stop()
        self.assertRaises(ValueError, block_copy.copy, self.source,
                          self.other, 0, 1)
        self.numbers.start()
