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

import os
import time
from typing import Any

import websocket

from tests.functional import contract
from tests import raw_lxd

ROOT_OF_100 = {'root': {**contract.ROOT['root'], 'size': '100MiB'}}


class InstanceContract(contract.ContractTest):
    """Instances."""

    def setUp(self):
        super().setUp()
        self.import_image()

    def _create(self, name: str = 'c1', **kwargs: Any) -> None:
        self.same('POST', '/1.0/instances', {
            'name': name, 'source': contract.FROM_IMAGE, **kwargs})

    def _power(self, action: str, name: str = 'c1', real_retries: bool = False,
               **kwargs: Any) -> tuple[raw_lxd.Answer, raw_lxd.Answer]:
        return self.same('PUT', f'/1.0/instances/{name}/state',
                         {'action': action, **kwargs},
                         real_retries=real_retries)

    def _compare(self, name: str = 'c1', **kwargs: Any) -> None:
        """Compare all that LXD tells of an instance."""
        fake, real = self.same('GET', f'/1.0/instances/{name}', **kwargs)
        for answer in (fake, real):
            for part in ('config', 'expanded_config'):
                config = answer.metadata[part]
                for key in ('volatile.uuid',
                            'volatile.cloud-init.instance-id'):
                    if key in config:
                        config[key] = 'UUID'
                # The host's subordinate ids decide.
                for key in config:
                    if key.startswith('volatile.idmap') or key == (
                            'volatile.last_state.idmap'):
                        config[key] = str(config[key] in ('[]', '0'))
            for key in ('created_at', 'last_used_at'):
                answer.metadata[key] = answer.metadata[key].startswith('1970')
        self.agree(real.metadata, fake.metadata, name)

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
            self._create(name)
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
            self._create(config=config)
        self._create(profiles=['nope'])
        self._create(profiles=[])
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
            self._create(devices={'root': root, **found})
        self._create(profiles=[], devices={
            'd': {'type': 'disk', 'source': '/', 'path': '/x'}})
        self.same('GET', '/1.0/instances')

    def test_life(self):
        self._create(config={'user.nova.uuid': 'u', 'limits.memory': '64MiB',
                             'security.idmap.isolated': 'true'},
                     description='d', devices=contract.ROOT)
        self._create()
        self._compare()
        self.same('GET', '/1.0/instances', values=True)
        self.same('GET', '/1.0/instances/c1/state', values=True,
                  ignore=('usage', 'root'))
        self.same('GET', '/1.0/instances/c1/logs', values=True)
        self.same('GET', '/1.0/instances/c1/console')
        for action in ('stop', 'freeze', 'unfreeze', 'restart', 'bogus', ''):
            self._power(action)
        self._power('stop', force=True)
        self._power('restart', force=True)
        fake, real = self._power('start')
        self.assertEqual(real.operation['metadata'],
                         fake.operation['metadata'])
        self._compare()
        self._power('start')
        self._power('unfreeze')
        self.same('DELETE', '/1.0/instances/c1')
        self.same('POST', '/1.0/instances/c1', {'name': 'c2'})
        for recursion in (1, 2):
            self.same('GET', f'/1.0/instances?recursion={recursion}',
                      ignore=('lo', 'disk'))
        self.same('GET', '/1.0/instances/c1?recursion=1',
                  ignore=('lo', 'disk'))
        self._power('freeze')
        self._power('freeze')
        self._power('start')
        self.same('DELETE', '/1.0/instances/c1')
        self.same('POST', '/1.0/instances/c1/exec', {'command': ['true']})
        self._power('restart', force=True)
        self._power('stop', timeout=0)
        self._compare()
        fake, real = self._power('start', real_retries=True)
        self.assertEqual(real.operation['metadata'],
                         fake.operation['metadata'])
        self._power('stop', timeout=20)
        self.stop_hook('c1')
        self._compare()
        self._create('c2')
        self.same('POST', '/1.0/instances/c1', {'name': 'c2'})
        self.same('POST', '/1.0/instances/c1', {'name': 'a_2'})
        self.same('POST', '/1.0/instances/c1', {'name': 'c1'})
        self.same('POST', '/1.0/instances/c1', {'name': 'c3'})
        self._compare('c3')
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
        self._compare('n1')
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
            self._create(name, config=config)
        self.same('DELETE', '/1.0/instances/c1')
        self._create('c6', config=isolated)
        self._create('c7', config=isolated)
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
        self._create(config={'user.a': 'b',
                             'security.idmap.isolated': 'true'})
        self._power('start')
        self._power('stop', force=True)
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
            self._compare(name)
            self.same('GET', f'/1.0/instances/{name}/snapshots')
        fake, real = self._power('start', 'd2')
        self.assertEqual(real.operation['metadata'],
                         fake.operation['metadata'])

    def test_update(self):
        self._create(config={'user.a': 'b'}, devices=contract.ROOT)
        path = '/1.0/instances/c1'
        for body in ({'config': {'user.c': 'd'}}, {'config': {'user.c': ''}},
                     {'config': {'bad.key': '1'}}, {'config': {'user.z': 1}},
                     {'config': {'volatile.uuid': 'x'}},
                     {'description': 'text'}, {},
                     {'devices': {'x': {'type': 'bogus'}}},
                     {'devices': {'x': {}}},
                     {'devices': {'d': {'type': 'disk', 'source': '/nope',
                                        'path': '/x'}}},
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
            self._compare()
        self.same('PATCH', path, b'junk')
        self._power('start')
        self._remove_device('bd')
        self._compare()
        self._power('start')
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
            self._compare()

    def _remove_device(self, name: str) -> None:
        for api in (self.fake_api, self.real_api):
            instance = api.must('GET', '/1.0/instances/c1')
            del instance['devices'][name]
            api.must('PUT', '/1.0/instances/c1', instance)

    def test_replace(self):
        self._create(config={'user.a': 'b'})
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
            # The description is no part of the tag, config is.
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
        self._compare()

    def test_root_quota(self):
        self._create(devices=ROOT_OF_100)
        path = '/1.0/instances/c1'
        for size in ('1MiB', '200MiB', '50MiB', '', 'x'):
            self.same('PATCH', path, {'devices': {'root': {
                **contract.ROOT['root'], 'size': size}}})
            self._compare()
        self._power('start')
        self._create('c2', devices=ROOT_OF_100)
        self._power('start', 'c2')
        for size in ('200MiB', '50MiB', '1MiB', '200MiB'):
            self.same('PATCH', '/1.0/instances/c2', {'devices': {'root': {
                **contract.ROOT['root'], 'size': size}}})
            self._compare('c2')
        self._power('restart', 'c2', force=True)

    def test_volume_devices(self):
        self._create()
        volume = '/1.0/storage-pools/default/volumes/custom/v'
        self.same('POST', os.path.dirname(volume), {'name': 'v'})
        self._power('start')
        self.same('PATCH', '/1.0/instances/c1', {'devices': {'data': {
            'type': 'disk', 'pool': 'default', 'source': 'v',
            'path': '/data'}}})
        self.same('GET', volume)
        self.same('DELETE', volume)
        self.same('POST', volume, {'name': 'w'})
        self._remove_device('data')
        self.same('DELETE', volume)

    def test_files(self):
        self._create()
        self._power('start')

        def path(name):
            return '/1.0/instances/c1/files?path=' + name

        def read(name):
            fake, real = self.same('GET', path(name), shape=False)
            for key in ('x-lxd-uid', 'x-lxd-gid', 'x-lxd-mode', 'x-lxd-type'):
                self.assertEqual(real.headers.get(key),
                                 fake.headers.get(key), f'{name} {key}')
            if real.headers.get('x-lxd-type') == 'directory':
                self.assertEqual(sorted(real.metadata),
                                 sorted(fake.metadata), name)
            elif real.status == 200:
                self.assertEqual(real.body, fake.body, name)

        for name in ('/etc/passwd', 'etc/passwd', '/bin/sh', '/root',
                     '/nope', '/etc/nope/x', ''):
            read(name)
        self.same('GET', '/1.0/instances/c1/files')
        for name, content, headers in (
                ('/root/a', b'hello', {
                    'X-LXD-type': 'file', 'X-LXD-mode': '0600',
                    'X-LXD-uid': '5', 'X-LXD-gid': '6'}),
                ('/root/a', b'bye', {}),
                ('/root/a', b'more', {'X-LXD-write': 'append'}),
                ('/root/a', b'x', {'X-LXD-write': 'bogus'}),
                ('/root/n', b'', {}),
                ('/root/d', b'', {'X-LXD-type': 'directory',
                                  'X-LXD-mode': '0711'}),
                ('/root/d', b'', {'X-LXD-type': 'directory'}),
                ('/root/d', b'x', {}), ('/root/x/y', b'x', {}),
                ('/root/x/y', b'', {'X-LXD-type': 'directory'}),
                ('/root/a/b', b'x', {}),
                ('/root/l', b'/etc/passwd', {'X-LXD-type': 'symlink'}),
                ('/root/l', b'/root/n', {'X-LXD-type': 'symlink'}),
                ('/root/l', b'through', {}),
                ('/root/b', b'x', {'X-LXD-type': 'bogus'}),
                ('/root/a', b'', {'X-LXD-type': 'directory'})):
            self.same('POST', path(name), content, headers=headers)
            read(name)
        for name in ('/root/n', '/root/l', '/root'):
            read(name)
        for name in ('/root/a', '/root/a', '/etc', '/root/d', '/root/l'):
            self.same('DELETE', path(name))

    def test_exec(self):
        self._create()
        base = '/1.0/instances/c1'
        self.same('POST', f'{base}/exec', {'command': ['true']})
        self._power('start')
        recorded = {'record-output': True, 'wait-for-websocket': False}
        for command in (['true'], ['false'], ['echo', 'a', 'b'], ['nope'],
                        []):
            fake, real = self.same('POST', f'{base}/exec', {
                'command': command, **recorded})
            outcomes = []
            for api, answer in ((self.fake_api, fake), (self.real_api, real)):
                found = dict(answer.operation['metadata'] or {})
                for key, url in found.pop('output', {}).items():
                    found[key] = api.must('GET', url)
                    api.must('DELETE', url)
                    self.assertEqual(500, api.call('GET', url).status)
                    self.assertEqual(404, api.call('DELETE', url).status)
                outcomes.append(found)
            self.assertEqual(outcomes[1], outcomes[0])
        self.same('GET', f'{base}/logs/bad.log')
        self.same('GET', f'{base}/console', shape=False)
        self.same('DELETE', f'{base}/console')
        self.same('GET', f'{base}/console')

    def test_exec_on_websockets(self):
        self._create()
        base = '/1.0/instances/c1'
        self.same('POST', f'{base}/console', {'type': 'console'})
        self._power('start')
        self.same('POST', f'{base}/console', {'type': 'bogus'})
        found = []
        for api in (self.fake_api, self.real_api):
            answer = api.request('POST', f'{base}/exec', {
                'command': ['cat'], 'wait-for-websocket': True,
                'interactive': False, 'environment': {'A': 'b'}})
            path = answer.body['operation']
            fds = answer.metadata['metadata'].pop('fds')
            self.assertRaises(websocket.WebSocketBadStatusException,
                              api.websocket, f'{path}/websocket', secret='x')
            channels = {
                name: api.websocket(f'{path}/websocket', secret=fds[name])
                for name in ('0', '1', '2', 'control')}
            channels['0'].send_binary(b'hello')
            channels['0'].send('')
            got = [channels['1'].recv_data(), channels['1'].recv_data()]
            ended = api.must('GET', f'{path}/wait')
            ended['metadata'].pop('fds')
            for channel in channels.values():
                channel.shutdown()
            found.append((answer.metadata['metadata'], sorted(fds), got,
                          ended['metadata'], ended['class']))
        self.assertEqual(found[1], found[0])
        self.same('POST', f'{base}/exec', {
            'command': ['true'], 'wait-for-websocket': True})

    def test_console(self):
        self._create()
        self._power('start')
        for api in (self.fake_api, self.real_api):
            answer = api.request('POST', '/1.0/instances/c1/console', {
                'type': 'console', 'width': 80, 'height': 25})
            self.assertEqual('Showing console', answer.metadata['description'])
            path = answer.body['operation']
            channels = {
                name: api.websocket(f'{path}/websocket', secret=secret)
                for name, secret in answer.metadata['metadata'][
                    'fds'].items()}
            self.assertEqual({'0', 'control'}, set(channels))
            time.sleep(0.3)
            channels['0'].send_binary(b'abc')
            self.assertEqual(b'abc', channels['0'].recv())
            api.must('PUT', '/1.0/instances/c1/state', {
                'action': 'stop', 'force': True})
            while channels['0'].recv():
                pass
            for channel in channels.values():
                channel.shutdown()

    def test_snapshots(self):
        self._create()
        self._power('start')
        base = '/1.0/instances/c1/snapshots'
        self.same('GET', base)
        for body in ({'name': 's1'}, {'name': 's1'}, {'name': 'a/b'},
                     {'name': 's 1'}, {}, {'name': 'x', 'stateful': True}):
            self.same('POST', base, body)
        self.same('GET', base, values=True)
        self.same('GET', f'{base}/s1')
        self.same('GET', f'{base}?recursion=1')
        self.same('GET', f'{base}/nope')
        self.same('DELETE', f'{base}/nope')
        self.same('GET', '/1.0/instances?recursion=2',
                  ignore=('lo', 'disk'))
        for body in ({'source': {'type': 'instance', 'name': 'c1'}},
                     {'source': {'type': 'snapshot', 'name': 'c1/nope'}},
                     {'source': {'type': 'snapshot', 'name': 'c1/s1'},
                      'compression_algorithm': 'bogus'},
                     {'source': {'type': 'snapshot', 'name': 'c1/s1'},
                      'compression_algorithm': 'squashfs'},
                     {'source': {'type': 'nope'}},
                     {'source': {'type': 'snapshot', 'name': 'c1/s1'},
                      'compression_algorithm': 'none',
                      'properties': {'a': 'b'}, 'aliases': [
                          {'name': 'made', 'description': 'd'}]},
                     {'source': {'type': 'snapshot', 'name': 'c1/s1'},
                      'properties': {'a': 'c'},
                      'aliases': [{'name': 'made'}]}):
            self.same('POST', '/1.0/images', body)
            self.same('GET', '/1.0/images/aliases/made')
            for api in (self.fake_api, self.real_api):
                body.setdefault('images', len(api.must('GET', '/1.0/images')))
                self.assertEqual(body['images'],
                                 len(api.must('GET', '/1.0/images')))
        self.same('GET', '/1.0/images?recursion=1',
                  ignore=('properties', 'aliases'))
        self.same('POST', f'{base}/s1', {'name': 's2'})
        self.same('POST', f'{base}/s2', {'name': 's2'})
        self.same('PUT', f'{base}/s2', {
            'expires_at': '2035-01-01T00:00:00Z'})
        self.same('DELETE', f'{base}/s2')
        self.same('GET', base, values=True)

    def test_guest_that_does_not_listen(self):
        # A signal that its init takes no notice of.
        self._create(config={'raw.lxc': 'lxc.signal.halt=SIGCONT'})
        self.fake.instance('c1').guest.ignores_shutdown = True
        self._power('start')
        self._power('stop', timeout=1)
        self._power('restart', timeout=1)
        self._power('freeze')
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
            ended = api.request('GET', pending + '/wait?timeout=10')
            self.assertEqual(200, ended.metadata['status_code'])

    def test_busy(self):
        self._create()
        self.fake.daemon.stop_hook_delay = 1.0
        for api in (self.fake_api, self.real_api):
            api.must('PUT', '/1.0/instances/c1/state', {'action': 'start'})
            api.request('PUT', '/1.0/instances/c1/state',
                        {'action': 'stop', 'force': True})
            self.fake.wait_for(lambda api=api: api.must(
                'GET', '/1.0/instances/c1')['status'] == 'Stopped')
            busy = 'Instance is busy running a "stop" operation'
            self.assertEqual(
                f'Failed to create instance start operation: {busy}',
                api.call('PUT', '/1.0/instances/c1/state',
                         {'action': 'start'}).error)
            self.assertEqual(
                f'Create restart operation: {busy}',
                api.call('PUT', '/1.0/instances/c1/state',
                         {'action': 'restart', 'force': True}).error)
            self.assertEqual(
                f'Failed to create instance delete operation: {busy}',
                api.call('DELETE', '/1.0/instances/c1').error)

    def test_operations_are_forgotten(self):
        self._create()
        for api in (self.fake_api, self.real_api):
            operation = api.request('PUT', '/1.0/instances/c1/state', {
                'action': 'start'}).body['operation']
            api.must('GET', operation + '/wait')
            self.assertEqual(200, api.request('GET', operation).status)
        time.sleep(5.5)
        for api in (self.fake_api, self.real_api):
            gone = api.request('GET', operation + '/wait')
            self.assertEqual((404, 'Operation not found'),
                             (gone.status, gone.error))
