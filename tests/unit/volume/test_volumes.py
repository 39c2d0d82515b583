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

"""Volumes: what is refused, and what is said of it."""

from __future__ import annotations

import os
import tempfile
from typing import Any
from unittest import mock

import fixtures
from nova import exception
from oslo_concurrency import processutils
from oslotest import base
from stevedore import extension

from nova_lxd_py import conf
from nova_lxd_py.virt.privileged import fuser
from nova_lxd_py.virt.privileged import loop
from nova_lxd_py.virt.volume import base as volume_base
from nova_lxd_py.virt.volume import connections
from nova_lxd_py.virt.volume import device_identity
from nova_lxd_py.virt.volume import lxd_devices

VOLUME = '9a0b6f0e-5d2c-4f4e-8a57-6a1c1b1f0e11'
SECRET = 'open-sesame-77aa'


class Plugin(volume_base.VolumePlugin):
    """A plugin of a third party, whose storage is out of order."""

    error: Exception = ValueError('nothing')

    def connect(self, volume_id, connection_info):
        raise self.error

    def disconnect(self, volume_id, connection_info, *, force):
        raise self.error

    def extend(self, volume_id, connection_info):
        raise self.error


class ConnectionsTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.log = self.useFixture(fixtures.FakeLogger(level=0))
        self.plugin = Plugin(conf.CONF.lxd)
        found = extension.ExtensionManager.make_test_instance([
            extension.Extension('pigeon', None, None, self.plugin),
            extension.Extension('broken', mock.Mock(value='a:B'), None, 7)])
        self.useFixture(fixtures.MonkeyPatch(
            'stevedore.extension.ExtensionManager',
            lambda *args, **kwargs: found))
        self.connections = connections.VolumeConnections(conf.CONF.lxd)

    def connection(self, **changes: Any) -> dict[str, Any]:
        return {'driver_volume_type': 'pigeon', 'serial': VOLUME,
                'data': {'auth_password': SECRET}, **changes}

    def connect(self, **changes: Any) -> str:
        return self.connections.connect(None, self.connection(**changes), 1,
                                        context=None)

    def test_plugins(self) -> None:
        self.assertEqual(['pigeon'], self.connections.supported_types)
        self.assertIn('is not a VolumePlugin', self.log.output)

    def test_types(self) -> None:
        for kind in ('broken', 'iscsi', '', None):
            error = self.assertRaises(
                exception.VolumeDriverNotFound, self.connect,
                driver_volume_type=kind)
            self.assertIn('Supported types: pigeon', str(error))

    def test_secrets_of_commands(self) -> None:
        self.plugin.error = processutils.ProcessExecutionError(
            cmd=f'iscsiadm --password {SECRET} --op update',
            stderr=f'auth_password={SECRET} is wrong')
        for call, kind in (
                (self.connect,
                 exception.VolumeAttachFailed),
                (lambda: self.connections.disconnect(None, self.connection()),
                 exception.VolumeDetachFailed),
                (lambda: self.connections.extend(None, self.connection(), 1,
                                                 None),
                 exception.VolumeExtendFailed)):
            error = self.assertRaises(kind, call)
            self.assertNotIn(SECRET, str(error))
            self.assertTrue(error.__suppress_context__)
        self.assertIn('ProcessExecutionError', self.log.output)
        self.assertNotIn(SECRET, self.log.output)

    def test_reasons_for_owners(self) -> None:
        self.plugin.error = volume_base.Refused('it is upside down')
        error = self.assertRaises(exception.VolumeAttachFailed,
                                  self.connect)
        self.assertIn('upside down', str(error))
        self.plugin.error = device_identity.WrongDevice('/dev/sdx is not')
        error = self.assertRaises(exception.VolumeAttachFailed,
                                  self.connect)
        self.assertNotIn('/dev/sdx', str(error))

    def test_force_ignores_errors(self) -> None:
        self.connections.disconnect(None, self.connection(), force=True)
        self.assertIn('may be left on this host', self.log.output)
        self.connections.forget(None, VOLUME, force=True)

    def test_what_cannot_be_closed(self) -> None:
        """It stays open; with force, the host is disconnected all the same."""
        done: list[bool] = []
        self.plugin.disconnect = (
            lambda identifier, connection_info, *, force: done.append(force))
        # Its link is a directory, which nothing removes.
        directory = self.useFixture(fixtures.TempDir()).path
        os.makedirs(os.path.join(directory, VOLUME, 'x'))
        conf.CONF.set_override('volume_encryption_directory', directory, 'lxd')
        self.addCleanup(conf.CONF.clear_override,
                        'volume_encryption_directory', 'lxd')
        self.connections.note(VOLUME,
                              connections.Connection('/dev/loop0'))
        self.assertRaises(exception.VolumeDetachFailed,
                          self.connections.disconnect, None, self.connection())
        self.assertEqual([], done)
        self.connections.disconnect(None, self.connection(), force=True)
        self.assertEqual([True], done)
        self.assertIn(VOLUME, self.connections.known())
        self.assertIn('may be left on this host', self.log.output)

    def test_ids(self) -> None:
        for serial in ('', None, 'x', '../' + VOLUME, VOLUME + '\n',
                       VOLUME.upper()):
            self.assertRaises(exception.InvalidVolume, connections.volume_id,
                              {'serial': serial, 'data': {}})
        self.assertEqual(VOLUME, connections.volume_id(
            {'serial': 'other', 'data': {'volume_id': VOLUME}}))


