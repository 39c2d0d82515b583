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

"""The fake LXD against a real one: instances."""

from __future__ import annotations

import json
import os
import time
from typing import Any

from tests.fixtures import contract
from tests.fixtures import raw_lxd

ROOT_OF_100 = {'root': {**contract.ROOT['root'], 'size': '100MiB'}}


class InstanceContract(contract.InstanceContractTest):
    """Instances."""

    def test_missing(self):
        path = '/1.0/instances/nope'
        for where in ('', '/state', '/snapshots', '/logs', '/console',
                      '/files?path=/x'):
            self.same('GET', path + where)
        self.same('PUT', f'{path}/state', {'action': 'start'})
        self.same('PUT', path, {'config': {}})
        self.same('PATCH', path, {'config': {}})
        self.same('POST', path, {'name': 'x'})
        self.same('DELETE', path)
        self.same('POST', f'{path}/exec', {'command': ['true']})
        self.same('POST', f'{path}/snapshots', {'name': 's'})

    def test_create_refused(self):
        for name in ('a_1', '1a', 'a' * 64, 'a b', 'a/b', '-a', 'a-'):
            self.create(name)
        for source in ({'type': 'image', 'alias': 'nope'},
                       {'type': 'image', 'fingerprint': 'nope'},
                       {'type': 'image'}, {'type': 'bogus'}, {},
                       {'type': 'copy'}, {'type': 'copy', 'source': 'nope'},
                       {'type': 'copy', 'source': 'nope/snap'}):
            self.same('POST', '/1.0/instances', {'name': 'c1',
                                                 'source': source})
        self.same('POST', '/1.0/instances', b'junk')
        for config in ({'bad.key': '1'}, {'limits.memory': 'x'},
                       {'limits.cpu': 'x'}, {'security.nesting': 'maybe'},
                       {'user.x': 1}, {'limits.processes': 'x'},
                       {'raw.lxc': 'x'}, {'volatile.foo': '1'},
                       {'security.idmap.isolated': 'true',
                        'security.idmap.size': '1000000000'}):
            self.create(config=config)
        self.create(profiles=['nope'])
        self.create(profiles=[])
        root = contract.ROOT['root']
        for found in ({'x': {'type': 'bogus'}},
                      {'n': {'type': 'nic', 'nictype': 'physical',
                             'name': 'eth0'}},
                      {'n': {'type': 'nic', 'nictype': 'bogus'}},
                      {'n': {'type': 'nic', 'nictype': 'physical',
                             'parent': 'p', 'bogus': '1'}},
                      {'d': {'type': 'disk', 'source': '/nope',
                             'path': '/x'}},
                      {'d': {'type': 'disk', 'source': 'nope',
                             'pool': 'default', 'path': '/x'}},
                      {'root': {**root, 'pool': 'nope'}},
                      {'root': {'type': 'disk', 'path': '/'}},
                      {'root': {**root, 'size': 'x'}},
                      {'root': {**root, 'size': '1MiB'}}):
            self.create(devices={'root': root, **found})
        self.create(profiles=[], devices={
            'd': {'type': 'disk', 'source': '/', 'path': '/x'}})
        self.same('GET', '/1.0/instances')

    def uid_ranges(self, api, name):
        """What LXD keeps of the user ids of an instance."""
        config = api.must('GET', f'/1.0/instances/{name}')['config']
        return {key: value if key.endswith('.base') else json.loads(value)
                for key, value in config.items() if 'idmap' in key
                and key.startswith('volatile.')}

    def test_uid_ranges(self):
        self.create('c1')
        ranges = self.uid_ranges(self.real_api, 'c1')
        [first, size] = [ranges['volatile.idmap.next'][0][key]
                         for key in ('Hostid', 'Maprange')]
        self.fake.daemon.uid_range = first, size
        isolated = {'security.idmap.isolated': 'true'}
        for number, config in enumerate((
                {}, isolated, {**isolated, 'security.idmap.size': '70000'},
                isolated, {**isolated, 'security.idmap.base':
                           str(first + 20 * 65536)},
                {'security.privileged': 'true'}, isolated)):
            name = f'd{number}'
            self.create(name, config=config)
            self.agree(*(self.uid_ranges(api, name) for api in (
                self.real_api, self.fake_api)), name)
        for name in ('d0', 'd1', 'd5'):
            self.power('start', name)
            self.agree(*(self.uid_ranges(api, name) for api in (
                self.real_api, self.fake_api)), name)
        # Stopped, with other ids at its next start.
        for config in (isolated, {}, {'security.privileged': 'true'}):
            self.same('PATCH', '/1.0/instances/d3', {'config': {
                'security.idmap.isolated': '', 'security.privileged': '',
                **config}})
            self.agree(*(self.uid_ranges(api, 'd3') for api in (
                self.real_api, self.fake_api)), 'd3')

    def test_life(self):
        self.create(config={'user.nova.uuid': 'u', 'limits.memory': '64MiB',
                            'security.idmap.isolated': 'true'},
                    description='d', devices=contract.ROOT)
        self.create()
        self.compare()
        self.same('GET', '/1.0/instances', values=True)
        self.same('GET', '/1.0/instances/c1/state', values=True,
                  ignore=('usage', 'root'))
        self.same('GET', '/1.0/instances/c1/logs', values=True)
        self.same('GET', '/1.0/instances/c1/console')
        for action in ('stop', 'freeze', 'unfreeze', 'restart', 'bogus', ''):
            self.power(action)
        self.power('stop', force=True)
        self.power('restart', force=True)
        fake, real = self.power('start')
        self.assertEqual(real.operation['metadata'],
                         fake.operation['metadata'])
        self.compare()
        self.power('start')
        self.power('unfreeze')
        self.same('DELETE', '/1.0/instances/c1')
        self.same('POST', '/1.0/instances/c1', {'name': 'c2'})
        for recursion in (1, 2):
            self.same('GET', f'/1.0/instances?recursion={recursion}',
                      ignore=('lo', 'disk'))
        self.same('GET', '/1.0/instances/c1?recursion=1',
                  ignore=('lo', 'disk'))
        self.power('freeze')
        self.power('freeze')
        self.power('start')
        self.same('DELETE', '/1.0/instances/c1')
        self.same('POST', '/1.0/instances/c1/exec', {'command': ['true']})
        self.power('restart', force=True)
        self.power('stop', timeout=0)
        self.compare()
        fake, real = self.power('start', real_retries=True)
        self.assertEqual(real.operation['metadata'],
                         fake.operation['metadata'])
        self.until_booted()
        self.power('stop', timeout=20)
        self.stop_hook('c1')
        self.compare()
        self.create('c2')
        self.same('POST', '/1.0/instances/c1', {'name': 'c2'})
        self.same('POST', '/1.0/instances/c1', {'name': 'a_2'})
        self.same('POST', '/1.0/instances/c1', {'name': 'c1'})
        self.same('POST', '/1.0/instances/c1', {'name': 'c3'})
        self.compare('c3')
        self.same('PATCH', '/1.0/instances/c3', {
            'config': {'security.protection.delete': 'true'}})
        self.same('DELETE', '/1.0/instances/c3')
        self.same('DELETE', '/1.0/instances/c2')
        self.same('GET', '/1.0/instances')
        self.same('PATCH', '/1.0/instances/c3', {
            'config': {'security.protection.delete': ''}})

    def test_without_root(self):
        self.same('POST', '/1.0/instances', {'name': 'n1',
                                             'source': {'type': 'none'}})
        self.compare('n1')
        fake = self.fake_api.call('PUT', '/1.0/instances/n1/state',
                                  {'action': 'start'})
        real = self.real_api.call('PUT', '/1.0/instances/n1/state',
                                  {'action': 'start'})
        self.assertEqual(
            self.plain(real.error), self.plain(fake.error))

    def test_idmaps(self):
        isolated = {'security.idmap.isolated': 'true'}
        for name, config in (
                ('c1', isolated), ('c2', isolated), ('c3', {}),
                ('c4', {'security.privileged': 'true'}),
                ('c5', {**isolated, 'security.idmap.base': '400000',
                        'security.idmap.size': '65536'})):
            self.create(name, config=config)
        self.same('DELETE', '/1.0/instances/c1')
        self.create('c6', config=isolated)
        self.create('c7', config=isolated)
        self.same('PATCH', '/1.0/instances/c3', {'config': isolated})
        self.same('PATCH', '/1.0/instances/c7', {
            'config': {'security.idmap.isolated': 'false'}})
        first = None
        for api in (self.fake_api, self.real_api):
            found = {
                instance['name']: int(instance['config'][
                    'volatile.idmap.base'])
                for instance in api.must('GET', '/1.0/instances?recursion=1')}
            first = first or found
            self.assertEqual(first, found)

    def test_copies(self):
        self.create(config={'user.a': 'b',
                            'security.idmap.isolated': 'true'})
        self.power('start')
        self.power('stop', force=True)
        self.stop_hook('c1')
        self.same('POST', '/1.0/instances/c1/snapshots', {'name': 's1'})
        for name, more in (
                ('d1', {'source': {'type': 'copy', 'source': 'c1'}}),
                ('d2', {'source': {'type': 'copy', 'source': 'c1',
                                   'instance_only': True},
                        'profiles': ['default'],
                        'config': {'user.a': 'c', 'user.x': 'y'}}),
                ('d3', {'source': {'type': 'copy', 'source': 'c1/s1'},
                        'profiles': ['default']}),
                ('d3', {'source': {'type': 'copy', 'source': 'c1'},
                        'profiles': ['default']})):
            self.same('POST', '/1.0/instances', {'name': name, **more})
        for name in ('d2', 'd3'):
            self.compare(name)
            self.same('GET', f'/1.0/instances/{name}/snapshots')
        fake, real = self.power('start', 'd2')
        self.assertEqual(real.operation['metadata'],
                         fake.operation['metadata'])

    def test_update(self):
        self.create(config={'user.a': 'b'}, devices=contract.ROOT)
        path = '/1.0/instances/c1'
        for body in ({'config': {'user.c': 'd'}}, {'config': {'user.c': ''}},
                     {'config': {'bad.key': '1'}}, {'config': {'user.z': 1}},
                     {'config': {'volatile.uuid': 'x'}},
                     {'description': 'text'}, {},
                     {'devices': {'x': {'type': 'bogus'}}},
                     {'devices': {'x': {}}},
                     {'devices': {'d': {'type': 'disk', 'source': '/nope',
                                        'path': '/x'}}},
                     {'devices': {'d': {'type': 'disk', 'source': '/nope',
                                        'path': '/x', 'user.x': 'y'}}},
                     {'devices': {'d': {'type': 'disk', 'source': 'nope',
                                        'pool': 'default', 'path': '/x'}}},
                     {'devices': {'root': {**contract.ROOT['root'],
                                           'pool': 'nope'}}},
                     {'devices': {'root': {**contract.ROOT['root'],
                                           'size': '100MiB'}}},
                     {'devices': {'bd': {'type': 'unix-block',
                                         'source': '/dev/nope',
                                         'path': '/dev/vdb'}}},
                     {'profiles': ['nope']}):
            self.same('PATCH', path, body)
            self.compare()
        self.same('PATCH', path, b'junk')
        self.power('start')
        self._remove_device('bd')
        self.compare()
        self.power('start')
        for body in ({'devices': {'bd': {'type': 'unix-block',
                                         'source': '/dev/nope',
                                         'path': '/dev/vdb'}}},
                     {'devices': {'bd': {'type': 'unix-block',
                                         'source': '/dev/nope',
                                         'path': '/dev/vdb',
                                         'required': 'false'}}},
                     {'devices': {'n': {'type': 'nic', 'nictype': 'physical',
                                        'parent': 'nope0',
                                        'name': 'eth0'}}},
                     {'config': {'limits.memory': '1'}},
                     {'config': {'limits.memory': '256MiB'}},
                     {'config': {'raw.lxc': 'foo'}}):
            self.same('PATCH', path, body)
            self.compare()

    def _remove_device(self, name: str) -> None:
        for api in (self.fake_api, self.real_api):
            instance = api.must('GET', '/1.0/instances/c1')
            del instance['devices'][name]
            api.must('PUT', '/1.0/instances/c1', instance)

    def test_replace(self):
        self.create(config={'user.a': 'b'})
        path = '/1.0/instances/c1'
        self.same('PUT', path, {})
        self.same('PUT', path, {'config': {'bad.key': '1'}})
        self.same('PUT', path, {'restore': 'nope'})
        for api in (self.fake_api, self.real_api):
            answer = api.request('GET', path)
            tag = answer.headers['etag']
            body = dict(answer.metadata, description='new')
            self.assertEqual(202, api.call(
                'PUT', path, body, headers={'If-Match': tag}).status)
            # The ETag covers the config, but not the description.
            body['config']['user.a'] = 'c'
            self.assertEqual(202, api.call(
                'PUT', path, body, headers={'If-Match': tag}).status)
            refused = api.call('PUT', path, body, headers={'If-Match': tag})
            self.assertEqual(412, refused.status)
            self.assertEqual("ETag doesn't match: HASH vs HASH",
                             self.plain(refused.error))
            self.assertEqual(412, api.call(
                'PATCH', path, {'config': {}},
                headers={'If-Match': tag}).status)
        self.compare()

    def test_root_quota(self):
        self.create(devices=ROOT_OF_100)
        path = '/1.0/instances/c1'
        for size in ('1MiB', '200MiB', '50MiB', '', 'x'):
            self.same('PATCH', path, {'devices': {'root': {
                **contract.ROOT['root'], 'size': size}}})
            self.compare()
        self.power('start')
        self.create('c2', devices=ROOT_OF_100)
        self.power('start', 'c2')
        for size in ('200MiB', '50MiB', '1MiB', '200MiB'):
            self.same('PATCH', '/1.0/instances/c2', {'devices': {'root': {
                **contract.ROOT['root'], 'size': size}}})
            self.compare('c2')
        self.power('restart', 'c2', force=True)

    def test_volume_devices(self):
        self.create()
        volume = '/1.0/storage-pools/default/volumes/custom/v'
        self.same('POST', os.path.dirname(volume), {'name': 'v'})
        self.power('start')
        self.same('PATCH', '/1.0/instances/c1', {'devices': {'data': {
            'type': 'disk', 'pool': 'default', 'source': 'v',
            'path': '/data'}}})
        self.same('GET', volume)
        self.same('DELETE', volume)
        self.same('POST', volume, {'name': 'w'})
        self._remove_device('data')
        self.same('DELETE', volume)

    def test_guest_that_does_not_listen(self):
        # A signal that its init ignores.
        self.create(config={'raw.lxc': 'lxc.signal.halt=SIGCONT'})
        self.fake.instance('c1').guest.ignores_shutdown = True
        self.power('start')
        self.power('stop', timeout=1)
        self.power('restart', timeout=1)
        self.power('freeze')
        for api in (self.fake_api, self.real_api):
            pending = api.request('PUT', '/1.0/instances/c1/state', {
                'action': 'stop', 'timeout': 30}).body['operation']
            time.sleep(0.2)
            waited = api.request('GET', pending + '/wait?timeout=1')
            self.assertEqual(103, waited.metadata['status_code'])
            cancelled = api.request('DELETE', pending)
            self.assertEqual((400, "This operation can't be cancelled"),
                             (cancelled.status, cancelled.error))
            self.assertEqual('The instance is already running', api.call(
                'PUT', '/1.0/instances/c1/state',
                {'action': 'start'}).error)
            self.assertEqual('', api.call(
                'PUT', '/1.0/instances/c1/state',
                {'action': 'stop', 'force': True}).error)
            ended = api.request('GET', pending + '/wait?timeout=60')
            self.assertEqual(200, ended.metadata['status_code'])

    def test_busy(self):
        self.create()
        self.fake.daemon.stop_hook_delay = 1.0
        busy = 'Instance is busy running a "stop" operation'
        for api in (self.fake_api, self.real_api):
            for error, *request in (
                    ('Failed to create instance start operation',
                     'PUT', '/1.0/instances/c1/state', {'action': 'start'}),
                    ('Create restart operation',
                     'PUT', '/1.0/instances/c1/state',
                     {'action': 'restart', 'force': True}),
                    ('Failed to create instance delete operation',
                     'DELETE', '/1.0/instances/c1')):
                self.assertEqual(f'{error}: {busy}',
                                 self._while_it_stops(api, *request))

    def _while_it_stops(self, api: raw_lxd.Client, *request: Any) -> str:
        """Send a request in the moment between the end of an instance and
        that of its stop, however often it takes to hit it.

        :returns: the error.
        """
        state = '/1.0/instances/c1/state'
        deadline = time.monotonic() + 60
        while True:
            if api.request('GET', state).status == 404:
                api.must('POST', '/1.0/instances', {
                    'name': 'c1', 'source': contract.FROM_IMAGE})
            self.retry(lambda: api.call('PUT', state, {'action': 'start'}))
            api.request('PUT', state, {'action': 'stop', 'force': True})
            self.fake.wait_for(lambda: api.must(
                'GET', '/1.0/instances/c1')['status'] == 'Stopped', timeout=60)
            error = api.call(*request).error
            if 'busy' in error or time.monotonic() > deadline:
                return error

    def test_operations_are_forgotten(self):
        self.create()
        operations = []
        deadline = time.monotonic() + 60
        for api in (self.fake_api, self.real_api):
            operation = self._ended_operation(api)
            while api.request('GET', operation).status != 200:
                # The seconds for which it is kept are over already.
                self.assertLess(time.monotonic(), deadline)
                operation = self._ended_operation(api)
            operations.append((api, operation))
        for api, operation in operations:
            while api.request('GET', operation).status == 200:
                self.assertLess(time.monotonic(), deadline)
                time.sleep(0.5)
            gone = api.request('GET', operation + '/wait')
            self.assertEqual((404, 'Operation not found'),
                             (gone.status, gone.error))

    def _ended_operation(self, api: raw_lxd.Client) -> str:
        instance = api.must('GET', '/1.0/instances/c1')
        operation = api.request('PUT', '/1.0/instances/c1',
                                instance).body['operation']
        api.request('GET', operation + '/wait')
        return operation
