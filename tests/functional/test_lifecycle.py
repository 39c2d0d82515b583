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

"""The lifecycle of instances on a real LXD, through the driver."""

from __future__ import annotations

import contextlib
import threading
import time
import unittest

from nova.compute import power_state
from nova import exception
from nova import objects
from nova.virt import event as virt_event

from tests.fixtures import busybox_image
from tests.fixtures import driver_case
from tests.fixtures import lxd_daemon

NO_LXD = lxd_daemon.missing()

#: An init that ignores all signals for a shutdown.
STUBBORN = {'etc/inittab': b"""\
::sysinit:/bin/hostname -F /etc/hostname
::respawn:/bin/sleep 100000
"""}


@unittest.skipIf(NO_LXD, NO_LXD or '')
class LifecycleTest(driver_case.DriverCase, unittest.TestCase):

    def assert_nothing_left(self) -> None:
        left = {name: entry for name, entry
                in self.host.lxd_instances().items()
                if entry['config'].get('user.nova.role') != 'template'}
        self.assertEqual({}, left)
        self.assertEqual([], self.host.lxd_volumes())

    # -- spawn --------------------------------------------------------------

    def test_spawn_gives_what_the_flavor_says(self) -> None:
        server = self.host.spawn(self.host.instance(
            self.host.image(), memory_mb=96, root_gb=1))
        self.assertEqual(power_state.RUNNING, self.host.state(server))
        self.assertEqual([server.name], self.driver.list_instances())
        self.assertEqual([server.uuid], self.driver.list_instance_uuids())
        self.assertEqual(1, self.driver.get_num_instances())
        self.assertTrue(self.driver.instance_exists(server))
        config = self.host.lxd_instances()[server.name]['config']
        self.assertEqual('96MiB', config['limits.memory'])
        self.assertEqual('false', config['security.privileged'])
        self.assertEqual('false', config[lxd_daemon.GUEST_API_KEY])
        uids = self.host.run(server, 'cat', '/proc/self/uid_map').split()
        self.assertEqual('0', uids[0])
        self.assertGreaterEqual(int(uids[1]), 65536)

    def test_spawn_without_power(self) -> None:
        server = self.host.spawn(power_on=False)
        self.assertEqual(power_state.SHUTDOWN, self.host.state(server))

    def test_privileged_only_by_flavor(self) -> None:
        image = self.host.image(
            **{'lxd:privileged_allowed': 'true',
               'lxd_security_privileged': 'true', 'raw.lxc': 'x'})
        plain = self.host.spawn(self.host.instance(image), image)
        self.assertNotEqual(
            '0', self.host.run(plain, 'cat', '/proc/self/uid_map').split()[1])
        privileged = self.host.spawn(self.host.instance(
            image, {'lxd:privileged_allowed': 'true',
                    'lxd:nested_allowed': 'true'}), image)
        self.assertEqual('0', self.host.run(
            privileged, 'cat', '/proc/self/uid_map').split()[1])
        config = self.host.lxd_instances()[privileged.name]['config']
        self.assertEqual('true', config['security.nesting'])

    def test_spawn_replaces_what_a_crash_left(self) -> None:
        image = self.host.image()
        server = self.host.spawn(self.host.instance(image), image)
        before = self.host.lxd_instances()[server.name]['config'][
            'volatile.uuid']
        self.host.restart_driver()
        self.host.spawn(server, image)
        after = self.host.lxd_instances()[server.name]['config'][
            'volatile.uuid']
        self.assertNotEqual(before, after)
        self.assertEqual(power_state.RUNNING, self.host.state(server))

    def test_a_copy_that_an_operator_makes_is_kept(self) -> None:
        image = self.host.image()
        server = self.host.spawn(self.host.instance(
            image, config_drive='True'), image)
        done = self.host.lxd.client(
            'copy', server.name, 'backup', '--instance-only', '--project',
            self.host.project)
        self.assertEqual(0, done.returncode, done.stderr)
        copy = self.host.lxd_instances()['backup']
        self.assertEqual(server.uuid, copy['config']['user.nova.uuid'])
        self.assertEqual([server.name], self.driver.list_instances())
        self.assertEqual([server.uuid], self.driver.list_instance_uuids())
        self.assertEqual(1, self.driver.get_num_instances())
        self.driver.reboot(self.host.context, server, [], 'HARD')
        self.driver.destroy(self.host.context, server, [])
        self.assertFalse(self.driver.instance_exists(server))
        self.assertEqual([], self.driver.list_instance_uuids())
        self.assertEqual(0, self.driver.get_num_instances())
        self.assertEqual(copy, self.host.lxd_instances()['backup'])

    def test_a_foreign_instance_of_the_name_is_kept(self) -> None:
        image = self.host.image()
        server = self.host.instance(image)
        self.host.lxd.api.must('POST', '/1.0/instances', {
            'name': server.name, 'source': {'type': 'none'}, 'profiles': [],
            'devices': {'root': {'type': 'disk', 'path': '/',
                                 'pool': self.host.lxd.pool}}},
            params={'project': self.host.project})
        self.assertRaises(exception.InstanceExists, self.host.spawn, server,
                          image)
        self.driver.destroy(self.host.context, server, [])
        self.assertIn(server.name, self.host.lxd_instances())
        self.assertEqual([], self.driver.list_instances())
        self.assertEqual(0, self.driver.get_num_instances())
        self.assertRaises(exception.InstanceNotFound, self.driver.get_info,
                          server)

    def test_bad_flavor_leaves_nothing(self) -> None:
        image = self.host.image()
        self.assertRaises(
            exception.InvalidInput, self.host.spawn,
            self.host.instance(image, {'lxd:nested_allowed': 'maybe'}), image)
        self.assert_nothing_left()

    # -- destroy ------------------------------------------------------------

    def test_destroy_twice_and_unknown(self) -> None:
        server = self.host.spawn(self.host.instance(
            image := self.host.image(), config_drive='True'), image)
        self.assertEqual(1, len(self.host.lxd_volumes()))
        self.driver.destroy(self.host.context, server, [])
        self.assert_nothing_left()
        self.driver.destroy(self.host.context, server, [])
        self.driver.cleanup(self.host.context, server, [])
        self.assertRaises(exception.InstanceNotFound, self.driver.get_info,
                          server)
        self.assertFalse(self.driver.instance_exists(server))

    def test_destroy_frozen(self) -> None:
        server = self.host.spawn()
        self.driver.pause(server)
        self.driver.destroy(self.host.context, server, [])
        self.assert_nothing_left()

    def test_destroy_keeping_the_disk(self) -> None:
        server = self.host.spawn()
        self.driver.destroy(self.host.context, server, [],
                            destroy_disks=False)
        self.assertEqual(power_state.SHUTDOWN, self.host.state(server))

    # -- power --------------------------------------------------------------

    def test_clean_and_forced_power_off(self) -> None:
        server = self.host.spawn()
        self.host.wait_for_init(server)
        self.driver.power_off(server, timeout=60, retry_interval=60)
        self.assertEqual(power_state.SHUTDOWN, self.host.state(server))
        self.assertIn('going down', self.driver.get_console_output(
            self.host.context, server))
        self.driver.power_off(server)
        self.driver.power_on(self.host.context, server, [])
        self.driver.power_on(self.host.context, server, [])
        self.assertEqual(power_state.RUNNING, self.host.state(server))
        self.driver.power_off(server)
        self.assertEqual(power_state.SHUTDOWN, self.host.state(server))

    def test_power_off_of_a_stubborn_guest(self) -> None:
        image = self.host.image(busybox_image.unified(
            {**STUBBORN, 'sbin/halt-signal': b''}))
        server = self.host.spawn(self.host.instance(image), image)
        self.host.run(server, 'kill', '-STOP', '1')
        began = time.monotonic()
        self.driver.power_off(server, timeout=2, retry_interval=1)
        self.assertGreaterEqual(time.monotonic() - began, 2)
        self.assertEqual(power_state.SHUTDOWN, self.host.state(server))

    def test_power_off_paused(self) -> None:
        server = self.host.spawn()
        self.driver.pause(server)
        self.driver.power_off(server, timeout=20, retry_interval=10)
        self.assertEqual(power_state.SHUTDOWN, self.host.state(server))

    def test_soft_and_hard_reboot(self) -> None:
        server = self.host.spawn()
        for kind in ('SOFT', 'HARD'):
            self.host.run(server, 'touch', '/run/before')
            boots = self._pid(server)
            self.driver.reboot(self.host.context, server, [], kind)
            self.assertEqual(power_state.RUNNING, self.host.state(server))
            self.assertNotEqual(boots, self._pid(server))

    def test_soft_reboot_of_a_stopped_guest_is_a_hard_one(self) -> None:
        server = self.host.spawn()
        self.driver.power_off(server)
        self.driver.reboot(self.host.context, server, [], 'SOFT')
        self.assertEqual(power_state.RUNNING, self.host.state(server))

    def test_hard_reboot_repairs(self) -> None:
        server = self.host.spawn()
        api, params = self.host.lxd.api, {'project': self.host.project}
        url = f'/1.0/instances/{server.name}'
        entry = api.must('GET', url, params=params)
        broken = {**entry['config'], 'limits.memory': '20MiB',
                  'limits.processes': '77', 'security.nesting': 'true'}
        api.must('PUT', url, {**entry, 'config': broken, 'devices': {
            **entry['devices'],
            'oops': {'type': 'none'}}}, params=params)
        self.driver.reboot(self.host.context, server, [], 'HARD')
        after = api.must('GET', url, params=params)
        self.assertEqual('128MiB', after['config']['limits.memory'])
        self.assertNotIn('limits.processes', after['config'])
        self.assertEqual('false', after['config']['security.nesting'])
        self.assertEqual(entry['devices'], after['devices'])

    def test_pause_suspend(self) -> None:
        server = self.host.spawn()
        for _ in range(2):
            self.driver.pause(server)
            self.assertEqual(power_state.PAUSED, self.host.state(server))
        for _ in range(2):
            self.driver.unpause(server)
            self.assertEqual(power_state.RUNNING, self.host.state(server))
        self.driver.suspend(self.host.context, server)
        self.assertEqual(power_state.SUSPENDED, self.host.state(server))
        self.driver.resume(self.host.context, server, [])
        self.assertEqual(power_state.RUNNING, self.host.state(server))
        # A start resumes it as well, and a later pause is a pause.
        self.driver.suspend(self.host.context, server)
        self.driver.power_on(self.host.context, server, [])
        self.assertEqual(power_state.RUNNING, self.host.state(server))
        self.driver.pause(server)
        self.assertEqual(power_state.PAUSED, self.host.state(server))
        self.driver.unpause(server)
        # The host was rebooted meanwhile.
        self.driver.suspend(self.host.context, server)
        self.host.lxd.api.must(
            'PUT', f'/1.0/instances/{server.name}/state',
            {'action': 'stop', 'force': True},
            params={'project': self.host.project})
        self.driver.resume(self.host.context, server, [])
        self.assertEqual(power_state.RUNNING, self.host.state(server))

    def test_unknown_server(self) -> None:
        server = self.host.instance(self.host.image())
        context = self.host.context
        for call in (lambda: self.driver.power_on(context, server, []),
                     lambda: self.driver.reboot(context, server, [], 'HARD'),
                     lambda: self.driver.pause(server),
                     lambda: self.driver.get_console_output(context, server)):
            self.assertRaises(exception.InstanceNotFound, call)

    def test_lost_instance(self) -> None:
        """The LXD instance was deleted by hand, or a rebuild has failed."""
        image = self.host.image()
        server = self.host.spawn(self.host.instance(image), image)
        context = self.host.context
        self.host.lxd.api.must(
            'PUT', f'/1.0/instances/{server.name}/state',
            {'action': 'stop', 'force': True},
            params={'project': self.host.project})
        self.host.lxd.api.must('DELETE', f'/1.0/instances/{server.name}',
                               params={'project': self.host.project})
        driver = self.driver
        began = time.monotonic()
        # Nova calls this first for stop, rescue, shelve and rebuild.
        driver.power_off(server)
        driver.power_off(server, timeout=120, retry_interval=60)
        for call in (
                lambda: driver.power_on(context, server, []),
                lambda: driver.reboot(context, server, [], 'SOFT'),
                lambda: driver.pause(server),
                lambda: driver.suspend(context, server),
                lambda: driver.rescue(context, server, [], image, 'x', {},
                                      None),
                lambda: driver.unrescue(context, server),
                lambda: driver.set_admin_password(server, 'x'),
                lambda: driver.get_info(server, use_cache=False),
                lambda: driver.finish_revert_migration(
                    context, server, [], objects.Migration(
                        source_compute='testhost',
                        dest_compute='testhost'))):
            self.assertRaises(exception.InstanceNotFound, call)
        with self.assertRaises(exception.InstanceFaultRollback) as caught:
            driver.migrate_disk_and_power_off(
                context, server, driver.get_host_ip_addr(), server.flavor, [])
        self.assertIsInstance(caught.exception.inner_exception,
                              exception.InstanceNotFound)
        self.assertRaises(exception.InstanceNotRunning, driver.snapshot,
                          context, server, self.host.glance.create(
                              context, {'name': 'x'})['id'],
                          lambda **kwargs: None)
        driver.destroy(context, server, [])
        self.assertLess(time.monotonic() - began, 60)
        self.host.spawn(server, image)
        self.assertEqual(power_state.RUNNING, self.host.state(server))

    # -- host ---------------------------------------------------------------

    def test_resume_state_on_host_boot(self) -> None:
        server = self.host.spawn()
        pid = self._pid(server)
        resume = self.driver.resume_state_on_host_boot
        resume(self.host.context, server, [], None)
        self.assertEqual(pid, self._pid(server))
        self.driver.power_off(server)
        resume(self.host.context, server, [], None)
        self.assertEqual(power_state.RUNNING, self.host.state(server))

    def test_a_restarted_driver_finds_everything(self) -> None:
        server = self.host.spawn()
        self.host.restart_driver()
        driver = self.host.driver
        self.assertEqual([server.uuid], driver.list_instance_uuids())
        self.assertEqual(power_state.RUNNING, driver.get_info(server).state)
        driver.destroy(self.host.context, server, [])
        self.assert_nothing_left()

    # -- events -------------------------------------------------------------

    def _transitions(self, server) -> list[int]:
        return [event.get_transition() for event in self.host.events
                if event.get_instance_uuid() == server.uuid]

    def _wait_for(self, server, transition: int, timeout: float = 120
                  ) -> None:
        deadline = time.monotonic() + timeout
        while transition not in self._transitions(server):
            self.assertLess(time.monotonic(), deadline, 'no event received')
            time.sleep(0.1)

    def _from_within(self, server, command: str) -> None:
        self.host.wait_for_init(server)
        # The guest may end before this command has returned.
        with contextlib.suppress(AssertionError):
            self.host.run(server, 'sh', '-c',
                          f'(sleep 1; {command}) > /dev/null 2>&1 &')

    def test_guest_powers_itself_off(self) -> None:
        server = self.host.spawn()
        self._from_within(server, 'poweroff')
        self._wait_for(server, virt_event.EVENT_LIFECYCLE_STOPPED)
        self.assertEqual(power_state.SHUTDOWN,
                         self.driver.get_info(server).state)

    def test_guest_reboots_itself(self) -> None:
        server = self.host.spawn()
        self.host.record(server)
        self._wait_for(server, virt_event.EVENT_LIFECYCLE_STARTED)
        self.host.events.clear()
        self._from_within(server, 'reboot')
        self._wait_for(server, virt_event.EVENT_LIFECYCLE_STARTED)
        time.sleep(6)
        self.assertNotIn(virt_event.EVENT_LIFECYCLE_STOPPED,
                         self._transitions(server))
        self.assertEqual(power_state.RUNNING,
                         self.driver.get_info(server).state)

    # -- concurrency --------------------------------------------------------

    def test_operations_on_one_server_do_not_interleave(self) -> None:
        server = self.host.spawn()
        failures: list[Exception] = []

        def attempt(call, *args) -> None:
            try:
                call(*args)
            except Exception as exc:
                failures.append(exc)

        context = self.host.context
        threads = [threading.Thread(target=attempt, args=call) for call in (
            (self.driver.reboot, context, server, [], 'HARD'),
            (self.driver.power_off, server),
            (self.driver.reboot, context, server, [], 'SOFT'),
            (self.driver.power_on, context, server, []))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual([], failures)
        self.driver.destroy(context, server, [])
        self.assert_nothing_left()

    def _pid(self, server) -> int:
        return self.host.lxd.api.must(
            'GET', f'/1.0/instances/{server.name}/state',
            params={'project': self.host.project})['pid']
