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
        for key, status in (('security.devlxd', 404),
                            ('security.guestapi', 200)):
            name = key.replace('.', '-')
            for api in (self.fake_api, self.real_api):
                api.call('POST', '/1.0/instances', {
                    'name': name, 'source': contract.FROM_IMAGE,
                    'config': {key: 'false'}})
            self.lxd.wait_for_operations()
            for api in (self.fake_api, self.real_api):
                self.assertEqual(status, api.call(
                    'GET', f'/1.0/instances/{name}').status)

    def start(self):
        """Start a server that has a uid range of its own on both."""
        for api in (self.fake_api, self.real_api):
            api.must('POST', '/1.0/instances', {
                'name': 'c1', 'source': contract.FROM_IMAGE,
                'config': {'security.idmap.isolated': 'true'}})
            api.must('PUT', '/1.0/instances/c1/state', {'action': 'start'})

    def test_idmapped_root(self):
        self.start()
        for api in (self.fake_api, self.real_api):
            config = api.must('GET', '/1.0/instances/c1')['config']
            self.assertEqual('[]', config['volatile.last_state.idmap'])
            self.assertEqual(config['volatile.idmap.next'],
                             config['volatile.idmap.current'])

    def test_metrics(self):
        self.start()
        real, fake = ({line.partition('{')[0] for line in api.request(
            'GET', '/1.0/metrics').body.decode().splitlines()
            if 'name="c1"' in line} for api in (self.real_api, self.fake_api))
        self.assertLessEqual(fake, real)
        self.assertIn('incus_memory_MemAvailable_bytes', fake)

    def test_headers(self):
        self.start()
        for api in (self.fake_api, self.real_api):
            answer = api.request('GET', '/1.0/instances/c1/files',
                                 params={'path': '/'})
            self.assertEqual('directory', answer.headers['x-incus-type'])
            self.assertNotIn('x-lxd-type', answer.headers)
