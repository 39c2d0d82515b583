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

"""Shell code of the quickstart that needs no cloud."""

from __future__ import annotations

import re
import subprocess

from oslotest import base

from tests.fixtures.devstack_shell import DEVSTACK
from tests.fixtures.devstack_shell import Files
from tests.fixtures.devstack_shell import REPO
from tests.fixtures.devstack_shell import run


class QuickstartNetworkTestCase(base.BaseTestCase):
    """devstack/quickstart/settings.sh: the private network."""

    def test_aligned(self):
        for numbers, network in (('', '10.24.0.0/20'),
                                 # Saved by clouds of earlier versions.
                                 ('10.24.4', '10.24.0.0/20'),
                                 ('192.168.255', '192.168.240.0/20')):
            self.assertEqual(network, run(
                f'. {DEVSTACK}/quickstart/settings.sh\necho $PRIVATE_CIDR',
                QUICKSTART_PREFIX='/nonexistent',
                QUICKSTART_PRIVATE_NET=numbers))


class SecondHostTestCase(base.BaseTestCase):
    """devstack/quickstart/second_host.sh."""

    def setUp(self) -> None:
        super().setUp()
        self.prefix = self.useFixture(Files()).path

    def quickstart(self, script: str, **environment: str) -> str:
        """Run a piece of shell code with the parts of the quickstart."""
        parts = ' '.join(re.search(  # type: ignore[union-attr]
            r'for part in ([^;]*);', (DEVSTACK / 'quickstart.sh').read_text()
        )[1].replace('\\', ' ').split())
        return run(f'HERE={DEVSTACK}/quickstart REPO={REPO} SELF=up.sh\n'
                   f'for part in {parts}; do\n. $HERE/$part.sh\ndone\n'
                   f'{script}',
                   QUICKSTART_PREFIX=str(self.prefix), **environment)

    def steps(self, script: str) -> list[str]:
        return self.quickstart(
            f'{script} GUEST_IMAGE=debian\n'
            'declare_steps\nprintf "%s\\n" "${STEP_ORDER[@]}"\n'
            'for name in "${STEP_ORDER[@]}"; do\n'
            '    declare -F "step_${name//-/_}" >/dev/null\n'
            '    for need in ${STEP_NEEDS[$name]}; do\n'
            '        [[ " ${STEP_ORDER[*]} " == *" $need "* ||\n'
            '            $need == cinder-volume ]]\n'
            '    done\ndone').split()

    def test_one_host_takes_no_more_steps(self):
        one = self.steps('COMPUTES=1')
        self.assertFalse([name for name in one if 'second' in name or
                          'compute-2' in name])
        two = self.steps('COMPUTES=2')
        self.assertEqual(one, [name for name in two if name in one])
        self.assertIn('second-nova-compute', two)
        # It is taken away when there is one.
        (self.prefix / 'compute-2').mkdir()
        self.assertEqual({'second-removal'},
                         set(self.steps('COMPUTES=1')) - set(one))

    def test_paths(self):
        """What belongs to a host differs, what belongs to the cloud not."""
        script = 'printf "%s\\n" '
        own = '$LXD_HOME $ETC $LOG $RUN $DATA $OVS_RUN $OVSDB'
        first = self.quickstart(script + own).split()
        second = self.quickstart(script + own,
                                 QUICKSTART_HOST_NUMBER='2').split()
        for before, after in zip(first, second, strict=True):
            self.assertEqual(before.replace(
                str(self.prefix), f'{self.prefix}/compute-2'), after)
        common = '$VENV $CACHE $MYSQL_SOCKET $OVN_DB $SECRET_FILE'
        self.assertEqual(
            self.quickstart(script + common),
            self.quickstart(script + common, QUICKSTART_HOST_NUMBER='2'))

    def test_addresses(self):
        address = 'host_address'
        self.assertEqual('127.0.0.1', self.quickstart(address))
        self.assertEqual('172.24.4.1',
                         self.quickstart(f'COMPUTES=2\n{address}'))
        self.assertEqual('172.24.4.2', self.quickstart(
            f'COMPUTES=2\n{address}', QUICKSTART_HOST_NUMBER='2'))

    def test_cloud_that_is_down(self):
        """Nobody knows whether the second host has servers."""
        script = 'COMPUTES=1\ncheck_second_host_unused'
        self.assertEqual('', self.quickstart(script))
        (self.prefix / 'compute-2').mkdir()
        error = self.assertRaises(subprocess.CalledProcessError,
                                  self.quickstart, script)
        self.assertIn('up.sh up --computes 2', error.stdout)
