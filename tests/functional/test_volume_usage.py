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

"""Usage of volumes, with a real LXD and the kernel's counters."""

from __future__ import annotations

import subprocess
from typing import Any
import unittest

from nova import objects
from oslo_utils import units

from tests.fixtures import lab_volumes
from tests.fixtures import lxd_daemon
from tests.fixtures import volume_host

NO_LXD = lxd_daemon.missing()
PATH = volume_host.PATH


class UsageCases(volume_host.VolumeHost):
    """Tests for both modes.

    :cvar own_writes: bytes that the host may write by itself.
    """

    own_writes = 0

    def volume(self) -> lab_volumes.Volume:
        return self.storage.volume()

    def write_more(self, server: Any) -> str:
        """Write 4 MiB to the volume in the guest, and wait until they are on
        it."""
        return self.write(server, megabytes=4)

    def usage(self, server: Any, volume: lab_volumes.Volume
              ) -> dict[str, Any] | None:
        bdm = objects.BlockDeviceMapping(volume_id=volume.id,
                                         device_name=PATH)
        found = self.host.driver.get_all_volume_usage(self.host.context, [
            {'instance': server, 'instance_bdms': [bdm]}])
        stats = self.host.driver.block_stats(server,
                                             PATH.removeprefix('/dev/'))
        if not found:
            self.assertIsNone(stats)
            return None
        [usage] = found
        self.assertEqual((volume.id, server),
                         (usage['volume'], usage['instance']))
        assert stats is not None
        for key, number in zip(('rd_req', 'rd_bytes', 'wr_req', 'wr_bytes'),
                               stats):
            self.assertLessEqual(usage[key], number)
        return usage

    def read_usage(self, server: Any, volume: lab_volumes.Volume
                   ) -> dict[str, Any]:
        usage = self.usage(server, volume)
        assert usage is not None
        return usage

    def test_counted_since_attached(self) -> None:
        server = self.host.spawn()
        volume = self.volume()
        connection = self.attach(server, volume)
        before = self.read_usage(server, volume)
        self.assertLessEqual(before['wr_bytes'], self.own_writes)
        written = self.write_more(server)
        usage = self.read_usage(server, volume)
        self.assertGreaterEqual(usage['wr_bytes'], 4 * units.Mi)
        self.assertLessEqual(usage['wr_bytes'],
                             4 * units.Mi + self.own_writes)
        self.assertGreater(usage['wr_req'], before['wr_req'])
        self.host.restart_driver()
        self.assertGreaterEqual(self.read_usage(server, volume)['wr_bytes'],
                                usage['wr_bytes'])
        self.detach(server, connection)
        self.assertIsNone(self.usage(server, volume))
        # The block device may be the same one, with its counters.
        connection = self.attach(server, volume)
        usage = self.read_usage(server, volume)
        self.assertLessEqual(usage['wr_bytes'], self.own_writes)
        self.assertLess(usage['rd_bytes'], 4 * units.Mi)
        self.assertEqual(written, self.read_all(server))
        usage = self.read_usage(server, volume)
        self.assertGreaterEqual(usage['rd_bytes'], 4 * units.Mi)
        self.assertGreater(usage['rd_req'], 0)
        self.assertLessEqual(usage['wr_bytes'], self.own_writes)
        self.detach(server, connection)

    def read_all(self, server: Any) -> str:
        return self.read(server, megabytes=4)


@unittest.skipIf(NO_LXD, NO_LXD or '')
class LocalUsageTest(UsageCases, unittest.TestCase):
    """A loop device that exists longer than the volume is attached."""

    kind = lab_volumes.LocalVolume


@unittest.skipIf(NO_LXD, NO_LXD or '')
class FileUsageTest(UsageCases, unittest.TestCase):
    """A loop device that the driver makes."""

    kind = lab_volumes.FileVolume


@unittest.skipIf(NO_LXD, NO_LXD or '')
class FilesystemUsageTest(UsageCases, volume_host.FilesystemHost,
                          unittest.TestCase):

    filesystem = 'ext4'
    # What ext4 writes when it is mounted and unmounted.
    own_writes = 2 * units.Mi

    def volume(self) -> lab_volumes.Volume:
        """A volume whose filesystem has been initialised: otherwise the
        kernel writes 16 MiB some time after the first mount."""
        volume = super().volume()
        assert isinstance(volume, lab_volumes.FileVolume)
        subprocess.run(
            ['mkfs.ext4', '-q', '-E',
             'root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0',
             volume.file], check=True, timeout=60)
        return volume

    def write_more(self, server: Any) -> str:
        written = self.fill(server)
        self.host.run(server, 'busybox', 'sync')
        return written

    def read_all(self, server: Any) -> str:
        return self.sum(server)
