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
"""Instances frozen for snapshots of their volumes, through the driver."""

from __future__ import annotations

import errno
import threading

import fixtures
from nova.compute import power_state
from nova import exception
from nova import objects

from tests.fixtures import disks
from tests.fixtures import fake_driver_host
from tests.fixtures import memory_cinder


class QuiesceTest(fake_driver_host.FakeDriverTestCase):

    def with_volume(self, image: objects.ImageMeta | None = None
                    ) -> tuple[objects.Instance, memory_cinder.Volume]:
        volume = self.storage.volume()
        image = image or self.host.image()
        return self.host.spawn(
            self.host.instance(image), image,
            block_device_info=disks.described(
                volume.mapping())), volume

    def test_quiesce(self) -> None:
        image = self.host.image(os_require_quiesce='yes')
        server, volume = self.with_volume(image)
        self.storage.before('mounts.sync_device', lambda: self.assert_state(
            power_state.PAUSED, server))
        self.driver.quiesce(self.context, server, image)
        self.assert_state(power_state.PAUSED, server)
        self.assertEqual(1, volume.disk.synced)
        for _time in range(2):
            self.driver.unquiesce(self.context, server, image)
            self.assert_state(power_state.RUNNING, server)

    def test_quiesce_without_a_request(self) -> None:
        server, volume = self.with_volume()
        self.assertRaises(
            exception.InstanceQuiesceNotSupported, self.driver.quiesce,
            self.context, server, server.image_meta)
        self.assert_state(power_state.RUNNING, server)
        self.assertEqual(1, volume.disk.synced)

    def test_quiesce_while_storage_hangs(self) -> None:
        image = self.host.image(os_require_quiesce='yes')
        server, volume = self.with_volume(image)
        self.storage.fail('mounts.sync_device', TimeoutError(
            errno.ETIMEDOUT, 'fsync did not finish'))
        self.assertRaises(
            exception.InstanceQuiesceNotSupported, self.driver.quiesce,
            self.context, server, image)
        self.assertEqual(0, volume.disk.synced)
        self.assert_state(power_state.RUNNING, server)
        self.assertNotIn('user.nova.quiesced', self.config(server))

    def test_quiesce_leaves_other_servers_volumes(self) -> None:
        server, _volume = self.with_volume()
        _other, volume = self.with_volume()
        self.assertRaises(
            exception.InstanceQuiesceNotSupported, self.driver.quiesce,
            self.context, server, server.image_meta)
        self.assertEqual(0, volume.disk.synced)

    def test_quiesce_fails(self) -> None:
        image = self.host.image(os_require_quiesce='yes')
        server = self.host.spawn(self.host.instance(image), image)
        self.lxd.fail_operation('PUT', '/1.0/instances/*/state',
                                where={'action': 'freeze'})
        self.assertRaises(exception.NovaException, self.driver.quiesce,
                          self.context, server, image)
        self.assert_state(power_state.RUNNING, server)
        self.assertNotIn('user.nova.quiesced', self.config(server))

    def test_restart_of_nova_compute_ends_it(self) -> None:
        image = self.host.image(os_require_quiesce='yes')
        server = self.host.spawn(self.host.instance(image), image)
        self.driver.quiesce(self.context, server, image)
        self.host.restart_driver()
        self.assert_state(power_state.RUNNING, server)
        self.assertNotIn('user.nova.quiesced', self.config(server))

    # -- thawing whatever happens to LXD ------------------------------------

    def quiesced(self) -> tuple[objects.Instance, objects.ImageMeta]:
        image = self.host.image(os_require_quiesce='yes')
        server = self.host.spawn(self.host.instance(image), image)
        self.driver.quiesce(self.context, server, image)
        self.assert_state(power_state.PAUSED, server)
        return server, image

    def assert_thawed(self, server: objects.Instance) -> None:
        self.lxd.wait_for(
            lambda: 'user.nova.quiesced' not in self.config(server))
        self.assert_state(power_state.RUNNING, server)

    def test_lxd_restarts_while_it_is_unquiesced(self) -> None:
        server, image = self.quiesced()
        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.server.quiesce.RETRY_INTERVAL', 0.1))
        self.lxd.stop()
        starter = threading.Timer(0.3, self.lxd.start)
        starter.start()
        self.addCleanup(starter.join)
        self.driver.unquiesce(self.context, server, image)
        self.assert_thawed(server)

    def test_lxd_is_back_long_after_unquiesce(self) -> None:
        server, image = self.quiesced()
        with self.host.lxd_down():
            self.assertRaises(exception.HypervisorUnavailable,
                              self.driver.unquiesce, self.context, server,
                              image)
        self.assert_thawed(server)

    def test_frozen_until_unquiesce_although_lxd_restarts(self) -> None:
        server, image = self.quiesced()
        reconnected = threading.Event()
        thaw = self.driver._services.quiescer.thaw

        def thaw_and_report() -> None:
            thaw()
            reconnected.set()

        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.server.quiesce.Quiescer.thaw',
            lambda _self: thaw_and_report()))
        self.lxd.restart()
        self.assertTrue(reconnected.wait(20))
        self.assert_state(power_state.PAUSED, server)
        self.driver.unquiesce(self.context, server, image)
        self.assert_thawed(server)

    def test_nova_does_not_unquiesce(self) -> None:
        """nova-api may have ended."""
        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.server.quiesce.DEADLINE', 0.5))
        server, image = self.quiesced()
        self.assert_thawed(server)
        # It is back.
        self.driver.unquiesce(self.context, server, image)
        self.assert_state(power_state.RUNNING, server)

    def test_deadline_ends_with_unquiesce(self) -> None:
        server, image = self.quiesced()
        self.assertTrue(self.timers())
        self.driver.unquiesce(self.context, server, image)
        self.lxd.wait_for(lambda: not self.timers())

    @staticmethod
    def timers() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate()
                if isinstance(thread, threading.Timer)]

    def test_stopped_meanwhile(self) -> None:
        """It is not running, and not left with the key."""
        server, image = self.quiesced()
        self.lxd.guest_poweroff(server.name)
        self.driver.unquiesce(self.context, server, image)
        self.assertNotIn('user.nova.quiesced', self.config(server))
        self.assert_state(power_state.SHUTDOWN, server)

    def test_ends_before_it_is_quiesced(self) -> None:
        image = self.host.image(os_require_quiesce='yes')
        server = self.host.spawn(self.host.instance(image), image)
        self.lxd.before('PUT', f'/1.0/instances/{server.name}/state',
                        lambda _request: self.lxd.guest_poweroff(server.name),
                        where={'action': 'freeze'})
        self.driver.quiesce(self.context, server, image)
        self.driver.unquiesce(self.context, server, image)
        self.assertNotIn('user.nova.quiesced', self.config(server))

    def test_thawed_periodically(self) -> None:
        server, image = self.quiesced()
        self.lxd.fail_operation('PUT', '/1.0/instances/*/state', 'no',
                                where={'action': 'unfreeze'})
        self.assertRaises(exception.NovaException, self.driver.unquiesce,
                          self.context, server, image)
        self.assert_state(power_state.PAUSED, server)
        self.driver.manage_image_cache(self.context, [server])
        self.assert_thawed(server)

    def test_one_that_cannot_be_thawed_keeps_no_other_frozen(self) -> None:
        servers = [self.quiesced()[0] for _number in range(2)]
        self.lxd.fail_operation('PUT', '/1.0/instances/*/state', 'no',
                                where={'action': 'unfreeze'})
        self.host.restart_driver()
        self.assertEqual(1, sum('user.nova.quiesced' in self.config(server)
                                for server in servers))
