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

"""Device names that the driver chooses for volumes."""

from __future__ import annotations

from nova import exception
from nova import objects
from oslo_config import fixture as config_fixture
from oslotest import base

from nova_lxd_py import conf
from nova_lxd_py.virt import driver

objects.register_all()


class DeviceNameTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.cfg = self.useFixture(config_fixture.Config(conf.CONF))
        self.instance = objects.Instance(root_device_name='/dev/sda')
        self.mappings = objects.BlockDeviceMappingList(objects=[
            objects.BlockDeviceMapping(device_name=name)
            for name in ('/dev/sda', '/dev/sdb', None)])

    def choose(self) -> str:
        return driver.LXDDriver.get_device_name_for_instance(
            None, self.instance, self.mappings, {})

    def test_next(self) -> None:
        self.assertEqual('/dev/sdc', self.choose())

    def test_most_disks(self) -> None:
        self.cfg.config(group='compute', max_disk_devices_to_attach=3)
        self.assertEqual('/dev/sdc', self.choose())
        self.cfg.config(group='compute', max_disk_devices_to_attach=2)
        self.assertRaises(exception.TooManyDiskDevices, self.choose)
