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

"""Which tests are left in a variant of a test class."""

from __future__ import annotations

import unittest

from oslotest import base

from tests.fixtures import variants


class KeepTestCase(base.BaseTestCase):

    class Whole(unittest.TestCase):

        def test_first(self) -> None:
            """Do nothing."""

        def test_second(self) -> None:
            """Do nothing."""

    def test_inherited_and_own(self) -> None:
        @variants.keep('test_second')
        class Variant(self.Whole):

            def test_own(self) -> None:
                """Do nothing."""

        names = unittest.defaultTestLoader.getTestCaseNames
        self.assertEqual(['test_own', 'test_second'], names(Variant))
        self.assertEqual(['test_first', 'test_second'], names(self.Whole))

    def test_unknown_name(self) -> None:
        self.assertRaisesRegex(
            ValueError, 'Variant inherits no .*test_third', variants.keep(
                'test_second', 'test_third'), type(
                    'Variant', (self.Whole,), {}))
