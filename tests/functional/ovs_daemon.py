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

"""A private Open vSwitch for functional tests.

Runs its own ``ovsdb-server`` and ``ovs-vswitchd`` in a temporary directory.
Bridges use the userspace datapath, so no kernel module is needed, and the
strictest case is the one tested: there a port whose device was re-made is not
picked up again by itself.

A network namespace can hold one Open vSwitch with that datapath, so use this
with :class:`tests.functional.private_network.PrivateNetwork`.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import time

import fixtures

#: Seconds that a daemon may take to answer or to end.
DAEMON_TIMEOUT = 20

SCHEMA = '/usr/share/openvswitch/vswitch.ovsschema'


def missing() -> str | None:
    """Say what this machine lacks for an Open vSwitch, if anything.

    :returns: a sentence fit for a skipped test, or None.
    """
    for program in ('ovsdb-tool', 'ovsdb-server', 'ovs-vswitchd', 'ovs-vsctl'):
        if shutil.which(program) is None:
            return f'{program} is not installed (package openvswitch-switch)'
    if not os.path.exists(SCHEMA):
        return f'{SCHEMA} does not exist (package openvswitch-switch)'
    if os.geteuid() != 0:
        return 'Open vSwitch needs root'
    return None


class OVSDaemon(fixtures.Fixture):
    """``ovsdb-server`` and ``ovs-vswitchd`` of our own, with one bridge.

    :param bridge: name of the integration bridge to make.
    """

    def __init__(self, bridge: str = 'br-int') -> None:
        super().__init__()
        self.bridge = bridge
        self._daemons: dict[str, int] = {}

    def _setUp(self) -> None:
        # Unix socket paths end at 107 characters: not below a long TMPDIR.
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix='ovs-',
                                                       dir='/tmp'))
        self.addCleanup(shutil.rmtree, self.directory, ignore_errors=True)
        self.socket = self.directory / 'db.sock'
        #: what ``[os_vif_ovs] ovsdb_connection`` has to be.
        self.connection = f'unix:{self.socket}'
        self._environment = dict(
            os.environ, OVS_RUNDIR=str(self.directory),
            OVS_LOGDIR=str(self.directory), OVS_DBDIR=str(self.directory),
            OVS_SYSCONFDIR=str(self.directory))
        database = self.directory / 'conf.db'
        self._run('ovsdb-tool', 'create', str(database), SCHEMA)
        self.addCleanup(self._stop, 'ovsdb-server')
        self._start('ovsdb-server', str(database),
                    f'--remote=punix:{self.socket}')
        self.vsctl('--no-wait', 'init')
        self.addCleanup(self._stop, 'ovs-vswitchd')
        self.start_vswitchd()
        self.addCleanup(self.vsctl, '--if-exists', 'del-br', self.bridge)
        self.vsctl('add-br', self.bridge, '--', 'set', 'bridge', self.bridge,
                   'datapath_type=netdev')

    def start_vswitchd(self) -> None:
        """Start the switch; it is running after :meth:`setUp` already."""
        self._start('ovs-vswitchd', self.connection)

    def stop_vswitchd(self) -> None:
        """Stop the switch and leave its database running."""
        self._stop('ovs-vswitchd')

    def vsctl(self, *arguments: str) -> str:
        """Run ``ovs-vsctl`` on this database.

        :returns: what it printed, without the final newline.
        :raises subprocess.CalledProcessError: if it failed.
        """
        return self._run('ovs-vsctl', f'--db={self.connection}',
                         f'--timeout={DAEMON_TIMEOUT}', *arguments)

    def ports(self) -> list[str]:
        """Name the ports of the integration bridge."""
        return self.vsctl('list-ports', self.bridge).split()

    def interface(self, name: str, column: str) -> str:
        """Read one column of an Interface row, without quotes."""
        return self.vsctl('get', 'Interface', name, column).strip('"')

    def rows(self, table: str) -> int:
        """Count the rows of a table, to see whether any were left behind."""
        listed = self.vsctl('--columns=_uuid', '--format=csv', '--no-headings',
                            'list', table)
        return len(listed.split())

    def _run(self, *command: str) -> str:
        done = subprocess.run(command, env=self._environment, check=True,
                              stdout=subprocess.PIPE, text=True)
        return done.stdout.rstrip('\n')

    def _start(self, program: str, *arguments: str) -> None:
        pidfile = self.directory / f'{program}.pid'
        self._run(program, *arguments, '--detach', '--no-chdir',
                  f'--pidfile={pidfile}', '-vconsole:off', '-vsyslog:off',
                  f'--log-file={self.directory}/{program}.log')
        self._daemons[program] = int(pidfile.read_text())

    def _stop(self, program: str) -> None:
        pid = self._daemons.pop(program, None)
        if pid is None:
            return
        for sent in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.kill(pid, sent)
                self._wait_for_end(pid)
                return
            except ProcessLookupError:
                return
            except TimeoutError:
                continue

    @staticmethod
    def _wait_for_end(pid: int) -> None:
        deadline = time.monotonic() + DAEMON_TIMEOUT
        while time.monotonic() < deadline:
            try:
                os.kill(pid, 0)
                with open(f'/proc/{pid}/stat', encoding='ascii') as stat:
                    # A zombie has ended; its parent is just slow to reap it.
                    if stat.read().rpartition(')')[2].split()[0] == 'Z':
                        return
            except (ProcessLookupError, FileNotFoundError):
                return
            time.sleep(0.05)
        raise TimeoutError
