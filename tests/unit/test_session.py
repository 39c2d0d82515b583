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

"""The session with LXD, mostly where it goes wrong."""

from __future__ import annotations

import os
import socket
import threading
import time

import fixtures
from oslo_config import fixture as config_fixture
from oslotest import base
import testtools
import websocket

from nova_lxd_py import conf
from nova_lxd_py.virt import errors
from nova_lxd_py.virt import session
from tests.unit import fake_lxd
from tests.unit.fake_lxd import certificates

STATE = ('instances', 'c1', 'state')
START = {'action': 'start'}


class SessionTestCase(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        self.lxd = self.useFixture(fake_lxd.FakeLXD(project='nova'))
        self.lxd.add_image(project='nova', alias='tiny')
        self.cfg = self.useFixture(config_fixture.Config(conf.CONF))
        self.cfg.config(group='lxd', endpoint=self.lxd.endpoint,
                        project='nova', request_timeout=5)
        self.session = session.Session(conf.CONF.lxd)

    def create(self, name='c1', start=False, **config):
        self.session.post('instances', body={
            'name': name, 'source': {'type': 'image', 'alias': 'tiny'},
            'profiles': [], 'config': config, 'devices': {'root': {
                'type': 'disk', 'path': '/', 'pool': 'default'}}})
        if start:
            self.session.put('instances', name, 'state', body=START)

    def status(self):
        return self.lxd.instance('c1').status

    def refused(self, kind, function, *args, **kwargs):
        """Have a call fail with exactly this class of error."""
        error = self.assertRaises(errors.LXDError, function, *args, **kwargs)
        self.assertIs(kind, type(error), str(error))
        return error


class ConnectionTestCase(SessionTestCase):

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
        path = os.path.join(self.lxd.folder, 'dead')
        with socket.socket(socket.AF_UNIX) as left_over:
            left_over.bind(path)
        self.cfg.config(group='lxd', endpoint=path)
        error = self.refused(errors.Unreachable, self.session.connect)
        self.assertIn(path, str(error))

    def test_a_file_that_is_no_socket(self):
        path = os.path.join(self.lxd.folder, 'file')
        with open(path, 'w'):
            pass
        self.cfg.config(group='lxd', endpoint=path)
        self.refused(errors.Unreachable, self.session.connect)

    def test_no_permission_for_the_socket(self):
        # Root may use any socket, so the kernel's answer is played here.
        def connect(sock, address):
            raise PermissionError(13, 'Permission denied')

        real = socket.socket
        self.useFixture(fixtures.MonkeyPatch(
            'socket.socket', type('Socket', (real,), {'connect': connect})))
        error = self.refused(errors.PermissionDenied, self.session.connect)
        self.assertIn('group', str(error))
        self.refused(errors.PermissionDenied, self.session.websocket,
                     'events')

    def test_what_answers_is_no_lxd(self):
        path = os.path.join(self.lxd.folder, 'other')
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


class ErrorsTestCase(SessionTestCase):

    def test_not_found(self):
        error = self.refused(errors.NotFound, self.session.get, 'instances',
                             'nope')
        self.assertEqual(404, error.code)
        self.assertIn('Instance not found', str(error))
        self.assertIn('instances/nope', str(error))
        self.refused(errors.NotFound, self.session.put, *STATE, body=START)
        self.refused(errors.NotFound, self.session.delete, 'instances', 'c1')

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
        # A thing that an operation misses is not the thing that was asked
        # for.
        self.create()
        self.lxd.fail_operation('PUT', '*/state', 'Image not found')
        self.refused(errors.OperationFailed, self.session.put, *STATE,
                     body=START)

    def test_server_error(self):
        self.lxd.fail_next('GET', '/1.0/instances', 500, 'database is locked')
        error = self.refused(errors.OperationFailed, self.session.get,
                             'instances')
        self.assertIn('database is locked', str(error))

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
        self.refused(errors.NotFound, self.session.get, 'instances',
                     '../projects/nova')
        self.refused(errors.NotFound, self.session.get, 'instances',
                     'a?project=default')
        self.refused(errors.NotFound, self.session.get, 'images', 'aliases',
                     'a b/c%2f#d')


class ETagTestCase(SessionTestCase):

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


class OperationTestCase(SessionTestCase):

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
        self.assertLess(time.monotonic() - began, 3)
        self.assertIn('instances/c1/state', str(error))
        # LXD was asked to give up.
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
        self.session.put(*STATE, body=START, timeout=2)
        self.assertEqual('Running', self.status())

    def test_waiting_is_one_request(self):
        fault = self.lxd.hang_operation('PUT', '*/state')
        threading.Timer(0.3, fault.release).start()
        with self.lxd.recording() as recorded:
            self.session.put(*STATE, body=START, timeout=10)
        self.assertEqual(2, len(recorded), [str(r) for r in recorded])

    def test_progress(self):
        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.session.PROGRESS_SLICE', 1))
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
            time.sleep(0.3)
            self.lxd.restart()

        thread = threading.Thread(target=restart)
        thread.start()
        error = self.assertRaises(errors.LXDError, self.session.put, *STATE,
                                  body=START, timeout=5)
        thread.join()
        self.assertIn(type(error), (errors.OperationLost, errors.Unreachable),
                      repr(error))
        self.assertEqual('Stopped', self.status())
        # And the session goes on.
        self.session.put(*STATE, body=START)

    def test_lxd_forgets_an_operation(self):
        fault = self.lxd.hang_operation('PUT', '*/state')
        operation = self.session.submit('put', *STATE, body=START)
        self.lxd.daemon.operations.memory = 0
        fault.release()
        self.lxd.wait_for(lambda: self.status() == 'Running')
        time.sleep(0.05)
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


class TransportTestCase(SessionTestCase):

    def setUp(self):
        super().setUp()
        self.create()

    def test_slow_answer(self):
        self.lxd.delay('GET', '/1.0/instances', 3)
        began = time.monotonic()
        error = self.assertRaises(errors.LXDError, self.session.get,
                                  'instances', timeout=0.2)
        self.assertLess(time.monotonic() - began, 2)
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
        self.assertLess(time.monotonic() - began, 4)

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


class StreamsTestCase(SessionTestCase):

    OCTETS = {'Content-Type': 'application/octet-stream'}

    def setUp(self):
        super().setUp()
        self.content = fake_lxd.fixture.unified_image(
            {'etc/a': os.urandom(300000)})

    def chunks(self, size=10000):
        for start in range(0, len(self.content), size):
            yield self.content[start:start + size]

    def images(self):
        return len(self.session.get('images'))

    def test_upload(self):
        self.session.upload('images', chunks=self.chunks(), headers={
            **self.OCTETS, 'X-LXD-properties': 'a=b'})
        sent = [entry for entry in self.lxd.requests
                if str(entry) == 'POST /1.0/images'][0]
        self.assertEqual('chunked', sent.headers['transfer-encoding'])
        self.assertEqual(self.content, sent.body)

    def test_empty_chunks_do_not_end_the_stream(self):
        half = len(self.content) // 2
        self.session.upload('images', headers=self.OCTETS, chunks=[
            self.content[:half], b'', self.content[half:]])
        self.assertEqual(2, self.images())

    def test_source_breaks_off(self):
        class GlanceIsDown(Exception):
            pass

        def source():
            yield self.content[:1000]
            raise GlanceIsDown('so sad')

        self.assertRaises(GlanceIsDown, self.session.upload, 'images',
                          chunks=source(), headers=self.OCTETS)
        self.lxd.wait_for(lambda: [entry for entry in self.lxd.requests
                                   if entry.broken])
        self.assertEqual(1, self.images())

    def test_source_is_too_slow(self):
        def source():
            for chunk in self.chunks():
                time.sleep(0.3)
                yield chunk

        began = time.monotonic()
        error = self.refused(errors.DeadlineExceeded, self.session.upload,
                             'images', chunks=source(), headers=self.OCTETS,
                             timeout=1)
        self.assertLess(time.monotonic() - began, 3)
        self.assertIn('too long', str(error))
        self.assertEqual(1, self.images())

    def test_lxd_refuses_the_content(self):
        for content, reason in ((b'junk' * 200, 'Unsupported compression'),
                                (self.content[:50], 'metadata.yaml')):
            error = self.assertRaises(
                errors.LXDError, self.session.upload, 'images',
                chunks=[content], headers=self.OCTETS)
            self.assertIn(reason, str(error))

    def test_wrong_checksum(self):
        error = self.refused(
            errors.OperationFailed, self.session.upload, 'images',
            chunks=self.chunks(), headers={**self.OCTETS,
                                           'X-LXD-fingerprint': '0' * 64})
        self.assertIn("fingerprints don't match", str(error))

    def test_lxd_hangs_up_in_the_middle_of_an_upload(self):
        def source():
            for number, chunk in enumerate(self.chunks()):
                if number == 3:
                    self.lxd.stop()
                yield chunk

        self.refused(errors.Unreachable, self.session.upload, 'images',
                     chunks=source(), headers=self.OCTETS)

    def test_operation_of_an_upload_has_what_is_left_of_its_time(self):
        self.lxd.hang_operation('POST', '/1.0/images')
        began = time.monotonic()
        self.refused(errors.DeadlineExceeded, self.session.upload, 'images',
                     chunks=self.chunks(), headers=self.OCTETS, timeout=1)
        self.assertLess(time.monotonic() - began, 4)

    def test_download(self):
        fingerprint = self.lxd.add_image(self.content, project='nova')
        with self.session.download('images', fingerprint, 'export',
                                   chunk_size=10000) as (headers, chunks):
            self.assertEqual(str(len(self.content)),
                             headers['Content-Length'])
            self.assertEqual(self.content, b''.join(chunks))

    def test_download_of_what_is_not_there(self):
        def download():
            with self.session.download('images', 'abc', 'export'):
                self.fail('there is no such image')

        self.refused(errors.NotFound, download)

    def test_download_breaks_off(self):
        fingerprint = self.lxd.add_image(self.content, project='nova')

        def download():
            with self.session.download('images', fingerprint, 'export',
                                       chunk_size=1000) as (_h, chunks):
                next(chunks)
                self.lxd.stop()
                got = sum(len(chunk) for chunk in chunks)
                # The kernel had all of it already: nothing broke then.
                self.assertEqual(len(self.content) - 1000, got)
                raise errors.Unreachable('unlikely')

        self.refused(errors.Unreachable, download)

    def test_download_that_is_not_read_to_the_end(self):
        fingerprint = self.lxd.add_image(self.content, project='nova')
        for _ in range(3):
            with self.session.download('images', fingerprint, 'export',
                                       chunk_size=1000) as (_h, chunks):
                next(chunks)
            self.assertEqual(2, self.images())


class FilesTestCase(SessionTestCase):

    def setUp(self):
        super().setUp()
        self.create(start=True)

    def test_write_and_read(self):
        self.session.write_file('c1', '/root/a b&c', b'content', mode=0o600,
                                uid=5, gid=6)
        self.assertEqual(b'content',
                         self.session.read_file('c1', '/root/a b&c'))
        node = self.lxd.instance('c1').files.get('/root/a b&c')
        self.assertEqual((0o600, 5, 6), (node.mode, node.uid, node.gid))

    def test_empty_file(self):
        self.session.write_file('c1', '/root/empty', b'')
        self.assertEqual(b'', self.session.read_file('c1', '/root/empty'))

    def test_directory(self):
        self.session.write_file('c1', '/root/dir', b'', kind='directory',
                                mode=0o700)
        self.session.write_file('c1', '/root/dir/file', b'x')
        self.assertEqual(['file'], self.session.get(
            'instances', 'c1', 'files', params={'path': '/root/dir'}))

    def test_read_no_more_than_wanted(self):
        self.session.write_file('c1', '/root/big', b'x' * 100000)
        self.assertEqual(b'x' * 10,
                         self.session.read_file('c1', '/root/big', limit=10))

    def test_missing(self):
        self.refused(errors.NotFound, self.session.read_file, 'c1', '/nope')
        self.refused(errors.NotFound, self.session.write_file, 'c1',
                     '/nope/file', b'')
        self.refused(errors.NotFound, self.session.read_file, 'nope', '/x')


class WebsocketTestCase(SessionTestCase):

    def setUp(self):
        super().setUp()
        self.create(start=True)

    def open(self, **kwargs):
        channel = self.session.websocket('events', params={
            'type': 'lifecycle'}, **kwargs)
        self.addCleanup(channel.shutdown)
        self.lxd.wait_for(lambda: self.lxd.daemon.events.listeners)
        return channel

    def test_events(self):
        channel = self.open(timeout=5)
        self.lxd.guest_poweroff('c1')
        self.assertIn('instance-shutdown', channel.recv())

    def test_only_those_of_the_own_project(self):
        channel = self.open(timeout=0.2)
        self.lxd.daemon.events.lifecycle('instance-started', 'default',
                                         '/1.0/instances/foreign')
        self.assertRaises(websocket.WebSocketTimeoutException, channel.recv)

    def test_timeout_is_for_each_read(self):
        channel = self.open(timeout=0.1)
        for _ in range(2):
            self.assertRaises(websocket.WebSocketTimeoutException,
                              channel.recv)
        self.lxd.guest_poweroff('c1')
        self.assertIn('instance-shutdown', channel.recv())

    def test_daemon_goes(self):
        channel = self.open(timeout=5)
        self.lxd.stop()
        self.assertRaises((OSError, websocket.WebSocketException),
                          channel.recv)
        self.refused(errors.Unreachable, self.session.websocket, 'events')

    def test_refused(self):
        self.lxd.fail_next('GET', '/1.0/events', 403, 'go away')
        error = self.refused(errors.PermissionDenied, self.session.websocket,
                             'events')
        self.assertIn('go away', str(error))
        error = self.assertRaises(
            errors.LXDError, self.session.websocket, 'events',
            params={'type': 'bogus'})
        self.assertIn("isn't a supported event type", str(error))

    def test_connection_breaks_in_the_handshake(self):
        self.lxd.drop_connection('GET', '/1.0/events')
        self.refused(errors.Unreachable, self.session.websocket, 'events')

    def test_no_answer_to_the_handshake(self):
        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.session.CONNECT_TIMEOUT', 0.2))
        self.lxd.delay('GET', '/1.0/events', 2)
        error = self.assertRaises(errors.LXDError, self.session.websocket,
                                  'events')
        self.assertIsInstance(error, (errors.DeadlineExceeded,
                                      errors.Unreachable))


class TLSTestCase(SessionTestCase):

    def setUp(self):
        super().setUp()
        folder = self.lxd.folder
        self.certificate, self.key = certificates.make(folder, 'client')
        self.stranger = certificates.make(folder, 'stranger')
        self.url, self.server_certificate = self.lxd.listen_https(
            {self.certificate: True, self.stranger[0]: False})
        self.configure()

    def configure(self, **kwargs):
        self.cfg.config(group='lxd', **{
            'endpoint': self.url, 'client_certificate': self.certificate,
            'client_key': self.key,
            'server_certificate': self.server_certificate, **kwargs})
        self.session = session.Session(conf.CONF.lxd)

    def test_connect(self):
        self.session.connect()
        self.assertFalse(self.session.is_local)
        self.create(start=True)
        self.assertEqual('Running', self.status())
        channel = self.session.websocket('events', timeout=5, params={
            'type': 'lifecycle'})
        self.addCleanup(channel.shutdown)
        self.lxd.wait_for(lambda: self.lxd.daemon.events.listeners)
        self.lxd.guest_poweroff('c1')
        self.assertIn('instance-shutdown', channel.recv())

    def test_trailing_slash(self):
        self.configure(endpoint=self.url + '/')
        self.session.connect()
        self.session.websocket('events').shutdown()

    def test_certificate_bundles_of_the_environment_do_not_matter(self):
        self.useFixture(fixtures.EnvironmentVariable(
            'REQUESTS_CA_BUNDLE', self.stranger[0]))
        self.session.connect()

    def test_server_shows_another_certificate(self):
        self.configure(server_certificate=self.stranger[0])
        error = self.refused(errors.PermissionDenied, self.session.connect)
        self.assertIn(self.stranger[0], str(error))
        self.refused(errors.PermissionDenied, self.session.websocket,
                     'events')

    def test_lxd_does_not_trust_the_client(self):
        self.configure(client_certificate=self.stranger[0],
                       client_key=self.stranger[1])
        error = self.refused(errors.PermissionDenied, self.session.connect)
        self.assertIn('lxc config trust add', str(error))

    def test_missing_settings_and_files(self):
        for option in ('client_certificate', 'client_key',
                       'server_certificate'):
            for value in (None, '/nonexistent'):
                self.configure(**{option: value})
                error = self.refused(errors.PermissionDenied,
                                     self.session.connect)
                self.assertIn(option, str(error))

    def test_files_that_are_no_certificates(self):
        junk = os.path.join(self.lxd.folder, 'junk')
        with open(junk, 'w') as out:
            out.write('junk')
        for option in ('client_certificate', 'client_key',
                       'server_certificate'):
            self.configure(**{option: junk})
            self.assertRaises(errors.LXDError, self.session.connect)
            self.assertRaises(errors.LXDError, self.session.websocket,
                              'events')

    def test_nobody_listens(self):
        self.configure(endpoint='https://127.0.0.1:1')
        self.refused(errors.Unreachable, self.session.connect)
        self.refused(errors.Unreachable, self.session.websocket, 'events')


class TextsTestCase(testtools.TestCase):
    """Errors of servers that the fake is not."""

    def error(self, text, code=400, failed=False):
        return type(session._error_from_text('what', text, code, failed))

    def test_texts(self):
        for text, code, failed, expected in (
                ('Failed to fetch instance "x" in project "default": '
                 'Instance not found', 404, False, errors.NotFound),
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
