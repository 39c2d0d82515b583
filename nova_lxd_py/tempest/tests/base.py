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

"""Base class of the tests."""

from typing import Any

from tempest import config
from tempest.lib.common.utils import data_utils
from tempest.scenario import manager

CONF = config.CONF

#: Guest command that logs the monotonic time in milliseconds every 10 ms.
_TICKER = ('nohup python3 -uc "import time\n'
           'while True:\n'
           '    print(time.monotonic_ns() // 1000000)\n'
           '    time.sleep(0.01)" > ticks 2> /dev/null < /dev/null &')


class LXDScenarioTest(manager.ScenarioTest):
    """Boots servers to log in to, with flavors of its own."""

    credentials = ['primary', 'admin']

    @classmethod
    def skip_checks(cls) -> None:
        super().skip_checks()
        if not CONF.validation.run_validation:
            raise cls.skipException('These tests log in to servers, but '
                                    '[validation] run_validation is false')

    def setUp(self) -> None:
        super().setUp()
        self.keypair = self.create_keypair()
        self.group = self.create_security_group()

    def create_flavor(self, extra_specs: dict[str, str] | None = None,
                      **changes: int) -> str:
        """Create a flavor from ``[compute] flavor_ref``, deleted at cleanup.

        :param extra_specs: extra specs to set.
        :param changes: different ``vcpus``, ``ram`` (MiB) or ``disk`` (GiB).
        :returns: the id of the flavor.
        """
        client = self.os_admin.flavors_client
        default = client.show_flavor(CONF.compute.flavor_ref)['flavor']
        flavor = client.create_flavor(
            name=data_utils.rand_name('lxd'),
            **{key: changes.get(key, default[key])
               for key in ('vcpus', 'ram', 'disk')})['flavor']
        self.addCleanup(client.delete_flavor, flavor['id'])
        if extra_specs:
            client.set_flavor_extra_spec(flavor['id'], **extra_specs)
        return flavor['id']

    def boot(self, **options: Any) -> dict[str, Any]:
        """Create a server with a key pair, reachable by SSH.

        :param options: further arguments of ``create_server``.
        :returns: the server.
        """
        return self.create_server(
            key_name=self.keypair['name'],
            security_groups=[{'name': self.group['name']}], **options)

    def log_in(self, server: dict[str, Any]) -> Any:
        """Connect to a server by SSH.

        :param server: server created by :meth:`boot`.
        :returns: tempest's remote client.
        """
        return self.get_remote_client(
            self.get_server_ip(server), server=server,
            private_key=self.keypair['private_key'])

    def start_ticking(self, guest: Any) -> None:
        """Start a process in the guest that logs the time every 10 ms.

        :param guest: remote client returned by :meth:`log_in`.
        """
        guest.exec_command(_TICKER)

    def longest_pause(self, guest: Any) -> int:
        """Return the longest time for which that process did not run.

        :param guest: remote client returned by :meth:`log_in`.
        :returns: milliseconds.
        """
        # pkill fails if the guest was restarted, which ended the process.
        guest.exec_command('pkill -f monotonic_ns')
        ticks = [int(line) for line in
                 guest.exec_command('cat ticks').splitlines()]
        self.assertGreater(len(ticks), 10)
        return max(after - before for before, after
                   in zip(ticks, ticks[1:], strict=False))
