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

"""The fake LXD: what tests make it do.

That it answers as LXD does is the subject of the functional tests
``test_fake_matches_lxd*``.
"""

from __future__ import annotations

from http import client as http_client
import json
import threading
import time

import pylxd
import testtools
import websocket

from tests.fixtures import fake_lxd
from tests.fixtures import raw_lxd

STATE = '/1.0/instances/c1/state'


class FakeLXDTestCase(testtools.TestCase):

    def setUp(self):
        super().setUp()
        self.lxd = self.useFixture(fake_lxd.FakeLXD(project='nova'))
        self.api = raw_lxd.Client(self.lxd.endpoint, 'nova', timeout=5)
        self.lxd.add_image(project='nova', alias='tiny')

    def create(self, name='c1', start=True, **config):
        self.api.must('POST', '/1.0/instances', {
            'name': name, 'source': {'type': 'image', 'alias': 'tiny'},
            'profiles': [], 'config': config, 'devices': {'root': {
                'type': 'disk', 'path': '/', 'pool': 'default'}}})
        if start:
            self.api.must('PUT', f'/1.0/instances/{name}/state',
                          {'action': 'start'})


class FaultsTestCase(FakeLXDTestCase):

    def test_fail_next(self):
        fault = self.lxd.fail_next('POST', '/1.0/instances', code=503,
                                   error='not now')
        answer = self.api.request('POST', '/1.0/instances', {'name': 'c1'})
        self.assertEqual((503, 'not now'), (answer.status, answer.error))
        self.create()
        self.assertEqual(1, fault.hits)

    def test_fail_only_what_matches(self):
        self.create()
        self.lxd.fail_next('PUT', '/1.0/instances/*/state', times=2,
                           where={'action': 'freeze'})
        self.assertEqual(202, self.api.call(
            'PUT', STATE, {'action': 'restart'}).status)
        for status in (500, 500, 202):
            self.assertEqual(status, self.api.call(
                'PUT', STATE, {'action': 'freeze'}).status)

    def test_fail_always_until_released(self):
        fault = self.lxd.fail_next('*', '/1.0/projects', times=None)
        for _ in range(3):
            self.assertEqual(
                500, self.api.request('GET', '/1.0/projects').status)
        fault.release()
        self.assertEqual(200, self.api.request('GET', '/1.0/projects').status)

    def test_fail_operation_before_and_after_its_work(self):
        self.create(start=False)
        self.lxd.fail_operation('PUT', '*/state', 'no luck')
        answer = self.api.call('PUT', STATE, {'action': 'start'})
        self.assertEqual((202, 400, 'no luck'), (
            answer.status, answer.operation['status_code'], answer.error))
        self.assertEqual('Stopped', self.lxd.instance('c1').status)
        self.lxd.fail_operation('PUT', '*/state', 'too late', after=True)
        self.assertEqual('too late', self.api.call(
            'PUT', STATE, {'action': 'start'}).error)
        self.assertEqual('Running', self.lxd.instance('c1').status)

    def test_hang_operation(self):
        self.create()
        fault = self.lxd.hang_operation('PUT', '*/state')
        operation = self.api.request(
            'PUT', STATE, {'action': 'freeze'}).body['operation']
        waited = self.api.must('GET', f'{operation}/wait?timeout=0')
        self.assertEqual('Running', waited['status'])
        fault.release()
        waited = self.api.must('GET', f'{operation}/wait')
        self.assertEqual('Success', waited['status'])
        self.assertEqual('Frozen', self.lxd.instance('c1').status)

    def test_delay(self):
        self.lxd.delay('GET', '/1.0', 0.2)
        began = time.monotonic()
        self.api.must('GET', '/1.0')
        self.assertGreater(time.monotonic() - began, 0.19)

    def test_drop_connection(self):
        self.lxd.drop_connection('PUT', '*/state')
        self.create(start=False)
        self.assertRaises(http_client.RemoteDisconnected, self.api.request,
                          'PUT', STATE, {'action': 'start'})
        self.assertEqual('Stopped', self.lxd.instance('c1').status)
        self.lxd.drop_connection('PUT', '*/state', after=True)
        self.assertRaises(http_client.RemoteDisconnected, self.api.request,
                          'PUT', STATE, {'action': 'start'})
        self.lxd.wait_for(
            lambda: self.lxd.instance('c1').status == 'Running')

    def test_before(self):
        self.create()
        self.lxd.before('PATCH', '/1.0/instances/c1',
                        lambda request: self.lxd.guest_poweroff('c1'))
        self.api.must('PATCH', '/1.0/instances/c1', {'config': {}})
        self.assertEqual('Stopped', self.lxd.instance('c1').status)


