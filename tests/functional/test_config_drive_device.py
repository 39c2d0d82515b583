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

"""Config drives as block devices, on a real LXD."""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
import subprocess
import time
import types
from typing import Any
import unittest

from nova.compute import vm_states
from nova import exception
from nova.network import model as network_model
from nova import objects

from nova_lxd_py.virt.metadata import config_drive
from nova_lxd_py.virt.metadata import config_drive_device
from tests.fixtures import busybox_image
from tests.fixtures import driver_host
from tests.fixtures import host_programs
from tests.fixtures import lab_volumes
from tests.fixtures import lxd_daemon

NO_LXD = lxd_daemon.missing()
if not NO_LXD and not shutil.which('isoinfo'):
    NO_LXD = 'the package genisoimage is not installed'

CONF = driver_host.CONF

LABEL = '/dev/disk/by-label/config-2'
METADATA = '/openstack/latest/meta_data.json'

CAN_VFAT = all(map(shutil.which, ('mkfs.vfat', 'mtools')))


def vfat_programs() -> dict[str, bytes]:
    """Return mtools with the code page of its file names, for an image."""
    if not CAN_VFAT:
        return {}
    module = next(pathlib.Path('/usr/lib').glob('*/gconv/IBM850.so'))
    return {**host_programs.files('mtools'),
            'root/IBM850.so': module.read_bytes(),
            'root/gconv-modules': b'alias CP850// IBM850//\n'
                                  b'module IBM850// INTERNAL IBM850 1\n'
                                  b'module INTERNAL IBM850// IBM850 1\n'}


class ConfigDriveDeviceCase(unittest.TestCase):

    daemon = False

    def setUp(self) -> None:
        super().setUp()
        # Nova reads its release file beside its configuration files.
        CONF([], default_config_files=[], default_config_dirs=[])
        # Nova's own test cases add options for the command line.
        self.addCleanup(CONF.clear)
        self.host = driver_host.DriverHost()
        self.host.setUp()
        self.addCleanup(self.host.cleanUp)
        # For its privsep context, which may be a daemon.
        self.storage = lab_volumes.Storage(lab_volumes.FileVolume,
                                           daemon=self.daemon)
        self.storage.setUp()
        self.addCleanup(self.storage.cleanUp)
        self.image = self.host.image(busybox_image.unified(
            {**host_programs.files('blkid', 'isoinfo'), **vfat_programs()}))
        before = self.loops()
        self.addCleanup(lambda: self.assertEqual(before, self.loops()))

    def loops(self) -> set[str]:
        """List the loop devices of the driver's config drives."""
        found = set()
        for path in pathlib.Path('/sys/block').glob(
                'loop*/loop/backing_file'):
            # Other tests create and delete loop devices meanwhile.
            with contextlib.suppress(OSError):
                text = path.read_text()
                if text.startswith(f'{CONF.state_path}/') and (
                        '/config-drive-' in text):
                    found.add(str(path))
        return found

    def instance(self, extra_specs: dict[str, str] | None = None,
                 **fields: Any) -> objects.Instance:
        return self.host.instance(
            self.image, {'lxd:config_drive_device': 'true',
                         **(extra_specs or {})},
            **{'config_drive': 'True', **fields})

    def spawn(self, *args: Any, **kwargs: Any) -> objects.Instance:
        server = self.host.spawn(
            self.instance(*args, **kwargs), self.image,
            admin_password='s3cret',
            injected_files=[('/etc/motd', b'\x00\xff')])
        self.addCleanup(self.destroy, server)
        return server

    def destroy(self, server: objects.Instance) -> None:
        self.host.driver.destroy(self.host.context, server, [])

    def program(self, server: Any, *command: str) -> str:
        return self.host.run(server, *host_programs.command(*command))

    def device(self, server: Any) -> str:
        return self.program(server, 'blkid', '-c', '/dev/null', '-L',
                            'config-2').strip()

    def metadata(self, server: Any, device: str = LABEL) -> dict[str, Any]:
        return json.loads(self.program(server, 'isoinfo', '-R', '-x',
                                       METADATA, '-i', device))

    def reboot_host(self, server: objects.Instance) -> None:
        """Detach the loop devices, which do not survive a reboot."""
        self.host.driver.power_off(server)
        for path in self.loops():
            subprocess.run(['losetup', '--detach',
                            f'/dev/{path.split("/")[3]}'], check=True)
        # The kernel waits for processes that look at the devices just now.
        deadline = time.monotonic() + 20
        while self.loops() and time.monotonic() < deadline:
            time.sleep(0.05)
        self.assertEqual(set(), self.loops())

    def assert_fails_in(self, server: objects.Instance, script: str) -> str:
        with self.assertRaises(AssertionError) as caught:
            self.host.run(server, 'sh', '-c', script)
        return str(caught.exception)


