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

"""The disks that guests find in sysfs, through the driver."""

from __future__ import annotations

import os
import pathlib
from typing import Any
from unittest import mock

from oslo_utils import units

from nova_lxd_py import conf
from nova_lxd_py.virt.guest import disk_view
from tests.fixtures import disks
from tests.fixtures import volume_case


class GuestDisksTestCase(volume_case.VolumeTestCase):

    def shown(self, name: str | None = None) -> dict[str, int]:
        """Return the sizes of the disks of a guest in GiB, by name."""
        top = pathlib.Path(disk_view.directory(name or self.server.name))
        return {link: int((top / 'devices' / link / 'size').read_text()) *
                512 // units.Gi for link in os.listdir(top / 'block')}

    def mounted(self, server: Any = None) -> set[str]:
        return {name for name in self.devices(server or self.server)
                if disk_view.is_part(name)}

    def directories(self) -> set[str]:
        return set(os.listdir(os.path.join(conf.CONF.state_path,
                                           disk_view.DIRECTORY)))

    def test_attach_extend_detach(self) -> None:
        self.assertEqual(4, len(self.mounted()))
        self.assertEqual({'sda': 1}, self.shown())
        self.assertEqual(1, self.driver.get_instance_diagnostics(
            self.server).num_disks)
        connection = self.attach()
        self.assertEqual({'sda': 1, 'vdb': 1}, self.shown())
        self.volume.extend(2)
        self.driver.extend_volume(self.context, connection, self.server,
                                  2 * units.Gi)
        self.assertEqual({'sda': 1, 'vdb': 2}, self.shown())
        self.detach(connection)
        self.assertEqual({'sda': 1}, self.shown())
        self.driver.destroy(self.context, self.server, [])
        self.assertEqual(set(), self.directories())

    def test_crash(self) -> None:
        with mock.patch.object(disk_view, 'show'):
            self.attach()
        left = pathlib.Path(disk_view.directory('instance-0000beef'))
        left.mkdir()
        self.host.restart_driver()
        self.assertEqual({'sda': 1, 'vdb': 1}, self.shown())
        self.assertEqual({self.server.name}, self.directories())

    def test_option(self) -> None:
        """Servers get it, and lose it, at their next start."""
        conf.CONF.set_override('guest_disk_view', False, 'lxd')
        self.addCleanup(conf.CONF.clear_override, 'guest_disk_view', 'lxd')
        other = self.host.spawn()
        self.assertEqual(set(), self.mounted(other))
        self.assertEqual({self.server.name}, self.directories())
        self.driver.reboot(self.context, self.server, [], 'HARD',
                           disks.described())
        self.assertEqual(set(), self.mounted())
        conf.CONF.set_override('guest_disk_view', True, 'lxd')
        for server in (self.server, other):
            self.driver.reboot(self.context, server, [], 'HARD',
                               disks.described())
            self.assertEqual(4, len(self.mounted(server)))
            self.assertEqual({'sda': 1}, self.shown(server.name))