class RequestsTestCase(FakeLXDTestCase):

    def test_log(self):
        with self.lxd.recording() as recorded:
            self.create()
        self.assertEqual(
            ['POST /1.0/instances', 'PUT /1.0/instances/c1/state'],
            [str(entry) for entry in recorded if entry.method != 'GET'])
        self.assertEqual('c1', recorded[0].body['name'])
        self.assertEqual({'project': 'nova'}, recorded[0].query)
        self.assertEqual(2, self.lxd.count('GET', '/1.0/operations/*/wait'))
        self.lxd.clear_requests()
        self.assertEqual(0, self.lxd.count())

    def test_broken_upload_is_logged_and_leaves_nothing(self):
        def chunks():
            yield b'x' * 1000
            raise ValueError('the source broke')

        self.assertRaises(ValueError, self.api.request, 'POST',
                          '/1.0/images', chunks())
        entry = self.lxd.wait_for(lambda: [
            entry for entry in self.lxd.requests if entry.broken])
        self.assertEqual('POST /1.0/images', str(entry[0]))
        self.assertEqual(1, len(self.api.must('GET', '/1.0/images')))


class DaemonTestCase(FakeLXDTestCase):

    def test_restart_keeps_instances_and_loses_operations(self):
        self.create()
        self.lxd.hang_operation('PUT', '*/state')
        operation = self.api.request(
            'PUT', STATE, {'action': 'freeze'}).body['operation']
        self.lxd.stop()
        self.assertRaises(OSError, self.api.request, 'GET', '/1.0')
        self.lxd.start()
        self.assertEqual(404, self.api.request('GET', operation).status)
        self.assertEqual('Running', self.api.must(
            'GET', '/1.0/instances/c1')['status'])

    def test_stop_breaks_waits_off(self):
        self.create()
        self.lxd.hang_operation('PUT', '*/state')
        operation = self.api.request(
            'PUT', STATE, {'action': 'freeze'}).body['operation']
        timer = threading.Timer(0.1, self.lxd.stop)
        timer.start()
        self.addCleanup(timer.join)
        self.assertRaises((OSError, http_client.HTTPException),
                          self.api.request, 'GET', f'{operation}/wait')

    def test_what_stopped_meanwhile_is_started(self):
        self.create('c1')
        self.create('c2', **{'boot.autostart': 'false'})
        self.create('c3', start=False)
        self.lxd.stop()
        self.lxd.guest_poweroff('c1')
        self.lxd.guest_poweroff('c2')
        self.lxd.start()
        self.assertEqual(
            {'c1': 'Running', 'c2': 'Stopped', 'c3': 'Stopped'},
            {name: instance.status
             for name, instance in self.lxd.instances.items()})

    def test_stubborn_guests_need_no_real_time(self):
        self.create()
        self.lxd.instance('c1').guest.ignores_shutdown = True
        self.lxd.daemon.speed = 1000
        began = time.monotonic()
        answer = self.api.call('PUT', STATE, {'action': 'stop',
                                              'timeout': 30})
        self.assertIn('Failed shutting down', answer.error)
        self.assertLess(time.monotonic() - began, 10)

    def test_a_new_instance_without_range_spoils_those_of_others(self):
        isolated = {'security.idmap.isolated': 'true'}
        # Long enough for the other one to be created meanwhile.
        self.lxd.daemon.record_delay = 2
        thread = threading.Thread(target=self.create, args=('c1', False),
                                  kwargs=isolated)
        thread.start()
        self.lxd.wait_for(lambda: self.lxd.instances)
        self.create('c2', False, **isolated)
        thread.join()
        bases = {instance.config['volatile.idmap.base']
                 for instance in self.lxd.instances.values()}
        self.assertIn('65536', bases)

    def test_extensions_and_environment_can_be_changed(self):
        self.lxd.daemon.extensions.remove('projects')
        self.lxd.daemon.environment['server'] = 'incus'
        server = self.api.must('GET', '/1.0')
        self.assertNotIn('projects', server['api_extensions'])
        self.assertEqual('incus', server['environment']['server'])


