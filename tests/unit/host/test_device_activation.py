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

"""Detection of tools that would activate what tenants write on volumes."""

import os
import pathlib

import fixtures
from oslotest import base

from nova_lxd_py.virt.host import device_activation

RULES = pathlib.Path(__file__).parents[3] / 'etc' / 'udev'


class DeviceActivationTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.root = self.useFixture(fixtures.TempDir()).path
        self.write('run/udev/control')
        self.write(f'etc/udev/rules.d/{device_activation.RULE}')

    def write(self, path: str, content: str = '') -> None:
        file = pathlib.Path(self.root, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)

    def missing(self) -> str:
        return ' '.join(device_activation.missing_settings(self.root))

    def test_none_installed(self) -> None:
        self.assertEqual('', self.missing())

    def test_lvm(self) -> None:
        self.write('usr/sbin/lvm')
        self.assertIn('lvm.conf', self.missing())
        self.write('etc/lvm/lvm.conf', 'devices {\n  # global_filter = []\n}')
        self.assertIn('lvm.conf', self.missing())
        for line in ('global_filter = [ "r|.*|" ]', 'filter=["r|.*|"]'):
            self.write('etc/lvm/lvm.conf', f'devices {{\n  {line}\n}}')
            self.assertEqual('', self.missing())
        self.write('etc/lvm/lvm.conf')
        self.write('etc/lvm/devices/system.devices')
        self.assertEqual('', self.missing())
        self.write('etc/lvm/lvm.conf', 'use_devicesfile = 0\n')
        self.assertIn('lvm.conf', self.missing())

    def test_md(self) -> None:
        self.write('sbin/mdadm')
        self.assertIn('AUTO -all', self.missing())
        self.write('etc/mdadm/mdadm.conf', '#AUTO -all\nHOMEHOST <system>\n')
        self.assertIn('AUTO -all', self.missing())
        self.write('etc/mdadm/mdadm.conf', 'AUTO +imsm -all\n')
        self.assertEqual('', self.missing())

    def test_rule(self) -> None:
        os.unlink(f'{self.root}/etc/udev/rules.d/{device_activation.RULE}')
        self.assertIn(device_activation.RULE, self.missing())

    def test_no_udev(self) -> None:
        self.write('usr/sbin/lvm')
        os.unlink(f'{self.root}/run/udev/control')
        self.assertEqual('', self.missing())

    def test_shipped_rule(self) -> None:
        """Each jump of the rule has a label."""
        text = (RULES / device_activation.RULE).read_text()
        lines = [line for line in text.splitlines()
                 if line and not line.startswith('#')]
        jumps = {line.partition('GOTO="')[2].rstrip('"')
                 for line in lines if 'GOTO="' in line}
        labels = {line.removeprefix('LABEL="').rstrip('"')
                  for line in lines if line.startswith('LABEL=')}
        self.assertEqual(labels, jumps)
