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


"""Changes that the driver does not make: restarts and LXD's events."""

from __future__ import annotations

from typing import Any

import fixtures
from nova.compute import power_state
from nova import exception
from nova import objects
from nova.virt import driver
from nova.virt import event as virt_event

from nova_lxd_py.virt.guest import events
from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.volume import usage
from tests.fixtures import disks
from tests.fixtures import fake_driver_host
from tests.fixtures import memory_cinder

STARTED = virt_event.EVENT_LIFECYCLE_STARTED
STOPPED = virt_event.EVENT_LIFECYCLE_STOPPED
PAUSED = virt_event.EVENT_LIFECYCLE_PAUSED


class _Killed(BaseException):
    """nova-compute is killed at this point."""


class RestartTestCase(fake_driver_host.FakeDriverTestCase):

    def setUp(self) -> None:
        self.useFixture(fixtures.MockPatchObject(
            events, 'RECONNECT_FIRST', 0.02))
        super().setUp()

    def transitions(self, server: objects.Instance) -> list[int]:
        return [event.get_transition() for event in self.host.events
                if event.get_instance_uuid() == server.uuid]

    def wait_for(self, server: objects.Instance, transition: int) -> None:
        self.lxd.wait_for(lambda: transition in self.transitions(server))


class RestartTest(RestartTestCase):

    def test_nova_compute(self) -> None:
        ports, volume = self.host.ports(), self.storage.volume()
        info = disks.described(volume.mapping())
        server = self.host.spawn(network_info=ports, block_device_info=info)
        self.host.restart_driver()
        self.lxd.clear_requests()
        self.assertEqual([server.uuid], self.driver.list_instance_uuids())
        self.assertEqual(power_state.RUNNING,
                         self.driver.get_info(server).state)
        self.assertEqual([server], self.driver.process_instances_at_startup(
            self.context, [server]))
        # Nobody else gets the volume, although this process is new.
        self.assertRaises(
            exception.VolumeAttachFailed, self.driver.attach_volume,
            self.context, volume.connection(), self.host.spawn(), '/dev/vdb')
        self.driver.detach_volume(
            self.context,
            info['block_device_mapping'][0]['connection_info'], server,
            '/dev/vdb')
        self.driver.destroy(self.context, server, ports)
        self.assertEqual(set(), self.storage.left())
        self.assertEqual(set(), self.network.names())

    def kill_while_attaching(self, server: objects.Instance,
                             volume: memory_cinder.Volume, step: str) -> str:
        """End nova-compute before a step, so that nothing is undone.

        :returns: what LXD knew of the volume before nova-compute was back.
        """
        def killed(*_args: Any, **_kwargs: Any) -> None:
            raise _Killed()
        package = 'nova_lxd_py.virt.volume'
        with fixtures.MonkeyPatch(f'{package}.{step}', killed), \
            fixtures.MonkeyPatch(f'{package}.usage.clear_note',
                                 lambda guest: None), \
            fixtures.MonkeyPatch(f'{package}.attachment.VolumeAttacher.drop',
                                 lambda *args, **kwargs: None):
            self.assertRaises(_Killed, self.driver.attach_volume, self.context,
                              volume.connection(), server, '/dev/vdb')
        note = self.config(server)[usage.KEY_ATTACHING]
        self.host.restart_driver()
        return note

    def test_killed_while_it_attaches(self) -> None:
        """Nova and the host do not know to which volume the device belongs."""
        server, volume = self.host.spawn(), self.storage.volume()
        self.kill_while_attaching(server, volume, 'lxd_devices.add')
        self.assertEqual(set(), self.storage.left())
        self.assertNotIn(usage.KEY_ATTACHING, self.config(server))
        self.host.driver.attach_volume(
            self.context, volume.connection(), server, '/dev/vdb')
        self.assertNotIn(usage.KEY_ATTACHING, self.config(server))

    def test_killed_while_it_shuts_down(self) -> None:
        """What is asked of the next nova-compute comes after the shutdown."""
        server = self.host.spawn()
        self.host.fake(server).guest.shutdown_time = 0.5
        self.lxd.api.request('PUT', f'/1.0/instances/{server.name}/state',
                             {'action': 'stop', 'timeout': 10},
                             params={'project': self.host.project})
        self.host.restart_driver()
        self.host.driver.power_on(self.context, server, [])
        self.assertEqual(power_state.RUNNING,
                         self.host.driver.get_info(server).state)
        self.lxd.wait_for(lambda: 'running' not in self.lxd.api.must(
            'GET', '/1.0/operations',
            params={'project': self.host.project}))
        self.assertEqual(power_state.RUNNING, self.host.state(server))

    def test_killed_before_it_attaches(self) -> None:
        server, volume = self.host.spawn(), self.storage.volume()
        self.kill_while_attaching(server, volume,
                                  'attachment.VolumeAttacher.connect')
        self.assertNotIn(usage.KEY_ATTACHING, self.config(server))

    def test_killed_when_it_has_attached(self) -> None:
        server, volume = self.host.spawn(), self.storage.volume()
        with fixtures.MonkeyPatch(
                'nova_lxd_py.virt.volume.usage.clear_note',
                lambda guest: None):
            self.driver.attach_volume(
                self.context, volume.connection(), server, '/dev/vdb')
        left = self.storage.left()
        self.host.restart_driver()
        self.assertEqual(left, self.storage.left())
        self.assertNotIn(usage.KEY_ATTACHING, self.config(server))

    def test_note_of_a_connection_has_no_credentials(self) -> None:
        server, volume = self.host.spawn(), self.storage.volume()
        note = self.kill_while_attaching(server, volume,
                                         'lxd_devices.add')
        self.assertIn(f'example:{volume.id}', note)
        self.assertNotIn('open-sesame', note)

    def test_cpus_with_nova_31_to_33(self) -> None:
        """They do not pass their instances to the driver."""
        server = self.host.spawn()
        self.useFixture(fixtures.MonkeyPatch(
            'nova.virt.driver.ComputeDriver.process_instances_at_startup',
            fixtures.MonkeyPatch.delete))
        self.host._set('cpu_shared_set', '0', 'compute')
        self.host.restart_driver()
        self.assertNotEqual('0-0', self.limit(server))
        self.host.instances = [server]
        self.host.restart_driver()
        self.assertEqual('0-0', self.limit(server))

    def limit(self, server: objects.Instance) -> str:
        return self.host.lxd_instances()[server.name]['config']['limits.cpu']

    def test_cpus_with_nova_34(self) -> None:
        if not hasattr(driver.ComputeDriver, 'process_instances_at_startup'):
            self.skipTest('This Nova does not pass its instances')
        server = self.host.spawn()
        self.host.instances = [server]
        self.host._set('cpu_shared_set', '0', 'compute')
        self.host.restart_driver()
        self.assertNotEqual('0-0', self.limit(server))
        self.host.driver.process_instances_at_startup(self.context, [server])
        self.assertEqual('0-0', self.limit(server))

    def test_two_drivers_on_one_project(self) -> None:
        """The project belongs to one nova-compute."""
        self.host._set('host', 'another')
        self.assertRaises(exception.InvalidConfiguration,
                          self.host.start_driver)

    def test_lxd_is_not_there_when_nova_compute_starts(self) -> None:
        self.driver.cleanup_host('testhost')
        self.lxd.stop()
        self.host._set('startup_timeout', 0, 'lxd')
        self.assertRaises(exception.NovaException, self.host.start_driver)
        self.lxd.start()
        self.host.driver = self.host.start_driver()
        self.assertEqual([], self.driver.list_instances())

    def test_lxd_restarts(self) -> None:
        server, other = self.host.spawn(), self.host.spawn()
        self.driver.get_info(other)
        with self.host.lxd_down():
            # It stops without an event.
            self.lxd.guest_poweroff(other.name)
            self.host.fake(other).config['boot.autostart'] = 'false'
            self.assertRaises(exception.HypervisorUnavailable,
                              self.driver.get_info, server)
            self.host.events.clear()
        self.wait_for(other, STOPPED)
        self.assertEqual(power_state.RUNNING,
                         self.driver.get_info(server).state)
        self.assertEqual(power_state.SHUTDOWN,
                         self.driver.get_info(other).state)

    def test_stop_of_a_server_that_nobody_has_asked_for(self) -> None:
        """What is known of it was learned before it was started."""
        server = self.host.spawn()
        self.wait_for(server, STARTED)
        self.lxd.stop()
        self.lxd.guest_poweroff(server.name)
        self.host.fake(server).config['boot.autostart'] = 'false'
        self.host.events.clear()
        self.lxd.start()
        self.wait_for(server, STOPPED)

    def test_events_are_lost(self) -> None:
        server = self.host.spawn()
        for goodbye in (False, True):
            self.lxd.clear_requests()
            self.lxd.close_websockets(goodbye)
            self.lxd.wait_for(lambda: self.lxd.count('GET', '/1.0/events'))
            self.lxd.wait_for(lambda: self.lxd.count('GET',
                                                     '/1.0/instances'))
            self.assertEqual(power_state.RUNNING,
                             self.driver.get_info(server).state)

    def test_what_the_host_says_of_itself(self) -> None:
        self.useFixture(fixtures.MonkeyPatch(
            'os_brick.initiator.connector.get_connector_properties',
            lambda *args, **kwargs: {'initiator': 'iqn.host'}))
        self.assertEqual([self.driver.get_available_nodes()[0]],
                         self.driver.get_available_nodes())
        self.assertLess(0, len(self.driver.get_host_uptime()))
        self.assertTrue(self.driver.get_host_cpu_stats())
        self.assertTrue(self.driver.get_host_ip_addr())
        self.assertIn('initiator', self.driver.get_volume_connector(None))


