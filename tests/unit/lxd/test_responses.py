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

"""LXD session: errors."""

from __future__ import annotations

import testtools

from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import responses
from tests.fixtures import fake_lxd
from tests.fixtures import session_case

STATE = ('instances', 'c1', 'state')
START = {'action': 'start'}


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
