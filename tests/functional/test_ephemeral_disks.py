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

"""Ephemeral disks and swap, through the driver, on a real LXD."""

from __future__ import annotations

import unittest

from nova.compute import power_state
from nova import exception

from nova_lxd_py.virt.storage import ephemeral_disks
from tests.fixtures import driver_case
from tests.fixtures import lxd_daemon
from tests.fixtures import variants

NO_LXD = lxd_daemon.missing()


def ephemerals(*sizes: int, **fields) -> dict:
    """Return Nova's block device info of ephemeral disks."""
    return {'swap': None, 'block_device_mapping': [], 'ephemerals': [
        {'device_name': f'/dev/sd{"bcdef"[number]}', 'size': size,
         'guest_format': None, 'disk_bus': None, 'device_type': 'disk',
         **fields} for number, size in enumerate(sizes)]}


class EphemeralDiskCases(driver_case.DriverCase):
    """Tests for every storage driver."""

    def spawn(self, *sizes: int, **fields):
        info = ephemerals(*sizes, **fields)
        return self.host.spawn(block_device_info=info), info

    def devices(self, server) -> dict:
        return self.host.lxd_instances()[server.name]['devices']

    def volume(self, server, number: int) -> dict:
        return self.host.lxd.api.must(
            'GET', f'/1.0/storage-pools/{self.host.lxd.pool}/volumes/custom/'
            f'{ephemeral_disks.volume_name(server, number)}',
            params={'project': self.host.project})

    def reboot(self, server, info) -> None:
        self.host.driver.reboot(self.host.context, server, [], 'HARD', info)

    def test_paths_sizes_and_owners(self) -> None:
        server, _info = self.spawn(1, 2)
        for number, path in enumerate(('/mnt', '/mnt/ephemeral1')):
            self.host.run(server, 'sh', '-c', f'echo {number} > {path}/file')
            self.assertEqual('0 0', self.host.run(
                server, 'stat', '-c', '%u %g', f'{path}/file').strip())
            volume = self.volume(server, number)
            self.assertEqual(f'{number + 1}GiB', volume['config']['size'])
            self.assertEqual(server.uuid, volume['config']['user.nova.uuid'])
            self.assertEqual('ephemeral', volume['config']['user.nova.role'])

    def test_content_outlives_reboots_and_repairs(self) -> None:
        server, info = self.spawn(1)
        self.host.run(server, 'sh', '-c', 'echo kept > /mnt/file')
        self.reboot(server, info)
        self.assertEqual('kept', self.host.run(
            server, 'cat', '/mnt/file').strip())
        api, params = self.host.lxd.api, {'project': self.host.project}
        described = self.host.lxd_instances()[server.name]
        del described['devices']['ephemeral0']
        api.must('PUT', f'/1.0/instances/{server.name}', described,
                 params=params)
        for _turn in range(2):
            self.reboot(server, info)
            self.assertEqual('kept', self.host.run(
                server, 'cat', '/mnt/file').strip())
        self.driver.power_off(server)
        self.driver.power_on(self.host.context, server, [], info)
        self.assertEqual('kept', self.host.run(
            server, 'cat', '/mnt/file').strip())

    def test_lost_volume_is_replaced(self) -> None:
        server, info = self.spawn(1)
        self.driver.power_off(server)
        api, params = self.host.lxd.api, {'project': self.host.project}
        described = self.host.lxd_instances()[server.name]
        del described['devices']['ephemeral0']
        api.must('PUT', f'/1.0/instances/{server.name}', described,
                 params=params)
        api.must('DELETE', f'/1.0/storage-pools/{self.host.lxd.pool}/volumes/'
                 f'custom/{ephemeral_disks.volume_name(server, 0)}',
                 params=params)
        self.reboot(server, info)
        self.host.run(server, 'touch', '/mnt/file')

    def test_growth(self) -> None:
        server, _info = self.spawn(1)
        self.host.run(server, 'sh', '-c', 'echo kept > /mnt/file')
        self.reboot(server, ephemerals(2, 1))
        self.assertEqual('2GiB', self.volume(server, 0)['config']['size'])
        self.assertEqual('kept', self.host.run(
            server, 'cat', '/mnt/file').strip())
        self.host.run(server, 'touch', '/mnt/ephemeral1/file')
        # A smaller size is ignored.
        self.reboot(server, ephemerals(1, 1))
        self.assertEqual('2GiB', self.volume(server, 0)['config']['size'])

    def test_destroy_deletes_them(self) -> None:
        server, info = self.spawn(1, 1)
        self.driver.destroy(self.host.context, server, [], info)
        self.assertEqual([], self.host.lxd_volumes())
        server, _info = self.spawn(1, 1)
        # Nova does not always pass the block device info.
        self.driver.destroy(self.host.context, server, [], None)
        self.assertEqual([], self.host.lxd_volumes())

    def test_destroy_without_the_disks_keeps_them(self) -> None:
        server, info = self.spawn(1)
        self.host.run(server, 'sh', '-c', 'echo kept > /mnt/file')
        self.driver.destroy(self.host.context, server, [], info,
                            destroy_disks=False)
        self.assertEqual(1, len(self.host.lxd_volumes()))
        self.assertNotIn('ephemeral0', self.devices(server))
        self.reboot(server, info)
        self.assertEqual('kept', self.host.run(
            server, 'cat', '/mnt/file').strip())

    def test_failed_spawn_leaves_nothing(self) -> None:
        image = self.host.image()
        server = self.host.instance(image, {'lxd:no-such-thing': 'true'})
        self.assertRaises(exception.InvalidInput, self.host.spawn, server,
                          image, block_device_info=ephemerals(1, 1))
        self.assertEqual([], self.host.lxd_volumes())
        del server.flavor.extra_specs['lxd:no-such-thing']
        self.host.spawn(server, image, block_device_info=ephemerals(1))

    def test_build_after_a_crash_gets_empty_disks(self) -> None:
        server, info = self.spawn(1, 1)
        self.host.run(server, 'touch', '/mnt/old')
        image = self.host.image()
        self.driver.spawn(self.host.context, server, image, [], None, {}, [],
                          ephemerals(1))
        self.assertNotIn('old', self.host.run(server, 'ls', '/mnt'))
        self.assertEqual(1, len(self.host.lxd_volumes()))

    def test_format_and_encryption(self) -> None:
        server, _info = self.spawn(1, guest_format='ext4')
        self.host.run(server, 'touch', '/mnt/file')
        self.assertRaises(exception.InvalidInput, self.spawn, 1,
                          encrypted=True)

    def test_disks_of_others_stay(self) -> None:
        first, info = self.spawn(1)
        self.spawn(1)
        self.driver.destroy(self.host.context, first, [], info)
        self.assertEqual(1, len(self.host.lxd_volumes()))

    def test_swap(self) -> None:
        image = self.host.image()
        plain = self.host.spawn(image=image)
        self.assertEqual('false', self._swap(plain))
        asked = self.host.instance(image, swap=64)
        self.host.spawn(asked, image, block_device_info={
            'swap': {'device_name': '/dev/sdb', 'swap_size': 32},
            'ephemerals': [], 'block_device_mapping': []})
        self.assertNotEqual('false', self._swap(asked))
        self.assertEqual(power_state.RUNNING, self.host.state(asked))

    def _swap(self, server) -> str:
        return self.host.lxd_instances()[server.name]['config'][
            'limits.memory.swap']


