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

"""LXD session: operations."""

from __future__ import annotations

import threading
import time

import fixtures

from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import retry
from tests.fixtures import fake_lxd
from tests.fixtures import session_case

STATE = ('instances', 'c1', 'state')
START = {'action': 'start'}


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
        timer = threading.Timer(0.1, fault.release)
        timer.start()
        self.session.put(*STATE, body=START, timeout=5)
        self.assertEqual('Running', self.status())

    def test_waiting_is_one_request(self):
        fault = self.lxd.hang_operation('PUT', '*/state')
        threading.Timer(0.1, fault.release).start()
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
        self.session._outage = retry.Outage(0.2)
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
