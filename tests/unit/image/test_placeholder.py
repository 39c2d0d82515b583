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

"""The image of placeholder instances."""

from __future__ import annotations

from oslotest import base

from nova_lxd_py.virt.image import placeholder


class PlaceholderTestCase(base.BaseTestCase):

    def test_is_reproducible(self) -> None:
        self.assertEqual(placeholder.archive('x86_64'),
                         placeholder.archive('x86_64'))
        self.assertNotEqual(placeholder.archive('x86_64'),
                            placeholder.archive('aarch64'))
