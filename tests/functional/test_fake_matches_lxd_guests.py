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

"""The fake LXD against a real one: files and commands in instances."""

from __future__ import annotations

import contextlib
import time

import websocket

from tests.fixtures import contract


class GuestContract(contract.InstanceContractTest):
    """Files, commands, consoles, snapshots."""

    def test_files(self):
        self.create()
        self.power('start')

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
        self.create()
        base = '/1.0/instances/c1'
        self.same('POST', f'{base}/exec', {'command': ['true']})
        self.power('start')
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
        self.create()
        base = '/1.0/instances/c1'
        self.same('POST', f'{base}/console', {'type': 'console'})
        self.power('start')
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

    def test_operations(self):
        self.create()
        self.power('start')
        found = []
        for api in (self.fake_api, self.real_api):
            answer = api.request('POST', '/1.0/instances/c1/exec', {
                'command': ['cat'], 'wait-for-websocket': True,
                'interactive': False})
            path = answer.body['operation']
            # Others have ended, and are listed for some seconds.
            self.assertEqual([path], api.must('GET', '/1.0/operations')[
                'running'])
            [listed] = [operation for operation in api.must(
                'GET', '/1.0/operations', params={'recursion': '1'})['running']
                if path.endswith(operation['id'])]
            self.assertEqual(api.must('GET', path), listed)
            self.assertNotIn(path, api.must(
                'GET', '/1.0/operations', params={'project': 'default'}
                ).get('running', []))
            refused = api.call('DELETE', path)
            fds = listed['metadata']['fds']
            channels = {
                name: api.websocket(f'{path}/websocket', secret=fds[name])
                for name in ('0', '1', '2', 'control')}
            channels['0'].send('')
            api.must('GET', f'{path}/wait')
            for channel in channels.values():
                channel.shutdown()
            self.assertNotIn('running', api.must('GET', '/1.0/operations'))
            found.append((contract.shape_of({**listed, 'metadata': sorted(
                listed['metadata'])}), listed['class'], listed['description'],
                listed['resources'], listed['may_cancel'], refused.status,
                refused.error))
        self.assertEqual(found[1], found[0])

    def test_console(self):
        self.create()
        self.power('start')
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
            if api is self.real_api:
                self.until_booted()
            channels['0'].settimeout(1)
            deadline = time.monotonic() + 60
            shown = b''
            # What a guest prints when it boots may come first, and what comes
            # before the console is attached may be discarded.
            while b'abc' not in shown:
                self.assertLess(time.monotonic(), deadline, shown)
                channels['0'].send_binary(b'abc')
                with contextlib.suppress(
                        websocket.WebSocketTimeoutException):
                    shown += channels['0'].recv()
            channels['0'].settimeout(60)
            api.must('PUT', '/1.0/instances/c1/state', {
                'action': 'stop', 'force': True})
            while channels['0'].recv():
                pass
            for channel in channels.values():
                channel.shutdown()

    def test_snapshots(self):
        self.create()
        self.power('start')
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
