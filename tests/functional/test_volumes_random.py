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

"""Volume operations in random order, after which nothing is left.

Some steps kill LXD, or a process with the driver, during an operation. The
environment variable NOVA_LXD_TEST_STEPS sets the number of steps, and
NOVA_LXD_TEST_SEED repeats those of an earlier run.
"""

from __future__ import annotations

from collections.abc import Callable
import fcntl
import os
import pathlib
import random
import threading
import time
import unittest

from nova import exception
from oslo_utils import units

from tests.fixtures import disks
from tests.fixtures import killed_process
from tests.fixtures import lab_volumes
from tests.fixtures import lxd_daemon
from tests.fixtures import volume_host

NO_LXD = lxd_daemon.missing()

STEPS = int(os.environ.get('NOVA_LXD_TEST_STEPS', '40'))
SEED = int(os.environ.get('NOVA_LXD_TEST_SEED', '0'))

CHOICES = (
    'attach', 'attach', 'attach', 'detach', 'detach', 'extend', 'hard',
    'soft', 'restart', 'fail', 'stop', 'kill driver', 'kill driver',
    'kill lxd', 'kill lxd')


@unittest.skipIf(NO_LXD or os.environ.get('LXD_SOCKET'),
                 NO_LXD or 'it kills LXD, so it needs a private one (without '
                 'LXD_SOCKET)')
