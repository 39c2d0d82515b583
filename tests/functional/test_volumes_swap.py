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

"""Volumes of servers swapped with others, with a real LXD."""

from __future__ import annotations

import errno
import json
import time
from typing import Any
import unittest

import fixtures
from nova.compute import power_state
from nova import exception
from oslo_utils import units

from nova_lxd_py.virt.privileged import block_copy
from tests.fixtures import disks
from tests.fixtures import faulty_proxy
from tests.fixtures import killed_process
from tests.fixtures import lab_volumes
from tests.fixtures import lxd_daemon
from tests.fixtures import variants
from tests.fixtures import volume_host

NO_LXD = lxd_daemon.missing()

PATH = volume_host.PATH


class SwapCases(volume_host.VolumeHost):
    """Tests for block devices and filesystems."""

    where = PATH
    size = 128 * units.Mi
    options: dict[str, Any] = {}

    def setUp(self) -> None:
        super().setUp()

    def swap(self, server, old: dict, new: lab_volumes.Volume,
             size_gb: int = 0, **data: Any) -> dict:
        """Swap a volume as Nova does.

        :returns: the connection of the new volume.
        """
        connection = new.connection(**data)
        self.host.driver.swap_volume(self.host.context, old, connection,
                                     server, PATH, size_gb)
        return connection

    def volume(self) -> lab_volumes.Volume:
        return self.storage.volume(self.size)

    def fill(self, server) -> str:
        return self.write(server, self.where)

    def sum(self, server) -> str:
        return self.read(server, self.where)

    def test_content_moves(self) -> None:
        server = self.host.spawn()
        first, second = self.volume(), self.volume()
        old = self.attach(server, first)
        filled = self.fill(server)
        new = self.swap(server, old, second)
        self.assertEqual([f'volume-{second.id}'],
                         list(self.devices(server)))
        self.assertEqual(filled, self.sum(server))
        self.assertEqual(power_state.RUNNING, self.host.state(server))
        first.close()
        # Reads and writes go to the new volume only.
        refilled = self.fill(server)
        self.reboot(server, disks.described(self._mapping(second, new)))
        self.assertEqual(refilled, self.sum(server))
        self.detach(server, new)
        self.assertEqual(set(), self.storage.left_on_host())
        again = self.attach(server, second)
        self.assertEqual(refilled, self.sum(server))
        self.detach(server, again)

    @staticmethod
    def _mapping(volume: lab_volumes.Volume, connection: dict
                 ) -> disks.Mapping:
        mapping = volume.mapping()
        mapping['connection_info'] = connection
        return mapping

    def test_larger(self) -> None:
        server = self.host.spawn()
        old = self.attach(server, self.volume())
        filled = self.fill(server)
        before = self.capacity(server)
        new = self.swap(server, old, self.storage.volume(2 * units.Gi), 2)
        self.assertEqual(filled, self.sum(server))
        self.assertGreater(self.capacity(server), before + units.Gi)
        self.detach(server, new)

    def capacity(self, server) -> int:
        """Return the size of the volume in the guest, in bytes."""
        return int(self.host.run(server, 'busybox', 'blockdev',
                                 '--getsize64', PATH))

    def test_moved_by_cinder(self) -> None:
        """Cinder gives the new volume the ID of the old one afterwards."""
        server = self.host.spawn()
        first, second = self.volume(), self.volume()
        old = self.attach(server, first)
        filled = self.fill(server)
        new = json.loads(json.dumps(self.swap(server, old, second)))
        new.update(serial=first.id, volume_id=first.id)
        new['data']['volume_id'] = first.id
        self.reboot(server, disks.described(self._mapping(second, new)))
        self.assertEqual(filled, self.sum(server))
        self.host.restart_driver()
        self.detach(server, new)
        self.assertEqual({}, self.devices(server))
        self.assertEqual(set(), self.storage.left_on_host())

    def test_in_use(self) -> None:
        server = self.host.spawn()
        first, second = self.volume(), self.volume()
        old = self.attach(server, first)
        filled = self.fill(server)
        self.hold_open(server, self.where)
        self.assertRaisesRegex(exception.DeviceDetachFailed, 'processes',
                               self.swap, server, old, second)
        self.assert_as_before(server, first, filled)
        self.release(server)
        self.detach(server, self.swap(server, old, second))

    def assert_as_before(self, server, volume, filled: str) -> None:
        self.assertEqual(power_state.RUNNING, self.host.state(server))
        self.assertEqual([f'volume-{volume.id}'], list(self.devices(server)))
        config = self.host.lxd_instances()[server.name]['config']
        self.assertNotIn('user.nova.volume_swap', config)
        self.assertNotIn('user.nova.quiesced', config)
        self.assertEqual(filled, self.sum(server))
        self.assertEqual(filled, self.fill_again(server, filled))

    def fill_again(self, server, filled: str) -> str:
        """Write to the volume, and return the checksum."""
        self.host.run(server, 'sh', '-c', f'dd if=/root/data of={self.where} '
                      'bs=1M conv=fsync')
        return self.sum(server)

    def test_refusals(self) -> None:
        server = self.host.spawn()
        first = self.storage.volume(2 * self.size)
        old = self.attach(server, first)
        filled = self.fill(server)
        other = self.storage.volume(2 * self.size)
        for error, message, volume, data in (
                (exception.VolumeAttachFailed, 'bytes',
                 self.volume(), {}),
                (exception.VolumeAttachFailed, 'read-only', other,
                 {'access_mode': 'ro'}),
                (exception.InvalidVolume, 'itself', first, {})):
            self.assertRaisesRegex(error, message, self.swap, server, old,
                                   volume, **data)
            self.assert_as_before(server, first, filled)
        self.assertRaisesRegex(exception.InvalidVolume, 'does not have',
                               self.swap, server, other.connection(),
                               self.storage.volume(2 * self.size))
        self.detach(server, old)

    def test_paused_stays_paused(self) -> None:
        server = self.host.spawn()
        old = self.attach(server, self.volume())
        filled = self.fill(server)
        self.host.driver.pause(server)
        new = self.swap(server, old, self.volume())
        self.assertEqual(power_state.PAUSED, self.host.state(server))
        self.host.driver.unpause(server)
        self.assertEqual(filled, self.sum(server))
        self.detach(server, new)

    def test_lxd_fails(self) -> None:
        """Each request of a swap to LXD fails once."""
        server = self.host.spawn()
        first = self.volume()
        old = self.attach(server, first)
        filled = self.fill(server)
        for how in faulty_proxy.Spoil:
            # Detach the old one, attach the new one.
            for number in range(2):
                self.proxy.spoil(number, how)
                self.assertRaises(exception.NovaException, self.swap, server,
                                  old, self.volume())
                self.assertIsNotNone(self.proxy.spoilt)
                self.proxy.behave()
                self.assert_as_before(server, first, filled)
        self.detach(server, old)

    def test_lxd_is_gone_for_good(self) -> None:
        """The old volume is attached again as soon as LXD is back."""
        server = self.host.spawn()
        first = self.volume()
        old = self.attach(server, first)
        filled = self.fill(server)
        for how in (faulty_proxy.Spoil.LOSE_ANSWER,
                    faulty_proxy.Spoil.REFUSE):
            second = self.volume()
            self.proxy.refuse_from('PUT', how)
            self.assertRaises(exception.NovaException, self.swap, server, old,
                              second)
            self.proxy.behave()
            self.wait_for_lxd()
            self.host.driver._services.volume_reconciler.run()
            self.assert_as_before(server, first, filled)
            self.assertNotIn(second.id, str(self.storage.left_on_host()))
        self.detach(server, old)

    def test_lxd_has_crashed_while_it_switched(self) -> None:
        """The guest has neither volume, or no longer the old one."""
        server = self.host.spawn()
        first = self.volume()
        old = self.attach(server, first)
        filled = self.fill(server)
        self.host.run(server, 'busybox', 'umount', '-l',
                      self.where.removesuffix('/file'))
        self.proxy.spoil(0, faulty_proxy.Spoil.LOSE_REQUEST)
        self.assertRaises(exception.NovaException, self.swap, server, old,
                          self.volume())
        self.proxy.behave()
        self.assert_as_before(server, first, filled)
        self.detach(server, old)

    def test_server_runs_during_the_copy(self) -> None:
        server = self.host.spawn()
        old = self.attach(server, self.volume())
        filled = self.fill(server)
        seen = []

        def copy(*args: Any) -> int:
            seen.append((self.host.state(server), list(self.devices(server)),
                         self.host.run(server, 'echo', 'runs')))
            return copied(*args)
        copied = block_copy.copy
        with fixtures.MonkeyPatch(
                'nova_lxd_py.virt.privileged.block_copy.copy', copy):
            new = self.swap(server, old, self.volume())
        self.assertEqual((power_state.RUNNING, [], 'runs\n'), seen[0])
        self.assertEqual(filled, self.sum(server))
        self.detach(server, new)

    def test_old_volume_cannot_be_disconnected(self) -> None:
        """It is not attached again, and the swap is a success for Nova."""
        server = self.host.spawn()
        first, second = self.volume(), self.volume()
        old = self.attach(server, first)
        filled = self.fill(server)

        def refuse(_self: Any, identifier: str, *args: Any, **kwargs: Any
                   ) -> None:
            raise OSError(errno.EBUSY, 'test')
        kind = type(self.host.driver._services.volumes._connections._plugins[
            first.kind])
        with fixtures.MonkeyPatch(
                f'{kind.__module__}.{kind.__name__}.disconnect', refuse):
            new = self.swap(server, old, second)
        self.assertIn('could not be disconnected', self.log.output)
        self.assertEqual([f'volume-{second.id}'], list(self.devices(server)))
        self.assertEqual(filled, self.sum(server))
        # The next attempt disconnects it.
        self.host.driver._services.volume_reconciler.run()
        self.assertNotIn(first.id, str(self.storage.left_on_host()))
        self.assertEqual(filled, self.sum(server))
        self.detach(server, new)

    def test_nova_compute_is_killed(self) -> None:
        """Before the first change of the guest, during the copy, and after
        the new volume has been attached: the guest has one of them, whole."""
        server = self.host.spawn()
        first, second = self.volume(), self.volume()
        old = self.attach(server, first)
        filled = self.fill(server)
        for number in range(3):
            self.proxy.behave()
            self.assertTrue(killed_process.run(
                lambda: self.host.make_driver().swap_volume(
                    self.host.context, dict(old), second.connection(), server,
                    PATH, 0),
                lambda: self._changes() >= number and self.begun(second)),
                number)
            self.wait_for_lxd()
            self.host.restart_driver()
            if number < 2:
                self.assert_as_before(server, first, filled)
                # Nova deletes the attachment of the new volume.
                self.detach(server, second.connection())
        # LXD may not have carried out the last change, since another one of
        # the instance came between.
        kept = (second if f'volume-{second.id}' in self.devices(server)
                else first)
        self.assert_as_before(server, kept, filled)
        self.detach(server, second.connection())
        # As Nova does then.
        self.detach(server, old)
        self.assertEqual({}, self.devices(server))
        self.assertEqual(set(), self.storage.left_on_host())

    def wait_for_lxd(self) -> None:
        """Wait until LXD has processed all requests."""
        time.sleep(2)
        self.host.lxd.wait_for_operations()

    def begun(self, volume: lab_volumes.Volume) -> bool:
        """Whether the host has a connection to a volume."""
        return (not isinstance(volume, lab_volumes.FileVolume) or
                volume.id in str(self.storage.left_on_host()))

    def _changes(self) -> int:
        return sum(request.method != 'GET' for request in self.proxy.seen)


