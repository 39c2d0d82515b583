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

"""Encrypted volumes with a real LXD, and with cryptsetup where that can work.

On a kernel without device-mapper, a script replaces cryptsetup: it attaches a
loop device behind a header, without a cipher. Everything up to its arguments
and standard input is real there, too.
"""

from __future__ import annotations

import os
import pathlib
import unittest

from nova import exception
from oslo_utils import units

from tests.fixtures import boot_volume_host
from tests.fixtures import disks
from tests.fixtures import encrypted_volumes
from tests.fixtures import lab_volumes
from tests.fixtures import lxd_daemon

NO_LXD = lxd_daemon.missing()

KEY = encrypted_volumes.KEY
PATH = encrypted_volumes.PATH


@unittest.skipIf(NO_LXD, NO_LXD or '')
class EncryptedVolumeTest(encrypted_volumes.EncryptedCases,
                          unittest.TestCase):
    """As block devices, on both kinds of storage."""

    kind = lab_volumes.FileVolume

    def test_key_and_content(self) -> None:
        self.install()
        server = self.host.spawn()
        volume = self.storage.volume()
        connection = self.attach_encrypted(server, volume)
        written = self.write(server)
        self.assertEqual(written, self.read(server))
        self.assertTrue(self.opened(volume))
        config = str(self.host.lxd_instances()[server.name])
        self.detach(server, connection)
        self.assert_closed(volume)
        # The content begins after the header.
        content = volume.file.read_bytes()[:self.header + 2 * units.Mi]
        self.assertTrue(content.startswith(b'LUKS'))
        arguments = pathlib.Path(f'{self.program}.arguments').read_text()
        for wanted in ('luksFormat', '--type luks2', '--key-file=-',
                       'aes-xts-plain64', 'luksOpen', 'luksClose'):
            self.assertIn(wanted, arguments)
        # The key is passed by standard input only.
        self.assertEqual(KEY * 3, pathlib.Path(
            f'{self.program}.input').read_text())
        for text in (arguments, self.log.output, config, str(connection)):
            self.assertNotIn(KEY, text)
        # A volume is formatted only once.
        other = self.host.spawn()
        connection = self.attach_encrypted(other, volume)
        self.assertEqual(written, self.read(other))
        self.detach(other, connection)
        self.assertEqual(1, pathlib.Path(
            f'{self.program}.arguments').read_text().count('luksFormat'))

    def test_boot_reboot_and_destroy(self) -> None:
        self.install()
        volume = self.storage.volume()
        mapping = volume.mapping()
        mapping['connection_info']['data']['encrypted'] = True
        server = self.host.spawn(block_device_info=disks.described(mapping))
        written = self.write(server)
        self.reboot(server, disks.described(mapping))
        self.assertEqual(written, self.read(server))
        # As after a reboot of the host, or a crash of nova-compute.
        self.host.restart_driver()
        fresh = volume.mapping()
        fresh['connection_info']['data']['encrypted'] = True
        self.reboot(server, disks.described(fresh))
        self.assertEqual(written, self.read(server))
        self.destroy(server, disks.described(fresh))
        self.assert_closed(volume)

    def test_destroyed_without_its_connection(self) -> None:
        self.install()
        server = self.host.spawn()
        volume = self.storage.volume()
        self.attach_encrypted(server, volume)
        self.destroy(server)
        self.assert_closed(volume)

    def test_extend(self) -> None:
        self.install()
        server = self.host.spawn()
        volume = self.storage.volume()
        connection = self.attach_encrypted(server, volume)
        self.grow(server, volume, connection)
        self.assertEqual(2 * units.Gi - self.header, self.device_size(server))
        self.detach(server, connection)
        self.assert_closed(volume)

    def test_moved_by_cinder(self) -> None:
        """Cinder knows only the id that the volume had before."""
        self.install()
        server = self.host.spawn()
        first, second = self.storage.volume(), self.storage.volume()
        old = self.attach_encrypted(server, first)
        written = self.write(server)
        new = second.connection(encrypted=True)
        self.host.driver.swap_volume(self.host.context, old, new, server,
                                     PATH, 0)
        new.update(serial=first.id, volume_id=first.id)
        self.gone.add(second.id)
        self.grow(server, second, new)
        self.assertEqual(2 * units.Gi - self.header, self.device_size(server))
        mapping = second.mapping()
        mapping['connection_info'] = new
        self.reboot(server, disks.described(mapping))
        self.assertEqual(written, self.read(server))
        self.detach(server, new)
        self.assert_closed(second)

    def test_what_the_host_lacks(self) -> None:
        """Refused before the host is connected."""
        server = self.host.spawn()
        volume = self.storage.volume()
        volume.file.unlink()
        self._patch('nova_lxd_py.virt.volume.encryption.MISC_DEVICES',
                    '/dev/null')
        self._patch('nova_lxd_py.virt.volume.encryption.MODULES', '/dev/null')
        self.assertRaisesRegex(
            exception.VolumeAttachFailed, 'cryptsetup|device-mapper',
            self.attach_encrypted, server, volume)
        self.install()
        self._patch('nova_lxd_py.virt.volume.encryption.MISC_DEVICES',
                    '/dev/null')
        self.assertRaisesRegex(
            exception.VolumeAttachFailed, 'no device-mapper',
            self.attach_encrypted, server, volume)
        self.assertFalse(pathlib.Path(f'{self.program}.arguments').exists())

    def test_failures(self) -> None:
        self.install()
        server = self.host.spawn()
        volume = self.storage.volume()
        # A volume with content is never formatted.
        with open(volume.file, 'r+b') as stream:
            stream.write(b'something')
        self.assertRaisesRegex(exception.VolumeAttachFailed, 'but holds',
                               self.attach_encrypted, server, volume)
        self.assertTrue(volume.file.read_bytes().startswith(b'something'))
        self.metadata['encryption_key_id'] = 'another'
        self.assertRaises(exception.VolumeAttachFailed,
                          self.attach_encrypted, server,
                          self.storage.volume())
        self.metadata.clear()
        self.assertRaisesRegex(
            exception.VolumeAttachFailed, 'does not say',
            self.attach_encrypted, server, self.storage.volume())
        self.assertEqual({}, self.devices(server))
        self.assert_closed(volume)

    def test_encrypted_by_the_back_end(self) -> None:
        server = self.host.spawn()
        self.metadata['control_location'] = 'back-end'
        volume = self.storage.volume()
        connection = self.attach_encrypted(server, volume)
        written = self.write(server)
        self.detach(server, connection)
        self.assertEqual(written, volume.checksum(2 * units.Mi))