class RandomStepsTest(volume_host.VolumeHost, unittest.TestCase):
    """One server and three volumes."""

    kind = lab_volumes.FileVolume
    # The seconds that an operation waits for an LXD that has been killed.
    options = {'volume_filesystems': ['ext4'], 'request_timeout': 10}
    modes = ('block', 'filesystem', 'block')
    paths = ('/dev/vdb', '/dev/vdc', '/dev/vdd')

    def setUp(self) -> None:
        daemon = lxd_daemon.LXDDaemon()
        daemon.setUp()
        self.addCleanup(daemon.cleanUp)
        self.daemon_of_its_own = daemon.lxd
        super().setUp()
        self.seed = SEED or random.randrange(1, 1 << 30)
        self.random = random.Random(self.seed)
        self.mappings: dict[int, disks.Mapping] = {}
        self.written: dict[int, str] = {}

    def lxd(self) -> lxd_daemon.RealLXD:
        return self.daemon_of_its_own

    # -- steps --------------------------------------------------------------

    def step(self, name: str, number: int) -> None:
        """Do one step, if the state allows it."""
        info = disks.described(*self.mappings.values())
        driver, context = self.host.driver, self.host.context
        if name == 'attach' and number not in self.mappings:
            self.mappings[number] = self.attached(number)
        elif name == 'detach' and number in self.mappings:
            self.detach(self.server, self.mappings.pop(number)[
                'connection_info'], self.paths[number])
        elif name == 'extend' and number in self.mappings and (
                self.modes[number] == 'block'):
            volume = self.volumes[number]
            volume.extend(volume.size + units.Gi)
            driver.extend_volume(
                context, self.mappings[number]['connection_info'],
                self.server, volume.size)
            self.mappings[number].volume_size = volume.size // units.Gi
        elif name == 'hard':
            self.reboot(self.server, info)
        elif name == 'soft':
            self.reboot(self.server, info, 'SOFT')
        elif name == 'restart':
            self.host.restart_driver()
        elif name == 'stop':
            driver.power_off(self.server)
            driver.power_on(context, self.server, [], info)
        elif name == 'fail' and number in self.mappings:
            broken = self.volumes[number].mapping(self.paths[number])
            broken['connection_info']['driver_volume_type'] = 'pigeon'
            self.assertRaises(
                exception.VolumeDriverNotFound, driver.attach_volume, context,
                broken['connection_info'], self.server, self.paths[number])
        elif name.startswith('kill'):
            self.kill(name, number)

    def attached(self, number: int, driver=None) -> disks.Mapping:
        mapping = self.volumes[number].mapping(self.paths[number])
        self.server.metadata = {'lxd_volume_mode': self.modes[number]}
        (driver or self.host.driver).attach_volume(
            self.host.context, mapping['connection_info'], self.server,
            self.paths[number])
        return mapping

    def kill(self, name: str, number: int) -> None:
        """Kill a process that attaches, detaches or reboots, and repeat the
        operation as Nova or its user would."""
        what = self.random.choice(('attach', 'detach', 'hard'))
        if what != 'hard':
            what = 'detach' if number in self.mappings else 'attach'
        info = disks.described(*self.mappings.values())
        patience = self.random.uniform(0, 0.5 if what == 'hard' else 0.12)

        def begin(driver) -> None:
            if what == 'attach':
                self.attached(number, driver)
            elif what == 'detach':
                driver.detach_volume(
                    self.host.context,
                    dict(self.mappings[number]['connection_info']),
                    self.server, self.paths[number])
            else:
                driver.reboot(self.host.context, self.server, [], 'HARD',
                              info)
        if name == 'kill driver':
            began = time.monotonic()
            killed_process.run(
                lambda: begin(self.host.make_driver()),
                lambda: time.monotonic() > began + patience)
            self.daemon_of_its_own.wait_for_operations(self.proxy.path)
            self.host.restart_driver()
        else:
            self.kill_lxd(lambda: begin(self.host.driver), patience)
        if what == 'hard':
            # The result of the first attempt is unknown.
            self.reboot(self.server, info)
        elif what == 'detach':
            self.detach(self.server, self.mappings.pop(number)[
                'connection_info'], self.paths[number])
        elif self.random.random() < 0.5:
            self.mappings[number] = self.attached(number)
        else:
            # Nova does not have the connection.
            self.detach(self.server, self.volumes[number].connection(),
                        self.paths[number])

    def kill_lxd(self, action: Callable[[], None], patience: float) -> None:
        def tried() -> None:
            try:
                action()
            except exception.NovaException as error:
                self.log_error(error)
        thread = threading.Thread(target=tried)
        thread.start()
        time.sleep(patience)
        self.daemon_of_its_own.kill()
        thread.join()
        self.daemon_of_its_own.start()

    def log_error(self, error: Exception) -> None:
        self.done[-1] += f' ({type(error).__name__})'

    # -- the test -----------------------------------------------------------

    def test_nothing_is_left(self) -> None:
        self.server = self.host.spawn()
        self.volumes = [self.storage.volume() for _path in self.paths]
        self.done: list[str] = []
        for _step in range(STEPS):
            number = self.random.randrange(len(self.paths))
            name = self.random.choice(CHOICES)
            self.done.append(f'{name} {number}')
            try:
                self.step(name, number)
                self.check_content()
            except Exception as error:
                raise AssertionError(
                    f'NOVA_LXD_TEST_SEED={self.seed}: {self.done}'
                ) from error
        self.destroy(self.server,
                     disks.described(*self.mappings.values()))
        self.assertEqual(set(), self.storage.left_on_host(),
                         f'NOVA_LXD_TEST_SEED={self.seed}: {self.done}')
        self.assertEqual([], os.listdir(self.mount_directory()))
        self.assertEqual([], self.held_locks())

    def check_content(self) -> None:
        """Check that each volume has its first content."""
        self.assertEqual({f'volume-{self.volumes[number].id}'
                          for number in self.mappings},
                         set(self.devices(self.server)))
        for number in self.mappings:
            where = (self.paths[number] if self.modes[number] == 'block' else
                     self.paths[number].replace('/dev', '/mnt') + '/file')
            if number not in self.written:
                self.written[number] = self.write(self.server, where, 1)
            self.assertEqual(self.written[number],
                             self.read(self.server, where, 1))

    def held_locks(self) -> list[str]:
        """List os-brick's file locks that are held."""
        held = []
        for path in pathlib.Path(lab_volumes.CONF.state_path).rglob(
                '*os-brick*'):
            with open(path, 'a', encoding='utf-8') as stream:
                try:
                    fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    held.append(path.name)
        return held

    def mount_directory(self) -> str:
        path = os.path.join(lab_volumes.CONF.state_path, 'volumes')
        os.makedirs(path, exist_ok=True)
        return path
