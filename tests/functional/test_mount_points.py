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

"""Guests with symbolic links at their mount points, on a real LXD."""

from __future__ import annotations

from typing import Any
import unittest

from nova.compute import power_state
from nova import exception

from tests.fixtures import busybox_image
from tests.fixtures import driver_host
from tests.fixtures import lxd_daemon

NO_LXD = lxd_daemon.missing()

DISK = {'swap': None, 'block_device_mapping': [], 'ephemerals': [
    {'device_name': '/dev/sdb', 'size': 1, 'guest_format': None,
     'disk_bus': None, 'device_type': 'disk'}]}


@unittest.skipIf(NO_LXD, NO_LXD or '')
class MountPointTest(unittest.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.host = driver_host.DriverHost()
        self.host.setUp()
        self.addCleanup(self.host.cleanUp)

    def spawn(self, **files: Any) -> None:
        self.image = self.host.image(busybox_image.unified(files))
        self.server = self.host.spawn(
            self.host.instance(self.image, config_drive='True'), self.image,
            block_device_info=DISK)

    def change(self, script: str) -> None:
        self.host.run(self.server, 'sh', '-c',
                      f'umount /mnt; umount /config-drive; {script}')
        self.host.driver.power_off(self.server)

    def power_on(self) -> None:
        self.host.driver.power_on(self.host.context, self.server, [], DISK)

    def mounted(self) -> set[str]:
        return {line.split()[1] for line in self.host.run(
            self.server, 'cat', '/proc/mounts').splitlines()}

    def test_links_in_the_guest(self) -> None:
        self.spawn()
        for script, path in (('rmdir /mnt; ln -s /data /mnt', '/data'),
                             ('rm /mnt; ln -s var/x/../mnt /mnt', '/var/mnt'),
                             ('rm /mnt; mkdir /mnt', '/mnt')):
            self.change(script)
            for _turn in range(2):
                self.power_on()
                self.assertIn(path, self.mounted())
                self.host.driver.power_off(self.server)
            self.power_on()
        self.change('rmdir /config-drive; ln -s root /config-drive')
        self.power_on()
        self.assertIn('/root', self.mounted())

    def test_link_in_the_image(self) -> None:
        self.spawn(mnt='var/mnt')
        self.assertIn('/var/mnt', self.mounted())

    def test_targets_that_are_not_allowed(self) -> None:
        self.spawn()
        self.change('rmdir /mnt; true')
        for target in ('/a none bind,rw', '/proc', 'dev/x', '/', 'mnt',
                       '/a\nlxc.hook.pre-start = /x'):
            self.host.driver.destroy(self.host.context, self.server, [])
            self.spawn()
            self.change(f"rmdir /mnt; ln -s '{target}' /mnt")
            self.assertRaises(exception.NovaException, self.power_on)
            # Incus says for a moment that it runs.
            self.host.wait_for_state(self.server, power_state.SHUTDOWN)
            self.assertEqual('/mnt', self.host.lxd_instances()[
                self.server.name]['devices']['ephemeral0']['path'])
