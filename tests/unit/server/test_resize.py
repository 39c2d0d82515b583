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


"""Resizes that are refused when a part of the work is done already."""

from __future__ import annotations

from typing import Any

import fixtures
from nova.compute import power_state
from nova import exception
from nova import objects

from nova_lxd_py.virt.guest import guest as lxd_guest
from tests.fixtures import fake_block_host
from tests.fixtures import fake_driver_host


class RefusedResizeTest(fake_driver_host.FakeDriverTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.migration = objects.Migration(
            source_compute='testhost', dest_compute='testhost')
        self.useFixture(fixtures.MonkeyPatch(
            'nova.objects.Migration.get_by_id',
            lambda cls, context, migration_id: self.migration))
        self.volume = self.storage.volume()
        self.mapping = self.volume.mapping()
        self.info = fake_block_host.described(self.mapping)
        self.server = self.host.spawn(block_device_info=self.info)
        self.before = dict(self.config(self.server)), dict(
            self.devices(self.server))

    def prepare(self, **changes: Any) -> Exception:
        flavor = self.server.flavor.obj_clone()
        flavor.memory_mb = 256
        self.server.new_flavor = flavor
        self.server.migration_context = objects.MigrationContext(
            migration_id=1, new_numa_topology=None)
        error = self.assertRaises(
            exception.InstanceFaultRollback,
            self.driver.migrate_disk_and_power_off, self.context, self.server,
            self.driver.get_host_ip_addr(), flavor, [], self.info)
        return error.inner_exception

    def assert_rolled_back(self) -> None:
        self.assert_state(power_state.RUNNING, self.server)
        config, devices = self.before
        self.assertEqual(devices, self.devices(self.server))
        for key in ('limits.memory', lxd_guest.KEY_RESIZE):
            self.assertEqual(config.get(key),
                             self.config(self.server).get(key))

    def test_volume_that_cannot_be_released(self) -> None:
        self.storage.fail('brick.disconnect', OSError('busy'))
        error = self.prepare()
        self.assertIn(self.volume.id, str(error))
        self.assert_rolled_back()

    def test_lxd_refuses(self) -> None:
        self.lxd.fail_next('PUT', f'/1.0/instances/{self.server.name}', 500,
                           'x')
        self.assertIsInstance(self.prepare(), exception.ResizeError)
        self.assert_rolled_back()

    def test_another_host_with_the_same_address(self) -> None:
        self.migration.dest_compute = 'other'
        self.assertIsInstance(self.prepare(), exception.MigrationError)
        self.assert_rolled_back()

    def test_lxd_that_does_not_answer(self) -> None:
        """The guest is started when LXD can be reached again."""
        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.server.rollback.INTERVAL', 0.1))
        self.storage.fail('brick.disconnect', OSError('busy'))
        fault = self.lxd.drop_connection(
            'PUT', f'/1.0/instances/{self.server.name}/state',
            where={'action': 'start'})
        self.assertIsInstance(self.prepare(), exception.ResizeError)
        self.assertEqual(1, fault.hits)
        self.assert_rolled_back()

    def test_guest_that_does_not_start_again(self) -> None:
        self.storage.fail('brick.disconnect', OSError('busy'))
        self.lxd.fail_operation(
            'PUT', f'/1.0/instances/{self.server.name}/state', 'no',
            where={'action': 'start'})
        # Still an error that leaves the server's state to Nova.
        self.assertIsInstance(self.prepare(), exception.ResizeError)
        self.assert_state(power_state.SHUTDOWN, self.server)
