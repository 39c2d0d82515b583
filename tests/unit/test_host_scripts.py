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

"""Scripts that run as root: they change settings of a host, and restore them.
"""

from __future__ import annotations

import os
import pathlib
import re
import subprocess

from oslotest import base

from tests.fixtures.devstack_shell import Files
from tests.fixtures.devstack_shell import REPO
from tests.fixtures.devstack_shell import run


class AsRootTestCase(base.BaseTestCase):
    """tools/as_root.sh."""

    def test_sudo_keeps_what_tests_read(self):
        names = {name for path in (REPO / 'tests').rglob('*.py')
                 for name in re.findall(r"environ\.get\(\s*'([A-Z_]+)'",
                                        path.read_text())}
        self.assertIn('NOVA_LXD_TEST_SEED', names)
        self.assertEqual('', run(
            f'. tools/as_root.sh\nfor name in {" ".join(sorted(names))}; do\n'
            f'[[ $name =~ ^($AS_ROOT_KEPT)$ ]] || echo "$name"\ndone'))


class UdevRuleTestCase(base.BaseTestCase):
    """tools/udev_rule.sh."""

    def setUp(self) -> None:
        super().setUp()
        self.root = self.useFixture(Files()).path
        self.target = self.root / 'etc/udev/rules.d/62-nova-lxd-py.rules'
        self.touch('run/udev/control')

    def touch(self, path: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()

    def rule(self, command: str) -> str:
        return subprocess.run(
            [REPO / 'tools' / 'udev_rule.sh', command, self.root / 'stamp'],
            check=True, text=True, stdout=subprocess.PIPE,
            env={**os.environ, 'UDEV_RULE_ROOT': str(self.root)}).stdout

    def test_there_and_back(self):
        for _ in range(2):
            self.rule('install')
            self.assertIn('GOTO', self.target.read_text())
            # A volume that is attached by now is no disk of the host.
            self.touch('dev/disk/by-path/ip-192.0.2.1-iscsi-iqn.x-lun-1')
        for _ in range(2):
            self.rule('remove')
            self.assertFalse(self.target.exists())

    def test_rule_of_the_operator_stays(self):
        self.touch('etc/udev/rules.d/62-nova-lxd-py.rules')
        self.rule('install')
        self.rule('remove')
        self.assertEqual('', self.target.read_text())

    def test_disks_over_a_network(self):
        self.touch('dev/disk/by-path/pci-0000:05:00.0-fc-0x50-lun-0')
        self.assertIn('was not installed', self.rule('install'))
        self.assertFalse(self.target.exists())

    def test_host_without_udev(self):
        (self.root / 'run/udev/control').unlink()
        self.rule('install')
        self.assertFalse(self.target.exists())


class KernelLimitsTestCase(base.BaseTestCase):
    """tools/kernel_limits.sh."""

    INSTANCES = 'fs.inotify.max_user_instances'
    KEYS = 'kernel.keys.maxkeys'
    FILES = 'fs.file-max'

    def setUp(self) -> None:
        super().setUp()
        self.root = self.useFixture(Files()).path
        self.set(self.INSTANCES, 128)
        self.set(self.KEYS, 200)
        # systemd sets it at boot.
        self.set(self.FILES, 2 ** 63 - 1)

    def file(self, name: str) -> pathlib.Path:
        return self.root / 'proc/sys' / name.replace('.', '/')

    def set(self, name: str, value: int) -> None:
        self.file(name).parent.mkdir(parents=True, exist_ok=True)
        self.file(name).write_text(f'{value}\n')

    def get(self, name: str) -> int:
        return int(self.file(name).read_text())

    def limits(self, command: str) -> str:
        return subprocess.run(
            [REPO / 'tools' / 'kernel_limits.sh', command,
             self.root / 'undo' / 'record'],
            check=True, text=True, stdout=subprocess.PIPE,
            env={**os.environ, 'KERNEL_LIMITS_ROOT': str(self.root)}).stdout

    def test_there_and_back(self):
        for _ in range(2):
            self.limits('raise')
            self.assertEqual(1048576, self.get(self.INSTANCES))
            self.assertEqual(20000, self.get(self.KEYS))
        for _ in range(2):
            self.limits('restore')
            self.assertEqual(128, self.get(self.INSTANCES))
            self.assertEqual(200, self.get(self.KEYS))
        self.assertEqual(2 ** 63 - 1, self.get(self.FILES))

    def test_after_a_reboot(self):
        self.limits('raise')
        self.set(self.INSTANCES, 256)
        self.limits('raise')
        self.assertEqual(1048576, self.get(self.INSTANCES))
        self.limits('restore')
        self.assertEqual(128, self.get(self.INSTANCES))
        self.limits('raise')
        self.set(self.INSTANCES, 128)
        self.limits('restore')
        self.assertEqual(128, self.get(self.INSTANCES))

    def test_value_of_the_operator_stays(self):
        self.limits('raise')
        self.set(self.INSTANCES, 4096)
        self.set(self.KEYS, 30000)
        self.limits('restore')
        self.assertEqual(4096, self.get(self.INSTANCES))
        self.assertEqual(30000, self.get(self.KEYS))

    def test_higher_values_stay(self):
        self.set(self.INSTANCES, 2097152)
        self.limits('raise')
        self.assertEqual(2097152, self.get(self.INSTANCES))

    def test_limits_that_cannot_be_changed(self):
        """The kernel of a sandbox ignores the change; others are missing."""
        self.file(self.INSTANCES).unlink()
        self.file(self.INSTANCES).symlink_to('/dev/null')
        # Reads as nothing, which counts as 0.
        said = self.limits('raise')
        self.assertRegex(said, f'cannot be raised here: {self.INSTANCES}=')
        self.assertRegex(said, 'do not exist here:.* vm.max_map_count')
        self.assertNotIn(self.KEYS, said)
        self.assertEqual(20000, self.get(self.KEYS))
        self.limits('restore')
        self.assertEqual(200, self.get(self.KEYS))
