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

"""Slots of servers that come to a host."""

from __future__ import annotations

from unittest import mock

from nova import objects
from oslo_utils.fixture import uuidsentinel as uuids
from oslotest import base

from nova_lxd_py.virt.server import transfer_slots


class IncomingSlotsTestCase(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        self.now = 1000.0
        patch = mock.patch('time.monotonic', lambda: self.now)
        patch.start()
        self.addCleanup(patch.stop)
        self.slots = transfer_slots.IncomingSlots(2)
        objects.register_all()
        self.instance = objects.Instance(uuid=uuids.instance)

    def test_number(self):
        self.assertTrue(self.slots.take(1))
        self.assertTrue(self.slots.take(2))
        self.assertFalse(self.slots.take(3))
        # The source may ask again.
        self.assertTrue(self.slots.take(2))
        self.slots.release(1)
        self.slots.release(1)
        self.assertTrue(self.slots.take(3))
        self.assertFalse(self.slots.take(1))

    def test_lease_of_a_killed_source(self):
        self.slots.take(1)
        self.slots.take(2)
        self.now += transfer_slots.LEASE - 1
        with self.slots.used(2, self.instance):
            pass
        self.assertFalse(self.slots.take(3))
        self.now += 2
        self.assertTrue(self.slots.take(3))
        self.assertFalse(self.slots.take(4))

    def test_long_call(self):
        self.slots.take(1)
        with self.slots.used(1, self.instance):
            with self.slots.used(2, self.instance):
                self.now += 2 * transfer_slots.LEASE
                self.assertFalse(self.slots.take(3))
            self.assertFalse(self.slots.take(3))
        self.now += transfer_slots.LEASE + 1
        self.assertTrue(self.slots.take(3))
        self.assertTrue(self.slots.take(4))

    def test_discarded_during_a_call(self):
        with self.slots.used(1, self.instance):
            self.slots.release(1)
        for number in (2, 3):
            self.assertTrue(self.slots.take(number))

    def test_instance_of_a_call(self):
        other = objects.Instance(uuid=uuids.other)
        with self.slots.used(1, self.instance):
            # Also if its source has given up.
            self.slots.release(1)
            self.assertTrue(self.slots.is_busy_with(self.instance))
            self.assertFalse(self.slots.is_busy_with(other))
        self.assertFalse(self.slots.is_busy_with(self.instance))

    def test_call_without_a_slot(self):
        """Of a migration whose slot a restart has forgotten."""
        self.slots.take(1)
        self.slots.take(2)
        with self.slots.used(3, self.instance):
            pass
        self.slots.release(1)
        self.assertFalse(self.slots.take(4))
        self.slots.release(3)
        self.assertTrue(self.slots.take(4))
