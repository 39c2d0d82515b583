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

from __future__ import annotations

import os
import pathlib
from unittest import mock

import fixtures
from nova import exception
from nova import objects
from oslotest import base

from nova_lxd_py import conf
from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.image import placeholder
from nova_lxd_py.virt.privileged import rootfs
from nova_lxd_py.virt.server import guest_config
from nova_lxd_py.virt.volume import lxd_devices
from nova_lxd_py.virt.volume import modes
from nova_lxd_py.virt.volume import server_volumes

objects.register_all()

VOLUME = '9a0b6f0e-5d2c-4f4e-8a57-6a1c1b1f0e11'
OTHER = '9a0b6f0e-5d2c-4f4e-8a57-6a1c1b1f0e12'
TARGET = f'/run/x/root-{VOLUME}/{VOLUME}'


def guest(**config: str) -> lxd_guest.Guest:
    return lxd_guest.Guest(None, {
        'name': 'g', 'config': config,
        'devices': {f'volume-{OTHER}': {'type': 'unix-block',
                                        'source': '/dev/x'}}})


class RootsTestCase(base.BaseTestCase):
    """Root mode and what else knows of root volumes."""

    def setUp(self) -> None:
        super().setUp()
        self.info = {'block_device_mapping': [
            {'boot_index': None, 'connection_info': {}},
            {'boot_index': 0, 'connection_info': {'data': {}}}]}
        self.placeholder = guest(**{
            'raw.lxc': 'lxc.rootfs.path = dir:/x', 'raw.idmap': '',
            lxd_guest.KEY_ROOT_VOLUME: VOLUME,
            lxd_guest.KEY_ROOT_DEVICE: '/dev/y'})

    def test_which_volume(self) -> None:
        self.assertIs(self.info['block_device_mapping'][1],
                      server_volumes._root(self.info))
        self.assertIsNone(server_volumes._root(None))
        self.assertIsNone(server_volumes._root({'block_device_mapping': [
            self.info['block_device_mapping'][0]]}))
        self.assertEqual(VOLUME, lxd_guest.root_volume(self.placeholder))
        self.assertIsNone(lxd_guest.root_volume(guest()))
        self.assertIsNone(lxd_guest.root_volume(None))
        # It is none of those that a server has beside it.
        self.assertEqual([self.info['block_device_mapping'][0]],
                         server_volumes._data(self.info))

    def test_it_counts_as_held_while_connected(self) -> None:
        self.assertIn(f'volume-{VOLUME}',
                      lxd_devices.connected(self.placeholder))
        found = lxd_devices.of_guest(self.placeholder)
        self.assertEqual({f'volume-{VOLUME}', f'volume-{OTHER}'}, set(found))
        self.assertEqual(
            '/dev/y',
            lxd_devices.source(found[f'volume-{VOLUME}']))
        released = guest(**{lxd_guest.KEY_ROOT_VOLUME: VOLUME})
        self.assertNotIn(f'volume-{VOLUME}', lxd_devices.connected(released))

    def test_keys_survive_corrections(self) -> None:
        wanted = guest_config.GuestConfig({}, {})
        changes, _devices = guest_config.config_changes(self.placeholder,
                                                        wanted)
        self.assertEqual({'raw.idmap': None}, changes)
        by_hand = guest(**{'raw.lxc': 'lxc.net.0.type = none'})
        self.assertEqual({'raw.lxc': None},
                         guest_config.config_changes(by_hand, wanted)[0])

    def test_policy(self) -> None:
        options = mock.Mock(volume_filesystems=['ext4'])
        mode = modes.RootMode(options)
        server = objects.Instance(uuid=OTHER)
        mode.check(server, {'data': {}}, VOLUME)
        for info, allowed, reason in (
                ({'data': {'access_mode': 'ro'}}, ['ext4'], 'read-only'),
                ({'data': {}, 'multiattach': True}, ['xfs'], 'multiattach'),
                ({'data': {}}, [], 'volume_filesystems')):
            options.volume_filesystems = allowed
            error = self.assertRaises(exception.BuildAbortException,
                                      mode.check, server, info, VOLUME)
            self.assertIn(reason, str(error))

    def test_places(self) -> None:
        target = modes.RootMode(conf.CONF.lxd).target(VOLUME)
        self.assertEqual(target, rootfs._root_target(target))

    def test_refusals_say_what_to_do(self) -> None:
        self.assertIn('it is empty', modes.root_refusal('', ['ext4']))
        self.assertIn(
            'it holds dos', modes.root_refusal('dos', ['ext4', 'xfs']))

    def test_stub_is_always_the_same(self) -> None:
        self.assertEqual(
            placeholder.archive('x86_64'),
            placeholder.archive('x86_64'))
        self.assertNotEqual(
            placeholder.archive('x86_64'),
            placeholder.archive('aarch64'))


