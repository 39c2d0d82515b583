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

"""Many steps in no order, after which nothing of the volumes is left."""

from __future__ import annotations

import os
import random
import unittest

import fixtures
from nova import exception
from oslo_utils import units

from tests.functional import lab_volumes
from tests.functional import lxd_daemon
from tests.functional import test_volumes

NO_LXD = lxd_daemon.missing()

STEPS = int(os.environ.get('VOLUME_STEPS', '40'))


@unittest.skipIf(NO_LXD, NO_LXD or '')
class RandomStepsTest(test_volumes.Host, unittest.TestCase):

    kind = lab_volumes.FileVolume
    options = {'volume_filesystems': ['ext4']}

    def setUp(self) -> None:
        super().setUp()
        patch = fixtures.MonkeyPatch('nova.volume.cinder.API.get',
                                     lambda *args: {})
        patch.setUp()
        self.addCleanup(patch.cleanUp)
        seed = random.randrange(1 << 30)
        self.random = random.Random(seed)
        self.seed = seed

    def test_nothing_is_left(self) -> None:
        server = self.host.spawn()
        volumes = [self.storage.volume() for _number in range(3)]
        modes = ['block', 'filesystem', 'block']
        paths = ['/dev/vdb', '/dev/vdc', '/dev/vdd']
        written: dict[int, str] = {}
        mappings: dict[int, test_volumes.Mapping] = {}
        done = []
        for _step in range(STEPS):
            number = self.random.randrange(3)
            step = self.random.choice((
                'attach', 'attach', 'detach', 'detach', 'extend', 'hard',
                'soft', 'restart', 'fail', 'stop'))
            done.append(f'{step} {number}')
            info = test_volumes.described(*mappings.values())
            if step == 'attach' and number not in mappings:
                mapping = test_volumes.Mapping(volumes[number], paths[number])
                server.metadata = {'lxd_volume_mode': modes[number]}
                self.host.driver.attach_volume(
                    self.host.context, mapping['connection_info'], server,
                    paths[number])
                mappings[number] = mapping
            elif step == 'detach' and number in mappings:
                self.detach(server, mappings.pop(number)['connection_info'],
                            paths[number])
            elif (step == 'extend' and number in mappings and
                    modes[number] == 'block'):
                volume = volumes[number]
                volume.extend(volume.size + units.Gi)
                self.host.driver.extend_volume(
                    self.host.context, mappings[number]['connection_info'],
                    server, volume.size)
                mappings[number].volume_size = volume.size // units.Gi
            elif step == 'hard':
                self.reboot(server, info)
            elif step == 'soft':
                self.reboot(server, info, 'SOFT')
            elif step == 'restart':
                self.host.restart_driver()
            elif step == 'stop':
                self.host.driver.power_off(server)
                self.host.driver.power_on(self.host.context, server, [], info)
            elif step == 'fail' and number in mappings:
                broken = test_volumes.Mapping(volumes[number], paths[number])
                broken['connection_info']['driver_volume_type'] = 'pigeon'
                self.assertRaises(
                    exception.VolumeDriverNotFound,
                    self.host.driver.attach_volume, self.host.context,
                    broken['connection_info'], server, paths[number])
            for number in mappings:
                where = (paths[number] if modes[number] == 'block' else
                         paths[number].replace('/dev', '/mnt') + '/file')
                if number not in written:
                    written[number] = self.write(server, where, 1)
                self.assertEqual(written[number],
                                 self.read(server, where, 1),
                                 f'seed {self.seed}: {done}')
        self.destroy(server, test_volumes.described(*mappings.values()))
        self.assertEqual(set(), self.storage.left_on_host(),
                         f'seed {self.seed}: {done}')
        self.assertEqual([], os.listdir(self.mount_directory()))

    def mount_directory(self) -> str:
        path = os.path.join(lab_volumes.CONF.state_path,
                            'volumes')
        os.makedirs(path, exist_ok=True)
        return path
