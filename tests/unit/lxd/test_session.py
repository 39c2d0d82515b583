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

"""LXD session: requests, operations and errors."""

from __future__ import annotations

import os
import socket
import threading
import time

import fixtures
import testtools

from nova_lxd_py import conf
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import responses
from nova_lxd_py.virt.lxd import session
from tests.fixtures import fake_lxd
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


class ErrorsTestCase(session_case.SessionTestCase):

    def test_not_found(self):
        error = self.refused(errors.InstanceNotFound, self.session.get,
                             'instances', 'nope')
        self.assertEqual(404, error.code)
        self.assertIn('Instance not found', str(error))
        self.assertIn('instances/nope', str(error))
        self.refused(errors.InstanceNotFound, self.session.put, *STATE,
                     body=START)
        self.refused(errors.InstanceNotFound, self.session.delete, 'instances',
                     'c1')

    def test_exists_already_by_code(self):
        self.refused(errors.AlreadyExists, self.session.post, 'projects',
                     body={'name': 'nova'})

    def test_exists_already_by_text_of_a_failed_operation(self):
        self.create()
        self.refused(errors.AlreadyExists, self.create)

    def test_image_exists_already(self):
        content = fake_lxd.fixture.unified_image({'etc/a': b'b'})
        for expected in (None, errors.AlreadyExists):
            def upload():
                self.session.upload('images', chunks=[content], headers={
                    'Content-Type': 'application/octet-stream'})

            if expected is None:
                upload()
            else:
                self.refused(expected, upload)

    def test_busy(self):
        self.create(start=True)
        self.lxd.daemon.stop_hook_delay = 0.5
        self.session.submit('put', *STATE, body={'action': 'stop',
                                                 'force': True})
        self.lxd.wait_for(lambda: self.status() == 'Stopped')
        self.refused(errors.Busy, self.session.put, *STATE, body=START)
        self.refused(errors.Busy, self.session.put, *STATE,
                     body={'action': 'restart', 'force': True})
        self.refused(errors.Busy, self.session.delete, 'instances', 'c1')

    def test_refused_request(self):
        self.create(start=True)
        error = self.refused(errors.InvalidRequest, self.session.delete,
                             'instances', 'c1')
        self.assertEqual(400, error.code)
        self.assertIn('Instance is running', str(error))

    def test_failed_operation(self):
        self.create(start=True)
        error = self.refused(errors.OperationFailed, self.session.put, *STATE,
                             body=START)
        self.assertIn('already running', str(error))

    def test_failed_operation_that_says_not_found(self):
        # An object that an operation does not find is not the object of the
        # request.
        self.create()
        self.lxd.fail_operation('PUT', '*/state', 'Image not found')
        self.refused(errors.OperationFailed, self.session.put, *STATE,
                     body=START)

    def test_server_error(self):
        self.lxd.fail_next('GET', '/1.0/instances', 500, 'disk I/O error')
        error = self.refused(errors.OperationFailed, self.session.get,
                             'instances')
        self.assertIn('disk I/O error', str(error))

    def test_error_without_text(self):
        self.lxd.fail_next('GET', '/1.0/instances', 502, '')
        error = self.refused(errors.OperationFailed, self.session.get,
                             'instances')
        self.assertIn('Bad Gateway', str(error))

    def test_permission(self):
        for code in (401, 403):
            self.lxd.fail_next('GET', '/1.0/instances', code, 'no')
            self.refused(errors.PermissionDenied, self.session.get,
                         'instances')

    def test_not_implemented(self):
        self.assertRaises(errors.LXDError, self.session.post, 'instances',
                          'c1', 'rebuild', body={})

    def test_answer_that_is_not_json(self):
        self.create()
        self.session.write_file('c1', '/root/x', b'no json')
        self.assertRaises(errors.LXDError, self.session.get, 'instances',
                          'c1', 'files', params={'path': '/root/x'})

    def test_odd_names_stay_in_their_segment(self):
        self.refused(errors.InstanceNotFound, self.session.get, 'instances',
                     '../projects/nova')
        self.refused(errors.InstanceNotFound, self.session.get, 'instances',
                     'a?project=default')
        self.refused(errors.NotFound, self.session.get, 'images', 'aliases',
                     'a b/c%2f#d')


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


