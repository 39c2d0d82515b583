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

"""The fake LXD against a real one: server, projects, storage, images."""

from __future__ import annotations

import json
import shutil
from typing import Any

from tests.fixtures import busybox_image
from tests.fixtures import contract
from tests.fixtures import fake_lxd


class ServerContract(contract.ContractTest):
    """Server, projects, profiles, pools."""

    def test_server(self):
        self.same('GET', '/', values=True)
        fake, real = self.same('GET', '/1.0', ignore=(
            'addresses', 'storage_supported_drivers', 'config',
            'architectures', 'kernel_features', 'lxc_features'))
        self.assertEqual(real.metadata['api_extensions'],
                         fake.metadata['api_extensions'])
        for path in ('/2.0', '/nothing', '/1.0/nothing'):
            self.same('GET', path)
        self.same('POST', '/1.0', {})
        self.same('DELETE', '/1.0/instances')
        self.same('GET', '/1.0/operations/nope')
        self.same('GET', '/1.0/operations/nope/wait')
        self.same('DELETE', '/1.0/operations/nope')
        self.same('GET', '/1.0/events?type=bogus')
        self.same('GET', '/1.0/cluster', ignore=('member_config',))
        self.same('GET', '/1.0/certificates')
        self.same('GET', '/1.0/networks')

    def test_resources(self):
        fake, real = self.same('GET', '/1.0/resources', shape=False)
        self.assertEqual(sorted(real.metadata), sorted(fake.metadata))
        for part in ('memory', 'gpu'):
            self.assertEqual(contract.shape_of(real.metadata[part]),
                             contract.shape_of(fake.metadata[part]))
        real_cpu, fake_cpu = real.metadata['cpu'], fake.metadata['cpu']
        self.assertEqual(set(real_cpu), set(fake_cpu))
        self.assertEqual(
            contract.shape_of(real_cpu['sockets'][0]['cores'][0]['threads']),
            contract.shape_of(fake_cpu['sockets'][0]['cores'][0]['threads']))

    def test_projects(self):
        self.addCleanup(self.real_api.call, 'DELETE', '/1.0/projects/other')
        self.same('GET', '/1.0/projects/other')
        self.same('DELETE', '/1.0/projects/other')
        for body in ({}, {'name': 'a b'}, {'name': 'a/b'},
                     {'name': 'other', 'config': {'nope': '1'}},
                     {'name': 'other', 'config': {}}, {'name': 'other'}):
            self.same('POST', '/1.0/projects', body)
        self.same('GET', '/1.0/projects/other', values=True)
        self.same('PATCH', '/1.0/projects/other',
                  {'config': {'user.a': 'b'}})
        fake, real = self.same('GET', '/1.0/projects/other', values=True)
        for api, answer in ((self.fake_api, fake), (self.real_api, real)):
            stale = answer.headers['etag']
            api.must('PUT', '/1.0/projects/other', {
                'config': {'features.images': 'true'}, 'description': 'd'},
                headers={'If-Match': stale})
            again = api.call('PUT', '/1.0/projects/other', {'config': {}},
                             headers={'If-Match': stale})
            self.assertEqual(412, again.status)
        self.same('GET', '/1.0/projects/other', values=True)
        self.same('GET', '/1.0/projects?recursion=1')
        self.same('DELETE', '/1.0/projects/default')
        self.same('DELETE', '/1.0/projects/other')

    def test_unknown_project(self):
        params = {'project': 'zzz'}
        for path in ('/1.0/instances', '/1.0/images', '/1.0/profiles',
                     '/1.0/profiles/default', '/1.0/instances/a',
                     '/1.0/storage-pools/default/volumes/custom',
                     '/1.0/images/aliases/x'):
            self.same('GET', path, params=params)
        self.same('POST', '/1.0/instances', {
            'name': 'a', 'source': {'type': 'none'}}, params=params)

    def test_profiles(self):
        self.same('GET', '/1.0/profiles', values=True)
        self.same('GET', '/1.0/profiles/default', ignore=('description',),
                  values=True)
        self.same('GET', '/1.0/profiles/nope')
        self.same('POST', '/1.0/profiles', {})
        self.same('POST', '/1.0/profiles', {
            'name': 'p', 'config': {'user.a': 'b'}, 'devices': contract.ROOT})
        self.same('POST', '/1.0/profiles', {'name': 'p'})
        self.same('PATCH', '/1.0/profiles/p', {'config': {'user.c': 'd'}})
        self.same('GET', '/1.0/profiles/p', values=True)
        self.same('DELETE', '/1.0/profiles/p')
        self.same('DELETE', '/1.0/profiles/p')
        self.same('DELETE', '/1.0/profiles/default')
        for method in ('PUT', 'PATCH'):
            self.same(method, '/1.0/profiles/nope', {'config': {}})

    def test_all_projects(self):
        self.same('GET', '/1.0/instances', params={'all-projects': 'true'})
        # An LXD that others use may have more.
        self.same('GET', '/1.0/instances', shape=False, params={
            'all-projects': 'true', 'project': None})

    def test_pools(self):
        self.same('GET', '/1.0/storage-pools/nope')
        self.same('GET', '/1.0/storage-pools/nope/resources')
        self.same('GET', '/1.0/storage-pools/default/resources')
        self.same('GET', '/1.0/storage-pools/default',
                  ignore=('config', 'used_by'))
        self.same('POST', '/1.0/storage-pools', {})
        self.same('POST', '/1.0/storage-pools', {'name': 'default',
                                                 'driver': 'dir'})

    def test_volumes(self):
        base = '/1.0/storage-pools/default/volumes/custom'
        self.same('GET', base)
        self.same('GET', f'{base}/nope')
        self.same('DELETE', f'{base}/nope')
        for body in ({}, {'name': 'v/1'}, {'name': 'v', 'config': {'x': '1'}},
                     {'name': 'v', 'config': {'size': 'x'}},
                     {'name': 'v', 'config': {'size': '20MiB',
                                              'user.k': 'v'}},
                     {'name': 'v'}):
            self.same('POST', base, body)
        self.same('POST', '/1.0/storage-pools/nope/volumes/custom',
                  {'name': 'v'})
        self.same('GET', f'{base}/v', values=True)
        self.same('GET', base, values=True)
        self.same('GET', f'{base}?recursion=1', values=True)
        self.same('GET', f'{base}/v/state', ignore=('used',))
        self.same('PATCH', f'{base}/v', {'config': {'size': '30MiB'}})
        self.same('GET', f'{base}/v', values=True)
        self.same('PUT', f'{base}/v', {'config': {'size': '40MiB'},
                                       'description': 'd'})
        self.same('GET', f'{base}/v', values=True)
        for api in (self.fake_api, self.real_api):
            self.assertEqual(412, api.call(
                'PATCH', f'{base}/v', {'config': {}},
                headers={'If-Match': 'x'}).status)
        self.same('POST', f'{base}/v', {'name': 'w'})
        self.same('DELETE', f'{base}/w')
        backup = fake_lxd.fixture.tarball({
            'backup/index.yaml': json.dumps({
                'name': 'b', 'backend': '', 'pool': '', 'optimized': False,
                'optimized_header': False, 'type': 'custom',
                'config': {'volume': {
                    'name': 'b', 'type': 'custom', 'description': 'd',
                    'content_type': 'filesystem',
                    'config': {'size': '10MiB'}}}}).encode(),
            'backup/volume': None, 'backup/volume/file': b'content'}, 'w')
        for content, name in ((backup, 'b'), (backup, 'b'), (backup, 'a/b'),
                              (b'junk', 'c'), (b'', 'c')):
            self.same('POST', base, content, headers={
                'Content-Type': 'application/octet-stream',
                'X-LXD-name': name})
        self.same('GET', base, values=True)
        self.same('GET', f'{base}/b', values=True)
        self.same('DELETE', '/1.0/storage-pools/default/volumes/container/x')


