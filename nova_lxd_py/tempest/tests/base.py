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

"""Servers that the tests log in to."""

from typing import Any

from tempest import config
from tempest.lib.common.utils import data_utils
from tempest.scenario import manager

CONF = config.CONF

#: What the guest shell writes down: the time in milliseconds, again and again.
_TICKER = ('nohup python3 -uc "import time\n'
           'while True:\n'
           '    print(time.monotonic_ns() // 1000000)\n'
           '    time.sleep(0.01)" > ticks 2> /dev/null < /dev/null &')


class LXDScenarioTest(manager.ScenarioTest):
    """Boots servers with SSH, and makes flavors for them."""

    credentials = ['primary', 'admin']

    @classmethod
    def skip_checks(cls) -> None:
        super().skip_checks()
        if not CONF.validation.run_validation:
            raise cls.skipException('It logs in to servers: [validation] '
                                    'run_validation is off')

    def setUp(self) -> None:
        super().setUp()
        self.keypair = self.create_keypair()
        self.group = self.create_security_group()

    def create_flavor(self, extra_specs: dict[str, str] | None = None,
                      **changes: int) -> str:
        """Make a flavor that is like the configured one.

        :param extra_specs: extra specs of it.
        :param changes: ``vcpus``, ``ram`` (MiB) or ``disk`` (GiB).
        :returns: its id; it is deleted in the end.
        """
        client = self.os_admin.flavors_client
        usual = client.show_flavor(CONF.compute.flavor_ref)['flavor']
        flavor = client.create_flavor(
            name=data_utils.rand_name('lxd'),
            **{key: changes.get(key, usual[key])
               for key in ('vcpus', 'ram', 'disk')})['flavor']
        self.addCleanup(client.delete_flavor, flavor['id'])
        if extra_specs:
            client.set_flavor_extra_spec(flavor['id'], **extra_specs)
        return flavor['id']

    def boot(self, **options: Any) -> dict[str, Any]:
        """Make a server that can be logged in to.

        :param options: more for ``create_server``.
        :returns: the server.
        """
        return self.create_server(
            key_name=self.keypair['name'],
            security_groups=[{'name': self.group['name']}], **options)

    def log_in(self, server: dict[str, Any]) -> Any:
        """Connect to a server.

        :param server: one that :meth:`boot` has made.
        :returns: tempest's client of it.
        """
        return self.get_remote_client(
            self.get_server_ip(server), server=server,
            private_key=self.keypair['private_key'])

    def start_ticking(self, guest: Any) -> None:
        """Have a process in the guest look at the clock all the time.

        :param guest: what :meth:`log_in` returned.
        """
        guest.exec_command(_TICKER)

    def longest_pause(self, guest: Any) -> int:
        """Tell for how long that process did not run.

        :param guest: what :meth:`log_in` returned.
        :returns: milliseconds.
        """
        # A guest that was stopped in between has no such process any more.
        guest.exec_command('pkill -f monotonic_ns')
        ticks = [int(line) for line in
                 guest.exec_command('cat ticks').splitlines()]
        self.assertGreater(len(ticks), 10)
        return max(after - before for before, after
                   in zip(ticks, ticks[1:], strict=False))
