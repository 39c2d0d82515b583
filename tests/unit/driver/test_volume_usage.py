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

"""Usage of volumes, through the driver as Nova calls it."""

from __future__ import annotations

from typing import Any

from nova import objects

from tests.fixtures import volume_case

PATH = volume_case.PATH
SECTOR = 512


class UsageCases:
    """Tests for both modes."""

    def setUp(self) -> None:
        super().setUp()
        # A block device that was used before, for another volume perhaps.
        self.device = self.storage.add_device(self.volume.disk)
        self.count(100, 200, 300, 400)

    def count(self, *numbers: int) -> None:
        """Let the kernel count requests and sectors read and written."""
        reads, sectors_read, writes, sectors_written = numbers
        self.storage.set_attribute(
            self.device, 'stat', f'{reads} 9 {sectors_read} 9 {writes} 9 '
            f'{sectors_written} 9 9 9 9')

    def usage(self, *servers: Any) -> list[dict[str, Any]]:
        """Return the usage of the volume by servers."""
        bdm = objects.BlockDeviceMapping(volume_id=self.volume.id,
                                         device_name=PATH)
        return self.driver.get_all_volume_usage(self.context, [
            {'instance': server, 'instance_bdms': [bdm]}
            for server in servers or (self.server,)])

    def stats(self, disk: str = 'vdb') -> list[int] | None:
        return self.driver.block_stats(self.server, disk)

    def assert_usage(self, *numbers: int) -> None:
        [found] = self.usage()
        self.assertEqual(
            {'volume': self.volume.id, 'instance': self.server,
             **dict(zip(('rd_req', 'rd_bytes', 'wr_req', 'wr_bytes'),
                        numbers, strict=True))}, found)
        self.assertEqual([*numbers, -1], self.stats())

    def assert_no_usage(self) -> None:
        self.assertEqual([], self.usage())
        self.assertIsNone(self.stats())

    def test_counted_since_attached(self) -> None:
        connection = self.attach()
        self.assert_usage(0, 0, 0, 0)
        self.count(101, 208, 302, 416)
        self.assert_usage(1, 8 * SECTOR, 2, 16 * SECTOR)
        self.detach(connection)
        self.assert_no_usage()

    def test_survives_restarts_of_nova_and_the_server(self) -> None:
        self.attach()
        self.count(101, 208, 302, 416)
        self.host.driver = self.host.make_driver()
        self.assert_usage(1, 8 * SECTOR, 2, 16 * SECTOR)
        self.attach()
        self.driver.reboot(self.context, self.server, [], 'HARD', self.info())
        self.assert_usage(1, 8 * SECTOR, 2, 16 * SECTOR)

    def test_device_is_recreated(self) -> None:
        """Nova adds up what was counted before and after."""
        self.attach()
        self.storage.remove_device(self.device)
        self.assert_no_usage()
        self.storage.mounts.clear()
        self.device = self.storage.add_device(self.volume.disk)
        self.driver.reboot(self.context, self.server, [], 'HARD', self.info())
        self.count(3, 4, 5, 6)
        self.assert_usage(3, 4 * SECTOR, 5, 6 * SECTOR)

    def test_another_volume(self) -> None:
        self.attach()
        self.assertIsNone(self.stats('vdc'))
        self.assertIsNone(self.stats(''))
        # Nova names the device when the volume is being attached.
        for name in ('/dev/vdc', None):
            other = objects.BlockDeviceMapping(volume_id='other',
                                               device_name=name)
            self.assertEqual([], self.driver.get_all_volume_usage(
                self.context, [
                    {'instance': self.server, 'instance_bdms': [other]},
                    {'instance': self.server, 'instance_bdms': []}]))

    def test_after_a_reboot_of_the_host(self) -> None:
        """The name of the device may be another volume's by now."""
        self.attach()
        self.driver.power_off(self.server)
        self.assert_usage(0, 0, 0, 0)
        self.devices(self.server)[f'volume-{self.volume.id}'][
            'user.nova.boot'] = 'an earlier one'
        self.assert_no_usage()

    def test_attached_by_an_earlier_version(self) -> None:
        """What was counted for it before cannot be known."""
        self.attach()
        del self.devices(self.server)[f'volume-{self.volume.id}'][
            'user.nova.counters']
        self.assert_no_usage()
        self.driver.reboot(self.context, self.server, [], 'HARD', self.info())
        self.assert_usage(0, 0, 0, 0)

    def test_server_is_gone(self) -> None:
        self.attach()
        gone = self.host.instance(self.host.image())
        self.assertEqual([self.server], [
            each['instance'] for each in self.usage(gone, self.server)])
        self.assertIsNone(self.driver.block_stats(gone, 'vdb'))

    def test_constant_number_of_requests(self) -> None:
        self.attach()
        # The thread that follows events asks on its own account.
        self.driver._services.watcher.stop()
        with self.lxd.recording() as recorded:
            self.usage(self.server, self.server, self.server)
        self.assertEqual(1, len(recorded))
        with self.lxd.recording() as recorded:
            self.driver.get_all_volume_usage(self.context, [
                {'instance': self.server, 'instance_bdms': []}])
        self.assertEqual([], recorded)

    def test_lxd_does_not_answer(self) -> None:
        """Nova asks just before it detaches a volume."""
        self.attach()
        self.lxd.fail_next('GET', f'/1.0/instances/{self.server.name}')
        self.assertIsNone(self.stats())


class BlockUsageTest(UsageCases, volume_case.VolumeTestCase):

    def test_swapped(self) -> None:
        """The host writes the copy, not the server."""
        connection = self.attach()
        self.volume = self.storage.volume(self.kind)
        self.device = self.storage.add_device(self.volume.disk)
        self.storage.before('block_copy.copy',
                            lambda: self.count(1, 2, 3000, 4000))
        self.driver.swap_volume(self.context, connection,
                                self.volume.connection(), self.server, PATH, 0)
        self.assert_usage(0, 0, 0, 0)


class FilesystemUsageTest(UsageCases, volume_case.VolumeTestCase):

    options = {'volume_filesystems': ['ext4'], 'volume_mode': 'filesystem'}