@unittest.skipIf(NO_LXD, NO_LXD or '')
class ConfigDriveDeviceTest(ConfigDriveDeviceCase):

    def test_found_by_its_label(self) -> None:
        server = self.spawn()
        device = self.device(server)
        for path in (device, LABEL):
            found = self.metadata(server, path)
            self.assertEqual(server.uuid, found['uuid'])
            self.assertEqual('s3cret', found['admin_pass'])
        # The directory exists as well.
        self.assertEqual(found, json.loads(self.host.run(
            server, 'cat', f'/config-drive{METADATA}')))
        self.assertEqual('0 0 400', self.host.run(
            server, 'stat', '-c', '%u %g %a', device).strip())

    def test_guests_cannot_change_it(self) -> None:
        for specs in ({}, {'lxd:privileged_allowed': 'true'}):
            server = self.spawn(specs)
            device = self.device(server)
            self.assert_fails_in(
                server, f'dd if=/dev/zero of={device} bs=512 count=1 '
                        f'conv=fsync')
            # Nor detach it to read the next file that uses the loop device.
            self.assertIn('not permitted', self.assert_fails_in(
                server, f'busybox losetup -d {device}'))
            self.assertEqual(server.uuid, self.metadata(server)['uuid'])
            self.destroy(server)
            self.assertEqual(set(), self.loops())

    def test_not_asked_for(self) -> None:
        server = self.host.spawn(self.host.instance(
            self.image, config_drive='True'), self.image)
        self.addCleanup(self.destroy, server)
        self.assert_fails_in(server, f'ls {LABEL}')
        self.assertEqual(set(), self.loops())
        self.destroy(self.spawn(config_drive=''))

    def test_same_after_reboots(self) -> None:
        server = self.spawn()
        device = self.device(server)
        content = self.metadata(server)
        driver, context = self.host.driver, self.host.context
        for kind in ('SOFT', 'HARD', 'HARD'):
            driver.reboot(context, server, [], kind)
            self.assertEqual(device, self.device(server))
        driver.power_off(server)
        self.host.restart_driver()
        driver = self.host.driver
        driver.power_on(context, server, [])
        self.assertEqual(device, self.device(server))
        for _turn in range(2):
            self.reboot_host(server)
            driver.power_on(context, server, [])
            self.assertEqual(content, self.metadata(server, self.device(
                server)))
            self.assertEqual(1, len(self.loops()))
        self.assertEqual([], self.backups(server))

    def backups(self, server: objects.Instance) -> list[Any]:
        return self.host.lxd.api.must(
            'GET', f'/1.0/storage-pools/{self.host.lxd.pool}/volumes/custom/'
            f'{config_drive.volume_name(server)}/backups',
            params={'project': self.host.project})

    def test_leftover_of_an_interrupted_start(self) -> None:
        server = self.spawn()
        self.reboot_host(server)
        self.host.lxd.api.must(
            'POST', f'/1.0/storage-pools/{self.host.lxd.pool}/volumes/custom/'
            f'{config_drive.volume_name(server)}/backups',
            {'name': 'read-back'}, params={'project': self.host.project})
        self.host.driver.power_on(self.host.context, server, [])
        self.assertEqual(server.uuid, self.metadata(server)['uuid'])
        self.assertEqual([], self.backups(server))

    def test_leftover_of_an_interrupted_build(self) -> None:
        server = self.spawn()
        # As if nova-compute had been killed during the build.
        self.host.lxd.api.must(
            'PUT', f'/1.0/instances/{server.name}/state',
            {'action': 'stop', 'force': True},
            params={'project': self.host.project})
        self.host.lxd.api.must('DELETE', f'/1.0/instances/{server.name}',
                               params={'project': self.host.project})
        self.host.spawn(server, self.image)
        self.assertEqual(1, len(self.loops()))
        self.assertNotIn('admin_pass', self.metadata(server))
        self.destroy(server)
        self.destroy(server)
        self.assertEqual(set(), self.loops())

    def test_build_that_fails(self) -> None:
        broken = self.host.image(busybox_image.unified({'sbin/init': b''}))
        server = self.instance()
        self.assertRaises(exception.NovaException, self.host.spawn, server,
                          broken)
        self.assertEqual(set(), self.loops())
        self.assertEqual([], self.host.lxd_volumes())

    def test_disk_kept(self) -> None:
        server = self.spawn()
        self.host.driver.destroy(self.host.context, server, [],
                                 destroy_disks=False)
        self.assertEqual(set(), self.loops())

    def test_no_longer_asked_for(self) -> None:
        server = self.spawn()
        server.flavor.extra_specs.clear()
        self.host.driver.reboot(self.host.context, server, [], 'HARD')
        self.assert_fails_in(server, f'ls {LABEL}')
        self.destroy(server)
        self.assertEqual(set(), self.loops())

    def test_rescue(self) -> None:
        server = self.spawn()
        server.info_cache = objects.InstanceInfoCache(
            instance_uuid=server.uuid,
            network_info=network_model.NetworkInfo())
        self.host.driver.rescue(self.host.context, server, [], self.image,
                                None, {}, [])
        server.vm_state = vm_states.RESCUED
        other = types.SimpleNamespace(name=f'{server.name}-rescue')
        self.assertEqual(server.uuid, self.metadata(other)['uuid'])
        self.reboot_host(server)
        # The loop device is reused for another file.
        other_disk = self.storage.directory / 'other'
        other_disk.write_bytes(bytes(1 << 20))
        taken = subprocess.run(
            ['losetup', '--find', '--show', str(other_disk)], check=True,
            capture_output=True, text=True).stdout.strip()
        try:
            self.host.driver.unrescue(self.host.context, server)
            self.assertEqual(server.uuid, self.metadata(
                server, self.device(server))['uuid'])
        finally:
            subprocess.run(['losetup', '--detach', taken], check=True)

    def test_program_is_missing(self) -> None:
        CONF.set_override('mkisofs_cmd', 'no-such-program')
        self.addCleanup(CONF.clear_override, 'mkisofs_cmd')
        with self.assertRaisesRegex(exception.ComputeResourcesUnavailable,
                                    'no-such-program.*install genisoimage'):
            self.host.spawn(self.instance(), self.image)
        self.assertEqual({}, self.host.lxd_instances())
        self.assertEqual([], self.host.lxd_volumes())

    def test_program_fails(self) -> None:
        CONF.set_override('mkisofs_cmd', 'false')
        self.addCleanup(CONF.clear_override, 'mkisofs_cmd')
        with self.assertRaises(exception.ComputeResourcesUnavailable):
            self.host.spawn(self.instance(), self.image)
        self.assertEqual([], self.host.lxd_volumes())
        self.assertEqual(set(), self.loops())

    @unittest.skipUnless(CAN_VFAT, 'needs dosfstools and mtools')
    def test_vfat(self) -> None:
        CONF.set_override('config_drive_format', 'vfat')
        self.addCleanup(CONF.clear_override, 'config_drive_format')
        server = self.spawn()
        device = self.device(server)
        for _turn in range(2):
            self.assertIn('TYPE="vfat"', self.program(
                server, 'blkid', '-c', '/dev/null', device))
            for path in (device, LABEL):
                self.assertEqual(
                    json.loads(self.host.run(
                        server, 'cat', f'/config-drive{METADATA}')),
                    json.loads(self.on_vfat(server, path, METADATA)))
            # All files of the directory, byte for byte.
            files = self.host.run(server, 'sh', '-c',
                                  'cd /config-drive && find * -type f')
            self.assertIn('openstack/content/0000', files)
            for file in files.split():
                self.assertEqual(
                    self.host.run(server, 'sh', '-c',
                                  f'md5sum < /config-drive/{file}'),
                    self.on_vfat(server, LABEL, f'/{file} | md5sum'))
            self.reboot_host(server)
            self.host.driver.power_on(self.host.context, server, [])
            device = self.device(server)

    def on_vfat(self, server: Any, device: str, path: str) -> str:
        """Read a file as a guest does that cannot mount the device."""
        return self.program(server, 'mtools', '-c', 'mtype', '-i', device,
                            f'::{path}')

    def test_leftover_file(self) -> None:
        """Deleting an instance removes the backing file left by a crash."""
        server = self.spawn()
        directory = pathlib.Path(CONF.state_path,
                                 config_drive_device.DIRECTORY)
        self.assertEqual([], list(directory.iterdir()))
        self.assertEqual(0o700, directory.stat().st_mode & 0o777)
        (directory / config_drive.volume_name(server)).write_bytes(b'half')
        self.destroy(server)
        self.assertEqual([], list(directory.iterdir()))

    def test_backing_file_path(self) -> None:
        """Scripts that purge Nova find the devices by this path."""
        server = self.spawn()
        self.assertEqual(
            [f'{CONF.state_path}/{config_drive_device.DIRECTORY}/'
             f'{config_drive.volume_name(server)} (deleted)'],
            [pathlib.Path(path).read_text().strip()
             for path in self.loops()])


@unittest.skipIf(NO_LXD, NO_LXD or '')
class DaemonConfigDriveDeviceTest(ConfigDriveDeviceCase):
    """The same with the capabilities of the privsep daemon."""

    daemon = True

    def test_found_by_its_label(self) -> None:
        server = self.spawn()
        self.assertEqual(server.uuid, self.metadata(
            server, self.device(server))['uuid'])
