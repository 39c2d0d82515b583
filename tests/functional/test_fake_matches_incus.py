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

"""The fake against a real Incus, in what differs from LXD."""

from __future__ import annotations

from tests.fixtures import contract


class IncusContract(contract.InstanceContractTest):

    server = 'incus'

    def test_server(self):
        fake = self.fake_api.must('GET', '/1.0')
        real = self.real_api.must('GET', '/1.0')
        self.assertEqual(real['api_extensions'], fake['api_extensions'])
        for key in ('server', 'server_version', 'server_clustered',
                    'os_name', 'os_version', 'driver_version'):
            self.assertEqual(real['environment'][key],
                             fake['environment'][key], key)

    def test_guest_api(self):
        self.create(config={'security.devlxd': 'true'})
        self.create(config={'security.guestapi': 'maybe'})
        self.create(config={'security.guestapi': 'false'})

    def test_idmapped_root(self):
        self.create(config={'security.idmap.isolated': 'true'})
        self.power('start')
        for api in (self.fake_api, self.real_api):
            config = api.must('GET', '/1.0/instances/c1')['config']
            self.assertEqual('[]', config['volatile.last_state.idmap'])
            self.assertEqual(config['volatile.idmap.next'],
                             config['volatile.idmap.current'])

    def test_metrics(self):
        self.create()
        self.power('start')
        names = [{line.partition('{')[0] for line in api.request(
            'GET', '/1.0/metrics').body.decode().splitlines()
            if 'name="c1"' in line} for api in (self.real_api, self.fake_api)]
        self.assertLessEqual(names[1], names[0])
        self.assertIn('incus_memory_MemAvailable_bytes', names[1])
