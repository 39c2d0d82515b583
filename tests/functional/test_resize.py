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

"""Resizing servers on a real LXD, with the steps in Nova's order."""

from __future__ import annotations

from typing import Any
import unittest

from nova.compute import power_state
from nova.compute import task_states
from nova import exception
from nova import objects

from nova_lxd_py.virt import privileged
from tests.fixtures import driver_host
from tests.fixtures import lxd_daemon
from tests.fixtures import resize_case

NO_LXD = lxd_daemon.missing()


@unittest.skipIf(NO_LXD, NO_LXD or '')
class ResizeTest(resize_case.ResizeTestCase):

    def test_up_and_confirm(self) -> None:
        server = self.server()
        with self.running_on(server):
            self.resize(server, vcpus=2, memory_mb=256, root_gb=2)
            self.assertEqual('7', self.config(server)['user.nova.resize'])
            self.assertEqual('256MiB', self.config(server)['limits.memory'])
            self.assertEqual('2', self.config(server)['limits.cpu'])
            self.assertEqual('2GiB',
                             self.shown(server)['devices']['root']['size'])
            self.fill(server, 1100)
            self.confirm(server)
        self.assertNotIn('user.nova.resize', self.config(server))
        self.assertEqual('other', self.config(server)['user.nova.flavor'])

    def test_twice_in_a_row(self) -> None:
        server = self.server()
        with self.running_on(server):
            for memory in (256, 160):
                self.resize(server, memory_mb=memory)
                self.confirm(server)
                self.assertEqual(f'{memory}MiB',
                                 self.config(server)['limits.memory'])

    def test_made_by_an_earlier_driver(self) -> None:
        """Keys that need a restart do not cause one unless a flavor requests
        them."""
        server = self.server()
        key = 'security.syscalls.deny'
        self.assertIn(key, self.config(server))
        shown = self.shown(server)
        config = {name: value for name, value in shown['config'].items()
                  if name != key}
        self.host.lxd.api.must(
            'PUT', f'/1.0/instances/{server.name}', {
                name: shown[name] for name in (
                    'architecture', 'devices', 'ephemeral', 'profiles',
                    'description', 'stateful')} | {'config': config},
            params={'project': self.host.project})
        with self.running_on(server):
            self.resize(server, memory_mb=256)
            self.assertEqual('256MiB', self.config(server)['limits.memory'])
            # LXD has it for the next start, also for one of its own.
            self.assertIn(key, self.config(server))
            self.revert(server)
            self.assertIn(key, self.config(server))

    def test_up_and_revert(self) -> None:
        server = self.server()
        before = self.shown(server)
        with self.running_on(server):
            self.resize(server, vcpus=2, memory_mb=256, root_gb=3, swap=64)
            self.host.run(server, 'touch', '/root/made-meanwhile')
            self.revert(server)
        after = self.shown(server)
        for key in ('config', 'devices'):
            self.assertEqual(before[key], after[key])
        self.host.run(server, 'ls', '/root/made-meanwhile')
        # The quota is enforced again.
        with self.assertRaisesRegex(AssertionError, '(?i)quota|space'):
            self.fill(server, 1100)

    def test_revert_keeps_a_quota_that_is_needed(self) -> None:
        server = self.server()
        self.resize(server, root_gb=2)
        self.fill(server, 1200)
        with self.running_on(server):
            self.revert(server)
        self.assertEqual('2GiB', self.shown(server)['devices']['root']['size'])
        # Guest and LXD still work.
        self.fill(server, 10, '/more')
        self.host.run(server, 'rm', '/fill', '/more')
        self.driver.reboot(self.host.context, server, [], 'HARD')
        self.assertEqual('1GiB', self.shown(server)['devices']['root']['size'])
        self.assertEqual([server.name], list(self.servers()))

    def servers(self) -> dict[str, Any]:
        return {name: entry for name, entry
                in self.host.lxd_instances().items()
                if entry['config'].get('user.nova.role') != 'template'}

    def test_down(self) -> None:
        server = self.server(vcpus=2, memory_mb=256)
        with self.running_on(server):
            self.resize(server, vcpus=1, memory_mb=64)
            self.confirm(server)
        self.assertEqual('64MiB', self.config(server)['limits.memory'])

    def test_less_memory_than_in_use_is_refused(self) -> None:
        server = self.server(memory_mb=256)
        before = self.shown(server)
        # Files of a tmpfs are memory that cannot be reclaimed.
        self.host.run(server, 'mount', '-t', 'tmpfs', 'tmpfs', '/mnt')
        self.fill(server, 100, '/mnt/fill')
        with self.running_on(server):
            error = self.refusal(server, memory_mb=64)
        self.assertRegex(str(error), 'uses 1.. MiB of memory')
        self.assertEqual(before, self.shown(server))

    def refusal(self, server: objects.Instance, bdi: Any = None,
                **changes: Any) -> Exception:
        """Check that a resize is refused, and return the error."""
        with self.assertRaises(exception.InstanceFaultRollback) as caught:
            self.prepare(server, self.flavor(server, **changes), bdi)
        return caught.exception.inner_exception

    def test_shrinking_disks_is_refused(self) -> None:
        server = self.server(root_gb=2)
        before = self.shown(server)
        with self.running_on(server):
            error = self.refusal(server, root_gb=1, memory_mb=256)
        self.assertIsInstance(error, exception.ResizeError)
        self.assertIn('cannot be made smaller', str(error))
        self.assertEqual(before, self.shown(server))

    def test_flavor_that_lxd_cannot_give_is_refused(self) -> None:
        server = self.server()
        before = self.shown(server)
        error = self.refusal(server, extra_specs={'lxd:nested': 'true'})
        self.assertIn('lxd:nested', str(error))
        self.assertEqual(before, self.shown(server))

    def test_other_hosts_are_refused(self) -> None:
        server = self.server()
        server.migration_context = None
        with self.running_on(server), self.assertRaises(
                exception.InstanceFaultRollback):
            self.driver.migrate_disk_and_power_off(
                self.host.context, server, '192.0.2.99',
                self.flavor(server, memory_mb=256), [], None, 20, 10)

    def test_another_host_with_the_same_address_is_refused(self) -> None:
        server = self.server()
        self.migration.dest_compute = 'otherhost'
        with self.running_on(server):
            error = self.refusal(server, memory_mb=256)
        self.assertIsInstance(error, exception.MigrationError)

    def test_full_disk_is_what_a_larger_flavor_is_for(self) -> None:
        server = self.server()
        with self.assertRaises(AssertionError):
            self.fill(server, 1100)
        with self.running_on(server):
            self.resize(server, root_gb=2)
            self.confirm(server)
        self.fill(server, 100, '/more')

    def test_full_disk_and_no_larger_one(self) -> None:
        server = self.server()
        with self.assertRaises(AssertionError):
            self.fill(server, 1100)
        with self.running_on(server):
            self.resize(server, memory_mb=256)
            self.confirm(server)
        self.driver.reboot(self.host.context, server, [], 'HARD')
        self.assertEqual(power_state.RUNNING, self.host.state(server))

    def test_full_disk_does_not_keep_it_from_starting(self) -> None:
        server = self.server()
        with self.assertRaises(AssertionError):
            self.fill(server, 1100)
        for _round in range(2):
            self.driver.power_off(server)
            self.driver.power_on(self.host.context, server, [])
        self.host.run(server, 'rm', '/fill')
        self.driver.reboot(self.host.context, server, [], 'HARD')
        self.assertEqual('1GiB', self.shown(server)['devices']['root']['size'])

    # -- with a restart -----------------------------------------------------

    def test_restarted_for_nesting(self) -> None:
        server = self.server()
        before, pid = self.shown(server), self.pid(server)
        self.resize(server, extra_specs={'lxd:nested_allowed': 'true'})
        self.assertEqual('true', self.config(server)['security.nesting'])
        self.assertNotEqual(pid, self.pid(server))
        pid = self.pid(server)
        self.revert(server)
        self.assertEqual('false', self.config(server)['security.nesting'])
        self.assertNotIn(self.pid(server), (0, pid))
        self.assertEqual(before['devices'], self.shown(server)['devices'])

    def test_restarted_for_privileges(self) -> None:
        server = self.server()
        self.resize(server, extra_specs={'lxd:privileged_allowed': 'true'})
        uids = self.host.run(server, 'cat', '/proc/self/uid_map').split()
        self.assertEqual(['0', '0'], uids[:2])
        self.assertEqual('0', self.host.run(
            server, 'stat', '-c', '%u', '/etc/shadow').strip())
        self.revert(server)
        uids = self.host.run(server, 'cat', '/proc/self/uid_map').split()
        self.assertNotEqual('0', uids[1])
        self.assertEqual('0', self.host.run(
            server, 'stat', '-c', '%u', '/etc/shadow').strip())

    def test_restarted_for_a_uid_range_of_its_own(self) -> None:
        server = self.server()
        before = self.host.run(server, 'cat', '/proc/self/uid_map').split()
        self.resize(server, extra_specs={'lxd:isolated': 'true'})
        range_ = self.host.run(server, 'cat', '/proc/self/uid_map').split()
        self.assertEqual('65536', range_[2])
        self.assertEqual('0', self.host.run(
            server, 'stat', '-c', '%u', '/etc/shadow').strip())
        self.revert(server)
        self.assertEqual(before, self.host.run(
            server, 'cat', '/proc/self/uid_map').split())

    # -- stopped servers ----------------------------------------------------

    def test_stopped(self) -> None:
        server = self.server()
        self.driver.power_off(server)
        before = self.shown(server)
        self.resize(server, power_on=False, vcpus=2, memory_mb=256, root_gb=2)
        self.assertEqual(power_state.SHUTDOWN, self.host.state(server))
        self.assertEqual('256MiB', self.config(server)['limits.memory'])
        self.revert(server, power_on=False)
        # Nova's next call.
        self.driver.power_off(server)
        after = self.shown(server)
        self.assertEqual(before['config'], after['config'])
        self.assertEqual(before['devices'], after['devices'])
        self.driver.power_on(self.host.context, server, [])
        self.assertEqual(power_state.RUNNING, self.host.state(server))

    # -- failures -----------------------------------------------------------

    def test_delete_while_resized(self) -> None:
        server = self.server()
        self.resize(server, root_gb=2)
        self.confirm(server)
        server.task_state = task_states.DELETING
        self.driver.destroy(self.host.context, server, [])
        self.assertEqual({}, self.servers())

    def test_delete_without_confirmation(self) -> None:
        server = self.server()
        self.resize(server, root_gb=2)
        server.task_state = task_states.DELETING
        self.driver.destroy(self.host.context, server, [])
        self.assertEqual({}, self.servers())

    def test_reverting_server_that_was_deleted(self) -> None:
        server = self.server()
        self.resize(server)
        server.task_state = task_states.RESIZE_REVERTING
        server.deleted = True
        self.driver.destroy(self.host.context, server, [])
        self.assertEqual({}, self.servers())

    def test_crash_before_anything_happened(self) -> None:
        server = self.server()
        before = self.shown(server)
        server.new_flavor = self.flavor(server, memory_mb=256, root_gb=2)
        server.task_state = task_states.RESIZE_MIGRATING
        self.host.restart_driver()
        with self.running_on(server):
            self.host.driver.finish_revert_migration(
                self.host.context, server, [], self.migration, None, True)
        self.assertEqual(before, self.shown(server))

    def test_crash_in_the_middle(self) -> None:
        server = self.server()
        before = self.shown(server)
        self.prepare(server, self.flavor(server, memory_mb=256, root_gb=2))
        self.host.restart_driver()
        with self.running_on(server):
            self.host.driver.finish_revert_migration(
                self.host.context, server, [], self.migration, None, True)
        after = self.shown(server)
        self.assertEqual(before['config'], after['config'])
        self.assertEqual(before['devices'], after['devices'])

    def test_hard_reboot_while_resized_keeps_the_revert(self) -> None:
        server = self.server()
        before = self.shown(server)
        self.resize(server, memory_mb=256, root_gb=2)
        self.driver.reboot(self.host.context, server, [], 'HARD')
        self.assertEqual('256MiB', self.config(server)['limits.memory'])
        self.revert(server)
        after = self.shown(server)
        self.assertEqual(before['devices'], after['devices'])
        self.assertEqual(
            {key: value for key, value in before['config'].items()
             if not key.startswith('volatile.')}, self.config(server))

    def test_lxd_restarts_between_the_steps(self) -> None:
        lxd = lxd_daemon.RealLXD()
        with lxd:
            host = driver_host.DriverHost(lxd)
            host.setUp()
            try:
                self.host, self.driver = host, host.driver
                server = self.server()
                with self.running_on(server):
                    info = self.prepare(server, self.flavor(
                        server, memory_mb=256))
                    lxd.kill()
                    lxd.start()
                    self.finish(server, info)
                    lxd.restart()
                    self.revert(server)
                self.assertEqual('128MiB',
                                 self.config(server)['limits.memory'])
            finally:
                host.cleanUp()

    # -- ephemeral disks ----------------------------------------------------

    def test_ephemeral_disk(self) -> None:
        privileged.context.set_client_mode(False)
        self.addCleanup(privileged.context.set_client_mode, True)
        bdi = {'root_device_name': '/dev/root', 'swap': None,
               'block_device_mapping': [], 'ephemerals': [
                   {'size': 1, 'device_name': '/dev/sdb',
                    'guest_format': None, 'disk_bus': None,
                    'device_type': None}]}
        server = self.host.spawn(self.host.instance(
            self.host.image(), ephemeral_gb=1), block_device_info=bdi)
        with self.running_on(server):
            self.resize(server, ephemeral_gb=2, bdi=bdi)
            self.fill(server, 1100, '/mnt/fill')
            self.host.run(server, 'rm', '/mnt/fill')
            self.revert(server, bdi=bdi)
        with self.assertRaises(AssertionError):
            self.fill(server, 1100, '/mnt/fill')
        error = self.refusal(server, bdi, ephemeral_gb=0)
        self.assertIn('ephemeral', str(error))


@unittest.skipIf(NO_LXD, NO_LXD or '')
class DirPoolTest(resize_case.ResizeTestCase):
    """A pool without quotas."""

    pool_driver = 'dir'

    def test_up_and_revert(self) -> None:
        server = self.server()
        before = self.shown(server)
        with self.running_on(server):
            self.resize(server, memory_mb=256, root_gb=2)
            self.revert(server)
        self.assertEqual(before['devices'], self.shown(server)['devices'])