class EventsTest(RestartTestCase):

    def test_the_guest_goes_down(self) -> None:
        server = self.host.spawn()
        self.lxd.guest_poweroff(server.name)
        self.wait_for(server, STOPPED)
        self.assertEqual(power_state.SHUTDOWN,
                         self.driver.get_info(server).state)

    def test_the_guest_reboots(self) -> None:
        """It is down for a moment, of which Nova must not hear."""
        server = self.host.spawn()
        self.wait_for(server, STARTED)
        self.host.events.clear()
        self.lxd.guest_reboot(server.name)
        self.wait_for(server, STARTED)
        self.assertNotIn(STOPPED, self.transitions(server))

    def test_up_again_although_nobody_said_so(self) -> None:
        """A stop is reported only if the server is still down then."""
        server = self.host.spawn()
        self.lxd.guest_poweroff(server.name)
        self.host.fake(server).status = 'Running'
        self.lxd.clear_requests()
        self.lxd.wait_for(lambda: self.lxd.count(
            'GET', f'/1.0/instances/{server.name}'))
        # The answer has been read when the next timer has run.
        second = self.host.spawn()
        self.lxd.guest_poweroff(second.name)
        self.wait_for(second, STOPPED)
        self.assertNotIn(STOPPED, self.transitions(server))

    def test_deleted_before_its_stop_is_reported(self) -> None:
        server = self.host.spawn()
        self.lxd.guest_poweroff(server.name)
        self.driver.destroy(self.context, server, [])
        second = self.host.spawn()
        self.lxd.guest_poweroff(second.name)
        self.wait_for(second, STOPPED)
        self.assertNotIn(STOPPED, self.transitions(server))

    def test_event_that_comes_after_the_question(self) -> None:
        """What LXD said before it is not what the server is."""
        server = self.host.spawn()
        path = f'/1.0/instances/{server.name}'

        def event(request: Any) -> None:
            self.lxd.daemon.events.lifecycle(
                'instance-paused', self.host.project, path, by_api=True)
            self.wait_for(server, PAUSED)
        self.lxd.before('GET', path, event)
        self.driver.get_info(server, use_cache=False)
        self.host.fake(server).status = 'Frozen'
        self.assertEqual(power_state.PAUSED,
                         self.driver.get_info(server).state)

    def test_answered_from_memory(self) -> None:
        servers = [self.host.spawn() for _number in range(3)]
        for server in servers:
            self.driver.get_info(server)
        self.driver.get_num_instances()
        self.lxd.clear_requests()
        for server in servers:
            self.assertEqual(power_state.RUNNING,
                             self.driver.get_info(server).state)
        self.assertEqual(3, self.driver.get_num_instances())
        self.assertEqual([], self.lxd.requests)


