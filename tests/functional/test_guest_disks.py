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

"""The disks that guests find in sysfs, on a real LXD."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import types
from typing import Any
import unittest
from unittest import mock

from nova.compute import power_state
from nova.compute import vm_states
from nova.network import model as network_model
from nova import objects
from oslo_utils import units

from nova_lxd_py.virt.guest import disk_view
from tests.fixtures import boot_volume_host
from tests.fixtures import busybox_image
from tests.fixtures import disks
from tests.fixtures import host_programs
from tests.fixtures import lab_volumes
from tests.fixtures import lxd_daemon
from tests.fixtures import volume_host

NO_LXD = lxd_daemon.missing()

#: Where sysfs has block devices, and what it has of file systems on them.
SYSFS = ('/sys/block', '/sys/class', '/sys/dev', '/sys/devices', '/sys/fs')


class GuestDisksHost(volume_host.VolumeHost):
    """A host whose image has lsblk."""

    kind = lab_volumes.FileVolume

    def setUp(self) -> None:
        super().setUp()
        self.image = self.host.image(busybox_image.unified(
            host_programs.files('lsblk')))

    def spawn(self, extra_specs: dict[str, str] | None = None,
              **kwargs: Any) -> objects.Instance:
        server = self.host.spawn(
            self.host.instance(self.image, extra_specs), self.image, **kwargs)
        server.info_cache = objects.InstanceInfoCache(
            instance_uuid=server.uuid,
            network_info=network_model.NetworkInfo())
        return server

    def lsblk(self, server: Any) -> dict[str, dict[str, Any]]:
        """Run lsblk in a guest.

        :returns: what it says of each disk, by name.
        """
        found = json.loads(self.host.run(server, *host_programs.command(
            'lsblk', '-J', '-b', '-o',
            'NAME,MAJ:MIN,SIZE,RO,TYPE,MOUNTPOINT')))
        return {disk['name']: disk for disk in found['blockdevices']}

    def sizes(self, server: Any) -> dict[str, int]:
        """Return the sizes of the disks of a guest by lsblk, in GiB; those of
        other types than disks under their type."""
        return {name if disk['type'] == 'disk' else disk['type']:
                disk['size'] // units.Gi
                for name, disk in self.lsblk(server).items()}

    def can_read(self, server: Any, identifier: str) -> bool:
        """Return whether the name of a volume is in sysfs of a guest."""
        found = self.host.run(
            server, 'sh', '-c',
            f'busybox grep -rsl {identifier} {" ".join(SYSFS)}; true')
        return bool(found.strip())

    def directories(self) -> set[str]:
        top = pathlib.Path(lab_volumes.CONF.state_path, disk_view.DIRECTORY)
        return {path.name for path in top.glob('*')}


@unittest.skipIf(NO_LXD, NO_LXD or '')
class GuestDisksTest(GuestDisksHost, unittest.TestCase):

    def test_own_disks_only(self) -> None:
        server, other = self.spawn(), self.spawn(power_on=False)
        secret = self.storage.volume()
        foreign = self.attach(other, secret)
        self.assertEqual({'sda': 1}, self.sizes(server))
        self.assertFalse(self.can_read(server, secret.id))
        volume = self.storage.volume()
        connection = self.attach(server, volume)
        self.assertEqual({'sda': 1, 'vdb': 1}, self.sizes(server))
        about = os.stat(connection['lxd_device_path'])
        self.assertEqual(
            f'{os.major(about.st_rdev)}:{os.minor(about.st_rdev)}',
            self.lsblk(server)['vdb']['maj:min'])
        self.grow(server, volume, connection)
        self.assertEqual({'sda': 1, 'vdb': 2}, self.sizes(server))
        self.assertFalse(self.can_read(server, secret.id))
        self.assertFalse(self.can_read(server, volume.id))
        # What root in the guest cannot change, others cannot either.
        self.assertRaisesRegex(
            AssertionError, 'Read-only', self.host.run, server, 'sh', '-c',
            'echo 1 >/sys/block/vdb/size')
        self.detach(server, connection)
        self.assertEqual({'sda': 1}, self.sizes(server))
        self.detach(other, foreign)
        for each in (server, other):
            self.destroy(each)
        self.assertEqual(set(), self.directories())

    def test_without_it(self) -> None:
        """What this is for; and servers of before, until they start."""
        self.host._set('guest_disk_view', False, 'lxd')
        server, other = self.spawn(), self.spawn(power_on=False)
        secret, volume = self.storage.volume(), self.storage.volume()
        foreign = self.attach(other, secret)
        self.assertTrue(self.can_read(server, secret.id))
        lab_volumes.CONF.set_override('guest_disk_view', True, 'lxd')
        connection = self.attach(server, volume)
        self.assertIn('loop', self.sizes(server))
        info = disks.described(volume.mapping())
        self.reboot(server, info)
        self.assertEqual({'sda': 1, 'vdb': 1}, self.sizes(server))
        self.assertFalse(self.can_read(server, secret.id))
        self.detach(server, connection)
        self.detach(other, foreign)

    def test_starts(self) -> None:
        server, volume = self.spawn(), self.storage.volume()
        connection = self.attach(server, volume)
        info = disks.described(volume.mapping())
        found = {'sda': 1, 'vdb': 1}
        for kind in ('HARD', 'SOFT'):
            self.reboot(server, info, kind)
            self.assertEqual(found, self.sizes(server))
        # The guest reboots itself where an operator has removed the files.
        shutil.rmtree(disk_view.directory(server.name))
        done = self.host.lxd.client('restart', '--force', server.name,
                                    '--project', self.host.project)
        self.assertEqual(0, done.returncode, done.stderr)
        self.host.wait_for_state(server, power_state.RUNNING)
        self.assertIn('loop', self.sizes(server))
        self.host.driver.power_off(server)
        self.detach(server, connection)
        self.host.driver.power_on(self.host.context, server, [],
                                  disks.described())
        self.assertEqual({'sda': 1}, self.sizes(server))

    def test_crash(self) -> None:
        """nova-compute ends when LXD has the device, or has it no longer."""
        server, volume = self.spawn(), self.storage.volume()
        with mock.patch.object(disk_view, 'show'):
            connection = self.attach(server, volume)
        self.assertEqual({'sda': 1}, self.sizes(server))
        left = pathlib.Path(disk_view.directory('instance-0000beef'), 'block')
        left.mkdir(parents=True)
        self.host.restart_driver()
        self.assertEqual({'sda': 1, 'vdb': 1}, self.sizes(server))
        self.assertFalse(left.exists())
        with mock.patch.object(disk_view, 'show'):
            self.detach(server, connection)
        self.host.restart_driver()
        self.assertEqual({'sda': 1}, self.sizes(server))

    def test_rescue(self) -> None:
        server, volume = self.spawn(), self.storage.volume()
        connection = self.attach(server, volume)
        self.host.driver.power_off(server)
        self.host.driver.rescue(self.host.context, server, [], self.image,
                                'secret', {}, [])
        server.vm_state = vm_states.RESCUED
        rescue = types.SimpleNamespace(name=server.name + '-rescue')
        self.assertEqual({'sda': 1}, self.sizes(rescue))
        self.assertFalse(self.can_read(rescue, volume.id))
        with mock.patch.object(
                objects.BlockDeviceMappingList, 'get_by_instance_uuid',
                lambda *args: objects.BlockDeviceMappingList(objects=[])), \
                mock.patch('nova.virt.driver.get_block_device_info',
                           lambda *args: disks.described(volume.mapping())):
            self.host.driver.unrescue(self.host.context, server)
        self.assertEqual({'sda': 1, 'vdb': 1}, self.sizes(server))
        self.assertEqual({server.name}, self.directories())
        self.detach(server, connection)

    def test_nested(self) -> None:
        """Containers in a guest have a sysfs of their own."""
        server = self.spawn({'lxd:nested_allowed': 'true'})
        self.assertEqual({'sda': 1}, self.sizes(server))
        self.assertIn('kernel', self.host.run(
            server, 'busybox', 'unshare', '-U', '-r', '-m', '-n', 'sh', '-c',
            'mount -t sysfs none /mnt && ls /mnt'))


@unittest.skipIf(NO_LXD, NO_LXD or '')
class MountedGuestDisksTest(GuestDisksHost, unittest.TestCase):
    options = {'volume_filesystems': ['ext4'], 'volume_mode': 'filesystem'}

    def test_mounted(self) -> None:
        server, volume = self.spawn(), self.storage.volume()
        connection = self.attach(server, volume)
        for _turn in range(2):
            self.assertEqual({'sda': 1, 'vdb': 1}, self.sizes(server))
            self.assertEqual('/mnt/vdb',
                             self.lsblk(server)['vdb']['mountpoint'])
            self.reboot(server, disks.described(volume.mapping()))
        self.assertFalse(self.can_read(server, volume.id))
        self.detach(server, connection)
        self.assertEqual({'sda': 1}, self.sizes(server))


@unittest.skipIf(NO_LXD, NO_LXD or '')
class BootedGuestDisksTest(GuestDisksHost, boot_volume_host.BootVolumeHost,
                           unittest.TestCase):

    def test_root_volume(self) -> None:
        server = self.boot(self.volume_from_image())
        self.assertEqual({'sda': 1}, self.sizes(server))
        self.assertEqual('/', self.lsblk(server)['sda']['mountpoint'])
        self.destroy(server)
        self.assert_clean()
