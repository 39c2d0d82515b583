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


"""Encrypted volumes, through the driver as Nova calls it.

cryptsetup is imitated: that the host decrypts is proved with a real one.
"""

from __future__ import annotations

from typing import Any

from nova import exception
from oslo_utils import units

from nova_lxd_py.virt.guest import disk_view
from tests.fixtures import disks
from tests.fixtures import fake_block_host
from tests.fixtures import fake_driver_host
from tests.fixtures import fake_encryption

PATH = '/dev/vdb'


class EncryptedVolumesTest(fake_driver_host.FakeDriverTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.encryption = self.useFixture(
            fake_encryption.FakeEncryption(self.storage))
        self.volume = self.storage.volume(
            encryption=fake_encryption.METADATA)
        self.server = self.host.spawn()

    def attach(self, encryption: Any = fake_encryption.METADATA
               ) -> dict[str, Any]:
        connection = self.volume.connection(encrypted=True)
        self.driver.attach_volume(self.context, connection, self.server,
                                  PATH, encryption=encryption)
        return connection

    def detach(self, connection: dict[str, Any]) -> None:
        self.driver.detach_volume(self.context, connection, self.server, PATH)

    def opened(self) -> fake_block_host.Device | None:
        return self.storage.devices.get(
            f'{self.encryption.mapper}/crypt-{self.volume.id}')

    def source(self) -> str:
        """The block device that the guest gets."""
        return self.devices(self.server)[f'volume-{self.volume.id}']['source']

    def assert_detached(self) -> None:
        self.assertEqual({'root'}, {name for name in self.devices(self.server)
                                    if not disk_view.is_part(name)})
        self.assertEqual(set(), self.storage.left())

    def test_the_guest_gets_the_plain_content(self) -> None:
        for _time in range(2):
            connection = self.attach()
            self.assertEqual(self.opened().path, self.source())
        self.assertEqual('crypto_LUKS', self.volume.disk.content)
        # Not noise, which would be taken for content.
        self.assertEqual('', self.opened().disk.content)
        self.assertNotIn('key-1', str(self.config(self.server)))
        for _time in range(2):
            self.detach(connection)
            self.assert_detached()

    def test_cinder_is_asked_where_nova_does_not_say(self) -> None:
        self.attach(encryption=None)
        self.assertEqual(self.opened().path, self.source())

    def test_mapping_left_on_another_device(self) -> None:
        """It would lead to the data of the volume that has that device now."""
        other = self.storage.volume(content='crypto_LUKS')
        stale = self.storage.add_device(other.disk)
        self.encryption.open(self.volume.id, stale.path).disk.data = b'theirs'
        self.attach()
        self.assertEqual(self.source(), self.opened().path)
        self.assertEqual(b'', self.opened().disk.data)
        self.assertEqual(
            self.storage.device_of(self.volume).path.rpartition('/')[2],
            self.encryption.lower[f'crypt-{self.volume.id}'])

    def test_mapping_of_which_the_kernel_says_nothing(self) -> None:
        other = self.storage.volume(content='crypto_LUKS')
        stale = self.storage.add_device(other.disk)
        self.encryption.open(self.volume.id, stale.path).disk.data = b'theirs'
        self.encryption.lower.clear()
        self.attach()
        self.assertEqual(b'', self.opened().disk.data)

    def test_plain_content_is_not_encrypted_over(self) -> None:
        self.volume.disk.content = 'ext4'
        self.assertRaises(exception.VolumeAttachFailed, self.attach)
        self.assertEqual('ext4', self.volume.disk.content)
        self.assert_detached()

    def test_what_the_host_lacks(self) -> None:
        self.encryption.programs.clear()
        error = self.assertRaises(exception.VolumeAttachFailed, self.attach)
        self.assertIn('cryptsetup', str(error))
        self.assertNotIn('brick.connect', self.storage.calls)

    def test_provider_is_unknown(self) -> None:
        self.assertRaises(exception.VolumeAttachFailed, self.attach,
                          {'control_location': 'front-end', 'provider': ''})
        self.assert_detached()

    def test_encrypted_by_the_storage(self) -> None:
        self.attach({**fake_encryption.METADATA,
                     'control_location': 'back-end'})
        self.assertIsNone(self.opened())
        self.assertEqual(self.storage.device_of(self.volume).path,
                         self.source())

    def test_cannot_be_opened(self) -> None:
        self.storage.fail('cryptsetup.open', OSError('wrong key key-1'))
        error = self.assertRaises(exception.VolumeAttachFailed, self.attach)
        self.assertNotIn('key-1', str(error))
        self.assert_detached()

    def test_cannot_be_closed(self) -> None:
        connection = self.attach()
        self.storage.fail('cryptsetup.close', OSError('in use'))
        self.assertRaises(exception.VolumeDetachFailed, self.detach,
                          connection)
        # The connection below stays as long as something is open on it.
        self.assertIsNotNone(self.storage.device_of(self.volume))
        self.detach(connection)
        self.assert_detached()

    def test_killed_after_formatting(self) -> None:
        self.storage.fail('probe.make_blank', OSError('killed'))
        self.assertRaises(exception.VolumeAttachFailed, self.attach)
        self.assertEqual('crypto_LUKS', self.volume.disk.content)
        self.attach()
        self.assertEqual('', self.opened().disk.content)

    def test_unknown_data_is_kept(self) -> None:
        connection = self.attach()
        self.opened().disk.content = 'unknown'
        self.opened().disk.data = b'of a database'
        self.detach(connection)
        self.attach()
        self.assertEqual('unknown', self.opened().disk.content)

    def test_extend(self) -> None:
        connection = self.attach()
        before = self.opened().size
        self.volume.extend(2)
        self.driver.extend_volume(self.context, connection, self.server,
                                  2 * units.Gi)
        self.assertLess(before, self.opened().size)

    def test_destroy(self) -> None:
        connection = self.attach()
        mapping = self.volume.mapping(PATH)
        mapping['connection_info'] = connection
        self.driver.destroy(self.context, self.server, [],
                            disks.described(mapping))
        self.assertEqual(set(), self.storage.left())

    def test_destroy_without_the_connection(self) -> None:
        self.attach()
        self.driver.destroy(self.context, self.server, [])
        self.assertIsNone(self.opened())

    def test_destroy_without_the_connection_that_cannot_be_closed(self
                                                                  ) -> None:
        """The server goes all the same; the volume is closed later."""
        self.attach()
        self.storage.fail('cryptsetup.close', OSError('in use'))
        self.driver.destroy(self.context, self.server, [])
        self.assertNotIn(self.server.name, self.lxd.instances)
        self.assertIsNotNone(self.opened())
