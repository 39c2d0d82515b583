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

"""Volumes that come over iSCSI: a target of Linux (LIO) and open-iscsi.

Both talk over the loopback interface. A small machine's kernel has neither;
``tools/debian_kernel.sh`` runs tests on one that has.
"""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import time
from typing import Any

import fixtures
from oslo_utils import units

from tests.functional import lab_volumes

TARGET = pathlib.Path('/sys/kernel/config/target')
PORTAL = '127.0.0.1:3260'
USER = 'nova'
#: What iscsiadm says if there are none.
NO_SESSIONS = 21
#: Seconds for the daemon's start.
PATIENCE = 30
MODULES = ('iscsi_tcp', 'iscsi_target_mod', 'target_core_iblock')


def missing() -> str | None:
    """Say what this machine lacks for iSCSI, if anything.

    :returns: a sentence fit for a skipped test, or None.
    """
    for module in MODULES:
        if not shutil.which('modprobe') or subprocess.run(
                ['modprobe', module], check=False,
                capture_output=True).returncode:
            return (f'the kernel has no {module}; tools/debian_kernel.sh runs '
                    'it on one that has')
    for program, package in (('iscsid', 'open-iscsi'),
                             ('lsscsi', 'lsscsi')):
        if shutil.which(program, path='/sbin:/usr/sbin:/usr/bin') is None:
            return f'{program} is not installed (package {package})'
    if sessions() or subprocess.run(['pgrep', '--exact', 'iscsid'],
                                    check=False,
                                    capture_output=True).returncode == 0:
        return 'the host uses iSCSI itself, which has one daemon only'
    return None


def sessions() -> list[str]:
    """Names of the targets that this host is logged in to."""
    return [(path / 'targetname').read_text().strip() for path in
            pathlib.Path('/sys/class/iscsi_session').glob('*')]


class IscsiVolume(lab_volumes.LocalVolume):
    """A block device of a target that wants a password."""

    kind = 'iscsi'

    def __init__(self, folder: pathlib.Path, size: int = units.Gi) -> None:
        super().__init__(folder, size)
        self.name = f'iqn.2026-01.example:volume-{self.id}'
        self._store = TARGET / 'core' / 'iblock_0' / self.id
        self._store.mkdir(parents=True)
        (self._store / 'control').write_text(f'udev_path={self.device}')
        (self._store / 'enable').write_text('1')
        (self._store / 'wwn' / 'vpd_unit_serial').write_text(self.id)
        self._group = TARGET / 'iscsi' / self.name / 'tpgt_1'
        self._group.mkdir(parents=True)
        self._portal = self._group / 'np' / PORTAL
        self._portal.mkdir()
        self._unit = self._group / 'lun' / 'lun_0'
        self._unit.mkdir()
        (self._unit / 'store').symlink_to(self._store)
        for name, value in (
                ('attrib/authentication', '1'),
                ('attrib/generate_node_acls', '1'),
                ('attrib/cache_dynamic_acls', '1'),
                ('attrib/demo_mode_write_protect', '0'),
                ('auth/userid', USER), ('auth/password',
                                        lab_volumes.PASSWORD),
                ('enable', '1')):
            (self._group / name).write_text(value)

    def data(self) -> dict[str, Any]:
        return {'target_discovered': False, 'target_portal': PORTAL,
                'target_iqn': self.name, 'target_lun': 0,
                'auth_method': 'CHAP', 'auth_username': USER,
                'volume_id': self.id}

    def close(self) -> None:
        (self._group / 'enable').write_text('0')
        (self._unit / 'store').unlink()
        for folder in (self._unit, self._portal, self._group,
                       self._group.parent, self._store):
            folder.rmdir()
        super().close()


class Initiator(fixtures.Fixture):
    """The daemon that logs in to targets."""

    def _setUp(self) -> None:
        if subprocess.run(['mountpoint', '-q', '/sys/kernel/config'],
                          check=False).returncode:
            subprocess.run(['mount', '-t', 'configfs', 'configfs',
                            '/sys/kernel/config'], check=True)
        # The target's own module is loaded when its folder is made.
        (TARGET / 'iscsi').mkdir(parents=True, exist_ok=True)
        folder = pathlib.Path(self.useFixture(fixtures.TempDir()).path)
        name = folder / 'initiatorname.iscsi'
        name.write_text('InitiatorName=iqn.2026-01.example:host\n')
        self._daemon = subprocess.Popen(
            ['iscsid', '--foreground', '--initiatorname', str(name)],
            stdin=subprocess.DEVNULL,
            # It ends all of its process group with itself.
            start_new_session=True)
        self.addCleanup(self._end)
        deadline = time.monotonic() + PATIENCE
        while subprocess.run(['iscsiadm', '--mode', 'session'], check=False,
                             capture_output=True
                             ).returncode not in (0, NO_SESSIONS):
            if (self._daemon.poll() is not None or
                    time.monotonic() > deadline):
                raise RuntimeError('iscsid does not answer')
            time.sleep(0.1)

    def _end(self) -> None:
        for name in sessions():
            subprocess.run(['iscsiadm', '--mode', 'node', '--targetname', name,
                            '--logout'], check=False, capture_output=True)
        self._daemon.terminate()
        try:
            self._daemon.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._daemon.kill()
            self._daemon.wait()
