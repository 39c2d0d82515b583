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
"""LXD or the driver's process is killed during an operation.

The next calls of Nova and the user must succeed, with the same data. Each
operation is interrupted at several moments. Attaching, detaching and hard
reboots are in test_volumes_random, swaps in test_volumes_swap, first boots of
volumes in test_first_boots.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import threading
import time
from typing import Any
import unittest

import fixtures
from nova.compute import power_state
from nova.compute import task_states
from nova.compute import vm_states
from nova import exception
from nova.network import model as network_model
from nova import objects
from nova.tests.unit import fake_flavor

from nova_lxd_py.virt.image import cache
from tests.fixtures import busybox_image
from tests.fixtures import driver_host
from tests.fixtures import killed_process
from tests.fixtures import lxd_daemon
from tests.fixtures import migration_record

NO_LXD = lxd_daemon.missing()

#: Fractions of an operation's duration after which it is interrupted.
MOMENTS = (0.1, 0.35, 0.6, 0.85)


class RestartCases:
    """Tests for both kinds of interruptions."""

    host: driver_host.DriverHost
    daemon: lxd_daemon.RealLXD

    def setUp(self) -> None:
        super().setUp()
        daemon = lxd_daemon.LXDDaemon()
        daemon.setUp()
        self.addCleanup(daemon.cleanUp)
        self.daemon = daemon.lxd
        self.host = driver_host.DriverHost(self.daemon)
        self.host.setUp()
        self.addCleanup(self.host.cleanUp)
        migrations = migration_record.MigrationRecord()
        migrations.setUp()
        self.addCleanup(migrations.cleanUp)
        self.migration = migrations.record
        # Nova does not have servers that were deleted.
        patch = fixtures.MonkeyPatch(
            'nova.objects.Instance.get_by_uuid', self.not_found)
        patch.setUp()
        self.addCleanup(patch.cleanUp)
        self.image = self.host.image(busybox_image.unified(
            {'etc/large': b'x' * (8 << 20)}))

    @staticmethod
    def not_found(context: Any, uuid: str, **kwargs: Any) -> None:
        raise exception.InstanceNotFound(instance_id=uuid)

    # -- killing ------------------------------------------------------------

    def interrupt(self, action: Callable[[Any], None], seconds: float) -> None:
        """Begin an action of a driver, and kill LXD or the driver."""
        raise NotImplementedError

    def measure(self, action: Callable[[Any], None]) -> float:
        """Return the duration of an action without interruption."""
        began = time.monotonic()
        action(self.host.driver)
        return time.monotonic() - began

    # -- servers ------------------------------------------------------------

    def server(self) -> objects.Instance:
        server = self.host.spawn(self.host.instance(self.image), self.image)
        server.info_cache = objects.InstanceInfoCache(
            instance_uuid=server.uuid,
            network_info=network_model.NetworkInfo())
        self.host.run(server, 'sh', '-c', 'echo mine > /root/mine; sync')
        return server

    def hard_reboot(self, server: objects.Instance) -> None:
        server.vm_state, server.task_state = vm_states.ERROR, None
        self.host.driver.reboot(self.host.context, server, [], 'HARD')
        server.vm_state = vm_states.ACTIVE

    def assert_whole(self, server: objects.Instance) -> None:
        """Check that it runs with its data, and nothing else is left."""
        self.assertEqual(power_state.RUNNING, self.host.state(server))
        self.assertEqual('mine\n',
                         self.host.run(server, 'cat', '/root/mine'))
        self.assertEqual([server.name], self.of(server))

    def of(self, server: objects.Instance) -> list[str]:
        return [name for name, entry in self.host.lxd_instances().items()
                if entry['config'].get('user.nova.uuid') == server.uuid]

    def assert_nothing_left(self) -> None:
        self.assertEqual({'template'}, {
            entry['config']['user.nova.role']
            for entry in self.host.lxd_instances().values()} | {'template'})
        self.assertEqual([], self.host.lxd_volumes())
        for image in self.daemon.api.must('GET', '/1.0/images', params={
                'project': self.host.project, 'recursion': '1'}):
            # An image that LXD has imported without the driver has no alias;
            # the next import of it uses it, or else it is aged out.
            self.assertIn(cache.PROPERTY_IMAGE, image['properties'])
            self.assertIn([alias['name'][:7] for alias in image['aliases']],
                          (['glance-'], []))

    def destroy(self, server: objects.Instance) -> None:
        self.host.driver.destroy(self.host.context, server, [])

    # -- operations ---------------------------------------------------------

    def test_spawn(self) -> None:
        def build(image: objects.ImageMeta, server: objects.Instance
                  ) -> Callable[[Any], None]:
            return lambda driver: driver.spawn(
                self.host.context, server, image, [], 'secret',
                {}, [], {'root_device_name': '/dev/root', 'swap': None,
                         'block_device_mapping': [], 'ephemerals': [
                             {'size': 1, 'device_name': '/dev/sdb',
                              'guest_format': None, 'disk_bus': None,
                              'device_type': None}]})

        def instance(image: objects.ImageMeta) -> objects.Instance:
            return self.host.instance(image, ephemeral_gb=1,
                                      config_drive='True')

        first = instance(self.image)
        seconds = self.measure(build(self.image, first))
        self.destroy(first)
        for moment in MOMENTS:
            # The first time with its transfer to LXD.
            image = self.host.image(busybox_image.unified(
                {'etc/large': str(moment).encode() * (4 << 20)}))
            for _turn in range(2):
                server = instance(image)
                self.interrupt(build(image, server), moment * seconds)
                # Nova has set it to ERROR; its owner deletes it.
                self.destroy(server)
                self.assertEqual([], self.of(server))
                self.assertEqual([], self.host.lxd_volumes())
        again = instance(self.image)
        build(self.image, again)(self.host.driver)
        self.destroy(again)
        self.assert_nothing_left()

    def test_snapshot(self) -> None:
        server = self.server()

        def take(driver: Any) -> None:
            image = self.host.glance.create(
                None, {'name': 'backup', 'properties': {}})['id']
            driver.snapshot(self.host.context, server, image,
                            lambda **kwargs: None)
        seconds = self.measure(take)
        for moment in MOMENTS:
            self.interrupt(take, moment * seconds)
            self.assertEqual(power_state.RUNNING, self.host.state(server))
            take(self.host.driver)
            self.assert_whole(server)
        self.destroy(server)
        self.assert_nothing_left()

    def test_rescue(self) -> None:
        server = self.server()

        def rescue(driver: Any) -> None:
            driver.power_off(server)
            driver.rescue(self.host.context, server, [], self.image,
                          'secret', {}, [])

        def unrescue(driver: Any) -> None:
            driver.unrescue(self.host.context, server)
        seconds = [self.measure(action) for action in (rescue, unrescue)]
        for moment in MOMENTS:
            self.interrupt(rescue, moment * seconds[0])
            self.hard_reboot(server)
            self.assert_whole(server)
            rescue(self.host.driver)
            server.vm_state = vm_states.RESCUED
            self.interrupt(unrescue, moment * seconds[1])
            self.hard_reboot(server)
            self.assert_whole(server)
        self.destroy(server)
        self.assert_nothing_left()

    def test_resize(self) -> None:
        server = self.server()
        small = server.flavor
        large = fake_flavor.fake_flavor_obj(
            self.host.context, name='large', expected_attrs=['extra_specs'],
            vcpus=1, memory_mb=256, root_gb=2, ephemeral_gb=0, swap=0,
            extra_specs={'lxd:nested_allowed': 'true'})
        small.extra_specs = {}

        def resize(driver: Any) -> None:
            server.task_state = task_states.RESIZE_MIGRATING
            server.new_flavor = large
            server.migration_context = objects.MigrationContext(
                migration_id=7, old_numa_topology=None,
                new_numa_topology=None)
            info = driver.migrate_disk_and_power_off(
                self.host.context, server, driver_host.CONF.my_ip, large, [],
                None, 20, 10)
            server.old_flavor, server.flavor = small, large
            driver.finish_migration(
                self.host.context, self.migration, server, info, [],
                server.image_meta, True, {}, None, True, share_info=None)

        def revert(driver: Any) -> None:
            server.flavor, server.new_flavor = small, large
            server.task_state = task_states.RESIZE_MIGRATING
            driver.finish_revert_migration(
                self.host.context, server, [], self.migration, None, True,
                share_info=None)
            server.task_state = None
            server.old_flavor = server.new_flavor = None
        seconds = self.measure(resize)
        revert(self.host.driver)
        for moment in MOMENTS:
            self.interrupt(resize, moment * seconds)
            # The call of nova-compute for such a server when it starts.
            revert(self.host.driver)
            self.assert_limits(server, '128MiB', '1GiB')
            # And what its owner does if Nova has gone further than that.
            self.interrupt(resize, moment * seconds)
            server.flavor = large
            self.hard_reboot(server)
            self.assert_limits(server, '256MiB', '2GiB')
            revert(self.host.driver)
        self.destroy(server)
        self.assert_nothing_left()

    def assert_limits(self, server: objects.Instance, memory: str, disk: str
                      ) -> None:
        self.assert_whole(server)
        shown = self.host.lxd_instances()[server.name]
        self.assertEqual((memory, disk), (
            shown['config']['limits.memory'],
            shown['devices']['root']['size']))


@unittest.skipIf(NO_LXD, NO_LXD or '')
class KilledLXDTest(RestartCases, unittest.TestCase):

    def interrupt(self, action: Callable[[Any], None], seconds: float) -> None:
        def tried() -> None:
            with contextlib.suppress(exception.NovaException):
                action(self.host.driver)
        thread = threading.Thread(target=tried)
        thread.start()
        time.sleep(seconds)
        self.daemon.kill()
        # Also an operation that waits for LXD must end.
        starter = threading.Timer(1, self.daemon.start)
        starter.start()
        thread.join()
        starter.join()


@unittest.skipIf(NO_LXD, NO_LXD or '')
class KilledDriverTest(RestartCases, unittest.TestCase):

    def interrupt(self, action: Callable[[Any], None], seconds: float) -> None:
        began = time.monotonic()
        killed_process.run(lambda: action(self.host.make_driver()),
                           lambda: time.monotonic() > began + seconds)
        # nova-compute takes longer to start than LXD to begin with what it
        # has got.
        time.sleep(0.5)
        self.host.restart_driver()
