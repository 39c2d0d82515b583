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

"""An image that is read from a volume."""

from __future__ import annotations

import io

import fixtures
from oslotest import base

from nova_lxd_py.virt.privileged import rootfs
from nova_lxd_py.virt.volume import provisioning


class CopyOnVolumeTestCase(base.BaseTestCase):

    CONTENT = b'image' * 1000

    def download(self, size: int) -> bytes:
        self.useFixture(fixtures.MockPatchObject(
            rootfs, 'read', lambda path, position, size:
                self.CONTENT[position:position + min(size, 999)]))
        stream = io.BytesIO()
        provisioning._CopyOnVolume('/dev/x', size).download(
            None, 'image', stream)
        return stream.getvalue()

    def test_no_more_than_the_image(self) -> None:
        self.assertEqual(self.CONTENT[:4321], self.download(4321))

    def test_volume_ends_within_it(self) -> None:
        self.assertRaises(OSError, self.download, 5001)
