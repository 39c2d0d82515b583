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

"""LXD session: connections and requests."""

from __future__ import annotations

import os
import socket
import threading
import time
from unittest import mock

import fixtures
import requests

from nova_lxd_py import conf
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import retry
from nova_lxd_py.virt.lxd import server_kind
from nova_lxd_py.virt.lxd import session
from tests.fixtures.fake_lxd import routing
from tests.fixtures import session_case

STATE = ('instances', 'c1', 'state')
START = {'action': 'start'}


class ConnectionTestCase(session_case.SessionTestCase):

    def test_connect(self):
        self.session.connect()
        self.assertEqual('lxd', self.session.server['environment']['server'])
        self.assertTrue(self.session.has_extension('projects'))
        self.assertFalse(self.session.has_extension('projects_of_mars'))
        self.assertTrue(self.session.is_local)

    def test_well_known_sockets(self):
        """The first one that exists, and else LXD's own."""
        self.cfg.config(group='lxd', endpoint='')
        names = ('/no/snap', '/no/lxd', '/no/incus')
        for present, expected in (
                ((), 1), ((2,), 2), ((1, 2), 1), ((0, 1, 2), 0)):
            paths = tuple(self.lxd.endpoint if number in present else name
                          for number, name in enumerate(names))
            with mock.patch.object(server_kind, 'WELL_KNOWN_SOCKETS', paths):
                self.assertEqual(paths[expected], self.session.endpoint)

    def test_first_request_connects(self):
        self.assertEqual([], self.session.get('instances'))

    def test_everything_is_asked_of_the_own_project(self):
        self.create()
        self.session.get('instances')
        self.assertEqual(
            set(), {str(entry) for entry in self.lxd.requests
                    if entry.query.get('project') != 'nova'} - {'GET /1.0'})

    def test_no_socket(self):
        self.cfg.config(group='lxd', endpoint='/nonexistent/unix.socket')
        error = self.refused(errors.Unreachable, self.session.connect)
        self.assertIn('There is no LXD socket at /nonexistent/unix.socket',
                      str(error))

    def test_nobody_listens_on_the_socket(self):
        path = os.path.join(self.lxd.directory, 'dead')
        with socket.socket(socket.AF_UNIX) as left_over:
            left_over.bind(path)
        self.cfg.config(group='lxd', endpoint=path)
        error = self.refused(errors.Unreachable, self.session.connect)
        self.assertIn(path, str(error))

    def test_a_file_that_is_no_socket(self):
        path = os.path.join(self.lxd.directory, 'file')
        with open(path, 'w'):
            pass
        self.cfg.config(group='lxd', endpoint=path)
        self.refused(errors.Unreachable, self.session.connect)

    def test_no_permission_for_the_socket(self):
        # Root may use any socket, so the kernel's error is simulated.
        def connect(sock, address):
            raise PermissionError(13, 'Permission denied')

        real = socket.socket
        self.useFixture(fixtures.MonkeyPatch(
            'socket.socket', type('Socket', (real,), {'connect': connect})))
        error = self.refused(errors.PermissionDenied, self.session.connect)
        self.assertIn('group', str(error))
        self.refused(errors.PermissionDenied, self.session.websocket,
                     'events')

    def test_server_is_not_lxd(self):
        path = os.path.join(self.lxd.directory, 'other')
        server = socket.socket(socket.AF_UNIX)
        self.addCleanup(server.close)
        server.bind(path)
        server.listen()
        for answer in (b'220 mail ready\r\n',
                       b'HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi',
                       b'HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n',
                       b''):
            def serve(answer=answer):
                sock, _address = server.accept()
                with sock:
                    sock.recv(65536)
                    sock.sendall(answer)

            thread = threading.Thread(target=serve, daemon=True)
            thread.start()
            self.cfg.config(group='lxd', endpoint=path)
            self.assertRaises(errors.LXDError,
                              session.Session(conf.CONF.lxd).connect)
            thread.join(5)

    def test_answer_of_another_type(self):
        self.session.connect()
        self.useFixture(fixtures.MonkeyPatch(
            'tests.fixtures.fake_lxd.routing.sync',
            lambda metadata, **kwargs: routing.json_response(
                200, routing.envelope('async', metadata=metadata))))
        self.refused(errors.Unreachable, self.session.get, 'instances')

    def test_answers_are_decoded_once(self):
        self.session.connect()
        decode, decoded = requests.Response.json, []

        def count(response, **kwargs):
            decoded.append(response)
            return decode(response, **kwargs)
        self.patch(requests.Response, 'json', count)
        self.session.get('instances')
        self.assertEqual(1, len(decoded))

    def test_connects_again_after_a_failed_attempt(self):
        self.lxd.stop()
        self.refused(errors.Unreachable, self.session.connect)
        self.refused(errors.Unreachable, self.session.get, 'instances')
        self.lxd.start()
        self.session.connect()
        self.assertEqual([], self.session.get('instances'))

    def test_proxies_of_the_environment_do_not_matter(self):
        for name in ('http_proxy', 'https_proxy', 'all_proxy',
                     'REQUESTS_CA_BUNDLE'):
            self.useFixture(fixtures.EnvironmentVariable(
                name, 'http://127.0.0.1:1'))
        self.session.connect()

    def test_requests_are_counted(self):
        self.session.connect()
        before = self.session.request_count
        with self.lxd.recording() as recorded:
            self.create()
            self.session.get('instances')
        self.assertEqual(len(recorded), self.session.request_count - before)

    def test_connections_are_used_again(self):
        self.session.connect()
        accepted = []
        accept = self.lxd._server.get_request
        self.lxd._server.get_request = lambda: (accepted.append(1),
                                                accept())[1]
        for _ in range(20):
            self.session.get('instances')
        self.assertLessEqual(len(accepted), 1)

    def test_many_threads(self):
        self.create()
        failures = []

        def work(number):
            try:
                for _ in range(5):
                    self.session.patch('instances', 'c1', body={
                        'config': {f'user.k{number}': 'v'}})
                    self.session.get('instances', 'c1')
            except Exception as exc:
                failures.append(exc)

        threads = [threading.Thread(target=work, args=(number,))
                   for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual([], failures)
        config = self.session.get('instances', 'c1')['config']
        self.assertTrue({f'user.k{number}' for number in range(8)}
                        <= set(config))


class ETagTestCase(session_case.SessionTestCase):

    def setUp(self):
        super().setUp()
        self.create(**{'user.a': '1'})

    def test_unchanged(self):
        body, etag = self.session.get_with_etag('instances', 'c1')
        body['config']['user.a'] = '2'
        self.session.put('instances', 'c1', body=body, etag=etag)
        self.assertEqual('2', self.lxd.instance('c1').config['user.a'])

    def test_changed_meanwhile(self):
        body, etag = self.session.get_with_etag('instances', 'c1')
        self.session.patch('instances', 'c1', body={'config': {
            'user.b': '1'}})
        for method in (self.session.put, self.session.patch):
            error = self.refused(errors.PreconditionFailed, method,
                                 'instances', 'c1', body=body, etag=etag)
            self.assertEqual(412, error.code)
        self.assertEqual('1', self.lxd.instance('c1').config['user.b'])

    def test_objects_without_tag(self):
        pool, etag = self.session.get_with_etag('storage-pools', 'default')
        self.assertEqual(('default', ''), (pool['name'], etag))


class TransportTestCase(session_case.SessionTestCase):

    def setUp(self):
        super().setUp()
        self.create()

    def test_slow_answer(self):
        self.lxd.delay('GET', '/1.0/instances', 5)
        began = time.monotonic()
        error = self.assertRaises(errors.LXDError, self.session.get,
                                  'instances', timeout=0.2)
        self.assertLess(time.monotonic() - began, 4)
        self.assertIsInstance(error, (errors.DeadlineExceeded,
                                      errors.Unreachable))
        self.assertEqual(0, self.lxd.count('GET', '/1.0/operations'))

    def test_slow_change(self):
        """LXD answers a PATCH when the change is done."""
        self.cfg.config(group='lxd', request_timeout=1)
        self.lxd.delay('PATCH', '/1.0/instances/c1', 1.2)
        self.session.patch('instances', 'c1', timeout=10,
                           body={'config': {'user.a': 'b'}})
        self.assertEqual('b', self.lxd.instance('c1').config['user.a'])

    def test_broken_connection(self):
        self.lxd.drop_connection('PUT', '*/state')
        self.refused(errors.Unreachable, self.session.put, *STATE, body=START)
        self.assertEqual('Stopped', self.status())

    def test_nothing_is_sent_twice(self):
        self.lxd.drop_connection('PUT', '*/state', after=True)
        with self.lxd.recording() as recorded:
            self.refused(errors.Unreachable, self.session.put, *STATE,
                         body=START)
        self.assertEqual(1, [str(entry) for entry in recorded].count(
            'PUT /1.0/instances/c1/state'))

    def test_lost_answer_is_reported_when_lxd_is_done(self):
        fault = self.lxd.hang_operation('PUT', '*/state')
        self.lxd.drop_connection('PUT', '*/state', after=True)
        self.lxd.before('GET', '/1.0/operations/*/wait',
                        lambda request: fault.release())
        self.refused(errors.Unreachable, self.session.put, *STATE, body=START)
        self.assertEqual('Running', self.status())

    def test_operations_of_others_hold_up_a_lost_answer_only_for_so_long(
            self):
        for name in ('c2', 'c3', 'c4'):
            self.create(name)
            self.lxd.hang_operation('PUT', f'/1.0/instances/{name}/state')
            self.session.submit('put', 'instances', name, 'state', body=START)
        self.lxd.drop_connection('PUT', '*/c1/state')
        self.cfg.config(group='lxd', request_timeout=1)
        began = time.monotonic()
        self.refused(errors.Unreachable, self.session.put, *STATE, body=START)
        self.assertLess(time.monotonic() - began, 30)

    def test_restart_between_requests(self):
        self.session.get('instances')
        for _ in range(3):
            self.lxd.restart()
            self.session.get('instances')
            self.session.patch('instances', 'c1', body={'config': {}})

    def test_down(self):
        self.session._outage = retry.Outage(0.2)
        self.session.get('instances')
        self.lxd.stop()
        for _ in range(2):
            self.refused(errors.ConnectionFailed, self.session.get,
                         'instances')
        self.lxd.start()
        self.session.get('instances')
