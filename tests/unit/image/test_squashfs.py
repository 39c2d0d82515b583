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

"""Directories of squashfs images."""

from __future__ import annotations

import base64
import gzip

from tests.fixtures import format_case

#: Made with mksquashfs -noI: directories /one and /two, /xx1, which is a link
#: to /t, and the file /xx2. Its metadata is not compressed.
PLAIN_SQUASHFS = """
H4sIAAAAAAACA8soLixmZYABJgZGIMnIIMhwmpGRgQXIroLKTGSE0J1Q+j8UJELl/0JpT6h8NZ
SumNXAyPCWEWYBI9wiBgZmIGYFiyHkmbDIMzP8h8szQ80AyeuXMDEsgcuwMKACRjSTWZHUWQMx
GxBbNDCjuYsRaHJ+XqoCkAFilpTnOwApZiCuqDCMAjNATCOBhgSETrBmc6gRGg0wGxWgtAOUjo
LSsCANhOpgAetohroUAM/F4f+RAQAA
"""


class SquashfsDirectoriesTestCase(format_case.FormatTestCase):
    """What unsquashfs must not find in a directory."""

    def setUp(self) -> None:
        super().setUp()
        self.image = gzip.decompress(base64.b64decode(PLAIN_SQUASHFS))

    def changed(self, name: bytes, offset: int, value: bytes) -> bytes:
        """Change the last directory entry of a name."""
        place = self.image.rindex(name) + offset
        return self.image[:place] + value + self.image[place + len(value):]

    def test_unchanged(self) -> None:
        self.assertEqual(1, format_case.inspect(self.image).unpacked_size)

    def test_names(self) -> None:
        for name in (b'a/b', b'/ab', b'a\0b'):
            self.assertUnacceptable('cannot be', self.changed(b'one', 0, name))
        # Two letters: the length of a name is in front of it, less one.
        short = self.changed(
            b'one', -2, b'\1\0..')
        self.assertUnacceptable('cannot be', short)

    def test_twice(self) -> None:
        self.assertUnacceptable('xx1 twice', self.changed(b'xx2', 0, b'xx1'))
        self.assertUnacceptable('not sorted', self.changed(b'one', 0, b'zzz'))

    def test_shared_directories(self) -> None:
        one = self.image.rindex(b'one') - 8
        self.assertUnacceptable('in two others', self.changed(
            b'two', -8, self.image[one:one + 2]))

    def test_inode_within_another(self) -> None:
        """It would not have been checked."""
        one = self.image.rindex(b'one') - 8
        offset = int.from_bytes(self.image[one:one + 2], 'little') + 4
        self.assertUnacceptable('no inode', self.changed(
            b'one', -8, offset.to_bytes(2, 'little')))
