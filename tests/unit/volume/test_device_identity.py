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

"""Checks of the block device of a volume, and its names."""

from __future__ import annotations

import os
from unittest import mock

import ddt
from nova import objects
from oslo_utils import units
from oslotest import base

from nova_lxd_py.virt.volume import device_identity
from tests.fixtures import fake_block_host

WWID = '3600140512345678'


class IdentityTestCase(base.BaseTestCase):

    def test_not_a_device(self) -> None:
        for path in ('/dev/null', '/etc/passwd', '/no/such/thing'):
            self.assertRaises(device_identity.WrongDevice,
                              device_identity.check, path, {'data': {}}, 1)

    def test_persistent_names(self) -> None:
        for path in ('/dev/sda', '/dev/sdaa', '/dev/dm-3', '/dev/nvme0n1',
                     '/dev/vdb'):
            self.assertTrue(device_identity.is_fleeting(path))
        for path in ('/dev/disk/by-id/wwn-0x1', '/dev/loop3', '/dev/vg/lv',
                     '/dev/mapper/x', '/dev/rbd/pool/image'):
            self.assertFalse(device_identity.is_fleeting(path))
            self.assertEqual(path, device_identity.stable_path(path))


@ddt.ddt
class CheckTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        objects.register_all()
        self.host = self.useFixture(fake_block_host.BlockHost())
        self.device = self.host.add_device(
            self.host.volume(size_gb=2).disk)

    def check(self, size_gb: int | None = 2, **data: str) -> None:
        device_identity.check(self.device.path, {'data': data}, size_gb)

    def show(self, name: str, value: str) -> None:
        self.host.set_attribute(self.device, name, value)

    def test_size(self) -> None:
        """Back ends may round it up, never down."""
        for size_gb in (None, 0, 1, 2):
            self.check(size_gb)
        error = self.assertRaises(device_identity.WrongDevice, self.check, 3)
        self.assertIn(f'{2 * units.Gi} bytes', str(error))

    def test_size_in_sectors(self) -> None:
        self.show('size', str(2 * units.Gi // 512 - 1))
        self.assertRaises(device_identity.WrongDevice, self.check)

    def test_nothing_behind_it(self) -> None:
        """A device that its storage has left has no size."""
        self.show('size', '0')
        for size_gb in (None, 2):
            self.assertRaises(device_identity.WrongDevice, self.check,
                              size_gb)

    def test_read_only(self) -> None:
        self.assertFalse(device_identity.is_read_only(self.device.path))
        self.show('ro', '1')
        self.assertTrue(device_identity.is_read_only(self.device.path))

    def test_multipath(self) -> None:
        """It has no identifier of its own, but multipathd names it so."""
        self.show('dm/uuid', f'mpath-{WWID}')
        for wanted in (WWID, f'0x{WWID[1:]}', WWID.upper()):
            self.check(wwn=wanted)
        error = self.assertRaises(device_identity.WrongDevice, self.check,
                                  wwn='0x600140587654321')
        self.assertIn(WWID, str(error))
        self.assertNotIn('mpath-', str(error))

    def test_other_mappings_say_nothing(self) -> None:
        for uuid in (f'LVM-{WWID}', f'CRYPT-LUKS2-{WWID}',
                     f'part1-mpath-{WWID}'):
            self.show('dm/uuid', uuid)
            self.check(wwn='0x600140587654321')

    @ddt.data(('wwn', 'wwid'), ('wwid', 'device/wwid'),
              ('nguid', 'nguid'), ('volume_nguid', 'nguid'),
              ('vol_uuid', 'uuid'), ('volume_uuid', 'uuid'))
    @ddt.unpack
    def test_identifier(self, key: str, attribute: str) -> None:
        self.check(**{key: WWID})
        self.show(attribute, f'naa.{WWID}')
        self.check(**{key: WWID})
        self.check(**{key: ''})
        error = self.assertRaises(device_identity.WrongDevice, self.check,
                                  **{key: '3600140587654321'})
        self.assertIn('3600140587654321', str(error))

    def test_own_identifier_comes_first(self) -> None:
        self.show('wwid', f'naa.{WWID}')
        self.show('device/wwid', 'naa.1')
        self.show('dm/uuid', 'mpath-2')
        self.check(wwn=WWID)


class PersistentNameTestCase(base.BaseTestCase):

    DEVICES = {'/dev/sda': 1, '/dev/sdb': 2, '/dev/dm-0': 3}

    def setUp(self) -> None:
        super().setUp()
        self.names: dict[str, int | None] = {}
        stat = os.stat

        def host_stat(path: str, *args: object, **kwargs: object) -> object:
            directory, _slash, name = str(path).rpartition('/')
            number = self.DEVICES.get(str(path))
            if directory == '/dev/disk/by-id':
                number = self.names[name]
                if number is None:
                    raise FileNotFoundError(path)
            if number is None:
                return stat(path, *args, **kwargs)
            return mock.Mock(st_mode=0o060600, st_rdev=number)

        for name, function in (('stat', host_stat),
                               ('listdir', lambda _path: list(self.names))):
            patch = mock.patch.object(os, name, function)
            patch.start()
            self.addCleanup(patch.stop)

    def test_most_reliable_first(self) -> None:
        self.names = {'ata-x': 1, 'scsi-3600': 1, 'wwn-0x600': 1,
                      'dm-uuid-mpath-3600': 3, 'wwn-0x700': 2}
        for path, name in (('/dev/sda', 'wwn-0x600'),
                           ('/dev/sdb', 'wwn-0x700'),
                           ('/dev/dm-0', 'dm-uuid-mpath-3600')):
            self.assertEqual(f'/dev/disk/by-id/{name}',
                             device_identity.stable_path(path))

    def test_always_the_same(self) -> None:
        self.names = {'wwn-0x2': 1, 'wwn-0x1': 1}
        self.assertEqual('/dev/disk/by-id/wwn-0x1',
                         device_identity.stable_path('/dev/sda'))

    def test_none(self) -> None:
        """Names of other kinds may be those of a part, or go away."""
        self.names = {'ata-x': 1, 'wwn-0x1': 2, 'wwn-0x3': None}
        self.assertEqual('/dev/sda', device_identity.stable_path('/dev/sda'))

    def test_links_elsewhere_are_followed(self) -> None:
        with mock.patch.object(os.path, 'realpath',
                               lambda path: '/dev/sda'):
            self.names = {'wwn-0x1': 1}
            for path in ('/var/lib/x', '/dev/../tmp/x'):
                self.assertEqual('/dev/disk/by-id/wwn-0x1',
                                 device_identity.stable_path(path))