@unittest.skipIf(NO_LXD, NO_LXD or '')
class BtrfsDiskTest(EphemeralDiskCases, unittest.TestCase):
    pool_driver = 'btrfs'

    def test_each_has_its_own_quota(self) -> None:
        server, _info = self.spawn(1, 1)
        with self.assertRaises(AssertionError):
            self.host.run(server, 'dd', 'if=/dev/zero', 'of=/mnt/fill',
                          'bs=1M', 'count=1100')
        self.host.run(server, 'dd', 'if=/dev/zero',
                      'of=/mnt/ephemeral1/fill', 'bs=1M', 'count=10')
        self.host.run(server, 'dd', 'if=/dev/zero', 'of=/root/fill',
                      'bs=1M', 'count=10')


@unittest.skipIf(NO_LXD, NO_LXD or '')
@variants.keep(
    'test_paths_sizes_and_owners', 'test_content_outlives_reboots_and_repairs',
    'test_growth', 'test_destroy_deletes_them')
class DirectoryDiskTest(EphemeralDiskCases, unittest.TestCase):
    pool_driver = 'dir'


@unittest.skipIf(NO_LXD, NO_LXD or '')
@variants.keep(
    'test_paths_sizes_and_owners', 'test_content_outlives_reboots_and_repairs',
    'test_growth', 'test_destroy_deletes_them')
class IsolatedDiskTest(EphemeralDiskCases, unittest.TestCase):
    pool_driver = 'btrfs'
    options = {'idmap_isolation': 'server'}
