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

"""The disks that guests find in sysfs."""

from __future__ import annotations

import os
import pathlib
import stat

import fixtures
from nova import conf as nova_conf
from oslo_config import fixture as config_fixture
from oslo_utils import units
from oslotest import base

from nova_lxd_py.virt.guest import disk_view
from tests.fixtures import fake_block_devices
from tests.fixtures import memory_cinder

NAME = 'instance-00000001'


class DiskViewTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.host = self.useFixture(fake_block_devices.BlockDevices())
        self.top = self.useFixture(fixtures.TempDir()).path
        self.useFixture(config_fixture.Config(nova_conf.CONF)).config(
            state_path=self.top)
        self.directory = pathlib.Path(disk_view.directory(NAME))
        self.log = self.useFixture(fixtures.FakeLogger())
        # Whatever block devices this machine has.
        self.useFixture(fixtures.MockPatchObject(disk_view, '_VIRTUAL',
                                                 self.top))

    def device(self, size: int = units.Gi) -> fake_block_devices.Device:
        return self.host.add_device(memory_cinder.Disk(size))

    def show(self, **volumes: fake_block_devices.Device) -> None:
        """Show block devices under the names of the arguments."""
        disk_view.show(NAME, {}, {**disk_view.devices(NAME), **{
            f'volume-{name}': {'type': 'unix-block', 'path': f'/dev/{name}',
                               'source': device.path}
            for name, device in volumes.items()}})

    def names(self) -> list[str]:
        return sorted(os.listdir(self.directory / 'block'))

    def read(self, name: str, key: str) -> str:
        return (self.directory / 'devices' / name / key).read_text().strip()

    def find(self, config: dict[str, str] | None = None, **device: str
             ) -> list[str]:
        return list(disk_view.find(config or {}, {'x': device}))

    def test_devices(self) -> None:
        found = disk_view.devices(NAME)
        self.assertEqual(
            {'/sys/block', '/sys/class/block', '/sys/dev/block',
             '/sys/devices/virtual/block'},
            {device['path'] for device in found.values()})
        for device in found.values():
            self.assertEqual(('true', 'false'), (device['readonly'],
                                                 device['required']))
        self.useFixture(fixtures.MockPatchObject(disk_view, '_VIRTUAL',
                                                 '/no/such/directory'))
        self.assertEqual({}, disk_view.devices(NAME))

    def test_names_of_instances(self) -> None:
        for name in ('', '..', 'a/b', '.x'):
            self.assertRaises(ValueError, disk_view.directory, name)

    def test_show(self) -> None:
        first, second = self.device(), self.device(2 * units.Gi)
        for _time in range(2):
            self.show(vdb=first, vdc=second)
            self.assertEqual(['vdb', 'vdc'], self.names())
        number = (f'{os.major(second.number)}:{os.minor(second.number)}')
        self.assertEqual(number, self.read('vdc', 'dev'))
        self.assertEqual(str(2 * units.Gi // 512), self.read('vdc', 'size'))
        self.assertIn(f'MINOR={os.minor(second.number)}\nDEVNAME=vdc',
                      self.read('vdc', 'uevent'))
        # As they are mounted in the guest.
        for path, target in (
                ('block/vdc', '../devices/virtual/block/vdc'),
                ('class/vdc', '../../devices/virtual/block/vdc'),
                (f'dev/{number}', '../../devices/virtual/block/vdc')):
            self.assertEqual(target, os.readlink(self.directory / path))
        self.show(vdb=second)
        self.assertEqual(['vdb'], self.names())
        self.assertEqual([number], os.listdir(self.directory / 'dev'))
        self.assertEqual(number, self.read('vdb', 'dev'))
        self.assertEqual(['vdb'], os.listdir(self.directory / 'devices'))
        self.assertEqual('', self.log.output)

    def test_modes(self) -> None:
        """Every user of the guest can read it, whatever the umask."""
        self.addCleanup(os.umask, os.umask(0o077))
        self.show(vdb=self.device())
        for path, mode in (('block', 0o755), ('devices/vdb', 0o755),
                           ('devices/vdb/queue', 0o755),
                           ('devices/vdb/queue/rotational', 0o644)):
            about = (self.directory / path).stat()
            self.assertEqual(mode, stat.S_IMODE(about.st_mode), path)

    def test_only_where_it_is_mounted(self) -> None:
        """Not for servers that run since before, nor for copies."""
        for devices in ({}, {'sysfs-block': {'type': 'none'}}):
            disk_view.show(NAME, {}, devices)
            self.assertFalse(self.directory.exists())

    def test_find(self) -> None:
        path = self.device().path
        self.assertEqual(['vdb'], self.find(
            type='unix-block', path='/dev/vdb', source=path))
        self.assertEqual(['sdc'], self.find(
            type='disk', path='/mnt/sdc', source='/srv',
            **{disk_view.KEY_DEVICE: path}))
        for device in (
                {'type': 'disk', 'path': '/', 'pool': 'default'},
                {'type': 'disk', 'path': '/mnt', 'source': path},
                {'type': 'unix-block', 'source': path,
                 'path': '/dev/disk/by-label/config-2'},
                {'type': 'unix-block', 'source': path, 'path': '/dev/../x'},
                {'type': 'unix-block', 'source': '/dev/null',
                 'path': '/dev/vdb'},
                {'type': 'unix-block', 'source': '/no/such/device',
                 'path': '/dev/vdb'},
                {'type': 'nic', 'name': 'eth0'}, {'type': 'none'}):
            self.assertEqual([], self.find(**device), device)

    def test_root(self) -> None:
        quota = {'user.nova.root_quota': '10GiB'}
        found = disk_view.find(quota, {})
        self.assertEqual(['sda'], list(found))
        self.assertEqual(str(10 * units.Gi // 512),
                         found['sda'].attributes['size'])
        self.assertEqual([], self.find(type='none'))
        device = self.device()
        found = disk_view.find({disk_view.KEY_ROOT_DEVICE: device.path,
                                **quota}, {})
        self.assertEqual(os.minor(device.number), found['sda'].number[1])
        self.assertEqual(['vda', 'sda'], self.find(
            quota, type='unix-block', path='/dev/sda', source=device.path))

    def test_update_sizes(self) -> None:
        disk_view.update_sizes(NAME)
        device = self.device()
        self.show(vdb=device)
        device.size = 3 * units.Gi
        self.host.update_sysfs(device)
        disk_view.update_sizes(NAME)
        self.assertEqual(str(3 * units.Gi // 512), self.read('vdb', 'size'))
        (self.directory / 'devices' / 'vdb' / 'dev').write_text('junk')
        disk_view.update_sizes(NAME)
        self.assertIn('Could not show the size', self.log.output)

    def test_errors_are_logged(self) -> None:
        pathlib.Path(self.top, disk_view.DIRECTORY).write_text('no directory')
        self.show(vdb=self.device())
        self.assertIn('Could not show its disks', self.log.output)

    def test_remove_and_sweep(self) -> None:
        disk_view.sweep(set(), 0)
        self.show(vdb=self.device())
        disk_view.sweep({NAME}, 0)
        disk_view.sweep(set(), 600)
        self.assertTrue(self.directory.exists())
        disk_view.sweep(set(), 0)
        self.assertFalse(self.directory.exists())
        self.show(vdb=self.device())
        for _time in range(2):
            disk_view.remove(NAME)
            self.assertFalse(self.directory.exists())
