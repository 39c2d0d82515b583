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

"""Who has which volume: before and after a reboot of the host, and when
something goes wrong."""

from __future__ import annotations

import contextlib
import pathlib
from typing import Any

import fixtures
from nova import exception
from nova import objects
from stevedore import extension

from nova_lxd_py import conf
from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.volume import attachment
from nova_lxd_py.virt.volume import base
from nova_lxd_py.virt.volume import connections
from nova_lxd_py.virt.volume import device_identity
from nova_lxd_py.virt.volume import lxd_devices
from nova_lxd_py.virt.volume import modes
from nova_lxd_py.virt.volume import provisioning
from nova_lxd_py.virt.volume import server_volumes
from nova_lxd_py.virt.volume import usage
from tests.fixtures import session_case

objects.register_all()

VOLUME = '9a0b6f0e-5d2c-4f4e-8a57-6a1c1b1f0e11'
OTHER = '9a0b6f0e-5d2c-4f4e-8a57-6a1c1b1f0e12'
SERVER = '0c1e9f0a-1111-4222-8333-444455556666'
NEIGHBOUR = '0c1e9f0a-1111-4222-8333-444455557777'
DEVICE = '/dev/loop7'


class Plugin(base.VolumePlugin):
    """A back end whose volumes all turn up as one device."""

    connected = 0

    def connect(self, volume_id, connection_info):
        self.connected += 1
        return DEVICE

    def disconnect(self, volume_id, connection_info, *, force):
        self.connected = 0

    def extend(self, volume_id, connection_info):
        pass


class _Volume(dict):
    """A volume as Nova describes it to drivers."""

    #: GiB.
    volume_size = 1


