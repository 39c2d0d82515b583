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

"""Requests of processes that were killed, which tests with LXD wait for."""

from __future__ import annotations

import os
import shutil
import socket
import unittest

import fixtures
from oslotest import base

from tests.fixtures import lxd_daemon


@unittest.skipUnless(shutil.which('ss'), 'needs ss (package iproute2)')
class KilledClientTest(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.path = os.path.join(
            self.useFixture(fixtures.TempDir()).path, 'socket')
        self.server = socket.socket(socket.AF_UNIX)
        self.addCleanup(self.server.close)
        self.server.bind(self.path)
        self.server.listen()

    def connect(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        self.addCleanup(client.close)
        client.connect(self.path)
        return client

    def is_left(self) -> bool:
        return lxd_daemon.has_request_of_dead_client(self.path)

    def test_until_the_server_closes_it(self) -> None:
        client = self.connect()
        client.sendall(b'request')
        client.close()
        self.assertTrue(self.is_left())
        accepted, _address = self.server.accept()
        self.assertTrue(self.is_left())
        accepted.close()
        self.assertFalse(self.is_left())

    def test_client_that_lives(self) -> None:
        self.assertFalse(self.is_left())
        client = self.connect()
        accepted, _address = self.server.accept()
        self.addCleanup(accepted.close)
        self.assertFalse(self.is_left())
        client.close()
        self.assertTrue(self.is_left())