@unittest.skipIf(NO_LXD, NO_LXD or '')
class EncryptedFilesystemTest(encrypted_volumes.EncryptedCases,
                              unittest.TestCase):
    """Mounted by the host."""

    kind = lab_volumes.LocalVolume
    options = {'volume_filesystems': ['ext4'], 'volume_mode': 'filesystem'}

    def test_content(self) -> None:
        self.install()
        volume = self.storage.volume()
        written = None
        for _turn in range(2):
            server = self.host.spawn()
            connection = self.attach_encrypted(server, volume)
            if written is None:
                written = self.write(server, '/mnt/vdb/file')
            self.assertEqual(written, self.read(server, '/mnt/vdb/file'))
            self.detach(server, connection)
            self.assert_closed(volume)
        # Cinder's own link to the device is unchanged.
        self.assertEqual(volume.device, os.path.realpath(volume.link))


@unittest.skipIf(NO_LXD, NO_LXD or '')
class EncryptedBootTest(boot_volume_host.BootVolumeHost,
                        encrypted_volumes.EncryptedCases, unittest.TestCase):
    """Servers that boot from encrypted volumes."""

    def test_boot_and_reboot(self) -> None:
        self.install()
        volume = self.storage.volume()
        server = self.host.spawn()
        connection = self.attach_encrypted(server, volume)
        # Cinder writes the image to the encrypted volume.
        data = self.host.glance.data(self.image.id)
        with open(connection['lxd_device_path'], 'r+b') as stream:
            stream.write(data + bytes(-len(data) % 512))
            os.fsync(stream.fileno())
        self.detach(server, connection)
        self.about[volume.id] = self.image_metadata(self.image)
        info = self.described(volume)
        for mapping in info['block_device_mapping']:
            mapping['connection_info']['data']['encrypted'] = True
        server = self.boot(volume, info=info)
        filled = self.fill(server)
        self.reboot(server, info)
        self.assertEqual(filled, self.sum(server))
        self.destroy(server, info)
        self.assert_closed(volume)
        self.assert_clean()
