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

"""Volumes swapped with others, through the driver as Nova calls it."""

from __future__ import annotations

import errno

import fixtures
from nova.compute import power_state
from nova import exception

from nova_lxd_py.virt.guest import events
from tests.fixtures import volume_case

PATH = volume_case.PATH


class SwapCases:
    """Tests for all kinds of connections and both modes."""

    def setUp(self) -> None:
        self.useFixture(fixtures.MockPatchObject(
            events, 'RECONNECT_FIRST', 0.02))
        super().setUp()

    def test_swap(self) -> None:
        self.volume.disk.data = b'mine'
        connection, target = self.attach(), self.storage.volume(
            self.kind, size_gb=2)
        self.driver.swap_volume(
            self.context, connection, new := target.connection(),
            self.server, PATH, 0)
        self.assertEqual(b'mine', target.disk.data)
        self.assertEqual([target.id], list(self.given()))
        self.assertIsNone(self.storage.device_of(self.volume))
        self.assert_state(power_state.RUNNING, self.server)
        self.detach(new)
        self.assert_detached()

    def test_swap_fails(self) -> None:
        self.volume.disk.data = b'mine'
        connection, target = self.attach(), self.storage.volume(
            self.kind, size_gb=2)
        for what, error in ((self.connect, OSError(errno.EIO, 'I/O error')),
                            ('block_copy.copy', OSError(errno.EIO, 'I/O'))):
            with self.subTest(what=what):
                self.storage.fail(what, error)
                self.assertRaises(
                    exception.NovaException, self.driver.swap_volume,
                    self.context, connection, target.connection(),
                    self.server, PATH, 0)
                self.assertEqual([self.volume.id], list(self.given()))
                self.assertIsNone(self.storage.device_of(target))
                self.assertIsNotNone(self.storage.device_of(self.volume))
        self.detach(connection)
        self.assert_detached()

    def test_swap_that_cannot_be_rolled_back(self) -> None:
        """The guest may have either, so both stay connected until LXD takes
        the old one back."""
        connection, target = self.attach(), self.storage.volume(
            self.kind, size_gb=2)
        self.storage.fail('block_copy.copy', OSError(errno.EIO, 'I/O error'))
        self.lxd.fail_next('PATCH', f'/1.0/instances/{self.server.name}')
        self.assertRaises(
            exception.VolumeAttachFailed, self.driver.swap_volume,
            self.context, connection, target.connection(), self.server, PATH,
            0)
        self.assertEqual({}, self.given())
        for volume in (self.volume, target):
            self.assertIsNotNone(self.storage.device_of(volume))
        self.lxd.close_websockets()
        self.lxd.wait_for(
            lambda: self.storage.device_of(target) is None)
        self.assertEqual([self.volume.id], list(self.given()))
        self.detach(connection)
        self.assert_detached()

    def test_swap_to_a_smaller_one(self) -> None:
        self.volume.extend(2)
        connection, target = self.attach(), self.storage.volume(self.kind)
        self.assertRaises(
            exception.NovaException, self.driver.swap_volume, self.context,
            connection, target.connection(), self.server, PATH, 0)
        self.assertEqual([self.volume.id], list(self.given()))
        self.assertIsNone(self.storage.device_of(target))


class BlockSwapTest(SwapCases, volume_case.VolumeTestCase):
    """Block devices over iSCSI."""

    connect = 'brick.connect'


class ShareFileSwapTest(SwapCases, volume_case.VolumeTestCase):
    """Files on a share."""

    kind, connect = 'nfs', 'loop.attach'


class FilesystemSwapTest(SwapCases, volume_case.VolumeTestCase):
    """Volumes that the host mounts."""

    options = {'volume_mode': 'filesystem', 'volume_filesystems': ['ext4']}
    connect = 'brick.connect'
