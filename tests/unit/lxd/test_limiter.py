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


"""The limit for heavy operations of LXD."""

from __future__ import annotations

import functools
import threading
import time

import fixtures
from nova import objects
import testtools

from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import exec as lxd_exec
from nova_lxd_py.virt.lxd import limiter
from tests.fixtures import session_case

objects.register_all()

UUID = '0c1e9f0a-1111-4222-8333-444455556666'
LIMIT = 2
START, STOP = ({'action': action, 'force': True, 'timeout': -1}
               for action in ('start', 'stop'))


class LimitTestCase(session_case.SessionTestCase):
    """With LXD's operations that hang."""

    def setUp(self):
        super().setUp()
        self.cfg.config(group='lxd', max_concurrent_operations=LIMIT)
        self.session = type(self.session)(self.session.options)
        self.names = [f'c{number}' for number in range(5)]
        for name in self.names:
            self.create(name)
        self.failures = []
        self.threads = []

    def begin(self, action):
        def run():
            try:
                action()
            except Exception as exc:
                self.failures.append(exc)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self.threads.append(thread)

    def starts(self):
        return self.lxd.count('PUT', '*/state')

    def occupy(self):
        """Begin starts that hang in LXD, as many as there are slots.

        :returns: the fault to release.
        """
        hung = self.lxd.hang_operation('PUT', '*/state', times=LIMIT,
                                       where={'action': 'start'})
        for name in self.names[:LIMIT]:
            self.begin(functools.partial(
                self.session.put, 'instances', name, 'state', body=START))
        self.lxd.wait_for(lambda: self.starts() == LIMIT)
        return hung

    def finish(self, hung):
        hung.release()
        for thread in self.threads:
            thread.join(10)
            self.assertFalse(thread.is_alive())
        self.assertEqual([], self.failures)

    def assert_waits(self, method, path, action):
        """Check that an action waits for a slot, and is done after that."""
        before = self.lxd.count(method, path)
        hung = self.occupy()
        sent = self.lxd.count(method, path) - before
        self.begin(action)
        time.sleep(0.1)
        self.assertEqual(sent, self.lxd.count(method, path) - before)
        self.finish(hung)
        self.assertEqual(sent + 1, self.lxd.count(method, path) - before)

    def test_start(self):
        self.assert_waits('PUT', '*/state', lambda: self.session.put(
            'instances', 'c3', 'state', body=START))
        self.assertEqual('Running', self.lxd.instance('c3').status)

    def test_stop_by_force(self):
        self.session.put('instances', 'c3', 'state', body=START)
        self.lxd.clear_requests()
        self.assert_waits('PUT', '*/c3/state', lambda: self.session.put(
            'instances', 'c3', 'state', body=STOP))

    def test_deletion(self):
        self.assert_waits('DELETE', '*', lambda: self.session.delete(
            'instances', 'c3'))

    def test_deletion_of_all_that_a_server_has(self):
        """Its reads wait as well."""
        server = objects.Instance(id=3, uuid=UUID)
        guests = registry.GuestRegistry(self.session)
        guests.create(server.name, {'type': 'image', 'alias': 'tiny'},
                      {'user.nova.uuid': UUID, 'user.nova.role': 'server'},
                      {'root': {'type': 'disk', 'path': '/',
                                'pool': 'default'}})
        hung = self.occupy()
        self.lxd.clear_requests()
        self.begin(lambda: guests.delete_all(server))
        time.sleep(0.1)
        self.assertEqual(0, self.lxd.count('*', '/1.0/instances/*'))
        self.finish(hung)
        self.assertNotIn(server.name, self.lxd.instances)

    def test_creation(self):
        self.assert_waits('POST', '/1.0/instances',
                          lambda: self.create('c9'))

    def test_creation_with_a_range_of_its_own(self):
        self.assert_waits(
            'POST', '/1.0/instances',
            lambda: registry.GuestRegistry(self.session).create(
                'c9', {'type': 'image', 'alias': 'tiny'},
                {'security.idmap.isolated': 'true'},
                {'root': {'type': 'disk', 'path': '/', 'pool': 'default'}}))

    def test_what_waits_for_something_else_goes_on(self):
        for name in ('c3', 'c4'):
            self.session.put('instances', name, 'state', body=START)
        self.lxd.clear_requests()
        hung = self.occupy()
        self.session.get('instances')
        self.session.patch('instances', 'c3', body={'config': {}})
        lxd_exec.run(self.session, 'c3', ['true'])
        for name, body in (('c3', {'action': 'stop', 'timeout': 5}),
                           ('c4', {'action': 'restart', 'timeout': 5})):
            self.session.put('instances', name, 'state', body=body)
        # A copy that may take as long as the transfer of an image.
        self.session.post('instances', timeout=3600, body={
            'name': 'c9', 'profiles': [],
            'source': {'type': 'copy', 'source': 'c3'}})
        self.assertTrue(all(thread.is_alive() for thread in self.threads))
        self.finish(hung)

    def test_within_a_slot(self):
        """An operation never waits for a second one."""
        hung = self.lxd.hang_operation('PUT', '*/state', times=1)
        self.begin(lambda: self.session.put('instances', 'c0', 'state',
                                            body=START))
        self.lxd.wait_for(lambda: self.starts() == 1)
        with self.session.slot('all of it'):
            self.session.put('instances', 'c3', 'state', body=START)
            self.session.delete('instances', 'c4')
        self.finish(hung)
        # All slots have been given back, once each.
        self.session.put('instances', 'c0', 'state', body=STOP)
        self.lxd.clear_requests()
        self.finish(self.occupy())

    def test_failures(self):
        self.lxd.fail_operation('PUT', '*/state', times=3 * LIMIT)
        for _time in range(3 * LIMIT):
            self.assertRaises(errors.LXDError, self.session.put,
                              'instances', 'c0', 'state', body=START)
        self.session.put('instances', 'c0', 'state', body=START)

    def test_a_burst(self):
        """Never more than the limit at once, and all are done."""
        now, most, lock = [], [], threading.Lock()

        def measured(number):
            with self.session.slot('deletion'):
                with lock:
                    now.append(number)
                    most.append(len(now))
                self.session.delete('instances', f'b{number}')
                with lock:
                    now.remove(number)

        for number in range(20):
            self.create(f'b{number}')
        for number in range(20):
            self.begin(functools.partial(measured, number))
        for thread in self.threads:
            thread.join(20)
        self.assertEqual([], self.failures)
        self.assertEqual(LIMIT, max(most))
        self.assertEqual(self.names, sorted(self.lxd.instances))


