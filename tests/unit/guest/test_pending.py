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

import unittest

from nova_lxd_py.virt.guest import pending


class ArrivalsTest(unittest.TestCase):

    def setUp(self):
        super().setUp()
        self.arrivals = pending.PendingInstances()

    def test_who_makes_it_hears_of_it(self):
        with self.arrivals.expected('one', {'a': 'b'}) as seen:
            self.assertIsNone(self.arrivals.expect('other'))
            self.assertFalse(seen.is_set())
            self.assertEqual({'a': 'b'}, self.arrivals.expect('one'))
            self.assertTrue(seen.is_set())

    def test_nothing_is_kept(self):
        with self.assertRaises(ZeroDivisionError):
            with self.arrivals.expected('one', {}):
                raise ZeroDivisionError
        self.assertIsNone(self.arrivals.expect('one'))

    def test_a_second_attempt_is_not_ended_by_the_first(self):
        with self.arrivals.expected('one', {'attempt': '1'}):
            second = self.arrivals.expected('one', {'attempt': '2'})
            second.__enter__()
        self.assertEqual({'attempt': '2'}, self.arrivals.expect('one'))
        second.__exit__(None, None, None)
        self.assertIsNone(self.arrivals.expect('one'))
