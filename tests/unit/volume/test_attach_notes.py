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

"""Notes of volumes that are being attached."""

from __future__ import annotations

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.volume import attach_notes
from tests.fixtures import session_case


class NotesTestCase(session_case.SessionTestCase):

    def guest(self) -> lxd_guest.Guest:
        return lxd_guest.Guest(self.session,
                               self.session.get('instances', 'c1'))

    def test_note_that_cannot_be_removed(self) -> None:
        """It does no harm, and what is under way goes on."""
        self.create(**{attach_notes.KEY_ATTACHING: '{"serial": "v"}'})
        self.assertEqual({'serial': 'v'}, attach_notes.read(self.guest()))
        self.lxd.fail_next('PUT', '/1.0/instances/c1', 400, 'x')
        attach_notes.clear(self.guest())
        self.assertEqual({'serial': 'v'}, attach_notes.read(self.guest()))
        attach_notes.clear(self.guest())
        self.assertIsNone(attach_notes.read(self.guest()))
