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

"""Numbers and records of tar headers."""

from __future__ import annotations

import io
import tarfile

import ddt
from oslotest import base

from nova_lxd_py.virt.image import tar


@ddt.ddt
class HeaderTestCase(base.BaseTestCase):

    @ddt.data(0, 1, 8 ** 11 - 1, 8 ** 11, 9 << 40)
    def test_numbers(self, number: int) -> None:
        """Python and GNU tar read them, binary ones too."""
        field = tar.number_field(number)
        self.assertEqual(12, len(field))
        self.assertEqual(number, tarfile.nti(field))
        self.assertEqual(number, tar._number(field))

    @ddt.data(1, 80, 90, 91, 92, 93, 94, 95, 990, 9990)
    def test_lengths_of_records(self, length: int) -> None:
        """They count their own digits."""
        header = tar.pax_header(((b'comment', b'x' * length),))
        content = header[tar.BLOCK:].rstrip(b'\0')
        count, _space, _rest = content.partition(b' ')
        self.assertEqual(len(content), int(count))
        member = tarfile.TarInfo('a').tobuf() + bytes(1024)
        with tarfile.open(fileobj=io.BytesIO(header + member)) as archive:
            self.assertEqual({'comment': 'x' * length},
                             archive.next().pax_headers)
