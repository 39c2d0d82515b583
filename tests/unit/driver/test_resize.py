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

"""Another flavor on the same host, through the driver as Nova calls it."""

from __future__ import annotations

from typing import Any

from nova.compute import power_state
from nova.compute import task_states
from nova import exception
from nova import objects

from tests.fixtures import disks
from tests.fixtures import driver_host
from tests.fixtures import fake_driver_host

MIB = 1 << 20


class ResizeTestCase(fake_driver_host.FakeDriverTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.ports = self.host.ports()
        self.info: dict[str, Any] | None = None
        self.migration = objects.Migration(
            id=7, source_compute='testhost', dest_compute='testhost',
            migration_type='resize')

    def make(self, extra_specs: dict[str, str] | None = None, **fields: Any
             ) -> objects.Instance:
        image = self.host.image()
        return self.host.spawn(
            self.host.instance(image, extra_specs, **fields), image,
            self.ports, block_device_info=self.info)

    def flavor(self, extra_specs: dict[str, str] | None = None,
               **fields: Any) -> objects.Flavor:
        return self.host.instance(None, extra_specs, **fields).flavor

    def prepare(self, server: objects.Instance, flavor: objects.Flavor,
                dest: str | None = None) -> Any:
        return self.driver.migrate_disk_and_power_off(
            self.context, server, dest or driver_host.CONF.my_ip, flavor,
            self.ports, self.info, timeout=5, retry_interval=5)

    def finish(self, server: objects.Instance, flavor: objects.Flavor,
               disk_info: Any = None, **kwargs: Any) -> None:
        server.old_flavor, server.new_flavor = server.flavor, flavor
        server.flavor = flavor
        self.driver.finish_migration(
            self.context, self.migration, server, disk_info, self.ports,
            None, True, {}, self.info, **kwargs)

    def resize(self, server: objects.Instance, flavor: objects.Flavor
               ) -> None:
        self.finish(server, flavor, self.prepare(server, flavor))

    def confirm(self, server: objects.Instance) -> None:
        self.driver.confirm_migration(self.context, self.migration, server,
                                      self.ports)
        server.old_flavor = server.new_flavor = None

    def revert(self, server: objects.Instance, **kwargs: Any) -> None:
        """Go back the way that Nova does."""
        server.task_state = task_states.RESIZE_REVERTING
        self.driver.destroy(self.context, server, self.ports, self.info)
        server.flavor = server.old_flavor
        self.driver.finish_revert_migration(
            self.context, server, self.ports, self.migration, self.info,
            **kwargs)
        server.old_flavor = server.new_flavor = server.task_state = None

    def limits(self, server: objects.Instance) -> tuple[str, str]:
        return (self.config(server)['limits.memory'],
                self.devices(server)['root']['size'])

    def stops(self) -> int:
        return sum(request.path.endswith('/state') and
                   request.body.get('action') == 'stop'
                   for request in self.lxd.requests if request.method == 'PUT')


class ResizeTest(ResizeTestCase):

    # -- there and back -----------------------------------------------------

    def test_live(self) -> None:
        server = self.make()
        self.lxd.clear_requests()
        self.resize(server, self.flavor(memory_mb=256, root_gb=2))
        self.assertEqual(('256MiB', '2GiB'), self.limits(server))
        self.assert_state(power_state.RUNNING, server)
        self.assertIn('user.nova.resize', self.config(server))
        self.confirm(server)
        self.assertNotIn('user.nova.resize', self.config(server))
        self.confirm(server)
        # The guest has not noticed.
        self.assertEqual(0, self.stops())

    def test_new_limit_is_tried_at_once(self) -> None:
        """While the server is as it was, so that a refusal harms nothing."""
        server = self.make()
        self.prepare(server, self.flavor(memory_mb=256))
        self.assertEqual('256MiB', self.config(server)['limits.memory'])

    def test_back(self) -> None:
        server = self.make()
        self.resize(server, self.flavor(memory_mb=256, root_gb=2))
        self.revert(server)
        self.assertEqual(('128MiB', '1GiB'), self.limits(server))
        self.assert_state(power_state.RUNNING, server)
        self.assertNotIn('user.nova.resize', self.config(server))

    def test_stopped(self) -> None:
        server = self.make()
        self.driver.power_off(server)
        flavor = self.flavor(memory_mb=64)
        self.finish(server, flavor, self.prepare(server, flavor),
                    power_on=False)
        self.assert_state(power_state.SHUTDOWN, server)
        self.assertEqual('64MiB', self.limits(server)[0])
        self.revert(server, power_on=False)
        self.assert_state(power_state.SHUTDOWN, server)

    def test_restart_where_lxd_needs_it(self) -> None:
        server = self.make()
        self.lxd.clear_requests()
        self.resize(server, self.flavor({'lxd:nested_allowed': 'true'}))
        self.assertEqual('true', self.config(server)['security.nesting'])
        self.assert_state(power_state.RUNNING, server)
        self.assertLess(0, self.stops())
        self.revert(server)
        self.assertEqual('false', self.config(server)['security.nesting'])
        self.assert_state(power_state.RUNNING, server)

    def test_another_uid_range(self) -> None:
        server = self.make()
        self.resize(server, self.flavor({'lxd:isolated': 'false'}))
        self.assertNotEqual('true', self.config(server).get(
            'security.idmap.isolated'))
        self.assert_state(power_state.RUNNING, server)

    def test_with_volumes(self) -> None:
        """Nova makes their connections again, so the server is stopped."""
        volume = self.storage.volume()
        self.info = disks.described(volume.mapping())
        server = self.make()
        flavor = self.flavor(memory_mb=256)
        disk_info = self.prepare(server, flavor)
        self.assert_state(power_state.SHUTDOWN, server)
        self.assertEqual(set(), self.storage.left())
        self.info = disks.described(volume.mapping())
        self.finish(server, flavor, disk_info)
        self.assert_state(power_state.RUNNING, server)
        self.assertIsNotNone(self.storage.device_of(volume))
        self.revert(server)
        self.assert_state(power_state.RUNNING, server)
        self.assertEqual('128MiB', self.limits(server)[0])

    def test_ephemeral_disk_follows(self) -> None:
        self.info = disks.described(ephemerals=[
            {'size': 1, 'device_name': '/dev/sdb', 'guest_format': None}])
        server = self.make(ephemeral_gb=1)
        self.resize(server, self.flavor(ephemeral_gb=3))
        [volume] = self.lxd.daemon.store.volumes.values()
        self.assertEqual('3GiB', volume.config['size'])

    # -- what cannot be -----------------------------------------------------

    def assert_refused(self, server: objects.Instance,
                       flavor: objects.Flavor, **kwargs: Any) -> Exception:
        before = dict(self.config(server)), dict(self.devices(server))
        status = self.host.fake(server).status
        error = self.assertRaises(exception.InstanceFaultRollback,
                                  self.prepare, server, flavor, **kwargs)
        self.assertEqual(status, self.host.fake(server).status)
        self.assertEqual(before, (self.config(server), self.devices(server)))
        return error.inner_exception

    def test_to_another_host(self) -> None:
        self.assert_refused(self.make(), self.flavor(), dest='192.0.2.9')

    def test_smaller_disks(self) -> None:
        server = self.make(root_gb=3, ephemeral_gb=2)
        for flavor in (self.flavor(root_gb=2, ephemeral_gb=2),
                       self.flavor(root_gb=3, ephemeral_gb=1)):
            self.assertIsInstance(self.assert_refused(server, flavor),
                                  exception.ResizeError)

    def use_memory(self, server: objects.Instance, **mib: int) -> None:
        """Let the guest use memory, as LXD measures it."""
        self.host.fake(server).usage.update(
            memory=mib['usage'] * MIB, metrics={
                'memory_MemTotal_bytes': mib['total'] * MIB,
                'memory_MemAvailable_bytes': mib['available'] * MIB,
                'memory_Shmem_bytes': mib.get('shared', 0) * MIB})

    def test_less_memory_than_in_use(self) -> None:
        server = self.make(memory_mb=256)
        self.use_memory(server, usage=200, total=256, available=100)
        error = self.assert_refused(server, self.flavor(memory_mb=128))
        # Binary, as everything in Nova is.
        self.assertIn('156 MiB', str(error))

    def test_memory_that_is_merely_cached(self) -> None:
        server = self.make(memory_mb=256)
        self.use_memory(server, usage=200, total=256, available=132)
        # The kernel gives these up.
        self.host.fake(server).usage['cached'] = 76 * MIB
        self.resize(server, self.flavor(memory_mb=128))
        self.assertEqual('128MiB', self.limits(server)[0])

    def test_shared_memory_counts(self) -> None:
        server = self.make(memory_mb=256)
        self.use_memory(server, usage=200, total=256, available=136,
                        shared=10)
        self.assert_refused(server, self.flavor(memory_mb=128))

    def test_lxd_refuses(self) -> None:
        server = self.make()
        self.lxd.fail_operation('PUT', f'/1.0/instances/{server.name}',
                                error='cgroup /sys/fs/cgroup/x')
        error = self.assert_refused(server, self.flavor(memory_mb=64))
        self.assertNotIn('cgroup', str(error))

    def test_lxd_refuses_a_stopped_one(self) -> None:
        """A server that was stopped for it runs again."""
        server = self.make()
        self.lxd.fail_operation('PUT', f'/1.0/instances/{server.name}')
        self.assertRaises(exception.InstanceFaultRollback, self.prepare,
                          server, self.flavor({'lxd:nested_allowed': 'true'}))
        self.assert_state(power_state.RUNNING, server)

    def test_bad_flavor(self) -> None:
        server = self.make()
        error = self.assert_refused(server, self.flavor(
            {'lxd:nested_allowed': 'maybe'}))
        self.assertIn('maybe', str(error))

    def test_lxd_is_gone(self) -> None:
        server = self.make()
        flavor = self.flavor(memory_mb=256)
        disk_info = self.prepare(server, flavor)
        with self.host.lxd_down():
            self.assertRaises(exception.HypervisorUnavailable, self.finish,
                              server, flavor, disk_info)
        self.host.restart_driver()
        server.flavor = server.old_flavor
        self.finish(server, flavor, disk_info)
        self.assertEqual('256MiB', self.limits(server)[0])

    def test_confirm_of_what_is_gone(self) -> None:
        server = self.make()
        self.driver.destroy(self.context, server, self.ports)
        self.confirm(server)

    def test_confirm_that_lxd_refuses(self) -> None:
        server = self.make()
        self.resize(server, self.flavor(memory_mb=256))
        self.lxd.fail_operation('PUT', f'/1.0/instances/{server.name}')
        self.confirm(server)
        self.assertEqual('256MiB', self.limits(server)[0])

    def test_revert_before_anything_was_done(self) -> None:
        server = self.make()
        server.old_flavor = server.flavor
        server.new_flavor = self.flavor(memory_mb=256)
        self.driver.finish_revert_migration(
            self.context, server, self.ports, self.migration, None)
        self.assertEqual('128MiB', self.limits(server)[0])
        self.assert_state(power_state.RUNNING, server)

    def test_revert_that_lxd_refuses_a_stopped_one(self) -> None:
        """Nothing is tried that helps only a running one."""
        server = self.make()
        self.driver.power_off(server)
        flavor = self.flavor(memory_mb=256)
        self.finish(server, flavor, self.prepare(server, flavor),
                    power_on=False)
        self.lxd.fail_next('PUT', f'/1.0/instances/{server.name}', 400, 'x')
        self.assertRaises(exception.NovaException, self.revert, server,
                          power_on=False)

    def test_revert_that_the_running_guest_does_not_bear(self) -> None:
        server = self.make()
        self.resize(server, self.flavor(memory_mb=512))
        self.host.fake(server).usage['memory'] = 300 * MIB
        server.flavor = server.old_flavor
        self.driver.finish_revert_migration(
            self.context, server, self.ports, self.migration, None)
        self.assertEqual('128MiB', self.limits(server)[0])
        self.assert_state(power_state.RUNNING, server)


class IncusResizeTest(ResizeTest):

    server = 'incus'


class RootDiskTest(ResizeTestCase):
    """Quotas that a root disk does not bear."""

    def fill(self, server: objects.Instance, mebibytes: int) -> None:
        """Let a guest write to its root disk."""
        self.host.fake(server).usage['disk'] = mebibytes * MIB

    def test_from_no_quota(self) -> None:
        """64 MiB must be free below the new quota."""
        server = self.make(root_gb=0)
        self.fill(server, 1024 - 63)
        self.assertRaises(exception.InstanceFaultRollback, self.prepare,
                          server, self.flavor(root_gb=1))
        self.assertIsNone(self.host.fake(server).too_low_quota)
        self.assertEqual([server.name], list(self.host.own()))
        self.fill(server, 1024 - 65)
        self.resize(server, self.flavor(root_gb=1))
        self.assertEqual('1GiB', self.devices(server)['root']['size'])

    def test_back_to_less_than_it_holds(self) -> None:
        """The quota stays, and a hard reboot tries again."""
        server = self.make()
        self.resize(server, self.flavor(root_gb=3))
        self.fill(server, 2000)
        self.revert(server)
        self.assertEqual('3GiB', self.devices(server)['root']['size'])
        self.assertIsNone(self.host.fake(server).too_low_quota)
        self.assert_state(power_state.RUNNING, server)
        self.fill(server, 500)
        self.driver.reboot(self.context, server, self.ports, 'HARD')
        self.assertEqual('1GiB', self.devices(server)['root']['size'])

    def test_full_disk_starts(self) -> None:
        """LXD cannot start a guest that has filled its disk."""
        server = self.make()
        self.driver.power_off(server)
        full = 'Failed clearing ownership: chown /x: disk quota exceeded'
        self.lxd.fail_operation('PUT', f'/1.0/instances/{server.name}/state',
                                full, where={'action': 'start'})
        self.driver.power_on(self.context, server, self.ports)
        self.assert_state(power_state.RUNNING, server)
        self.assertEqual(f'{(1024 + 64) * MIB}B',
                         self.devices(server)['root']['size'])
        # With enough free space the loan ends.
        self.driver.reboot(self.context, server, self.ports, 'HARD')
        self.assertEqual('1GiB', self.devices(server)['root']['size'])

    def test_full_disk_is_not_enlarged_for_ever(self) -> None:
        server = self.make()
        self.driver.power_off(server)
        fault = self.lxd.fail_operation(
            'PUT', f'/1.0/instances/{server.name}/state',
            'disk quota exceeded', where={'action': 'start'}, times=None)
        self.fill(server, 1020)
        for _time in range(8):
            self.assertRaises(exception.NovaException, self.driver.power_on,
                              self.context, server, self.ports)
        fault.release()
        self.assertEqual(f'{(1024 + 4 * 64) * MIB}B',
                         self.devices(server)['root']['size'])


class LiveMigrationTest(fake_driver_host.FakeDriverTestCase):

    def test_is_refused(self) -> None:
        server = self.host.spawn()
        error = self.assertRaises(
            exception.MigrationPreCheckError,
            self.driver.check_can_live_migrate_destination, self.context,
            server, None, None)
        self.assertIn('memory', str(error))
        self.driver.cleanup_live_migration_destination_check(self.context,
                                                             None)
