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

"""Costs of key derivation in LUKS headers."""

from __future__ import annotations

import os
import struct
import tempfile

from oslotest import base

from nova_lxd_py.virt.privileged import luks


class LuksTest(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.file = tempfile.TemporaryFile()
        self.addCleanup(self.file.close)

    def refusal(self, *parts: tuple[int, bytes]) -> str:
        self.file.truncate(0)
        self.file.truncate(16 << 20)
        for offset, content in parts:
            os.pwrite(self.file.fileno(), content, offset)
        return luks.refusal(self.file.fileno())

    def first(self, slot: int, digest: int = 100_000) -> bytes:
        """Return a header of LUKS1 whose last slot costs so much."""
        header = bytearray(592)
        header[:8] = luks.MAGIC + b'\0\1'
        struct.pack_into('>I', header, 164, digest)
        struct.pack_into('>2I', header, 208 + 48 * 7, 0x00ac71f3, slot)
        return bytes(header)

    def second(self, text: bytes, magic: bytes = luks.MAGIC) -> bytes:
        """Return a header of LUKS2."""
        return (magic + b'\0\2' + struct.pack('>Q', 0x4000)).ljust(
            4096, b'\0') + text + b'\0'

    def test_first_version(self) -> None:
        self.assertEqual('', self.refusal((0, self.first(5_000_000))))
        self.assertIn('too much', self.refusal((0, self.first(1 << 31))))
        self.assertIn('too much', self.refusal((0, self.first(1, 1 << 31))))

    def test_second_version(self) -> None:
        kdf = b'{"kdf":{"type":"argon2id","time":%d,"memory":%d,"cpus":4}}'
        for time, memory, wanted in ((9, 1 << 20, ''), (4, 1 << 22, 'much'),
                                     (1 << 20, 1 << 20, 'much'),
                                     (1 << 30, 32, 'much')):
            found = self.refusal((0, self.second(kdf % (time, memory))))
            self.assertIn(wanted, found)
            self.assertEqual(bool(wanted), bool(found))
        for text in (b'{"iterations": 4000000000}',
                     b"{'iterations' :4000000000}",
                     b'{"\\u0069terations":4000000000}'):
            self.assertNotEqual('', self.refusal((0, self.second(text))))

    def test_copy_of_the_header(self) -> None:
        evil = self.second(b'{"iterations":4000000000}', b'SKUL\xba\xbe')
        for offset in (0x4000, 0x40000, 0x400000):
            self.assertIn('too much', self.refusal(
                (0, self.second(b'{}')), (offset, evil)))

    def test_keys_are_not_read(self) -> None:
        self.assertEqual('', self.refusal(
            (0, self.second(b'{}')), (0x3000, b'"iterations":4000000000')))

    def test_truncated(self) -> None:
        self.file.truncate(0)
        os.pwrite(self.file.fileno(), luks.MAGIC, 0)
        self.assertEqual('', luks.refusal(self.file.fileno()))
