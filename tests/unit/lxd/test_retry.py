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

"""Retries after transient failures of LXD's daemon."""

from __future__ import annotations

import contextlib
import socket
import threading

import fixtures
import testtools

from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import responses
from nova_lxd_py.virt.lxd import retry
from nova_lxd_py.virt.lxd import transport_errors
from nova_lxd_py.virt.lxd import unix_adapter
from tests.fixtures import fake_lxd
from tests.fixtures import session_case

STATE = ('instances', 'c1', 'state')
BUSY = 'Failed to begin transaction: context deadline exceeded'


class _Clock(fixtures.Fixture):
    """A clock that only the pauses between attempts move on.

    :ivar now: seconds that the pauses have lasted.
    :ivar pauses: each of them.
    """

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.pauses = []
        self._alarm = None

    def _setUp(self):
        self.useFixture(fixtures.MockPatchObject(retry, 'time', self))

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.pauses.append(seconds)
        if self._alarm is not None and self._alarm[0] <= self.now:
            action, self._alarm = self._alarm[1], None
            action()

    def after(self, seconds, action):
        """Call a function in the pause that lasts until then or longer."""
        self._alarm = (self.now + seconds, action)


class TransientFailuresTestCase(session_case.SessionTestCase):

    def setUp(self):
        super().setUp()
        self.clock = self.useFixture(_Clock())
        self.create()

    def double_pauses(self):
        """Let each attempt but the last have many seconds."""
        for target, value in (('random.uniform', lambda least, most: most),
                              ('LONGEST_PAUSE', 100)):
            self.useFixture(fixtures.MonkeyPatch(
                f'nova_lxd_py.virt.lxd.retry.{target}', value))

    def sent(self, recorded, request):
        return [str(entry) for entry in recorded].count(request)

    def test_answers(self):
        for code, text in ((500, BUSY), (500, 'database is locked'),
                           (503, 'LXD daemon setup in progress'),
                           (503, 'LXD is shutting down')):
            self.lxd.fail_next('GET', '/1.0/instances', code, text, times=2)
            with self.lxd.recording() as recorded:
                self.assertEqual(1, len(self.session.get('instances')))
            self.assertEqual(3, len(recorded))

    def test_every_method(self):
        self.lxd.fail_next('*', '/1.0/*', 500, BUSY)
        self.create('c2')
        self.lxd.fail_next('*', '/1.0/*', 500, BUSY)
        self.session.patch('instances', 'c2', body={'config': {'user.a': '1'}})
        self.lxd.fail_next('*', '/1.0/*', 500, BUSY)
        info, etag = self.session.get_with_etag('instances', 'c2')
        self.assertEqual('1', info['config']['user.a'])
        self.lxd.fail_next('*', '/1.0/*', 500, BUSY)
        info['config']['user.a'] = '2'
        self.session.put('instances', 'c2', body=info, etag=etag)
        self.assertEqual('2', self.lxd.instance('c2').config['user.a'])
        self.lxd.fail_next('*', '/1.0/*', 500, BUSY)
        self.session.write_file('c2', '/root/a', b'content')
        self.lxd.fail_next('*', '/1.0/*', 500, BUSY)
        with self.session.download('instances', 'c2', 'files', params={
                'path': '/root/a'}) as (_headers, chunks):
            self.assertEqual(b'content', b''.join(chunks))
        self.lxd.fail_next('*', '/1.0/*', 500, BUSY)
        self.session.delete('instances', 'c2')
        self.assertEqual(['c1'], list(self.lxd.instances))

    def test_operations(self):
        for action, status in (('start', 'Running'), ('stop', 'Stopped')):
            self.lxd.fail_operation('PUT', '*/state', BUSY, times=2)
            self.session.put(*STATE, body={'action': action, 'force': True})
            self.assertEqual(status, self.status())
        self.lxd.fail_operation('DELETE', '*', BUSY, times=2)
        self.session.delete('instances', 'c1')
        self.assertEqual({}, self.lxd.instances)

    def test_deleted_by_the_attempt_that_failed(self):
        self.lxd.fail_operation('DELETE', '*', BUSY, after=True)
        self.session.delete('instances', 'c1')
        self.assertEqual({}, self.lxd.instances)
        self.refused(errors.InstanceNotFound, self.session.delete,
                     'instances', 'c1')

    def test_operations_that_may_not_be_repeated(self):
        self.session.put(*STATE, body={'action': 'start'})
        self.lxd.fail_operation('PUT', '*/state', BUSY)
        with self.lxd.recording() as recorded:
            self.refused(errors.Transient, self.session.put, *STATE,
                         body={'action': 'restart', 'force': True})
        self.assertEqual(1, self.sent(recorded,
                                      'PUT /1.0/instances/c1/state'))
        self.lxd.fail_operation('POST', '*', BUSY)
        with self.lxd.recording() as recorded:
            self.refused(errors.Transient, self.create, 'c2')
        self.assertEqual(1, self.sent(recorded, 'POST /1.0/instances'))

    def test_streams_are_sent_once(self):
        self.lxd.fail_next('POST', '/1.0/images', 503, 'not yet')
        with self.lxd.recording() as recorded:
            self.refused(
                errors.Transient, self.session.upload, 'images',
                chunks=[fake_lxd.fixture.unified_image({'etc/a': b'b'})],
                headers={'Content-Type': 'application/octet-stream'})
        self.assertEqual(1, self.sent(recorded, 'POST /1.0/images'))

    def test_other_failures_are_final(self):
        self.lxd.fail_next('GET', '/1.0/instances', 500, 'disk I/O error')
        with self.lxd.recording() as recorded:
            self.refused(errors.OperationFailed, self.session.get,
                         'instances')
        self.assertEqual(1, len(recorded))

    def test_deadline_of_a_request(self):
        self.double_pauses()
        self.lxd.fail_next('GET', '/1.0/instances', 503, 'not yet',
                           times=None)
        with self.lxd.recording() as recorded:
            self.refused(errors.Transient, self.session.get, 'instances',
                         timeout=25)
        # Another pause would end after the deadline.
        self.assertAlmostEqual(12.7, self.clock.now)
        self.assertEqual(8, len(recorded))

    def test_deadline_of_an_operation(self):
        self.double_pauses()
        self.lxd.fail_operation('PUT', '*/state', BUSY, times=None)
        with self.lxd.recording() as recorded:
            self.refused(errors.Transient, self.session.put, *STATE,
                         body={'action': 'start'}, timeout=25)
        self.assertAlmostEqual(12.7, self.clock.now)
        self.assertEqual(8, self.sent(recorded,
                                      'PUT /1.0/instances/c1/state'))

    def test_pauses(self):
        """LXD in trouble is not asked more and more often."""
        self.lxd.fail_next('GET', '/1.0/instances', 500, BUSY, times=8)
        self.session.get('instances', timeout=60)
        self.assertEqual(8, len(self.clock.pauses))
        for number, pause in enumerate(self.clock.pauses):
            longest = min(retry.FIRST_PAUSE * 2 ** number,
                          retry.LONGEST_PAUSE)
            self.assertLessEqual(longest / 2, pause)
            self.assertLessEqual(pause, longest)

    def test_lxd_is_ready_some_time_later(self):
        fault = self.lxd.fail_next(
            'GET', '/1.0', 503, 'LXD daemon setup in progress', times=4)
        self.session.connect()
        self.assertEqual(4, fault.hits)
        self.assertEqual('lxd', self.session.server['environment']['server'])


