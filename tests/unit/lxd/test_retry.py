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

import time
from unittest import mock

import testtools

from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import responses
from nova_lxd_py.virt.lxd import retry
from tests.fixtures import fake_lxd
from tests.fixtures import session_case

STATE = ('instances', 'c1', 'state')
BUSY = 'Failed to begin transaction: context deadline exceeded'


class TransientFailuresTestCase(session_case.SessionTestCase):

    def setUp(self):
        super().setUp()
        self.create()

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
        self.assertEqual(b'content', self.session.read_file('c2', '/root/a'))
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
        self.lxd.fail_next('GET', '/1.0/instances', 503, 'not yet',
                           times=None)
        began = time.monotonic()
        with self.lxd.recording() as recorded:
            self.refused(errors.Transient, self.session.get, 'instances',
                         timeout=1)
        self.assertLess(time.monotonic() - began, 1.5)
        self.assertGreater(len(recorded), 2)

    def test_deadline_of_an_operation(self):
        self.lxd.fail_operation('PUT', '*/state', BUSY, times=None)
        began = time.monotonic()
        with self.lxd.recording() as recorded:
            self.refused(errors.Transient, self.session.put, *STATE,
                         body={'action': 'start'}, timeout=1)
        self.assertLess(time.monotonic() - began, 1.5)
        self.assertGreater(self.sent(recorded, 'PUT /1.0/instances/c1/state'),
                           2)

    def test_pauses(self):
        """LXD in trouble is not asked more and more often."""
        pauses = []
        self.lxd.fail_next('GET', '/1.0/instances', 500, BUSY, times=6)
        clock = mock.Mock(monotonic=time.monotonic, sleep=pauses.append)
        with mock.patch.object(retry, 'time', clock):
            self.session.get('instances')
        self.assertEqual(6, len(pauses))
        for number, pause in enumerate(pauses):
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


class RepeatableTestCase(testtools.TestCase):

    def test_requests(self):
        for method, body, expected in (
                ('delete', None, True), ('put', {'action': 'stop'}, True),
                ('put', {'config': {}}, True), ('patch', {}, True),
                ('put', {'action': 'restart'}, False), ('post', {}, False)):
            self.assertIs(expected, retry.is_repeatable(method, body))

    def test_texts(self):
        for text, code, failed in (
                (f'Failed to fetch "c1": {BUSY}', 404, False),
                (BUSY, 400, True), ('database is locked', 400, True),
                ('Incus daemon setup in progress', 503, False),
                ('anything', 503, False)):
            self.assertIs(errors.Transient, type(
                responses.from_text('what', text, code, failed)), text)
