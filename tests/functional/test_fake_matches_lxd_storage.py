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


"""The fake LXD against a real one: pools, backups of volumes, metrics."""

from __future__ import annotations

import re
import uuid

from tests.fixtures import contract

_VOLUMES = '/1.0/storage-pools/default/volumes/custom'


class PoolContract(contract.InstanceContractTest):
    """Storage pools that are created and deleted."""

    def test_deletion(self):
        self.same('DELETE', '/1.0/storage-pools/nope')
        name = f'pool-{uuid.uuid4().hex[:8]}'
        path = f'/1.0/storage-pools/{name}'
        self.same('POST', '/1.0/storage-pools', {'name': name,
                                                 'driver': 'dir'})
        self.addCleanup(self.real_api.call, 'DELETE', path)
        self.create(devices={'root': {'type': 'disk', 'path': '/',
                                      'pool': name}})
        self.same('DELETE', path)
        self.same('DELETE', '/1.0/instances/c1')
        # The image of an instance stays in its pool.
        for image in self.real_api.must('GET', '/1.0/images'):
            self.real_api.must('DELETE', image.split('?')[0])
        self.same('DELETE', path)
        self.same('DELETE', path)

    def test_copy_that_does_not_fit(self):
        self.create(devices=contract.ROOT)
        small = {'root': {**contract.ROOT['root'], 'size': '100KiB'}}
        fake, real = (api.call('POST', '/1.0/instances', {
            'name': 'c2', 'source': {'type': 'copy', 'source': 'c1'},
            'devices': small}) for api in (self.fake_api, self.real_api))
        for answer in (fake, real):
            self.assertEqual(202, answer.status)
            self.assertIn('quota exceeded', answer.error.lower())
        self.same('GET', '/1.0/instances/c2')


class BackupContract(contract.ContractTest):
    """Backups that LXD makes of volumes."""

    def test_life(self):
        backups = f'{_VOLUMES}/v1/backups'
        body = {'name': 'b1', 'compression_algorithm': 'none',
                'volume_only': True, 'optimized_storage': False}
        self.same('POST', backups, body)
        self.same('POST', _VOLUMES, {'name': 'v1', 'type': 'custom',
                                     'config': {'size': '10MiB'}})
        self.same('GET', f'{backups}/b1/export')
        self.same('DELETE', f'{backups}/b1')
        self.same('POST', backups, body)
        self.same('POST', backups, body)
        for api in (self.fake_api, self.real_api):
            answer = api.request('GET', f'{backups}/b1/export')
            self.assertEqual(200, answer.status)
            self.assertIsInstance(answer.body, bytes)
        self.same('DELETE', f'{backups}/b1')
        self.same('DELETE', f'{backups}/b1')
        self.same('DELETE', f'{_VOLUMES}/v1')


class MetricsContract(contract.InstanceContractTest):
    """LXD's metrics."""

    def samples(self, api):
        """Return names and labels of the samples of an instance."""
        answer = api.request('GET', '/1.0/metrics')
        self.assertEqual(200, answer.status)
        found = re.findall(r'^lxd_(\w+)\{(.*)\} \S+$', answer.body.decode(),
                           re.MULTILINE)
        return {name: sorted(re.findall(r'(\w+)=', labels))
                for name, labels in found if 'name="c1"' in labels}

    def test_names(self):
        self.create(devices=contract.ROOT)
        self.power('start')
        fake, real = (self.samples(api)
                      for api in (self.fake_api, self.real_api))
        self.assertNotEqual({}, fake)
        self.assertEqual(fake, {name: labels for name, labels in real.items()
                                if name in fake})
