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

"""Unit tests of config drives, with the fake LXD."""

from __future__ import annotations

import base64
import json
import stat
from typing import Any

import fixtures
from nova import context as nova_context
from nova.network import model
from nova import objects
from nova.tests.unit import fake_instance
from oslo_config import fixture as config_fixture
from oslotest import base

from nova_lxd_py import conf
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import session
from nova_lxd_py.virt.metadata import config_drive
from tests.fixtures import fake_lxd
from tests.fixtures.fake_lxd import state

objects.register_all()

UUID = '9a9a9a9a-9a9a-4a9a-9a9a-9a9a9a9a9a9f'
NAME = f'config-drive-{UUID}'


class ConfigDriveTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.lxd = self.useFixture(fake_lxd.FakeLXD(project='nova'))
        self.cfg = self.useFixture(config_fixture.Config(conf.CONF))
        self.cfg.config(group='lxd', endpoint=self.lxd.endpoint,
                        project='nova')
        # InstanceMetadata reads the security groups from Neutron.
        self.useFixture(fixtures.MonkeyPatch(
            'nova.network.security_group_api.get_instance_security_groups',
            lambda context, instance: []))
        # nova-compute reads these through the conductor.
        self.useFixture(fixtures.MonkeyPatch(
            'nova.objects.Instance.get_bdms',
            lambda instance: objects.BlockDeviceMappingList(objects=[])))
        self.context = nova_context.RequestContext(
            'user', 'project', is_admin=False)
        self.drives = config_drive.ConfigDriveManager(
            session.Session(conf.CONF.lxd))

    def instance(self, **kwargs: Any) -> objects.Instance:
        values: dict[str, Any] = {
            'uuid': UUID, 'config_drive': 'True', 'hostname': 'web-1',
            'expected_attrs': ['system_metadata', 'metadata'],
            'user_data': base64.b64encode(b'#!/bin/sh').decode()}
        instance = fake_instance.fake_instance_obj(
            self.context, **{**values, **kwargs})
        instance.keypairs = objects.KeyPairList(objects=[])
        instance.device_metadata = None
        instance.numa_topology = None
        instance.ec2_ids = objects.EC2Ids(
            instance_id='i-1', ami_id='ami-1', kernel_id=None,
            ramdisk_id=None)
        instance.info_cache = objects.InstanceInfoCache(
            network_info=model.NetworkInfo([]))
        return instance

    @property
    def volumes(self) -> dict[str, state.Volume]:
        return {key[2]: volume
                for key, volume in self.lxd.daemon.store.volumes.items()}

    def metadata(self) -> dict[str, Any]:
        content, _mode = self.volumes[NAME].files[
            'openstack/latest/meta_data.json']
        return json.loads(content or '')


class BuildTestCase(ConfigDriveTestCase):

    def test_not_wanted(self) -> None:
        with self.lxd.recording() as requests:
            self.assertEqual({}, self.drives.build(
                self.instance(config_drive=''), []))
        self.assertEqual([], requests)

    def test_device(self) -> None:
        self.assertEqual(
            {'config-drive': {
                'type': 'disk', 'pool': 'default', 'source': NAME,
                'path': '/config-drive', 'readonly': 'true'}},
            self.drives.build(self.instance(), []))

    def test_volume_keys(self) -> None:
        self.drives.build(self.instance(), [])
        config = self.volumes[NAME].config
        self.assertEqual(UUID, config['user.nova.uuid'])
        self.assertEqual('config-drive', config['user.nova.role'])

    def test_content(self) -> None:
        self.drives.build(self.instance(), [])
        self.assertEqual(UUID, self.metadata()['uuid'])
        self.assertEqual('web-1', self.metadata()['hostname'].split('.')[0])
        files = self.volumes[NAME].files
        self.assertEqual(b'#!/bin/sh', files['openstack/latest/user_data'][0])
        self.assertIn('ec2/latest/meta-data.json', files)
        self.assertIn('openstack/latest/vendor_data.json', files)

    def test_secrets(self) -> None:
        self.drives.build(
            self.instance(), [],
            [('/etc/key', b'\x00\xff'), ('../../etc/passwd', b'x')], 's3cret')
        self.assertEqual('s3cret', self.metadata()['admin_pass'])
        files = self.volumes[NAME].files
        # Paths given by tenants are data in the drive, never paths of it.
        self.assertEqual(b'\x00\xff', files['openstack/content/0000'][0])
        self.assertEqual(
            ['/etc/key', '../../etc/passwd'],
            [entry['path'] for entry in self.metadata()['files']])
        self.assertFalse([path for path in files if '..' in path])

    def test_readable_by_root_only(self) -> None:
        self.drives.build(self.instance(), [], (), 's3cret')
        for _path, (content, mode) in self.volumes[NAME].files.items():
            self.assertEqual(0o700 if content is None else 0o400, mode)
            self.assertFalse(mode & (stat.S_IRWXG | stat.S_IRWXO))

    def test_directories_precede_their_files(self) -> None:
        self.drives.build(self.instance(), [])
        seen = {''}
        for path, (content, _mode) in self.volumes[NAME].files.items():
            self.assertIn(path.rpartition('/')[0], seen)
            if content is None:
                seen.add(path)

    def test_leftover_of_an_interrupted_build(self) -> None:
        self.drives.build(self.instance(), [], (), 'old')
        self.drives.build(self.instance(), [], (), 'new')
        self.assertEqual('new', self.metadata()['admin_pass'])
        self.assertEqual([NAME], list(self.volumes))

    def test_failure(self) -> None:
        self.lxd.fail_operation(
            'POST', '/1.0/storage-pools/default/volumes/custom', 'disk full')
        error = self.assertRaises(
            errors.OperationFailed, self.drives.build,
            self.instance(), [], (), 's3cret')
        self.assertIn('disk full', str(error))
        self.assertNotIn('s3cret', str(error))
        self.assertEqual({}, self.volumes)

    def test_paths(self) -> None:
        for path in ('/etc/passwd', '../x', 'a/../b', 'a//b', '', 'a/.'):
            self.assertRaises(ValueError, config_drive._backup, NAME, UUID,
                              [(path, b'')])


class EnsureAndRemoveTestCase(ConfigDriveTestCase):

    def test_remove(self) -> None:
        self.drives.build(self.instance(), [])
        self.drives.remove(self.instance())
        self.assertEqual({}, self.volumes)

    def test_remove_missing(self) -> None:
        self.drives.remove(self.instance())

    def test_remove_in_use(self) -> None:
        self.drives.build(self.instance(), [])
        self.lxd.fail_next('DELETE', f'*/{NAME}', 400,
                           'The storage volume is still in use')
        self.assertRaises(errors.LXDError, self.drives.remove,
                          self.instance())

    def test_ensure_keeps_it(self) -> None:
        devices = self.drives.build(self.instance(), [], (),
                                    'pw')
        self.assertEqual(devices, self.drives.ensure(
            self.instance(), []))
        self.assertEqual('pw', self.metadata()['admin_pass'])

    def test_ensure_recreates_it(self) -> None:
        devices = self.drives.ensure(self.instance(), [])
        self.assertEqual(NAME, devices['config-drive']['source'])
        self.assertNotIn('admin_pass', self.metadata())

    def test_ensure_not_wanted(self) -> None:
        self.assertEqual({}, self.drives.ensure(
            self.instance(config_drive=''), []))
        self.assertEqual({}, self.volumes)
