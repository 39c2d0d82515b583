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

"""The modes of volumes, and the guests that boot from volumes."""

from __future__ import annotations

import errno
from unittest import mock

import fixtures
from nova import exception
from nova import objects
from oslotest import base

from nova_lxd_py import conf
from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.privileged import mounts
from nova_lxd_py.virt.privileged import rootfs
from nova_lxd_py.virt.server import guest_config
from nova_lxd_py.virt.volume import base as volume_base
from nova_lxd_py.virt.volume import lxd_devices
from nova_lxd_py.virt.volume import modes

objects.register_all()

VOLUME = '9a0b6f0e-5d2c-4f4e-8a57-6a1c1b1f0e11'
OTHER = '9a0b6f0e-5d2c-4f4e-8a57-6a1c1b1f0e12'


def guest(**config: str) -> lxd_guest.Guest:
    return lxd_guest.Guest(None, {
        'name': 'g', 'config': config,
        'devices': {f'volume-{OTHER}': {'type': 'unix-block',
                                        'source': '/dev/x'}}})


class MountTestCase(base.BaseTestCase):

    def mount(self, **config: str) -> None:
        modes.FilesystemMode(conf.CONF.lxd).mount(guest(**config), {
            'serial': VOLUME, 'data': {}, modes.KEY_KIND: 'ext4',
            volume_base.DEVICE_PATH: '/dev/x'})

    def test_guest_without_ids(self) -> None:
        error = self.assertRaises(volume_base.Refused, self.mount)
        self.assertIn('range of user ids', str(error))

    def test_kernel_without_mapped_mounts(self) -> None:
        for number, kind in ((errno.EINVAL, volume_base.Refused),
                             (errno.ENOSYS, volume_base.Refused),
                             (errno.EIO, OSError)):
            with fixtures.MockPatchObject(
                    mounts, 'mount', side_effect=OSError(number, 'x')):
                self.assertRaises(kind, self.mount,
                                  **{'security.privileged': 'true'})


class RootModeTestCase(base.BaseTestCase):
    """Volumes that instances boot from."""

    def setUp(self) -> None:
        super().setUp()
        self.placeholder = guest(**{
            'raw.lxc': 'lxc.rootfs.path = dir:/x', 'raw.idmap': '',
            lxd_guest.KEY_ROOT_VOLUME: VOLUME,
            lxd_guest.KEY_ROOT_DEVICE: '/dev/y'})

    def test_root_volume(self) -> None:
        self.assertEqual(VOLUME, lxd_guest.root_volume(self.placeholder))
        self.assertIsNone(lxd_guest.root_volume(guest()))
        self.assertIsNone(lxd_guest.root_volume(None))

    def test_counts_as_attached_while_connected(self) -> None:
        self.assertIn(VOLUME, lxd_devices.connected(self.placeholder))
        found = lxd_devices.of_guest(self.placeholder)
        self.assertEqual({VOLUME, OTHER}, set(found))
        self.assertEqual('/dev/y', lxd_devices.source(found[VOLUME]))
        released = guest(**{lxd_guest.KEY_ROOT_VOLUME: VOLUME})
        self.assertNotIn(VOLUME, lxd_devices.connected(released))
        for each in (self.placeholder, released):
            self.assertEqual({VOLUME, OTHER}, lxd_devices.volumes(each))
        self.assertEqual({OTHER}, lxd_devices.volumes(guest()))
        self.assertEqual(set(), lxd_devices.volumes(None))

    def test_keys_survive_hard_reboot(self) -> None:
        wanted = guest_config.GuestConfig({}, {})
        changes, _devices = guest_config.config_changes(self.placeholder,
                                                        wanted)
        self.assertEqual({'raw.idmap': None}, changes)
        by_hand = guest(**{'raw.lxc': 'lxc.net.0.type = none'})
        self.assertEqual({'raw.lxc': None},
                         guest_config.config_changes(by_hand, wanted)[0])

    def test_refusals(self) -> None:
        options = mock.Mock(volume_filesystems=['ext4'])
        mode = modes.RootMode(options)
        server = objects.Instance(uuid=OTHER)
        mode.check(server, {'data': {}})
        for info, allowed, reason in (
                ({'data': {'access_mode': 'ro'}}, ['ext4'], 'read-only'),
                ({'data': {}, 'multiattach': True}, ['xfs'], 'multiattach'),
                ({'data': {}}, [], 'volume_filesystems')):
            options.volume_filesystems = allowed
            error = self.assertRaises(exception.BuildAbortException,
                                      mode.check, server, info)
            self.assertIn(reason, str(error))

    def test_target(self) -> None:
        target = modes.RootMode(conf.CONF.lxd).target(VOLUME)
        self.assertEqual(target, rootfs._root_target(target))

    def test_reasons_name_the_content(self) -> None:
        self.assertIn('it is empty', modes.root_refusal('', ['ext4']))
        self.assertIn(
            'it holds dos', modes.root_refusal('dos', ['ext4', 'xfs']))