class UsageTestCase(session_case.SessionTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.log = self.useFixture(fixtures.FakeLogger(level=0))
        self.cfg.config(group='lxd', volume_filesystems=['ext4'])
        self.boot_id = pathlib.Path(
            self.useFixture(fixtures.TempDir()).path) / 'boot_id'
        self.patch('lxd_devices._BOOT_ID', self.boot_id)
        self.reboot('first')
        self.numbers = {DEVICE: 7, '/dev/loop8': 8}
        self.patch('device_identity.device_number', self.device_number)
        self.patch('device_identity.size', lambda path: 1 << 30)
        self.plugin = Plugin(conf.CONF.lxd)
        found = extension.ExtensionManager.make_test_instance(
            [extension.Extension('pigeon', None, None, self.plugin)])
        self.useFixture(fixtures.MonkeyPatch(
            'stevedore.extension.ExtensionManager',
            lambda *args, **kwargs: found))
        self.guests = registry.GuestRegistry(self.session)
        self.start_driver()

    def patch(self, name: str, value: Any) -> None:
        self.useFixture(fixtures.MonkeyPatch(
            f'nova_lxd_py.virt.volume.{name}', value))

    def patch_root(self, name: str, value: Any) -> None:
        self.useFixture(fixtures.MonkeyPatch(
            f'nova_lxd_py.virt.privileged.{name}', value))

    def device_number(self, path: str) -> int:
        if path not in self.numbers:
            raise device_identity.WrongDevice(path)
        return self.numbers[path]

    def reboot(self, boot_id: str) -> None:
        self.boot_id.write_text(boot_id + '\n')

    def start_driver(self) -> None:
        options = conf.CONF.lxd
        self.connections = connections.VolumeConnections(options)
        self.usage = usage.VolumeUsage(self.guests, self.connections)
        self.attacher = attachment.VolumeAttacher(
            options, self.connections, self.usage)
        self.volumes = server_volumes.ServerVolumes(
            self.guests, self.connections, self.usage, self.attacher,
            provisioning.VolumeProvisioner(self.session, self.guests, None))

    def make(self, uuid: str, device: dict[str, str] | None = None,
             start: bool = False, **config: str) -> lxd_guest.Guest:
        """Make a server's guest, which has a volume."""
        name = f'g-{uuid[-4:]}'
        self.create(name, **{lxd_guest.KEY_UUID: uuid, **config})
        guest = self.guests.by_name(name)
        if device:
            guest.update(devices={lxd_devices.name(VOLUME): {
                'type': 'unix-block', 'source': DEVICE, 'path': '/dev/vdb',
                **device}})
        if start:
            guest.start()
        return guest.reload()

    @staticmethod
    def server(uuid: str) -> objects.Instance:
        return objects.Instance(uuid=uuid, metadata={}, system_metadata={},
                                flavor=objects.Flavor(extra_specs={}))

    def connection(self, identifier: str) -> dict[str, Any]:
        return {'driver_volume_type': 'pigeon', 'serial': identifier,
                'data': {}}

    def root_info(self, identifier: str) -> dict[str, Any]:
        """Describe the disks of a server that boots from a volume."""
        return {'block_device_mapping': [_Volume(
            connection_info=self.connection(identifier), boot_index=0,
            mount_device='/dev/vda')]}

    def connect_root(self, uuid: str, identifier: str) -> dict[str, str]:
        return self.volumes.connect(
            None, self.server(uuid), None, self.root_info(identifier)).config

    def known(self) -> dict[str, str]:
        """Paths of the devices of all recorded connections."""
        return {identifier: connection.path for identifier, connection
                in self.usage.connections().items()}

    def has_conflict(self) -> bool:
        """Whether another volume is refused the same device."""
        try:
            self.usage.check_device_conflict(self.server(NEIGHBOUR), OTHER,
                                             DEVICE)
        except exception.VolumeAttachFailed:
            return True
        return False

    # -- reboots of the host ------------------------------------------------

    def test_record_of_this_boot(self) -> None:
        guest = self.make(SERVER, {lxd_devices.KEY_BOOT: 'first'})
        self.assertTrue(self.has_conflict())
        self.assertEqual([SERVER],
                         [found.uuid for found in self.usage.users(VOLUME)])
        self.assertEqual({VOLUME: DEVICE}, self.known())
        self.assertRaises(exception.VolumeAttachFailed,
                          self.usage.check_exclusive, self.server(NEIGHBOUR),
                          VOLUME)
        self.assertTrue(self.usage.check_exclusive(
            self.server(NEIGHBOUR), VOLUME, sharing=True))
        self.assertTrue(lxd_devices.connected(guest))

    def test_record_without_a_boot(self) -> None:
        self.make(SERVER, {'user.x': 'y'})
        self.assertTrue(self.has_conflict())

    def test_record_of_another_boot(self) -> None:
        guest = self.make(SERVER, {lxd_devices.KEY_BOOT: 'first'})
        self.reboot('second')
        self.assertFalse(self.has_conflict())
        self.assertEqual([], self.usage.users(VOLUME))
        self.assertEqual({}, self.known())
        self.assertFalse(self.usage.check_exclusive(self.server(SERVER),
                                                    VOLUME))
        self.assertEqual({}, lxd_devices.connected(guest))
        self.assertEqual([VOLUME],
                         list(lxd_devices.of_guest(guest)))

    def test_running_server_has_what_it_has(self) -> None:
        self.make(SERVER, {lxd_devices.KEY_BOOT: 'first'}, start=True)
        self.reboot('second')
        self.assertTrue(self.has_conflict())

    def test_root_of_another_boot(self) -> None:
        keys = self.connect_root(SERVER, VOLUME)
        self.assertEqual('first', keys[lxd_guest.KEY_ROOT_BOOT])
        # What comes later counts: not mapped again by liblxc.
        self.assertEqual('lxc.rootfs.options =',
                         keys['raw.lxc'].splitlines()[0])
        guest = self.make(SERVER, **keys)
        self.assertTrue(self.has_conflict())
        self.assertRaisesRegex(
            exception.VolumeAttachFailed, 'for another volume',
            self.connect_root, NEIGHBOUR, OTHER)
        self.reboot('second')
        self.start_driver()
        self.connect_root(NEIGHBOUR, OTHER)
        self.patch_root('rootfs.unmount', lambda *args: False)
        self.patch_root('rootfs.close_staging', lambda *args: None)
        self.volumes.release(self.server(SERVER), guest,
                             self.root_info(VOLUME))
        self.assertEqual({}, lxd_devices.of_guest(guest.reload()))
        self.assertNotIn(lxd_guest.KEY_ROOT_BOOT, guest.config)

    def test_attached_after_a_reboot(self) -> None:
        """The device has become another volume's."""
        self.make(SERVER, {lxd_devices.KEY_BOOT: 'first'})
        self.reboot('second')
        with contextlib.ExitStack() as undo:
            changes = self.attacher.connect(
                None, self.server(NEIGHBOUR),
                {**self.connection(OTHER), modes.KEY_MODE: modes.BLOCK},
                '/dev/vdb', 1, undo)
            undo.pop_all()
        self.assertEqual('second', changes.devices[lxd_devices.name(OTHER)][
            lxd_devices.KEY_BOOT])

    def test_detached_after_a_reboot(self) -> None:
        """A mount of another server does not keep it attached."""
        self.patch_root('mounts.is_in_use', lambda path: True)
        self.patch('modes._RELEASE_TIMEOUT', 0)
        for boot in ('first', 'second'):
            guest = self.make(SERVER, {
                'type': 'disk', 'path': '/mnt/vdb', 'source': '/x',
                lxd_devices.KEY_SOURCE: DEVICE, lxd_devices.KEY_BOOT: 'first'})
            self.reboot(boot)

            def detach_device() -> None:
                self.attacher.detach_device(
                    self.server(SERVER), guest, self.connection(VOLUME),
                    '/dev/vdb')
            if boot == 'first':
                self.assertRaises(exception.DeviceDetachFailed, detach_device)
                guest.delete()
            else:
                detach_device()
                self.assertEqual({}, lxd_devices.of_guest(guest.reload()))

    def test_root_is_left_when_a_rescue_ends(self) -> None:
        """Nova's records name it with the others."""
        guest = self.make(SERVER, {lxd_devices.KEY_BOOT: 'first'})
        data = _Volume(connection_info={**self.connection(VOLUME),
                                        modes.KEY_MODE: modes.BLOCK},
                       boot_index=None, mount_device='/dev/vdb')
        info = self.root_info(OTHER)
        info['block_device_mapping'].append(data)
        self.patch('server_volumes.virt_driver.get_block_device_info',
                   lambda *args: info)
        self.useFixture(fixtures.MockPatchObject(
            objects.BlockDeviceMappingList, 'get_by_instance_uuid'))
        self.assertEqual([lxd_devices.name(VOLUME)],
                         list(self.volumes.reconnect(
                             None, self.server(SERVER), guest)))

    # -- failures -----------------------------------------------------------

    def test_failure_disconnects(self) -> None:
        self.patch('usage.VolumeUsage.check_device_conflict', self.fail_once)
        self.assertRaises(exception.VolumeAttachFailed, self.connect_root,
                          SERVER, VOLUME)
        self.assertEqual(0, self.plugin.connected)
        self.assertEqual({}, self.known())

    def test_failure_leaves_what_was_connected(self) -> None:
        self.make(SERVER, **self.connect_root(SERVER, VOLUME))
        self.plugin.connected = 1
        self.patch('device_identity.size', lambda path: 0)
        self.assertRaises(exception.VolumeAttachFailed, self.connect_root,
                          SERVER, VOLUME)
        self.assertEqual(2, self.plugin.connected)
        self.patch('device_identity.size', lambda path: 1 << 30)
        self.patch('usage.VolumeUsage.check_device_conflict', self.fail_once)
        self.assertRaises(exception.VolumeAttachFailed, self.connect_root,
                          SERVER, VOLUME)
        self.assertEqual(3, self.plugin.connected)
        self.assertEqual({VOLUME: DEVICE}, self.known())

    @staticmethod
    def fail_once(*_args: Any) -> None:
        raise exception.VolumeAttachFailed(volume_id=VOLUME, reason='test')


class NotesTestCase(session_case.SessionTestCase):

    def guest(self) -> lxd_guest.Guest:
        return lxd_guest.Guest(self.session,
                               self.session.get('instances', 'c1'))

    def test_note_that_cannot_be_removed(self) -> None:
        """It does no harm, and what is under way goes on."""
        self.create(**{usage.KEY_ATTACHING: '{"serial": "v"}'})
        self.assertEqual({'serial': 'v'}, usage.read_note(self.guest()))
        self.lxd.fail_next('PUT', '/1.0/instances/c1', 400, 'x')
        usage.clear_note(self.guest())
        self.assertEqual({'serial': 'v'}, usage.read_note(self.guest()))
        usage.clear_note(self.guest())
        self.assertIsNone(usage.read_note(self.guest()))
