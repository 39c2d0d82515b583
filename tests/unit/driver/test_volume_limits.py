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

"""QoS limits of volumes, through the driver as Nova calls it."""

from __future__ import annotations

from typing import Any

import fixtures
from nova import exception
from nova import objects

from nova_lxd_py.virt.guest import events
from tests.fixtures import boot_volume_case
from tests.fixtures import volume_case

PATH = volume_case.PATH

SPECS = {'total_bytes_sec': '1048576'}
LIMITS = 'rbps=1048576 wbps=1048576'
CHANGED = {'read_iops_sec': '70'}


class LimitCases:
    """Tests for all modes."""

    def setUp(self) -> None:
        self.useFixture(fixtures.MockPatchObject(
            events, 'RECONNECT_FIRST', 0.02))
        super().setUp()
        self.log = self.useFixture(fixtures.FakeLogger())

    def limits(self, server: objects.Instance) -> dict[str, str]:
        """Return the limits of a guest by the paths of devices."""
        return self.storage.limits.get(
            (f'{self.host.project}_{server.name}', self.host.fake(server).pid),
            {})

    def path(self) -> str:
        device = self.storage.device_of(self.volume)
        assert device is not None
        return device.path

    def wait_for_limits(self, server: objects.Instance) -> None:
        self.lxd.wait_for(lambda: self.limits(server))
        self.assertEqual({self.path(): LIMITS}, self.limits(server))

    def assert_restored(self, server: objects.Instance) -> None:
        """Check that limits survive whatever restarts the guest."""
        self.assertEqual({self.path(): LIMITS}, self.limits(server))
        self.lxd.guest_reboot(server.name)
        self.wait_for_limits(server)
        # nova-compute or LXD was down when the guest was restarted.
        self.storage.limits.clear()
        self.host.restart_driver()
        self.assertEqual({self.path(): LIMITS}, self.limits(server))
        self.storage.limits.clear()
        self.lxd.wait_for(lambda: self.lxd.daemon.events.listeners)
        self.lxd.close_websockets()
        self.wait_for_limits(server)


class DataVolumeCases(LimitCases):

    def test_attached_and_detached(self) -> None:
        for _time in range(2):
            connection = self.attach(qos_specs=SPECS)
            self.assertEqual({self.path(): LIMITS}, self.limits(self.server))
            self.detach(connection)
            self.assertEqual({}, self.limits(self.server))
        connection = self.attach(qos_specs=CHANGED)
        self.assertEqual({self.path(): 'riops=70'}, self.limits(self.server))
        self.detach(connection)
        self.attach(qos_specs={'total_bytes_sec': '0'})
        self.assertEqual({}, self.limits(self.server))
        self.assertNotIn('QoS', self.log.output)

    def test_restored(self) -> None:
        self.attach(qos_specs=SPECS)
        self.assert_restored(self.server)

    def test_changed(self) -> None:
        """What was counted before still counts."""
        self.attach(qos_specs=SPECS)
        before = self.given()[self.volume.id]['user.nova.counters']
        device = self.storage.device_of(self.volume)
        assert device is not None
        self.storage.set_attribute(device, 'stat', ' '.join(17 * ['8']))
        for specs, limits in ((CHANGED, {self.path(): 'riops=70'}), ({}, {})):
            self.driver.reboot(
                self.context, self.server, [], 'HARD', self.info(
                    self.volume.mapping(PATH, qos_specs=specs)))
            self.assertEqual(limits, self.limits(self.server))
            self.assertEqual(before, self.given()[self.volume.id][
                'user.nova.counters'])

    def test_stopped_server(self) -> None:
        """It has no control group before it starts."""
        self.driver.power_off(self.server)
        self.attach(qos_specs=SPECS)
        self.assertEqual({}, self.storage.limits)
        self.driver.power_on(self.context, self.server, [], self.info(
            self.volume.mapping(PATH, qos_specs=SPECS)))
        self.assertEqual({self.path(): LIMITS}, self.limits(self.server))

    def test_swapped(self) -> None:
        old, new = self.attach(qos_specs=SPECS), self.storage.volume(self.kind)
        connection = new.connection(qos_specs=CHANGED)
        self.driver.swap_volume(self.context, old, connection, self.server,
                                PATH, 0)
        self.volume = new
        self.assertEqual({self.path(): 'riops=70'}, self.limits(self.server))
        self.detach(connection)
        self.assertEqual({}, self.limits(self.server))

    def test_in_use(self) -> None:
        """It stays, and so do its limits."""
        connection = self.attach(qos_specs=SPECS)
        self.storage.processes.append(4712)
        self.assertRaises(exception.DeviceDetachFailed, self.detach,
                          connection)
        self.assertEqual({self.path(): LIMITS}, self.limits(self.server))

    def test_invalid(self) -> None:
        """The host is not even connected."""
        error = self.assertRaises(
            exception.VolumeAttachFailed, self.attach,
            qos_specs={'read_iops_sec': 'many'})
        self.assertIn('read_iops_sec', str(error))
        self.assertNotIn('brick.connect', self.storage.calls)
        self.assertEqual(set(), self.storage.left())
        self.assertEqual({}, self.given())

    def test_host_cannot_limit_it(self) -> None:
        """The server gets its volume nevertheless."""
        self.storage.fail('block_limits.set_limits', FileNotFoundError(
            2, 'No such file or directory', 'io.max'))
        connection = self.attach(qos_specs=SPECS)
        self.assertIn('QoS limits of volumes', self.log.output)
        self.assertIn('io.max', self.log.output)
        self.assertIn(self.volume.id, self.given())
        self.detach(connection)

    def test_no_request_without_limits(self) -> None:
        self.driver._services.watcher.stop()
        with self.lxd.recording() as recorded:
            connection = self.attach()
            self.detach(connection)
            self.driver.reboot(self.context, self.server, [], 'HARD')
        self.assertEqual([], [request for request in recorded
                              if request.method == 'GET' and
                              request.path.endswith('/state')])
        self.assertNotIn('block_limits.set_limits', self.storage.calls)


class BlockLimitTest(DataVolumeCases, volume_case.VolumeTestCase):
    pass


class FilesystemLimitTest(DataVolumeCases, volume_case.VolumeTestCase):

    options = {'volume_filesystems': ['ext4'], 'volume_mode': 'filesystem'}


class BootVolumeLimitTest(LimitCases, boot_volume_case.BootVolumeTestCase):

    def reboot(self, server: objects.Instance, info: dict[str, Any]) -> None:
        self.driver.reboot(self.context, server, [], 'HARD', info)

    def test_restored(self) -> None:
        server = self.spawn(self.info(qos_specs=SPECS))
        self.assert_restored(server)

    def test_changed(self) -> None:
        server = self.spawn(self.info(qos_specs=SPECS))
        self.reboot(server, self.info(qos_specs=CHANGED))
        self.assertEqual({self.path(): 'riops=70'}, self.limits(server))
        self.reboot(server, self.info())
        self.assertEqual({}, self.limits(server))
        self.assertNotIn('user.nova.root_limits', self.config(server))

    def test_detached_for_a_rebuild(self) -> None:
        info = self.info(qos_specs=SPECS)
        server = self.spawn(info)
        self.driver.power_off(server)
        self.driver.detach_volume(
            self.context, info['block_device_mapping'][0]['connection_info'],
            server, '/dev/sda')
        self.assertNotIn('user.nova.root_limits', self.config(server))
