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

"""Unit tests of config drives as block devices."""

from __future__ import annotations

import os
import types

import fixtures
from nova import exception
from oslo_config import fixture as config_fixture
from oslotest import base

from nova_lxd_py import conf
from nova_lxd_py.virt.metadata import config_drive_device


class ConfigDriveDeviceTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.cfg = self.useFixture(config_fixture.Config(conf.CONF))

    def wanted(self, flavor: str | None = None, image: str | None = None,
               host: bool = False) -> bool:
        self.cfg.config(group='lxd', config_drive_device=host)
        specs = {} if flavor is None else {
            'lxd:config_drive_device': flavor}
        data = {} if image is None else {
            'image_lxd_config_drive_device': image}
        return config_drive_device.is_wanted(types.SimpleNamespace(
            flavor=types.SimpleNamespace(name='small', extra_specs=specs),
            system_metadata=data), conf.CONF.lxd)

    def test_precedence_of_flavor_image_and_host(self) -> None:
        for flavor, image, host, wanted in (
                (None, None, False, False), (None, None, True, True),
                (None, 'true', False, True), (None, 'no', True, False),
                ('true', 'false', False, True),
                ('false', 'true', True, False)):
            self.assertIs(wanted, self.wanted(flavor, image, host))

    def test_invalid_boolean(self) -> None:
        for values in (('maybe', None), (None, '')):
            error = self.assertRaises(exception.InvalidInput, self.wanted,
                                      *values)
            self.assertIn('lxd', str(error))
            self.assertIn('true', str(error))

    def test_missing_requirement(self) -> None:
        self.cfg.config(mkisofs_cmd='/bin/true')
        self.assertIsNone(config_drive_device.missing_requirement(True))
        self.assertIn('socket',
                      config_drive_device.missing_requirement(False) or '')
        self.cfg.config(mkisofs_cmd='/no/such/mkisofs')
        text = config_drive_device.missing_requirement(True) or ''
        for word in ('/no/such/mkisofs', 'genisoimage', 'mkisofs_cmd'):
            self.assertIn(word, text)
        self.assertRaises(exception.ComputeResourcesUnavailable,
                          config_drive_device.check, True)

    def test_missing_requirement_for_vfat(self) -> None:
        self.cfg.config(config_drive_format='vfat')
        path = self.useFixture(fixtures.TempDir()).path
        self.useFixture(fixtures.EnvironmentVariable('PATH', path))
        for program, package in (('mkfs.vfat', 'dosfstools'),
                                 ('mcopy', 'mtools')):
            text = config_drive_device.missing_requirement(True) or ''
            for word in (program, package, 'vfat', 'config_drive_format'):
                self.assertIn(word, text)
            os.symlink('/bin/true', f'{path}/{program}')
        self.assertIsNone(config_drive_device.missing_requirement(True))

    def test_find_missing(self) -> None:
        self.assertIsNone(config_drive_device.find('config-drive-x'))

    def test_drive_of_another_host_on_this_machine(self) -> None:
        """It has a device for the same instance while that migrates."""
        top = self.useFixture(fixtures.TempDir()).path
        for name in ('here', 'there'):
            os.makedirs(f'{top}/{name}/config-drives')
        self.cfg.config(state_path=f'{top}/here')
        found = [types.SimpleNamespace(
            parts=('/', 'sys', 'block', name, 'loop', 'backing_file'),
            read_text=lambda errors, directory=directory: (
                f'{directory}/config-drives/drive (deleted)\n'))
            for name, directory in (
                ('loop1', f'{top}/there'), ('loop2', f'{top}/here'),
                # Of this nova-compute before its container was replaced.
                ('loop3', ''))]
        self.useFixture(fixtures.MonkeyPatch(
            'pathlib.Path.glob', lambda path, pattern: found))
        self.assertEqual('/dev/loop2', config_drive_device.find('drive'))
        del found[1]
        self.assertEqual('/dev/loop3', config_drive_device.find('drive'))
        del found[1]
        self.assertIsNone(config_drive_device.find('drive'))
