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

"""Extra specs at Nova's API, as Nova loads and calls the validators."""

from __future__ import annotations

from nova.api.validation.extra_specs import validators
from nova import exception
from nova import objects
from oslo_config import fixture as config_fixture
from oslotest import base

from nova_lxd_py import conf
from nova_lxd_py import extra_specs
from nova_lxd_py.virt.guest import flavor as lxd_flavor
from nova_lxd_py.virt.volume import mode_selection

objects.register_all()

VOLUME = 'c3d4a8f0-0000-4000-8000-000000000001'

_BOOLEANS = (('true', 'False', 'yes', 'no', '1', '0', 'on', 'off'),
             ('', 'ja', '2', 'truee'))
_DEVICES = (('10de:1db4', '10DE:1db4', '10de:1db4,0403:6001',
             ' 10de:1db4 , 0403:6001 '),
            ('', 'all', '10de', '10de:1db4,', '10de:1db4:x', '0000:3b:00.0',
             '10de:1db4\n', '10de;1db4'))

#: Right and wrong values.
VALUES = {
    extra_specs.NESTED: _BOOLEANS,
    extra_specs.PRIVILEGED: _BOOLEANS,
    extra_specs.ISOLATED: _BOOLEANS,
    extra_specs.CONFIG_DRIVE_DEVICE: _BOOLEANS,
    extra_specs.PROCESSES: (('0', '1', '500', '4194304'),
                            ('', '-1', 'many', '1.5', '4194305', '0x10')),
    extra_specs.GPU: _DEVICES,
    extra_specs.USB: _DEVICES,
    extra_specs.VOLUME_MODE: (('block', 'filesystem'),
                              ('Block', 'fs', 'root', 'block ')),
}


class ExtraSpecValidatorsTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.useFixture(config_fixture.Config(conf.CONF)).config(
            group='lxd', volume_filesystems=['ext4'])

    def flavor(self, name: str, value: str) -> objects.Flavor:
        return objects.Flavor(
            name='m1.small', vcpus=1, memory_mb=64, root_gb=1, ephemeral_gb=0,
            swap=0, extra_specs={name: value})

    def use(self, name: str, value: str) -> None:
        """Let the driver read an extra spec."""
        flavor = self.flavor(name, value)
        lxd_flavor.instance_config(flavor, conf.CONF.lxd)
        mode_selection.ModeSelection(conf.CONF.lxd).choose(
            objects.Instance(flavor=flavor, metadata={}, system_metadata={}),
            {'serial': VOLUME, 'data': {}}, dict)

    def test_all_have_values_here(self) -> None:
        self.assertEqual(set(extra_specs.EXTRA_SPECS), set(VALUES))

    def test_right_values(self) -> None:
        for name, (right, _wrong) in VALUES.items():
            for value in right:
                validators.validate(name, value)
                self.use(name, value)

    def test_wrong_values(self) -> None:
        """Neither the API nor the driver accepts them."""
        for name, (_right, wrong) in VALUES.items():
            for value in wrong:
                error = self.assertRaises(
                    exception.ValidationError, validators.validate, name,
                    value)
                self.assertIn(f"'{value}'", str(error))
                self.assertRaises(
                    (exception.InvalidInput, exception.VolumeAttachFailed),
                    self.use, name, value)

    def test_unknown_names(self) -> None:
        for name in ('lxd:isolatd', 'lxd:', 'lxd:Isolated', 'lxd:isolated:x',
                     'lxd:isolated '):
            error = self.assertRaises(exception.ValidationError,
                                      validators.validate, name, 'true')
            self.assertIn(f"'{name}'", str(error))
            self.assertRaises(exception.InvalidInput, self.use, name, 'true')

    def test_other_namespaces(self) -> None:
        """Those that Nova does not know belong to other drivers."""
        for name in ('lxdx:isolated', 'lxd', 'isolated', 'other:lxd'):
            validators.validate(name, 'whatever')

    def test_descriptions(self) -> None:
        for name, spec in extra_specs.EXTRA_SPECS.items():
            validator = validators.VALIDATORS[name]
            self.assertEqual(spec.description, validator.description)
            self.assertFalse(validator.deprecated)
