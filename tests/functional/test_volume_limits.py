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

"""QoS limits of volumes, with a real LXD and the kernel's control groups."""

from __future__ import annotations

import os
import pathlib
import stat
import time
from typing import Any
import unittest

from nova import objects
from oslo_utils import units

from tests.fixtures import boot_volume_host
from tests.fixtures import disks
from tests.fixtures import lab_volumes
from tests.fixtures import lxd_daemon
from tests.fixtures import volume_host

NO_LXD = lxd_daemon.missing()
PATH = volume_host.PATH

#: Files of cgroup v1, by the names of cgroup v2.
FILES = {f'{way[0]}{unit}': f'blkio.throttle.{way}_{unit}_device'
         for unit in ('bps', 'iops') for way in ('read', 'write')}

#: 1 MiB a second in each direction.
SPECS = {'total_bytes_sec': str(units.Mi), 'read_iops_sec': '500'}
LIMITS = {'rbps': units.Mi, 'wbps': units.Mi, 'riops': 500}
#: Others, and what the kernel has of them.
CHANGED = {'write_iops_sec': '70', 'write_iops_sec_max': '700'}
CHANGED_LIMITS = {'wiops': 70}


class LimitCases(volume_host.VolumeHost):
    """Tests for all modes."""

    def group(self, server: objects.Instance) -> tuple[pathlib.Path, bool]:
        """Find the control group of a guest.

        :returns: its directory, and whether it is one of cgroup v1.
        """
        state = self.host.lxd.api.must(
            'GET', f'/1.0/instances/{server.name}/state',
            params={'project': self.host.project})
        text = pathlib.Path(f'/proc/{state["pid"]}/cgroup').read_text(
            encoding='utf-8')
        groups = {controller: path for line in text.splitlines()
                  for _number, controllers, path in [line.split(':', 2)]
                  for controller in controllers.split(',')}
        if 'blkio' in groups:
            return pathlib.Path('/sys/fs/cgroup/blkio' + groups['blkio']), True
        return pathlib.Path('/sys/fs/cgroup' + groups['']), False

    def limits(self, server: objects.Instance) -> dict[str, dict[str, int]]:
        """Read the limits of a guest by the numbers of devices."""
        directory, first = self.group(server)
        found: dict[str, dict[str, int]] = {}
        for name, file in FILES.items() if first else [('', 'io.max')]:
            for line in (directory / file).read_text().splitlines():
                device, *values = line.split()
                for value in values:
                    key, _, number = value.rpartition('=')
                    if number != 'max':
                        found.setdefault(device, {})[key or name] = int(number)
        return found

    def device(self, server: objects.Instance) -> str:
        """Return the number of the block device of the only volume."""
        [device] = self.devices(server).values()
        return self.number(device.get('user.nova.device') or device['source'])

    def number(self, path: str) -> str:
        device = os.stat(path).st_rdev
        return f'{os.major(device)}:{os.minor(device)}'

    def wait_for_limits(self, server: objects.Instance,
                        expected: dict[str, dict[str, int]]) -> None:
        """Wait until a guest that was restarted is limited again."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if self.limits(server) == expected:
                return
            time.sleep(0.2)
        self.assertEqual(expected, self.limits(server))

    def seconds(self, server: objects.Instance, path: str) -> float:
        """Write 4 MiB in the guest, past all caches."""
        began = time.monotonic()
        self.host.run(server, 'sh', '-c',
                      f'dd if=/dev/zero of={path} bs=256k count=16 '
                      'oflag=direct 2>&1')
        return time.monotonic() - began

    def assert_only_root_can_change(self, server: objects.Instance) -> None:
        directory, first = self.group(server)
        for file in FILES.values() if first else ('io.max',):
            about = (directory / file).stat()
            self.assertEqual(0, about.st_uid)
            self.assertFalse(about.st_mode & (stat.S_IWGRP | stat.S_IWOTH))

    def assert_restored(self, server: objects.Instance, info: dict[str, Any],
                        expected: dict[str, dict[str, int]]) -> None:
        """Check that limits survive whatever restarts the guest."""
        self.reboot_by_itself(server)
        self.wait_for_limits(server, expected)
        self.reboot(server, info, 'SOFT')
        self.wait_for_limits(server, expected)
        # LXD and nova-compute were down while the guest was restarted.
        directory, first = self.group(server)
        for device in expected:
            for file in FILES.values() if first else ['io.max']:
                with open(directory / file, 'w', encoding='ascii') as stream:
                    stream.write(f'{device} 0' if first else
                                 f'{device} rbps=max wbps=max riops=max '
                                 'wiops=max')
        self.assertEqual({}, self.limits(server))
        self.host.restart_driver()
        self.assertEqual(expected, self.limits(server))


class DataVolumeCases(LimitCases):
    """Tests for volumes that are attached to a running server.

    :cvar file: where the guest writes to the volume.
    """

    file = PATH

    def info(self, volume: lab_volumes.Volume, connection: dict[str, Any],
             **specs: str) -> dict[str, Any]:
        mapping = disks.Mapping(volume)
        mapping['connection_info'] = {
            **connection, 'data': {**connection['data'], 'qos_specs': specs}}
        return disks.described(mapping)

    def test_limited(self) -> None:
        server = self.host.spawn()
        volume = self.storage.volume()
        connection = self.attach(server, volume, qos_specs=SPECS)
        expected = {self.device(server): LIMITS}
        self.assertEqual(expected, self.limits(server))
        self.assert_only_root_can_change(server)
        self.assertGreater(self.seconds(server, self.file), 3)
        info = self.info(volume, connection, **SPECS)
        self.assert_restored(server, info, expected)
        self.assertGreater(self.seconds(server, self.file), 3)
        self.reboot(server, self.info(volume, connection, **CHANGED))
        self.assertEqual({self.device(server): CHANGED_LIMITS},
                         self.limits(server))
        self.detach(server, connection)
        self.assertEqual({}, self.limits(server))
        for specs, limits in ((CHANGED, CHANGED_LIMITS), (SPECS, LIMITS)):
            connection = self.attach(server, volume, qos_specs=specs)
            self.assertEqual({self.device(server): limits},
                             self.limits(server))
            self.detach(server, connection)
        connection = self.attach(server, volume)
        self.assertEqual({}, self.limits(server))
        self.detach(server, connection)


@unittest.skipIf(NO_LXD, NO_LXD or '')
class LocalLimitTest(DataVolumeCases, unittest.TestCase):

    kind = lab_volumes.LocalVolume

    def test_swap(self) -> None:
        server = self.host.spawn()
        first, second = (self.storage.volume(32 * units.Mi)
                         for _number in range(2))
        old = self.attach(server, first, qos_specs=SPECS)
        new = second.connection(qos_specs=CHANGED)
        self.host.driver.swap_volume(self.host.context, old, new, server,
                                     PATH, 0)
        self.assertEqual({self.device(server): CHANGED_LIMITS},
                         self.limits(server))
        self.detach(server, new)


@unittest.skipIf(NO_LXD, NO_LXD or '')
class FilesystemLimitTest(DataVolumeCases, volume_host.FilesystemHost,
                          unittest.TestCase):
    """A file on a share with a loop device, which the host mounts."""

    filesystem = 'ext4'
    file = '/mnt/vdb/file'


@unittest.skipIf(NO_LXD, NO_LXD or '')
class BootVolumeLimitTest(LimitCases, boot_volume_host.BootVolumeHost,
                          unittest.TestCase):

    def info(self, volume: lab_volumes.Volume, **specs: str
             ) -> dict[str, Any]:
        info = self.described(volume)
        [mapping] = info['block_device_mapping']
        mapping['connection_info']['data']['qos_specs'] = specs
        return info

    def root(self, server: objects.Instance) -> str:
        return self.number(self.host.lxd_instances()[server.name]['config'][
            'user.nova.root_device'])

    def test_limited(self) -> None:
        volume = self.volume_from_image()
        server = self.boot(volume, info=self.info(volume, **SPECS))
        expected = {self.root(server): LIMITS}
        self.assertEqual(expected, self.limits(server))
        self.assertGreater(self.seconds(server, '/root/file'), 3)
        self.assert_restored(server, self.info(volume, **SPECS), expected)
        self.reboot(server, self.info(volume, **CHANGED))
        self.assertEqual({self.root(server): CHANGED_LIMITS},
                         self.limits(server))
        self.reboot(server, self.info(volume))
        self.assertEqual({}, self.limits(server))
        self.destroy(server, self.info(volume))
