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

"""Checks of the block device of a volume, and its names."""

from __future__ import annotations

from oslotest import base

from nova_lxd_py.virt.volume import device_identity


class IdentityTestCase(base.BaseTestCase):

    def test_not_a_device(self) -> None:
        for path in ('/dev/null', '/etc/passwd', '/no/such/thing'):
            self.assertRaises(device_identity.WrongDevice,
                              device_identity.check, path, {'data': {}}, 1)

    def test_persistent_names(self) -> None:
        for path in ('/dev/sda', '/dev/sdaa', '/dev/dm-3', '/dev/nvme0n1',
                     '/dev/vdb'):
            self.assertTrue(device_identity.is_fleeting(path))
        for path in ('/dev/disk/by-id/wwn-0x1', '/dev/loop3', '/dev/vg/lv',
                     '/dev/mapper/x', '/dev/rbd/pool/image'):
            self.assertFalse(device_identity.is_fleeting(path))
            self.assertEqual(path, device_identity.stable_path(path))
