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

"""Root disks on a real LXD, through the driver."""

from __future__ import annotations

import unittest

from nova.compute import power_state

from tests.fixtures import driver_host
from tests.fixtures import lxd_daemon

NO_LXD = lxd_daemon.missing()


@unittest.skipIf(NO_LXD, NO_LXD or '')
class MovedRootDiskTest(unittest.TestCase):
    """An operator moves an instance with ``lxc move -s``."""

    POOL = 'moved'

    def setUp(self) -> None:
        super().setUp()
        self.api = lxd_daemon.shared().api
        self.api.must('POST', '/1.0/storage-pools', {
            'name': self.POOL, 'driver': 'dir', 'config': {}})
        self.addCleanup(self.api.must, 'DELETE',
                        f'/1.0/storage-pools/{self.POOL}')
        self.host = driver_host.DriverHost()
        self.host.setUp()
        self.addCleanup(self.host.cleanUp)
        self.server = self.host.spawn(self.host.instance(
            self.host.image(), config_drive='True'))
        self.host.run(self.server, 'sh', '-c', 'echo kept > /root/file')
        self.host.driver.power_off(self.server)
        self.api.must('POST', f'/1.0/instances/{self.server.name}',
                      {'name': self.server.name, 'migration': True,
                       'pool': self.POOL},
                      params={'project': self.host.project})
        self.assertEqual(self.POOL, self.root()['pool'])

    def root(self) -> dict[str, str]:
        return self.host.lxd_instances()[self.server.name]['devices']['root']

    def test_starts_where_it_is(self) -> None:
        driver, context = self.host.driver, self.host.context
        driver.power_on(context, self.server, [])
        driver.reboot(context, self.server, [], 'HARD')
        self.assertEqual(power_state.RUNNING, self.host.state(self.server))
        self.assertEqual(self.POOL, self.root()['pool'])
        self.assertEqual('kept', self.host.run(
            self.server, 'cat', '/root/file').strip())

    def test_new_limits(self) -> None:
        self.host.driver.power_on(self.host.context, self.server, [])
        self.server.flavor.extra_specs['quota:disk_read_iops_sec'] = '100'
        self.host.driver.reboot(self.host.context, self.server, [], 'HARD')
        self.assertEqual('100iops', self.root()['limits.read'])

    def test_delete(self) -> None:
        self.host.driver.destroy(self.host.context, self.server, [])
        self.assertNotIn(self.server.name, self.host.lxd_instances())
        self.assertEqual([], self.host.lxd_volumes())
