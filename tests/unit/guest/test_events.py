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


"""The states that the watcher of LXD's events keeps in memory."""

from __future__ import annotations

import fixtures
from nova.compute import power_state
from nova import exception
from nova.virt import event as virt_event

from tests.fixtures import fake_driver_host

STOPPED = virt_event.EVENT_LIFECYCLE_STOPPED


class MemoryTest(fake_driver_host.FakeDriverTestCase):

    def setUp(self):
        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.guest.events.RECONNECT_FIRST', 0.01))
        super().setUp()
        # No guest reboots here.
        self.watcher()._shutdown_delay = 0.05

    def watcher(self):
        return self.driver._services.watcher

    def test_nothing_is_kept_of_deleted_servers(self):
        for _server in range(3):
            server = self.host.spawn()
            self.assert_state(power_state.RUNNING, server)
            self.driver.destroy(self.context, server, [])
            # Nova asks once more, and a deletion may come twice.
            self.assertRaises(exception.InstanceNotFound,
                              self.driver.get_info, server)
            self.driver.destroy(self.context, server, [])
        watcher = self.watcher()
        self.lxd.wait_for(lambda: not [
            name for name in (*watcher._known, *watcher._changes)
            if name.startswith('instance-')])

    def test_what_the_driver_has_changed_is_asked_for(self):
        """LXD's event of it may come later than Nova asks."""
        server = self.host.spawn()
        path = f'/1.0/instances/{server.name}'

        def questions():
            self.lxd.clear_requests()
            self.driver.get_info(server)
            return self.lxd.count('GET', path)

        # Until the last event of the creation has come.
        self.lxd.wait_for(lambda: questions() == 0, timeout=30)
        self.watcher().forget(server)
        self.assertEqual(1, questions())

    def test_instances_of_others_are_met_without_an_error(self):
        """An error would make the driver connect again and read all."""
        self.lxd.wait_for(lambda: self.watcher()._connected)
        self.lxd.clear_requests()
        self.lxd.api.must('POST', '/1.0/instances', {
            'name': 'foreign', 'source': {'type': 'none'}, 'profiles': [],
            'devices': {'root': {'type': 'disk', 'path': '/',
                                 'pool': 'default'}}},
            params={'project': self.host.project})
        self.lxd.guest_poweroff(self.host.spawn().name)
        self.lxd.wait_for(lambda: self.host.events and
                          self.host.events[-1].get_transition() == STOPPED)
        self.assertEqual(1, self.lxd.count('GET', '/1.0/instances/foreign'))
        self.assertEqual(0, self.lxd.count('GET', '/1.0/events'))

    def test_nothing_is_missed_until_lxd_sends_events(self):
        server = self.host.spawn()
        watcher = self.watcher()
        self.lxd.wait_for(lambda: watcher._connected)
        self.lxd.daemon.events.listening_delay = 0.3
        first = watcher._channel
        self.lxd.close_websockets()
        self.lxd.wait_for(lambda: watcher._connected and
                          watcher._channel is not first)
        self.lxd.guest_poweroff(server.name)
        self.lxd.wait_for(lambda: self.host.events and
                          self.host.events[-1].get_transition() == STOPPED)

    def test_quiet_connection_is_kept(self):
        """Nothing happens for long: the driver asks whether LXD is there."""
        session, pings = self.driver._services.session, []
        connect = session.websocket

        def websocket(*path, **kwargs):
            channel = connect(*path, **kwargs)
            ping, receive = channel.ping, channel.recv_data

            def ping_patiently():
                channel.settimeout(30)
                pings.append(channel)
                ping()

            def receive_impatiently(**options):
                received = receive(**options)
                channel.settimeout(0.05)
                return received

            channel.ping = ping_patiently
            channel.recv_data = receive_impatiently
            return channel

        self.lxd.wait_for(lambda: self.watcher()._connected)
        self.useFixture(fixtures.MockPatchObject(
            session, 'websocket', websocket))
        self.lxd.close_websockets()
        self.lxd.wait_for(lambda: len(pings) > 4, timeout=30)
        self.assertEqual(1, len(set(pings)))
        self.assertTrue(self.watcher()._connected)

    def test_only_changes_are_reported_after_an_interruption(self):
        servers = [self.host.spawn() for _number in range(2)]
        self.lxd.guest_poweroff(servers[0].name)
        # Two starts and a stop.
        self.lxd.wait_for(lambda: len(self.host.events) == 3)
        for server in servers:
            self.driver.get_info(server)
        self.host.events.clear()
        first = self.watcher()._channel
        self.lxd.close_websockets(False)
        self.lxd.wait_for(lambda: self.watcher()._connected and
                          self.watcher()._channel is not first)
        self.lxd.guest_poweroff(servers[1].name)
        self.lxd.wait_for(lambda: self.host.events)
        self.assertEqual(
            [(servers[1].uuid, STOPPED)],
            [(event.get_instance_uuid(), event.get_transition())
             for event in self.host.events])
