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

import contextlib
import time

from tempest import config
from tempest.lib import decorators
import websocket

from nova_lxd_py.tempest.tests import base

CONF = config.CONF


class SerialConsoleTest(base.LXDScenarioTest):
    """A login at the serial console, through Nova's proxy."""

    compute_min_microversion = '2.6'

    @classmethod
    def skip_checks(cls):
        super().skip_checks()
        if not CONF.compute_feature_enabled.serial_console:
            raise cls.skipException('[compute-feature-enabled] '
                                    'serial_console is false')

    @decorators.idempotent_id('a6b6f1c0-4f4b-4b9e-9d0c-0c6d36f7b010')
    def test_several_in_a_row(self):
        server = self.boot()
        # Wait until it has booted.
        self.log_in(server)
        for _ in range(3):
            self.assertIn('login:', self.read_prompt(server))

    def read_prompt(self, server):
        """Return the output of the console up to the login prompt."""
        url = self.servers_client.get_remote_console(
            server['id'], console_type='serial',
            protocol='serial')['remote_console']['url']
        seen = ''
        deadline = time.monotonic() + CONF.validation.ssh_timeout
        with contextlib.closing(websocket.create_connection(
                url, timeout=10, subprotocols=['binary'],
                suppress_origin=True)) as console:
            while 'login:' not in seen and time.monotonic() < deadline:
                with contextlib.suppress(websocket.WebSocketTimeoutException):
                    data = console.recv()
                    if not data:
                        break
                    seen += (data if isinstance(data, str)
                             else data.decode(errors='replace'))
        return seen