class RootFilesystemTestCase(base.BaseTestCase):
    """nova_lxd_py.virt.privileged.rootfs."""

    def setUp(self) -> None:
        super().setUp()
        rootfs.privileged.context.set_client_mode(False)
        self.addCleanup(rootfs.privileged.context.set_client_mode, True)
        self.directory = pathlib.Path(self.useFixture(fixtures.TempDir()).path)

    def find(self, *names: str, **links: str) -> str:
        directory = self.directory / str(len(list(self.directory.iterdir())))
        directory.mkdir()
        for name in names:
            (directory / name).mkdir(parents=True)
        for name, target in links.items():
            (directory / name).symlink_to(target)
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            return rootfs._find(descriptor)
        finally:
            os.close(descriptor)

    def test_what_is_there(self) -> None:
        self.assertEqual(rootfs.READY, self.find('rootfs', 'lost+found'))
        self.assertEqual(rootfs.READY, self.find(
            'etc', 'usr', sbin='usr/sbin'))
        self.assertEqual(rootfs.READY, self.find('rootfs', 'nova-unpack'))
        self.assertEqual(rootfs.UNFINISHED, self.find())
        self.assertEqual(rootfs.UNFINISHED, self.find('lost+found'))
        self.assertEqual(rootfs.UNFINISHED, self.find('nova-unpack/x'))
        self.assertEqual(rootfs.OTHER, self.find('etc'))
        self.assertEqual(rootfs.OTHER, self.find('data'))

    def test_links_are_none_of_it(self) -> None:
        self.assertEqual(rootfs.OTHER, self.find(rootfs='/'))
        self.assertEqual(rootfs.OTHER, self.find(**{'nova-unpack': '/'}))

    def test_comparing(self) -> None:
        file = self.directory / 'volume'
        file.write_bytes(b'image' + bytes(100))
        self.assertEqual('78805a221a988e79ef3f42d7c5bfd418',
                         rootfs._digest(str(file), 5))
        self.assertEqual('', rootfs._digest(str(file), 1000))
        for size in (0, -1, None, '5'):
            self.assertRaises(ValueError, rootfs._digest, str(file), size)

    def test_targets(self) -> None:
        for path in ('/', None, f'/run/{VOLUME}/{VOLUME}',
                     f'/run/root-{OTHER}/{VOLUME}', TARGET + '/',
                     f'/run/../root-{VOLUME}/{VOLUME}'):
            self.assertRaises(ValueError, rootfs.unmount, path, True)
            self.assertRaises(ValueError, rootfs.mount, '/dev/x', 'ext4',
                              path, 1, 1, 1)
        self.assertRaises(ValueError, rootfs.mount, '/dev/x', 'ext4', TARGET,
                          0, 0, 65536)
        self.assertRaises(ValueError, rootfs.root_state, '/dev/x', 'ext4', '/')
        for function in (rootfs.complete, rootfs.close_staging):
            self.assertRaises(ValueError, function, '/mnt')

    def test_nothing_is_mounted(self) -> None:
        target = self.directory / f'root-{VOLUME}' / VOLUME
        self.assertFalse(rootfs.unmount(str(target), False))
        rootfs.close_staging(str(self.directory / VOLUME))