class ImageContract(contract.ContractTest):
    """The image store."""

    OCTETS = {'Content-Type': 'application/octet-stream'}

    def setUp(self):
        super().setUp()
        self.content = busybox_image.unified()

    def _multipart(self, *parts: tuple[str, bytes]) -> dict[str, Any]:
        body = b''.join(
            b'--bound\r\nContent-Disposition: form-data; name="%s"; '
            b'filename="%s.tar"\r\nContent-Type: application/octet-stream'
            b'\r\n\r\n%s\r\n' % (name.encode(), name.encode(), content)
            for name, content in parts) + b'--bound--\r\n'
        return {'body': body, 'headers': {
            'Content-Type': 'multipart/form-data; boundary=bound'}}

    def test_import(self):
        wrong = {**self.OCTETS, 'X-LXD-fingerprint': '0' * 64}
        contents = [b'junk' * 200, b'', busybox_image.rootfs()]
        if shutil.which('qemu-img') is None:
            # LXD inspects disk images if it has the programs.
            contents.append(b'QFI\xfb' + bytes(600))
        for content in contents:
            self.same('POST', '/1.0/images', content, headers=self.OCTETS)
        self.same('POST', '/1.0/images', self.content, headers=wrong)
        headers = {**self.OCTETS, 'X-LXD-filename': 'f.tar.gz',
                   'X-LXD-properties': 'user.a=b%20c&os=other'}
        fake, real = self.same('POST', '/1.0/images', self.content,
                               headers=headers)
        self.assertEqual(real.operation['metadata'],
                         fake.operation['metadata'])
        fingerprint = real.operation['metadata']['fingerprint']
        self.same('POST', '/1.0/images', self.content, headers=headers)
        self.same('GET', f'/1.0/images/{fingerprint}', values=True,
                  ignore=('uploaded_at',))
        self.same('GET', f'/1.0/images/{fingerprint[:12]}')
        self.same('GET', '/1.0/images', values=True)
        self.same('GET', '/1.0/images?recursion=1', values=True,
                  ignore=('uploaded_at',))
        self.same('GET', '/1.0/images/abc')
        self.same('GET', '/1.0/images/abc/export')
        fake, real = self.same('GET', f'/1.0/images/{fingerprint}/export',
                               shape=False)
        self.assertEqual(real.body, fake.body)
        for header in ('content-disposition', 'content-length',
                       'content-type'):
            self.assertEqual(real.headers[header], fake.headers[header])
        self.same('PATCH', f'/1.0/images/{fingerprint}',
                  {'properties': {'k': 'v'}})
        self.same('GET', f'/1.0/images/{fingerprint}', values=True,
                  ignore=('uploaded_at',))
        for api in (self.fake_api, self.real_api):
            self.assertEqual(412, api.call(
                'PUT', f'/1.0/images/{fingerprint}', {'properties': {}},
                headers={'If-Match': 'x'}).status)
        self.same('PUT', f'/1.0/images/{fingerprint}', {
            'properties': {'only': '1'}, 'public': False})
        self.same('GET', f'/1.0/images/{fingerprint}', values=True,
                  ignore=('uploaded_at', 'profiles'))
        self.same('DELETE', '/1.0/images/abc')
        self.same('DELETE', f'/1.0/images/{fingerprint}')
        self.same('DELETE', f'/1.0/images/{fingerprint}')

    def test_export_of_a_part(self):
        fake, real = self.same('POST', '/1.0/images', self.content,
                               headers=self.OCTETS)
        path = '/1.0/images/{fingerprint}/export'.format(
            **real.operation['metadata'])
        fake, real = self.same('GET', path, shape=False,
                               headers={'Range': 'bytes=100-'})
        self.assertEqual(206, real.status)
        self.assertEqual(real.body, fake.body)
        self.assertEqual(real.headers['content-range'],
                         fake.headers['content-range'])

    def test_import_streamed(self):
        pieces = [self.content[start:start + 60000]
                  for start in range(0, len(self.content), 60000)]
        for api in (self.fake_api, self.real_api):
            answer = api.call('POST', '/1.0/images', iter(pieces),
                              headers=self.OCTETS)
            self.assertEqual(('', 200), (
                answer.error, answer.operation['status_code']))
            image = api.must('GET', '/1.0/images?recursion=1')[0]
            self.assertEqual(len(self.content), image['size'])

    def test_import_in_parts(self):
        metadata = fake_lxd.fixture.tarball({
            'metadata.yaml': b'architecture: x86_64\n'
                             b'creation_date: 1700000000\n'}, 'w')
        root = busybox_image.rootfs()
        for parts in ((('rootfs', root), ('metadata', metadata)),
                      (('metadata', metadata),),
                      (('metadata', root), ('rootfs', root)),
                      (('metadata', metadata), ('bogus', root))):
            self.same('POST', '/1.0/images', **self._multipart(*parts))
        broken = self._multipart(('metadata', metadata), ('rootfs', root))
        broken['body'] = broken['body'][:-40]
        self.same('POST', '/1.0/images', **broken)
        good = self._multipart(('metadata', metadata), ('rootfs', root))
        wrong = {**good, 'headers': {**good['headers'],
                                     'X-LXD-fingerprint': '1' * 64}}
        self.same('POST', '/1.0/images', **wrong)
        fake, real = self.same('POST', '/1.0/images', **good)
        self.assertEqual(real.operation['metadata'],
                         fake.operation['metadata'])
        fingerprint = real.operation['metadata']['fingerprint']
        self.same('GET', f'/1.0/images/{fingerprint}', values=True,
                  ignore=('uploaded_at',))
        fake, real = self.same('GET', f'/1.0/images/{fingerprint}/export',
                               shape=False)
        self.assertIn(root, real.body)
        self.assertIn(root, fake.body)
        self.assertEqual(real.headers['content-type'].split(';')[0],
                         fake.headers['content-type'].split(';')[0])
        self.same('POST', '/1.0/instances', {
            'name': 'c1', 'source': {'type': 'image',
                                     'fingerprint': fingerprint}})

    def test_bad_metadata(self):
        for text in (b'', b'{[', b'architecture: x86_64\n',
                     b'architecture: zz\ncreation_date: 1700000000\n'):
            content = fake_lxd.fixture.tarball({
                'metadata.yaml': text, 'rootfs': None,
                'rootfs/etc': None})
            self.same('POST', '/1.0/images', content, headers=self.OCTETS)
        content = fake_lxd.fixture.tarball({
            'metadata.yaml': b'architecture: x86_64\n'
                             b'creation_date: 1700000000\n'})
        self.same('POST', '/1.0/images', content, headers=self.OCTETS)

    def test_what_does_not_launch(self):
        foreign = fake_lxd.fixture.unified_image(architecture='aarch64')
        damaged = busybox_image.unified()[:300000]
        for content in (foreign, damaged):
            fake, real = self.same('POST', '/1.0/images', content,
                                   headers=self.OCTETS)
            body = {'name': 'c1', 'source': {
                'type': 'image',
                'fingerprint': real.operation['metadata']['fingerprint']}}
            fake = self.fake_api.call('POST', '/1.0/instances', body)
            real = self.real_api.call('POST', '/1.0/instances', body)
            self.assertEqual(real.error.split(' tar')[0],
                             fake.error.split(' tar')[0])
            self.same('GET', '/1.0/instances')

    def test_aliases(self):
        for api in (self.fake_api, self.real_api):
            api.must('POST', '/1.0/images', self.content, headers=self.OCTETS)
        fingerprint = self.real_api.must(
            'GET', '/1.0/images?recursion=1')[0]['fingerprint']
        base = '/1.0/images/aliases'
        for body in ({'name': '', 'target': fingerprint}, {'name': 'a'},
                     {'name': 'a', 'target': '1234'},
                     {'name': 'a', 'target': fingerprint,
                      'description': 'd'},
                     {'name': 'a', 'target': fingerprint}):
            self.same('POST', base, body)
        self.same('GET', f'{base}/a', values=True)
        self.same('GET', base, values=True)
        self.same('GET', f'{base}?recursion=1', values=True)
        self.same('PUT', f'{base}/a', {'target': fingerprint,
                                       'description': 'e'})
        self.same('GET', f'{base}/a', values=True)
        for api in (self.fake_api, self.real_api):
            self.assertEqual(412, api.call(
                'PATCH', f'{base}/a', {'description': 'z'},
                headers={'If-Match': 'x'}).status)
        self.same('POST', f'{base}/a', {'name': 'b'})
        self.same('GET', f'{base}/a')
        self.same('PUT', f'{base}/a', {'target': fingerprint})
        self.same('GET', f'/1.0/images/{fingerprint}',
                  ignore=('uploaded_at', 'created_at'), values=True)
        self.same('DELETE', f'{base}/b')
        self.same('DELETE', f'{base}/b')
        for api in (self.fake_api, self.real_api):
            api.must('POST', base, {'name': 'c', 'target': fingerprint})
        self.same('DELETE', f'/1.0/images/{fingerprint}')
        self.same('GET', base)