class EventsTestCase(FakeLXDTestCase):

    def setUp(self):
        super().setUp()
        self.create()
        self.channel = self.api.events(type='lifecycle')
        self.addCleanup(self.channel.shutdown)
        self.lxd.wait_for(lambda: self.lxd.daemon.events.listeners)

    def receive(self):
        return json.loads(self.channel.recv())

    def test_guests(self):
        self.lxd.guest_reboot('c1')
        self.lxd.guest_poweroff('c1')
        self.assertEqual(
            ['instance-shutdown', 'instance-restarted', 'instance-shutdown'],
            [self.receive()['metadata']['action'] for _ in range(3)])

    def test_ping(self):
        self.channel.ping()
        self.lxd.guest_reboot('c1')
        self.assertEqual('instance-shutdown',
                         self.receive()['metadata']['action'])

    def test_close(self):
        self.lxd.close_websockets(goodbye=True)
        self.assertEqual('', self.channel.recv())

    def test_break(self):
        self.lxd.close_websockets()
        self.assertRaises((OSError, websocket.WebSocketException),
                          self.channel.recv)

    def test_lost_events(self):
        self.lxd.daemon.events.muted = True
        self.lxd.guest_poweroff('c1')
        self.lxd.daemon.events.muted = False
        self.api.must('PUT', STATE, {'action': 'start'})
        self.assertEqual('instance-started',
                         self.receive()['metadata']['action'])

    def test_operations(self):
        channel = self.api.events(type='operation')
        self.addCleanup(channel.shutdown)
        self.lxd.wait_for(lambda: self.lxd.daemon.events.listeners == 2)
        self.api.must('PUT', STATE, {'action': 'freeze'})
        self.assertEqual(
            ['Pending', 'Running', 'Success'],
            [json.loads(channel.recv())['metadata']['status']
             for _ in range(3)])

    def test_foreign_origin_is_refused(self):
        with testtools.ExpectedException(
                websocket.WebSocketBadStatusException, '.*403.*'):
            websocket.create_connection(
                'ws://lxd/1.0/events', origin='http://evil',
                socket=raw_lxd.connect(self.lxd.endpoint))


class GuestsTestCase(FakeLXDTestCase):

    def test_missing_devices_of_the_host(self):
        self.lxd.daemon.host_interfaces = {'eth0'}
        self.create(start=False)
        self.api.must('PATCH', '/1.0/instances/c1', {'devices': {'n': {
            'type': 'nic', 'nictype': 'physical', 'parent': 'veth1',
            'name': 'eth0'}}})
        answer = self.api.call('PUT', STATE, {'action': 'start'})
        self.assertEqual('Failed to start device "n": Parent device '
                         '\'veth1\' doesn\'t exist', answer.error)
        self.lxd.daemon.host_interfaces.add('veth1')
        self.api.must('PUT', STATE, {'action': 'start'})

    def test_usage(self):
        self.create()
        self.lxd.instance('c1').usage.update(
            cpu=5, memory=7, network={'eth9': {'mtu': 1442}})
        found = self.api.must('GET', STATE)
        self.assertEqual(5, found['cpu']['usage'])
        self.assertEqual(7, found['memory']['usage'])
        self.assertEqual(1442, found['network']['eth9']['mtu'])

    def test_commands(self):
        def handler(instance, command, environment, stdin):
            return 3, instance.name.encode(), stdin.read()

        self.create()
        self.lxd.daemon.exec_handler = handler
        found = self.api.must('POST', '/1.0/instances/c1/exec', {
            'command': ['anything'], 'record-output': True})
        self.assertEqual(3, found['return'])
        self.assertEqual(b'c1', self.api.must('GET', found['output']['1']))
        self.assertEqual([('c1', ['anything'])], self.lxd.daemon.exec_log)

    def test_console(self):
        self.create()
        self.lxd.instance('c1').print_line('hello')
        self.assertEqual(b'booted\r\nhello\r\n', self.api.must(
            'GET', '/1.0/instances/c1/console'))


class PylxdTestCase(FakeLXDTestCase):
    """What the library that the driver uses makes of it."""

    def test_life(self):
        client = pylxd.Client(endpoint=self.lxd.endpoint, project='nova')
        self.assertTrue(client.trusted)
        instance = client.instances.create({
            'name': 'c1', 'source': {'type': 'image', 'alias': 'tiny'},
            'devices': {'root': {'type': 'disk', 'path': '/',
                                 'pool': 'default'}}}, wait=True)
        instance.start(wait=True)
        instance.files.put('/root/file', b'content')
        self.assertEqual(b'content', instance.files.get('/root/file'))
        instance.config['user.a'] = 'b'
        instance.save(wait=True)
        self.assertRaises(pylxd.exceptions.LXDAPIException, instance.delete,
                          wait=True)
        instance.stop(wait=True)
        instance.snapshots.create('s1', wait=True)
        image = instance.snapshots.get('s1').publish(wait=True)
        self.assertEqual(2, len(client.images.all()))
        image.delete(wait=True)
        instance.delete(wait=True)
        self.assertRaises(pylxd.exceptions.NotFound, client.instances.get,
                          'c1')

    def test_image(self):
        client = pylxd.Client(endpoint=self.lxd.endpoint, project='nova')
        content = fake_lxd.fixture.unified_image({'etc/motd': b'hi'})
        image = client.images.create(content, wait=True)
        self.assertEqual(fake_lxd.fixture.fingerprint(content),
                         image.fingerprint)
        self.assertEqual(content, image.export().read())