@unittest.skipIf(NO_LXD, NO_LXD or '')
@variants.keep(
    'test_content_moves', 'test_larger', 'test_moved_by_cinder', 'test_in_use',
    'test_refusals', 'test_paused_stays_paused',
    'test_server_runs_during_the_copy',
    'test_lxd_has_crashed_while_it_switched')
class BlockSwapTest(SwapCases, unittest.TestCase):
    kind = lab_volumes.LocalVolume


@unittest.skipIf(NO_LXD, NO_LXD or '')
class FilesystemSwapTest(SwapCases, unittest.TestCase):
    kind = lab_volumes.FileVolume
    where = '/mnt/vdb/file'
    options = {'volume_filesystems': ['ext4', 'xfs'],
               'volume_mode': 'filesystem'}

    def capacity(self, server) -> int:
        return 1024 * int(self.host.run(
            server, 'busybox', 'df', '-k', '/mnt/vdb').splitlines()[1]
            .split()[1])

    def test_larger(self) -> None:
        # ext4 grows only with CAP_SYS_RESOURCE.
        self.size = 512 * units.Mi
        lab_volumes.CONF.set_override('volume_filesystems', ['xfs'], 'lxd')
        super().test_larger()

    def test_nova_compute_is_killed_while_it_copies(self) -> None:
        """A damaged record of another swap does not prevent its rollback."""
        other, server = self.host.spawn(), self.host.spawn()
        first, second = self.volume(), self.volume()
        old = self.attach(server, first)
        filled = self.fill(server)
        self.host.driver.pause(server)
        empty = second.file.stat().st_blocks
        copied = block_copy.copy

        def copy_and_hang(*args: Any) -> None:
            copied(*args)
            time.sleep(60)

        def swap() -> None:
            with fixtures.MonkeyPatch(
                    'nova_lxd_py.virt.privileged.block_copy.copy',
                    copy_and_hang):
                self.host.make_driver().swap_volume(
                    self.host.context, dict(old), second.connection(), server,
                    PATH, 0)
        self.assertTrue(killed_process.run(
            swap, lambda: second.file.stat().st_blocks > empty))
        self.host.lxd.api.must(
            'PATCH', f'/1.0/instances/{other.name}',
            {'config': {'user.nova.volume_swap': 'nonsense'}},
            params={'project': self.host.project})
        self.host.restart_driver()
        self.assertIn(f'of {other.name}; hard reboot', self.log.output)
        self.host.driver.unpause(server)
        self.assert_as_before(server, first, filled)
        self.detach(server, second.connection())
        self.detach(server, self.swap(server, old, self.volume()))

    def test_mounted_elsewhere(self) -> None:
        """No process has it open."""
        server = self.host.spawn()
        first, second = self.volume(), self.volume()
        old = self.attach(server, first)
        filled = self.fill(server)
        self.host.run(server, 'sh', '-c', 'mkdir -p /other && busybox mount '
                      '-o bind /mnt/vdb /other')
        self.assertRaises(exception.DeviceDetachFailed, self.swap, server,
                          old, second)
        self.assert_as_before(server, first, filled)
        self.host.run(server, 'busybox', 'umount', '/other')
        self.detach(server, self.swap(server, old, second))