class ConnectionsTestCase(session_case.SessionTestCase):

    def setUp(self):
        super().setUp()
        self.log = self.useFixture(fixtures.FakeLogger())
        self.create()

    def sent(self, request):
        return [str(entry) for entry in self.lxd.requests].count(request)

    def test_restart(self):
        """Nothing was sent, so every request can be sent again."""
        clock = self.useFixture(_Clock())
        self.cfg.config(group='lxd', request_timeout=60)

        def restart():
            self.lxd.stop()
            clock.after(0.5, self.lxd.start)

        self.session = type(self.session)(self.session.options)
        self.session.connect()
        restart()
        self.assertEqual(1, len(self.session.get('instances')))
        restart()
        self.create('c2')
        restart()
        self.session.patch('instances', 'c2', body={'config': {'user.a': '1'}})
        self.assertEqual('1', self.lxd.instance('c2').config['user.a'])
        restart()
        self.session.put(*STATE, body={'action': 'start'})
        self.assertEqual('Running', self.status())
        restart()
        self.session.delete('instances', 'c2')
        self.assertEqual(['c1'], list(self.lxd.instances))
        self.assertIn('Retrying LXD request "get instances" in',
                      self.log.output)

    def test_outage(self):
        """One that lasts delays the first request only."""
        clock = self.useFixture(_Clock())
        self.cfg.config(group='lxd', request_timeout=60)
        lxd = type(self.session)(self.session.options)
        lxd.connect()
        self.lxd.stop()
        for least, most in ((50, 60), (0, 5), (0, 5)):
            began = clock.now
            self.refused(errors.ConnectionFailed, lxd.delete, 'instances',
                         'c1')
            elapsed = clock.now - began
            self.assertLessEqual(least, elapsed)
            self.assertLessEqual(elapsed, most)
        self.lxd.start()
        lxd.get('instances')
        # The next one has its own time.
        self.lxd.stop()
        clock.after(50, self.lxd.start)
        lxd.get('instances')

    def test_lost_answer_of_a_read(self):
        for after in (False, True):
            self.lxd.drop_connection('GET', '/1.0/instances/c1', after=after)
            self.assertEqual('c1', self.session.get('instances',
                                                    'c1')['name'])

    def test_lost_answer_of_a_deletion(self):
        for after in (False, True):
            self.create('c2')
            self.lxd.drop_connection('DELETE', '/1.0/instances/c2',
                                     after=after)
            self.session.delete('instances', 'c2')
            self.assertEqual(['c1'], list(self.lxd.instances))

    def test_lost_answer_of_a_stop_by_force(self):
        for after in (False, True):
            self.session.put(*STATE, body={'action': 'start'})
            self.lxd.drop_connection('PUT', '*/state', after=after)
            with contextlib.suppress(errors.OperationFailed):
                # LXD refuses to stop a stopped instance; callers know.
                self.session.put(*STATE, body={'action': 'stop',
                                               'force': True})
            self.assertEqual('Stopped', self.status())

    def test_restart_during_a_deletion(self):
        self.lxd.hang_operation('DELETE', '/1.0/instances/c1')

        def restart(request):
            self.lxd.stop()
            timer = threading.Timer(0.1, self.lxd.start)
            timer.start()
            self.addCleanup(timer.join)

        self.lxd.before('GET', '/1.0/operations/*/wait', restart)
        self.session.delete('instances', 'c1')
        self.assertEqual({}, self.lxd.instances)
        self.assertEqual(2, self.sent('DELETE /1.0/instances/c1'))

    def test_lost_answers_of_changes_are_final(self):
        for method, path in (('POST', '/1.0/instances'),
                             ('PUT', '/1.0/instances/c1'),
                             ('PATCH', '/1.0/instances/c1')):
            self.lxd.drop_connection(method, path)
            body = {'name': 'c2', 'source': {'type': 'none'}, 'config': {}}
            send = getattr(self.session, method.lower())
            self.refused(errors.Unreachable, send,
                         *path.split('/')[2:], body=body)
            self.assertEqual(1, self.sent(f'{method} {path}') - (
                method == 'POST'))


