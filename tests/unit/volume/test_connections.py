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

"""Connections of the host to volumes: plugins, errors and secrets."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import fixtures
from nova import exception
from oslo_concurrency import processutils
from oslotest import base
from stevedore import extension

from nova_lxd_py import conf
from nova_lxd_py.virt.volume import base as volume_base
from nova_lxd_py.virt.volume import connections
from nova_lxd_py.virt.volume import device_identity

VOLUME = '9a0b6f0e-5d2c-4f4e-8a57-6a1c1b1f0e11'
SECRET = 'open-sesame-77aa'


class Plugin(volume_base.VolumePlugin):
    """A plugin of a third party, all of whose calls fail."""

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
        self.plugin.forget = mock.Mock(side_effect=OSError('no way'))
        self.assertRaises(exception.VolumeDetachFailed,
                          self.connections.forget, None, VOLUME, force=False)
        self.connections.forget(None, VOLUME, force=True)
        self.assertIn('no way', self.log.output)

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
