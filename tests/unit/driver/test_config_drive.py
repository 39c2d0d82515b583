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


"""Config drives, through the driver as Nova calls it."""

from __future__ import annotations

import os
from typing import Any

from nova.compute import power_state
from nova import exception
from nova import objects

from nova_lxd_py.virt.guest import disk_view
from tests.fixtures import driver_host
from tests.fixtures import fake_driver_host

#: Stands in for genisoimage: all files of the directory, one after another.
_ISO = """#!/bin/sh
while [ "$1" != -o ]; do shift; done
for last; do :; done
find "$last" -type f -exec cat {} + > "$2"
"""


class ConfigDriveTest(fake_driver_host.FakeDriverTestCase):

    options = {'config_drive_device': True}

    def setUp(self) -> None:
        directory = self.useFixture(driver_host.fixtures.TempDir()).path
        self.program = os.path.join(directory, 'genisoimage')
        self.provide(_ISO)
        cfg = driver_host.CONF
        cfg.set_override('mkisofs_cmd', self.program)
        self.addCleanup(cfg.clear_override, 'mkisofs_cmd')
        # It is read from the configuration's directories otherwise.
        self.useFixture(driver_host.fixtures.MonkeyPatch(
            'nova.version.loaded', True))
        super().setUp()

    def provide(self, script: str) -> None:
        with open(self.program, 'w') as stream:
            stream.write(script)
        os.chmod(self.program, 0o755)

    def spawn(self, extra_specs: dict[str, str] | None = None, **kwargs: Any
              ) -> objects.Instance:
        image = self.host.image()
        return self.host.spawn(
            self.host.instance(image, extra_specs, config_drive='True'),
            image, admin_password='s3cret-9', **kwargs)

    def disks(self) -> list[bytes]:
        """Contents of the block devices of config drives."""
        return [device.disk.data for device in self.storage.devices.values()]

    def backups(self) -> list[dict[str, bytes]]:
        """Backups that LXD has of each volume."""
        return [volume.backups
                for volume in self.lxd.daemon.store.volumes.values()]

    def test_device(self) -> None:
        server = self.spawn()
        [content] = self.disks()
        self.assertIn(b's3cret-9', content)
        self.assertEqual({'config-drive', 'config-drive-disk',
                          'config-drive-label', 'root'},
                         {name for name in self.devices(server)
                          if not disk_view.is_part(name)})
        [device] = self.storage.devices.values()
        self.assertTrue(device.read_only)
        # The file that it was made of is gone, only the device has it.
        self.assertFalse(os.path.exists(device.file))
        self.driver.destroy(self.context, server, [])
        self.assert_nothing_left()

    def test_after_a_reboot_of_the_host(self) -> None:
        """It is made again of what LXD keeps, with the password; no copy of
        that stays in LXD."""
        server = self.spawn()
        [before] = self.disks()
        self.driver.power_off(server)
        for device in list(self.storage.devices.values()):
            self.storage.remove_device(device)
        self.lxd.clear_requests()
        self.driver.power_on(self.context, server, [])
        self.assert_state(power_state.RUNNING, server)
        [after] = self.disks()
        self.assertEqual(sorted(before), sorted(after))
        self.assertEqual(1, self.lxd.count('GET', '*/backups/*/export'))
        self.assertEqual([{}], self.backups())

    def test_backup_that_cannot_be_read(self) -> None:
        """The copy with the password goes in any case."""
        server = self.spawn()
        self.driver.power_off(server)
        for device in list(self.storage.devices.values()):
            self.storage.remove_device(device)
        self.lxd.fail_next('GET', '*/backups/*/export')
        self.assertRaises(exception.NovaException, self.driver.power_on,
                          self.context, server, [])
        self.assertEqual([{}], self.backups())

    def test_lost(self) -> None:
        """Without the volume there is no password any more."""
        server = self.spawn()
        self.driver.power_off(server)
        self.lxd.daemon.store.volumes.clear()
        for device in list(self.storage.devices.values()):
            self.storage.remove_device(device)
        self.driver.power_on(self.context, server, [])
        self.assert_state(power_state.RUNNING, server)
        [content] = self.disks()
        self.assertNotIn(b's3cret-9', content)

    def test_who_wants_it(self) -> None:
        server = self.spawn({'lxd:config_drive_device': 'false'})
        self.assertEqual([], self.disks())
        self.assertIn('config-drive', self.devices(server))

    def test_program_fails(self) -> None:
        self.provide('#!/bin/sh\nexit 1\n')
        self.assertRaises(exception.ComputeResourcesUnavailable, self.spawn)
        self.assert_nothing_left()

    def test_program_is_missing(self) -> None:
        os.unlink(self.program)
        self.assertRaises(exception.ComputeResourcesUnavailable, self.spawn)
        self.assert_nothing_left()
        self.assertRaises(exception.InvalidConfiguration,
                          self.host.restart_driver)

    def test_no_loop_device(self) -> None:
        self.storage.fail('loop.attach', OSError(16, 'no free loop device'))
        self.assertRaises(exception.ComputeResourcesUnavailable, self.spawn)
        self.assert_nothing_left()
