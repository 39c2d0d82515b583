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

"""An image of LXD as the file that Glance's client reads."""

from __future__ import annotations

import hashlib

from nova_lxd_py.virt.image import upload
from tests.fixtures import session_case


class ImageSourceTestCase(session_case.SessionTestCase):

    def test_reads_of_any_size(self) -> None:
        fingerprint = self.session.get('images', 'aliases', 'tiny')['target']
        reports: list[tuple[int, int]] = []
        with upload.ImageSource(
                self.session, fingerprint,
                lambda done, size: reports.append((done, size))) as source:
            content = b''.join(iter(lambda: source.read(777), b''))
            self.assertTrue(source.is_complete)
            self.assertEqual(b'', source.read(777))
        self.assertEqual(fingerprint, hashlib.sha256(content).hexdigest())
        self.assertEqual((len(content), len(content)), reports[-1])
