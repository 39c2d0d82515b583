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

"""Paths of volumes in the guest."""

from __future__ import annotations

from nova import exception
from oslotest import base

from nova_lxd_py.virt.volume import lxd_devices


class GuestPathTestCase(base.BaseTestCase):

    def test_choice(self) -> None:
        taken = ['/dev/sda', '/dev/sdb', 'sdd', None, '/dev/vdb']
        self.assertEqual('/dev/sdc', lxd_devices.choose_path(None, taken))
        self.assertEqual('/dev/sdb', lxd_devices.choose_path('', []))
        self.assertEqual('/dev/vdc',
                         lxd_devices.choose_path('/dev/vdc', taken))
        many = [f'/dev/sd{chr(letter)}' for letter in range(97, 123)]
        self.assertEqual('/dev/sdaa', lxd_devices.choose_path(None, many))
        self.assertRaises(exception.DevicePathInUse, lxd_devices.choose_path,
                          'vdb', taken)
        self.assertRaises(exception.InvalidDevicePath, lxd_devices.choose_path,
                          '/dev/null', taken)

    def test_paths(self) -> None:
        for path in ('/dev/vdb', '/dev/sdaa', '/dev/xvdc', '/dev/hda',
                     '/dev/vdb1'):
            self.assertEqual(path, lxd_devices.guest_path(path))
        self.assertEqual('/dev/vdb', lxd_devices.guest_path('vdb'))
        for path in ('/dev/null', '/dev/vd', '/dev/vdb/../null', '/dev/VDB',
                     '', None, '/etc/vdb', '/dev/vdb ', '/dev/vdb01'):
            self.assertRaises(exception.InvalidDevicePath,
                              lxd_devices.guest_path, path)