class SlotTestCase(testtools.TestCase):

    def test_patience(self):
        """Operations that are stuck do not hold up others for ever."""
        log = self.useFixture(fixtures.FakeLogger())
        slots = limiter.OperationLimiter(1)
        held, release = threading.Event(), threading.Event()

        def hold():
            with slots.slot('one', 1):
                held.set()
                release.wait(10)

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait(5)
        # Nor do they give back what they did not get.
        for _time in range(2):
            began = time.monotonic()
            with slots.slot('two', 0.2):
                self.assertGreaterEqual(time.monotonic() - began, 0.2)
        self.assertEqual(2, log.output.count('starting "two" nevertheless'))
        release.set()
        thread.join(5)
        began = time.monotonic()
        with slots.slot('three', 5):
            self.assertLess(time.monotonic() - began, 1)

    def test_default(self):
        for cpus, limit in ((1, 8), (2, 8), (16, 64), (None, 8)):
            self.useFixture(fixtures.MonkeyPatch('os.cpu_count',
                                                 lambda cpus=cpus: cpus))
            self.assertEqual(limit, limiter.OperationLimiter(None).limit)
        self.assertEqual(3, limiter.OperationLimiter(3).limit)

    def test_what_counts(self):
        name = ('instances', 'c1')
        for method, path, body, expected in (
                ('delete', name, None, True),
                ('delete', (*name, 'backups', 'b'), None, False),
                ('put', (*name, 'state'), START, True),
                ('put', (*name, 'state'), STOP, True),
                ('put', (*name, 'state'), {'action': 'stop'}, False),
                ('put', (*name, 'state'), {'action': 'restart',
                                           'force': False}, False),
                ('put', (*name, 'state'), {'action': 'freeze'}, False),
                ('put', name, {'config': {}}, False),
                ('patch', (), {}, False),
                ('post', (*name, 'exec'), {}, False),
                ('post', ('images',), {'source': {'type': 'instance'}},
                 False),
                *(('post', ('instances',), {'source': {'type': source}},
                   counts) for source, counts in (
                       ('image', True), ('copy', True), ('none', True),
                       ('migration', False)))):
            self.assertIs(expected, limiter.is_heavy(
                method, path, body, False), (method, path, body))
            self.assertFalse(limiter.is_heavy(method, path, body, True))
