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

"""Files that are written into a new instance."""

from __future__ import annotations

from nova import exception
from nova import objects

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import injected_files
from tests.fixtures import session_case


class InjectTestCase(session_case.SessionTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.create()

    def inject(self, *files: tuple[str, bytes]) -> None:
        injected_files.inject(
            objects.Instance(uuid='5f6e1b3a-0000-4000-8000-000000000001'),
            lxd_guest.Guest(self.session,
                            self.session.get('instances', 'c1')), files)

    def content(self, path: str) -> bytes:
        return self.lxd.instance('c1').files.get(path).content

    def test_missing_directories(self) -> None:
        self.inject(('/srv/new/deep/deeper/file', b'one'), ('top', b'two'))
        self.assertEqual(b'one', self.content('/srv/new/deep/deeper/file'))
        self.assertEqual(b'two', self.content('/top'))
        self.assertEqual(0o755,
                         self.lxd.instance('c1').files.get('/srv/new').mode)

    def test_below_a_file(self) -> None:
        self.inject(('/srv/file', b'one'))
        self.assertRaises(exception.InvalidInput, self.inject,
                          ('/srv/file/a/b', b'two'))
        self.assertEqual(b'one', self.content('/srv/file'))
