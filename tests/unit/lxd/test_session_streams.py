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

"""LXD session: uploads, downloads, websockets and TLS."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from unittest import mock

import fixtures
import websocket

from nova_lxd_py import conf
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import retry
from nova_lxd_py.virt.lxd import session
from nova_lxd_py.virt.lxd import streams
from tests.fixtures import fake_lxd
from tests.fixtures.fake_lxd import certificates
from tests.fixtures import session_case


class _SlowProxy(fixtures.Fixture):
    """Passes connections on, and pauses once in the first large request."""

    def __init__(self, target, pause):
        super().__init__()
        self._target = target
        self._pause = pause
        self.has_paused = False

    def _setUp(self):
        self.path = os.path.join(
            self.useFixture(fixtures.TempDir()).path, 'socket')
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.path)
        self._listener.listen()
        self.addCleanup(self._listener.close)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                client, _address = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            server.connect(self._target)
            for pair in ((client, server), (server, client)):
                threading.Thread(target=self._copy, args=pair,
                                 daemon=True).start()

    def _copy(self, source, target):
        total = 0
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
                total += len(data)
                if total > 1 << 20 and not self.has_paused:
                    self.has_paused = True
                    time.sleep(self._pause)
            target.shutdown(socket.SHUT_RDWR)


class StreamsTestCase(session_case.SessionTestCase):

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

    def test_upload_to_a_slow_lxd(self):
        """LXD may read nothing for longer than a connection may take."""
        proxy = self.useFixture(_SlowProxy(self.lxd.endpoint, pause=0.5))
        self.useFixture(fixtures.MockPatchObject(
            session, 'CONNECT_TIMEOUT', 0.1))
        self.cfg.config(group='lxd', endpoint=proxy.path)
        self.content = fake_lxd.fixture.unified_image(
            {'etc/a': os.urandom(4 << 20)})
        slow = session.Session(self.cfg.conf.lxd)
        slow.upload('images', chunks=self.chunks(), headers=self.OCTETS)
        self.assertTrue(proxy.has_paused)
        self.assertEqual(2, self.images())

    def test_upload_that_lxd_does_not_read(self):
        proxy = self.useFixture(_SlowProxy(self.lxd.endpoint, pause=3.0))
        self.cfg.config(group='lxd', endpoint=proxy.path)
        self.content = fake_lxd.fixture.unified_image(
            {'etc/a': os.urandom(4 << 20)})
        slow = session.Session(self.cfg.conf.lxd)
        self.assertRaises(errors.DeadlineExceeded, slow.upload, 'images',
                          chunks=self.chunks(), headers=self.OCTETS,
                          timeout=0.5)

    def test_download_from_a_slow_lxd(self):
        """LXD may send nothing for longer than a request may take."""
        proxy = self.useFixture(_SlowProxy(self.lxd.endpoint, pause=1.2))
        self.content = fake_lxd.fixture.unified_image(
            {'etc/a': os.urandom(4 << 20)})
        fingerprint = self.session.upload(
            'images', chunks=self.chunks(), headers=self.OCTETS)['fingerprint']
        self.cfg.config(group='lxd', endpoint=proxy.path)
        slow = session.Session(self.cfg.conf.lxd)
        slow.connect()
        self.cfg.config(group='lxd', request_timeout=1)
        with slow.download('images', fingerprint, 'export', timeout=60) as (
                _headers, chunks):
            self.assertEqual(self.content, b''.join(chunks))
        self.assertTrue(proxy.has_paused)

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
            for number, chunk in enumerate(self.chunks()):
                if number == 3:
                    self.useFixture(fixtures.MockPatchObject(
                        streams, 'time', mock.Mock(
                            monotonic=lambda: time.monotonic() + 60)))
                self.assertLess(number, 4)
                yield chunk

        error = self.refused(errors.DeadlineExceeded, self.session.upload,
                             'images', chunks=source(), headers=self.OCTETS,
                             timeout=60)
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
        self.session._outage = retry.Outage(0.2)

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
        self.assertLess(time.monotonic() - began, 10)

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
                # The kernel had buffered all of it: the upload succeeded.
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


class FilesTestCase(session_case.SessionTestCase):

    def setUp(self):
        super().setUp()
        self.create(start=True)

    def test_write(self):
        self.session.write_file('c1', '/root/a b&c', b'content', mode=0o600,
                                uid=5, gid=6)
        node = self.lxd.instance('c1').files.get('/root/a b&c')
        self.assertEqual((b'content', 0o600, 5, 6),
                         (node.content, node.mode, node.uid, node.gid))

    def test_empty_file(self):
        self.session.write_file('c1', '/root/empty', b'')
        node = self.lxd.instance('c1').files.get('/root/empty')
        self.assertEqual(b'', node.content)

    def test_directory(self):
        self.session.write_file('c1', '/root/dir', b'', kind='directory',
                                mode=0o700)
        self.session.write_file('c1', '/root/dir/file', b'x')
        self.assertEqual(['file'], self.session.get(
            'instances', 'c1', 'files', params={'path': '/root/dir'}))

    def test_missing(self):
        self.refused(errors.NotFound, self.session.write_file, 'c1',
                     '/nope/file', b'')
        self.refused(errors.InstanceNotFound, self.session.write_file, 'nope',
                     '/x', b'')


class WebsocketTestCase(session_case.SessionTestCase):

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
        channel.settimeout(5)
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
            'nova_lxd_py.virt.lxd.session.CONNECT_TIMEOUT', 0.2))
        self.lxd.delay('GET', '/1.0/events', 2)
        error = self.assertRaises(errors.LXDError, self.session.websocket,
                                  'events')
        self.assertIsInstance(error, (errors.DeadlineExceeded,
                                      errors.Unreachable))


class TLSTestCase(session_case.SessionTestCase):

    def setUp(self):
        super().setUp()
        directory = self.lxd.directory
        self.certificate, self.key = certificates.make(directory, 'client')
        self.stranger = certificates.make(directory, 'stranger')
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
        junk = os.path.join(self.lxd.directory, 'junk')
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