class IdentityTestCase(base.BaseTestCase):

    def test_not_a_device(self) -> None:
        for path in ('/dev/null', '/etc/passwd', '/no/such/thing'):
            self.assertRaises(device_identity.WrongDevice,
                              device_identity.check, path, {'data': {}}, 1)

    def test_names_that_pass(self) -> None:
        for path in ('/dev/sda', '/dev/sdaa', '/dev/dm-3', '/dev/nvme0n1',
                     '/dev/vdb'):
            self.assertTrue(device_identity.is_fleeting(path))
        for path in ('/dev/disk/by-id/wwn-0x1', '/dev/loop3', '/dev/vg/lv',
                     '/dev/mapper/x', '/dev/rbd/pool/image'):
            self.assertFalse(device_identity.is_fleeting(path))
            self.assertEqual(path, device_identity.stable_path(path))


class InputTestCase(base.BaseTestCase):
    """The privileged daemon acts on nothing but volumes."""

    def test_volumes(self) -> None:
        for identifier in ('', 'x', None, 7, VOLUME + '\0', b'x' * 36):
            for call in (lambda: loop.attach('/tmp/x', identifier, False),
                         lambda: loop.detach(identifier, False),
                         lambda: loop.update_size(identifier),
                         lambda: loop.share_path(identifier)):
                self.assertRaises(ValueError, call)

    def test_files(self) -> None:
        with tempfile.TemporaryDirectory() as directory:
            link = os.path.join(directory, 'link')
            os.symlink('/etc/passwd', link)
            for path in ('/dev/null', directory, link, directory + '/none'):
                self.assertRaises(OSError, loop.attach, path, VOLUME, True)

    def test_shares(self) -> None:
        for path in ('/', '/home', '', None, 'x' * 32, '/../' + 'a' * 32,
                     '/mnt/' + 'A' * 32):
            self.assertRaises(ValueError, loop.release_share, path)

    def test_numbers(self) -> None:
        for numbers in ((-1, 0, 0), ('1', 0, 0), (1, None, 0), (1, 0, 2.5)):
            self.assertRaises(ValueError, fuser.find_users, *numbers)
        self.assertEqual([], fuser.find_users(2 ** 30, 1, 1))

    def test_containers(self) -> None:
        for arguments in (('../x', VOLUME, 0), ('', VOLUME, 0),
                          (None, VOLUME, 0), ('x', 'a/b', 0),
                          ('x', VOLUME, -1), ('x', VOLUME, None)):
            self.assertRaises(ValueError, fuser.find_init, *arguments)
        self.assertEqual(0, fuser.find_init('no-such-one', VOLUME, 0))

    def setUp(self) -> None:
        super().setUp()
        loop.privileged.context.set_client_mode(False)
        self.addCleanup(loop.privileged.context.set_client_mode, True)


class GuestPathTestCase(base.BaseTestCase):

    def test_choice(self) -> None:
        taken = ['/dev/sda', '/dev/sdb', 'sdd', None, '/dev/vdb']
        self.assertEqual('/dev/sdc', lxd_devices.choose_path(None, taken))
        self.assertEqual('/dev/sdb', lxd_devices.choose_path('', []))
        self.assertEqual(
            '/dev/vdc',
            lxd_devices.choose_path(
                '/dev/vdc',
                taken))
        many = [f'/dev/sd{chr(letter)}' for letter in range(97, 123)]
        self.assertEqual('/dev/sdaa', lxd_devices.choose_path(None, many))
        self.assertRaises(exception.DevicePathInUse, lxd_devices.choose_path,
                          'vdb', taken)
        self.assertRaises(exception.InvalidDevicePath, lxd_devices.choose_path,
                          '/dev/null', taken)

    def test_paths(self) -> None:
        for path in ('/dev/vdb', '/dev/sdaa', '/dev/xvdc', '/dev/hda',
                     '/dev/vdb1'):
            self.assertEqual(path, lxd_devices.guest_path(path))
        self.assertEqual('/dev/vdb', lxd_devices.guest_path('vdb'))
        for path in ('/dev/null', '/dev/vd', '/dev/vdb/../null', '/dev/VDB',
                     '', None, '/etc/vdb', '/dev/vdb ', '/dev/vdb01'):
            self.assertRaises(exception.InvalidDevicePath,
                              lxd_devices.guest_path, path)
