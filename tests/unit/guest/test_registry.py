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

"""The registry of LXD instances: locks and what is forgotten with them."""

from __future__ import annotations

import threading

from nova import objects

from nova_lxd_py.virt.guest import registry
from tests.fixtures import session_case

UUID = '0c1e9f0a-1111-4222-8333-444455556666'
OTHER = '0c1e9f0a-1111-4222-8333-444455557777'


class ChangingTestCase(session_case.SessionTestCase):

    def setUp(self):
        super().setUp()
        self.guests = registry.GuestRegistry(self.session)
        self.forgotten = []
        self.guests.on_change(
            lambda instance: self.forgotten.append(instance.uuid))
        self.server = objects.Instance(id=1, uuid=UUID)

    def test_forgets_after_a_change(self):
        with self.guests.changing(self.server):
            self.assertEqual([], self.forgotten)
        self.assertEqual([UUID], self.forgotten)

    def test_forgets_after_a_change_that_failed_half_way(self):
        def fail():
            with self.guests.changing(self.server):
                raise KeyError

        self.assertRaises(KeyError, fail)
        self.assertEqual([UUID], self.forgotten)

    def test_changes_of_one_instance_never_interleave(self):
        inside = threading.Event()
        order = []

        def change():
            inside.set()
            with self.guests.changing(self.server):
                order.append('second')

        with self.guests.changing(self.server):
            thread = threading.Thread(target=change)
            thread.start()
            inside.wait(5)
            thread.join(0.3)
            self.assertTrue(thread.is_alive())
            order.append('first')
        thread.join(5)
        self.assertEqual(['first', 'second'], order)

    def test_changes_of_two_instances_do_not_wait(self):
        with self.guests.changing(self.server), \
                self.guests.changing(objects.Instance(id=2, uuid=OTHER)):
            pass
        self.assertEqual([OTHER, UUID], self.forgotten)
