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

"""One LXD instance."""

from __future__ import annotations

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.lxd import errors
from tests.fixtures import session_case

ROOT = {'root': {'type': 'disk', 'path': '/', 'pool': 'default'}}


class GuestTestCase(session_case.SessionTestCase):

    def guest(self) -> lxd_guest.Guest:
        return lxd_guest.Guest(self.session,
                               self.session.get('instances', 'c1'))

    def test_a_shutdown_takes_longer_than_other_operations(self) -> None:
        """It ends with LXD's answer that the guest still runs, not with one
        of the driver that LXD has not answered."""
        self.create(start=True)
        self.lxd.instance('c1').guest.ignores_shutdown = True
        self.lxd.daemon.speed = 2
        self.refused(errors.OperationFailed, self.guest().shut_down, 3)
        self.assertEqual('Running', self.status())

    def test_isolated_instance_that_cannot_be_created(self) -> None:
        guests = registry.GuestRegistry(self.session)
        self.lxd.fail_operation('POST', '/1.0/instances', 'no space left')
        error = self.refused(
            errors.OperationFailed, guests.create, 'c1',
            {'type': 'image', 'alias': 'tiny'},
            {'security.idmap.isolated': 'true'}, ROOT)
        self.assertIn('no space left', str(error))