class UnsentTestCase(testtools.TestCase):
    """Whether LXD can have got a request, through a unix socket."""

    def setUp(self):
        super().setUp()
        self.path = self.useFixture(fixtures.TempDir()).join('lxd')

    def is_unsent(self, connect=10, read=10):
        url, http = unix_adapter.session(self.path)
        error = self.assertRaises(transport_errors.ALL, http.get,
                                  f'{url}/1.0', timeout=(connect, read))
        return transport_errors.is_unsent(error)

    def listen(self, backlog):
        # With eventlet, one that nobody refers to is closed.
        self.server = socket.socket(socket.AF_UNIX)
        self.addCleanup(self.server.close)
        self.server.bind(self.path)
        self.server.listen(backlog)
        return self.server

    def test_no_socket(self):
        self.assertTrue(self.is_unsent())

    def test_nobody_listens(self):
        self.listen(1).close()
        self.assertTrue(self.is_unsent())

    def test_too_many_connections(self):
        self.listen(0)
        for _number in range(8):
            client = socket.socket(socket.AF_UNIX)
            self.addCleanup(client.close)
            client.setblocking(False)
            try:
                client.connect(self.path)
            except BlockingIOError:
                break
        # eventlet tries again until then.
        self.assertTrue(self.is_unsent(connect=0.1))

    def test_closed_without_an_answer(self):
        server = self.listen(1)

        def close():
            server.accept()[0].close()

        thread = threading.Thread(target=close)
        thread.start()
        self.assertFalse(self.is_unsent())
        thread.join(5)

    def test_no_answer(self):
        self.listen(1)
        self.assertFalse(self.is_unsent(read=0.1))


class RepeatableTestCase(testtools.TestCase):

    def test_requests(self):
        for method, body, expected in (
                ('delete', None, True), ('put', {'action': 'stop'}, True),
                ('put', {'config': {}}, True), ('patch', {}, True),
                ('put', {'action': 'restart'}, False), ('post', {}, False)):
            self.assertIs(expected, retry.is_repeatable(method, body))

    def test_same_effect(self):
        for method, body, expected in (
                ('delete', None, True),
                ('put', {'action': 'stop', 'force': True}, True),
                ('put', {'action': 'stop', 'force': False}, False),
                ('put', {'action': 'start', 'force': True}, False),
                ('put', {'config': {}}, False), ('post', {}, False)):
            self.assertIs(expected, retry.has_same_effect(method, body))

    def test_texts(self):
        for text, code, failed in (
                (f'Failed to fetch "c1": {BUSY}', 404, False),
                (BUSY, 400, True), ('database is locked', 400, True),
                ('Incus daemon setup in progress', 503, False),
                ('anything', 503, False)):
            self.assertIs(errors.Transient, type(
                responses.from_text('what', text, code, failed)), text)