class ChangeTest(fake_driver_host.FakeDriverTestCase):
    """Somebody else changes the instance at the same time."""

    def test_nothing_of_theirs_is_lost(self) -> None:
        """An operator's key that comes between reading and writing."""
        server = self.host.spawn()
        config = self.config(server)
        self.lxd.before('PUT', f'/1.0/instances/{server.name}',
                        lambda request: config.update({'user.rack': '7'}))
        self.driver.suspend(self.context, server)
        self.assertEqual('7', self.config(server)['user.rack'])
        self.assert_state(power_state.SUSPENDED, server)

    def test_it_never_ends(self) -> None:
        server = self.host.spawn()
        numbers = iter(range(1000))
        fault = self.lxd.before(
            'PUT', f'/1.0/instances/{server.name}',
            lambda request: self.config(server).update(
                {'user.rack': str(next(numbers))}), times=None)
        self.assertRaises(exception.NovaException, self.driver.suspend,
                          self.context, server)
        self.assertEqual(10, fault.hits)

    def test_busy_for_ever(self) -> None:
        """The wait for another operation ends in time."""
        server = self.host.spawn()
        clock = _Clock()
        self.useFixture(fixtures.MockPatchObject(lxd_guest, 'time', clock))
        self.lxd.fail_next(
            'PUT', f'/1.0/instances/{server.name}/state', 400,
            'Instance is busy running a "stop" operation', times=None)
        self.assertRaises(exception.NovaException, self.driver.pause, server)
        # [lxd] operation_timeout, and not one poll more.
        self.assertLessEqual(clock.now, 10.3)
        self.assertLess(9.9, clock.now)


class _Clock:
    """A clock that advances only during sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now > 60:
            raise AssertionError('the clock is not read')