class OperationTestCase(session_case.SessionTestCase):

    def setUp(self):
        super().setUp()
        self.create()

    def test_waits_and_returns_the_metadata(self):
        content = fake_lxd.fixture.unified_image({'etc/a': b'b'})
        result = self.session.upload('images', chunks=[content], headers={
            'Content-Type': 'application/octet-stream'})
        self.assertEqual(fake_lxd.fixture.fingerprint(content),
                         result['fingerprint'])
        self.assertEqual({}, self.session.put(*STATE, body={
            'action': 'start', 'timeout': 5}).get('output', {}))

    def test_submit(self):
        fault = self.lxd.hang_operation('PUT', '*/state')
        operation = self.session.submit('put', *STATE, body=START)
        self.assertTrue(operation.is_running())
        self.assertEqual('Stopped', self.status())
        fault.release()
        operation.wait(5)
        self.assertFalse(operation.is_running())
        self.assertEqual('Running', self.status())

    def test_deadline(self):
        self.lxd.hang_operation('PUT', '*/state')
        began = time.monotonic()
        error = self.refused(errors.DeadlineExceeded, self.session.put,
                             *STATE, body=START, timeout=1)
        self.assertLess(time.monotonic() - began, 10)
        self.assertIn('instances/c1/state', str(error))
        # The operation was cancelled.
        self.assertEqual(1, self.lxd.count('DELETE', '/1.0/operations/*'))

    def test_deadline_by_default(self):
        self.session.operation_timeout = 1
        self.lxd.hang_operation('PUT', '*/state')
        self.refused(errors.DeadlineExceeded, self.session.put, *STATE,
                     body=START)

    def test_an_operation_that_ends_just_in_time(self):
        fault = self.lxd.hang_operation('PUT', '*/state')
        timer = threading.Timer(0.3, fault.release)
        timer.start()
        self.session.put(*STATE, body=START, timeout=5)
        self.assertEqual('Running', self.status())

    def test_waiting_is_one_request(self):
        fault = self.lxd.hang_operation('PUT', '*/state')
        threading.Timer(0.3, fault.release).start()
        with self.lxd.recording() as recorded:
            self.session.put(*STATE, body=START, timeout=10)
        self.assertEqual(2, len(recorded), [str(r) for r in recorded])

    def test_progress(self):
        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.lxd.operations.PROGRESS_SLICE', 1))
        fault = self.lxd.hang_operation('PUT', '*/state')
        seen = []

        def progress(metadata):
            seen.append(metadata['status'])
            fault.release()

        self.session.put(*STATE, body=START, timeout=10, progress=progress)
        self.assertEqual(['Running'], seen)

    def test_lxd_restarts_while_an_operation_is_waited_for(self):
        self.lxd.hang_operation('PUT', '*/state')

        def restart():
            self.lxd.wait_for(lambda: self.lxd.count(
                'GET', '/1.0/operations/*/wait') > waits)
            self.lxd.restart()

        waits = self.lxd.count('GET', '/1.0/operations/*/wait')

        thread = threading.Thread(target=restart)
        thread.start()
        error = self.assertRaises(errors.LXDError, self.session.put, *STATE,
                                  body=START, timeout=5)
        thread.join()
        self.assertIn(type(error), (errors.OperationLost, errors.Unreachable),
                      repr(error))
        self.assertEqual('Stopped', self.status())
        # The session is still usable.
        self.session.put(*STATE, body=START)

    def test_lxd_forgets_an_operation(self):
        fault = self.lxd.hang_operation('PUT', '*/state')
        operation = self.session.submit('put', *STATE, body=START)
        self.lxd.daemon.operations.memory = 0
        known = self.lxd.daemon.operations.find(operation.id)
        fault.release()
        self.lxd.wait_for(lambda: known.ended is not None)
        self.assertEqual('Running', self.status())
        self.refused(errors.OperationLost, operation.wait, 5)
        self.assertFalse(operation.is_running())

    def test_stop_of_a_guest_that_does_not_listen(self):
        self.session.put(*STATE, body=START)
        self.lxd.instance('c1').guest.ignores_shutdown = True
        error = self.refused(
            errors.OperationFailed, self.session.put, *STATE,
            body={'action': 'stop', 'timeout': 1}, timeout=10)
        self.assertIn('Failed shutting down', str(error))
        self.assertEqual('Running', self.status())

    def test_cancel_is_no_promise(self):
        self.lxd.hang_operation('PUT', '*/state')
        operation = self.session.submit('put', *STATE, body=START)
        operation.cancel()
        self.assertTrue(operation.is_running())
        self.lxd.stop()
        operation.cancel()

    def test_cancelled_operation(self):
        self.lxd.hang_operation('PUT', '*/state')
        operation = self.session.submit('put', *STATE, body=START)
        found = self.lxd.daemon.operations.find(operation.id)
        found.may_cancel = True
        operation.cancel()
        self.refused(errors.OperationFailed, operation.wait, 5)


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
        threading.Timer(0.5, fault.release).start()
        self.refused(errors.Unreachable, self.session.put, *STATE, body=START)
        self.assertEqual('Running', self.status())

    def test_operations_of_others_hold_up_a_lost_answer_only_for_so_long(
            self):
        self.cfg.config(group='lxd', request_timeout=1)
        for name in ('c2', 'c3', 'c4'):
            self.create(name)
            self.lxd.hang_operation('PUT', f'/1.0/instances/{name}/state')
            self.session.submit('put', 'instances', name, 'state', body=START)
        self.lxd.drop_connection('PUT', '*/c1/state')
        began = time.monotonic()
        self.refused(errors.Unreachable, self.session.put, *STATE, body=START)
        self.assertLess(time.monotonic() - began, 10)

    def test_restart_between_requests(self):
        self.session.get('instances')
        for _ in range(3):
            self.lxd.restart()
            self.session.get('instances')
            self.session.patch('instances', 'c1', body={'config': {}})

    def test_down(self):
        self.session.get('instances')
        self.lxd.stop()
        for _ in range(2):
            self.refused(errors.Unreachable, self.session.get, 'instances')
        self.lxd.start()
        self.session.get('instances')


class TextsTestCase(testtools.TestCase):
    """Errors of other servers than the fake one."""

    def error(self, text, code=400, failed=False):
        return type(responses.from_text('what', text, code, failed))

    def test_texts(self):
        for text, code, failed, expected in (
                ('Failed to fetch instance "x" in project "default": '
                 'Instance not found', 404, False, errors.InstanceNotFound),
                ('Instance "x" already exists', 400, True,
                 errors.AlreadyExists),
                ('Alias already exists: a', 400, True, errors.AlreadyExists),
                ('Name "x" already in use', 400, False,
                 errors.AlreadyExists),
                ('Failed to create instance start operation: Instance is '
                 'busy running a "stop" operation', 400, True, errors.Busy),
                ('Instance is busy running a "start" operation', 409, False,
                 errors.Busy),
                ('Not Found', 404, True, errors.OperationFailed),
                ('anything', 422, False, errors.InvalidRequest),
                ('anything', 400, True, errors.OperationFailed)):
            self.assertIs(expected, self.error(text, code, failed), text)
