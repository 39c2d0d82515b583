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

"""Who has which volume, and what is left when something goes wrong."""

from __future__ import annotations

from typing import Any

import fixtures
from nova import exception
from nova import objects
from stevedore import extension

from nova_lxd_py import conf
from nova_lxd_py.virt import instance as lxd_instance
from nova_lxd_py.virt.volume import base
from nova_lxd_py.virt.volume import filesystems
from nova_lxd_py.virt.volume import holders
from nova_lxd_py.virt.volume import identity
from nova_lxd_py.virt.volume import manager
from nova_lxd_py.virt.volume import roots
from tests.unit import session_case

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


class HoldersTestCase(session_case.SessionTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.log = self.useFixture(fixtures.FakeLogger(level=0))
        self.cfg.config(group='lxd', volume_filesystems=['ext4'])
        self.numbers = {DEVICE: 7, '/dev/loop8': 8}
        self.patch('identity.device_number', self.device_number)
        self.patch('identity.size', lambda path: 1 << 30)
        self.plugin = Plugin(conf.CONF.lxd)
        found = extension.ExtensionManager.make_test_instance(
            [extension.Extension('pigeon', None, None, self.plugin)])
        self.useFixture(fixtures.MonkeyPatch(
            'stevedore.extension.ExtensionManager',
            lambda *args, **kwargs: found))
        self.guests = lxd_instance.Guests(self.session)
        self.start_driver()

    def patch(self, name: str, value: Any) -> None:
        self.useFixture(fixtures.MonkeyPatch(
            f'nova_lxd_py.virt.volume.{name}', value))

    def device_number(self, path: str) -> int:
        if path not in self.numbers:
            raise identity.WrongDevice(path)
        return self.numbers[path]

    def start_driver(self) -> None:
        options = conf.CONF.lxd
        self.volumes = manager.VolumeManager(options)
        self.holders = holders.Holders(self.guests, self.volumes)
        self.roots = roots.RootVolumes(options, self.volumes, self.holders)

    def make(self, uuid: str, **config: str) -> lxd_instance.Guest:
        """Make a server's guest."""
        name = f'g-{uuid[-4:]}'
        self.create(name, **{lxd_instance.KEY_UUID: uuid, **config})
        return self.guests.by_name(name)

    @staticmethod
    def server(uuid: str) -> objects.Instance:
        return objects.Instance(uuid=uuid, metadata={}, system_metadata={},
                                flavor=objects.Flavor(extra_specs={}))

    def connection(self, identifier: str) -> dict[str, Any]:
        return {'driver_volume_type': 'pigeon', 'serial': identifier,
                'data': {}, filesystems.KEY_MODE: filesystems.BLOCK}

    def root_of(self, identifier: str) -> dict[str, Any]:
        return {'connection_info': self.connection(identifier)}

    def is_mixed_up(self) -> bool:
        """Whether another volume is refused the same device."""
        try:
            self.holders.refuse_mix_up(self.server(NEIGHBOUR), OTHER, DEVICE)
        except exception.VolumeAttachFailed:
            return True
        return False

    def test_device_of_another_volume(self) -> None:
        self.make(SERVER, **self.roots.connect(self.server(SERVER),
                                               self.root_of(VOLUME)))
        self.assertRaisesRegex(
            exception.VolumeAttachFailed, 'for another volume',
            self.roots.connect, self.server(NEIGHBOUR), self.root_of(OTHER))

    # -- failures -----------------------------------------------------------

    def test_failure_takes_back_what_it_has_connected(self) -> None:
        self.patch('holders.Holders.refuse_mix_up', self.fail_once)
        self.assertRaises(exception.VolumeAttachFailed, self.roots.connect,
                          self.server(SERVER), self.root_of(VOLUME))
        self.assertEqual(0, self.plugin.connected)
        self.assertEqual({}, self.volumes.connections())

    def test_failure_leaves_what_was_connected(self) -> None:
        self.make(SERVER, **self.roots.connect(self.server(SERVER),
                                               self.root_of(VOLUME)))
        self.plugin.connected = 1
        self.patch('identity.size', lambda path: 0)
        self.assertRaises(exception.VolumeAttachFailed, self.roots.connect,
                          self.server(SERVER), self.root_of(VOLUME))
        self.assertEqual(2, self.plugin.connected)
        self.patch('identity.size', lambda path: 1 << 30)
        self.patch('holders.Holders.refuse_mix_up', self.fail_once)
        self.assertRaises(exception.VolumeAttachFailed, self.roots.connect,
                          self.server(SERVER), self.root_of(VOLUME))
        self.assertEqual(3, self.plugin.connected)
        self.assertEqual({VOLUME: DEVICE}, self.volumes.connections())

    @staticmethod
    def fail_once(*_args: Any) -> None:
        raise exception.VolumeAttachFailed(volume_id=VOLUME, reason='test')
