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

"""Connecting to LXD when nova-compute starts."""

from __future__ import annotations

import os
import threading
import time

import fixtures

from nova_lxd_py import conf
from nova_lxd_py.virt.lxd import retry
from tests.fixtures import preflight_case


class ConnectionTestCase(preflight_case.PreflightTestCase):

    def test_all_is_well(self) -> None:
        self.assertTrue(self.check().server)
        self.assertTrue(os.path.isdir(conf.CONF.instances_path))

    def test_no_socket(self) -> None:
        self.cfg.config(group='lxd', endpoint='/nonexistent/unix.socket')
        self.assert_stops('/nonexistent/unix.socket', '[lxd] endpoint')

    def test_nobody_listens(self) -> None:
        self.lxd.stop()
        self.assert_stops(self.lxd.endpoint)

    def test_no_permission(self) -> None:
        # Root may open any socket, so the kernel's error is simulated.
        self.useFixture(fixtures.MonkeyPatch(
            'socket.socket.connect', _refuse))
        self.assert_stops('group that owns the socket')

    def distrust(self) -> None:
        # Unix sockets are always trusted, certificates not always.
        self.useFixture(fixtures.MonkeyPatch(
            'tests.fixtures.fake_lxd.transport.UnixServer.is_trusted',
            lambda server, connection: False))

    def test_not_trusted(self) -> None:
        self.distrust()
        self.assert_stops('does not trust')

    def test_unset_certificates(self) -> None:
        self.cfg.config(group='lxd', endpoint='https://127.0.0.1:1')
        self.assert_stops('client_certificate')

    def test_certificate_that_is_not_there(self) -> None:
        self.cfg.config(group='lxd', endpoint='https://127.0.0.1:1',
                        client_certificate='/nonexistent/crt')
        self.assert_stops('/nonexistent/crt', 'client_certificate')

    def test_waits_for_a_late_start(self) -> None:
        self.cfg.config(group='lxd', startup_timeout=30)
        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.preflight.RETRY_DELAY', 0.01))
        self.lxd.stop()
        timer = threading.Timer(0.2, self.lxd.start)
        timer.start()
        self.addCleanup(timer.join)
        self.check()
        self.assertEqual(
            1, self.log.output.count('waiting for up to 30 seconds'))

    def test_waits_for_a_slow_answer(self) -> None:
        """LXD listens, but closes connections or answers late."""
        self.cfg.config(group='lxd', startup_timeout=30)
        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.preflight.RETRY_DELAY', 0.01))
        for path in ('/1.0', '/1.0/projects/*', '/1.0/storage-pools/*'):
            self.lxd.drop_connection('GET', path)
            self.check()
        # Once there is a session, it waits itself.
        self.assertEqual(1, self.log.output.count('LXD does not answer yet'))
        self.assertEqual(2, self.log.output.count('Retrying LXD request'))

    def test_does_not_wait_for_ever(self) -> None:
        self.cfg.config(group='lxd', startup_timeout=1)
        self.lxd.stop()
        began = time.monotonic()
        self.assert_stops('startup_timeout')
        self.assertLess(time.monotonic() - began, 30)

    def test_does_not_wait_for_permission(self) -> None:
        self.cfg.config(group='lxd', startup_timeout=30)
        self.distrust()
        began = time.monotonic()
        self.assert_stops('does not trust')
        self.assertLess(time.monotonic() - began, 20)

    def test_breaks_off_in_the_middle(self) -> None:
        # The session waits so long for an LXD that drops connections.
        outage = retry.Outage
        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.lxd.retry.Outage', lambda patience: outage(0.2)))
        self.lxd.drop_connection('GET', '/1.0/projects/*', times=None)
        self.assert_stops('cannot be used')


def _refuse(*args: object) -> None:
    raise PermissionError(13, 'Permission denied')
