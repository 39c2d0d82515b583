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


"""Cinder volumes when LXD fails, or nova-compute ends, with a real LXD."""

from __future__ import annotations

import os
import stat
import time
from typing import Any
import unittest

import fixtures
from nova import exception
from oslo_utils import units

from nova_lxd_py.virt.lxd import errors
from tests.fixtures import disks
from tests.fixtures import faulty_proxy
from tests.fixtures import killed_process
from tests.fixtures import lab_volumes
from tests.fixtures import lxd_daemon
from tests.fixtures import variants
from tests.fixtures import volume_host

NO_LXD = lxd_daemon.missing()
PATH = volume_host.PATH


def _fail(*_args: Any, **_kwargs: Any) -> None:
    raise errors.OperationFailed('test')


class VolumeFailureCases(volume_host.VolumeHost):
    """Tests for every kind of volume."""

    def test_lxd_fails(self) -> None:
        """LXD refuses a volume, or attaches it and the answer is lost."""
        server = self.host.spawn()
        first = self.attach(server, self.storage.volume())
        volume = self.storage.volume()
        for how in faulty_proxy.Spoil:
            self.proxy.spoil(0, how)
            self.assertRaises(exception.NovaException, self.attach, server,
                              volume, '/dev/vdc')
            self.proxy.behave()
            self.assertEqual(1, len(self.devices(server)), how)
            connection = self.attach(server, volume, '/dev/vdc')
            written = self.write(server, '/dev/vdc')
            self.proxy.spoil(0, how)
            self.assertRaises(exception.NovaException, self.detach, server,
                              connection, '/dev/vdc')
            self.proxy.behave()
            self.detach(server, connection, '/dev/vdc')
            self.assertEqual(written, volume.checksum(2 * units.Mi))
        self.detach(server, first)
        self.assertEqual(set(), self.storage.left_on_host())

    def test_lxd_has_crashed_while_it_attached(self) -> None:
        server = self.host.spawn()
        volume = self.storage.volume()
        connection = self.attach(server, volume)
        directory = self.host.lxd.directory
        if directory is None:
            self.skipTest('it needs the directory of a private LXD')
        [node] = (directory / 'devices').glob(f'*/*{volume.id[-12:]}*')
        number = os.stat(node).st_rdev
        self.detach(server, connection)
        self.assertFalse(node.exists())
        os.mknod(node, stat.S_IFBLK | 0o600, number)
        connection = self.attach(server, volume)
        written = self.write(server)
        self.assertEqual(written, self.read(server))
        self.detach(server, connection)
        self.assertFalse(node.exists())
        os.mknod(node, stat.S_IFBLK | 0o600, number)
        self.detach(server, volume.connection())
        self.assertFalse(node.exists())
        # LXD is back when the driver checks the result.
        os.mknod(node, stat.S_IFBLK | 0o600, number)
        self.proxy.spoil(0, faulty_proxy.Spoil.LOSE_REQUEST)
        self.assertRaises(exception.NovaException, self.attach, server,
                          volume)
        self.proxy.behave()
        self.assertFalse(node.exists())
        self.assertEqual(set(), self.storage.left_on_host())

    def test_lxd_is_gone_for_good(self) -> None:
        """The attachment fails for Nova, although LXD has the device."""
        first, second = self.host.spawn(), self.host.spawn()
        volume = self.storage.volume()
        self.proxy.refuse_from('PATCH', faulty_proxy.Spoil.LOSE_ANSWER)
        self.assertRaises(exception.NovaException, self.attach, first, volume)
        self.proxy.behave()
        self.assertEqual(1, len(self.devices(first)))
        self.hold_open(first)
        with self.assertRaisesRegex(exception.VolumeAttachFailed,
                                    f'{first.uuid}.*may have it'):
            self.attach(second, volume)
        self.assertEqual(1, len(self.devices(first)))
        self.release(first)
        connection = self.attach(second, volume)
        self.assertEqual({}, self.devices(first))
        self.assertFalse(self.has(first))
        written = self.write(second)
        self.detach(second, connection)
        self.assertEqual(written, volume.checksum(2 * units.Mi))
        self.assertEqual(set(), self.storage.left_on_host())

    def test_nova_compute_is_killed_while_it_attaches(self) -> None:
        """Nova has no record of the connection, so it is removed at start."""
        server = self.host.spawn()
        kept = self.attach(server, self.storage.volume())
        written = self.write(server)
        attached = self.storage.left_on_host()
        volume = self.storage.volume()

        def attach_and_hang() -> None:
            with fixtures.MonkeyPatch(
                    'nova_lxd_py.virt.volume.lxd_devices.add',
                    lambda *args: time.sleep(60)):
                self.host.make_driver().attach_volume(
                    self.host.context, volume.connection(), server,
                    '/dev/vdc')
        self.assertTrue(killed_process.run(
            attach_and_hang, lambda: self.is_connected(volume)))
        self.host.restart_driver()
        self.assertEqual(attached, self.storage.left_on_host())
        self.assertEqual(written, self.read(server))
        self.detach(server, kept)
        self.detach(server, self.attach(server, volume))

    def is_connected(self, volume: lab_volumes.Volume) -> bool:
        """Whether the host is already connected to a volume."""
        return volume.kind == 'local' or volume.id in str(
            self.storage.left_on_host())

    def test_build_that_cannot_be_undone(self) -> None:
        """The server keeps running with its volumes."""
        mapping = self.storage.volume().mapping()
        server = self.host.instance(self.host.image())
        with fixtures.MonkeyPatch(
                'nova_lxd_py.virt.guest.guest.Guest.delete', _fail), \
            fixtures.MonkeyPatch(
                'nova_lxd_py.virt.guest.password.AdminPassword.give', _fail):
            self.assertRaises(
                exception.NovaException, self.host.spawn, server,
                block_device_info=disks.described(mapping))
        written = self.write(server)
        self.assertEqual(written, self.read(server))
        self.assertIn('stays connected after a failed build', self.log.output)
        self.host.driver._services.volume_reconciler.run()
        self.assertEqual(written, self.read(server))
        # Nova does that later ([DEFAULT] running_deleted_instance_action).
        self.destroy(server, disks.described(mapping))
        self.assertEqual(set(), self.storage.left_on_host())


@unittest.skipIf(NO_LXD, NO_LXD or '')
@variants.keep(
    'test_lxd_fails', 'test_nova_compute_is_killed_while_it_attaches')
class LocalVolumeFailureTest(VolumeFailureCases, unittest.TestCase):
    kind = lab_volumes.LocalVolume


@unittest.skipIf(NO_LXD, NO_LXD or '')
class FileVolumeFailureTest(VolumeFailureCases, unittest.TestCase):
    kind = lab_volumes.FileVolume
