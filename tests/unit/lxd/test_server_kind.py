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

"""LXD and Incus are told apart by what they say of themselves."""

from __future__ import annotations

from oslo_config import fixture as config_fixture
from oslotest import base

from nova_lxd_py import conf
from nova_lxd_py.virt.lxd import metrics
from nova_lxd_py.virt.lxd import server_kind
from nova_lxd_py.virt.lxd import session
from tests.fixtures import fake_lxd


class ServerKindTestCase(base.BaseTestCase):

    def connect(self, server: str) -> session.Session:
        lxd = self.useFixture(fake_lxd.FakeLXD(project='nova', server=server))
        self.api = lxd.api
        for project in ('nova', 'default'):
            lxd.add_image(project=project, alias='tiny')
        cfg = self.useFixture(config_fixture.Config(conf.CONF))
        cfg.config(group='lxd', endpoint=lxd.endpoint, project='nova')
        opened = session.Session(conf.CONF.lxd)
        opened.connect()
        return opened

    def test_lxd(self) -> None:
        found = self.connect('lxd')
        self.assertIs(server_kind.LXD, found.kind)
        self.assertEqual('LXD 5.0.2', server_kind.version(found.server))

    def test_incus(self) -> None:
        found = self.connect('incus')
        self.assertIs(server_kind.INCUS, found.kind)
        self.assertEqual('Incus 6.0.4', server_kind.version(found.server))

    def test_client_that_is_not_trusted(self) -> None:
        """The environment is hidden from it."""
        untrusted = {'auth': 'untrusted', 'api_extensions': []}
        self.assertIs(server_kind.LXD, server_kind.identify(untrusted))
        self.assertEqual('LXD of an unknown version',
                         server_kind.version(untrusted))

    def test_metrics(self) -> None:
        for server in ('lxd', 'incus'):
            opened = self.connect(server)
            opened.post('instances', body={
                'name': 'c1', 'source': {'type': 'image', 'alias': 'tiny'},
                'profiles': [], 'config': {'limits.memory': '1GiB'},
                'devices': {'root': {'type': 'disk', 'path': '/',
                                     'pool': 'default'}}})
            opened.put('instances', 'c1', 'state', body={'action': 'start'})
            # Another project's may have the same name.
            where = {'project': 'default'}
            self.api.must('POST', '/1.0/instances', {
                'name': 'c1', 'source': {'type': 'image', 'alias': 'tiny'},
                'profiles': [], 'config': {'limits.memory': '2GiB'},
                'devices': {'root': {'type': 'disk', 'path': '/',
                                     'pool': 'default'}}}, params=where)
            self.api.must('PUT', '/1.0/instances/c1/state',
                          {'action': 'start'}, params=where)
            self.assertEqual(1 << 30, metrics.read(opened, 'c1').get(
                'memory_MemTotal_bytes'))

    def test_headers(self) -> None:
        for server in ('lxd', 'incus'):
            opened = self.connect(server)
            opened.post('instances', body={
                'name': 'c1', 'source': {'type': 'image', 'alias': 'tiny'},
                'profiles': [], 'devices': {'root': {
                    'type': 'disk', 'path': '/', 'pool': 'default'}}})
            opened.write_file('c1', '/root/mine', b'x', mode=0o400, uid=7)
            with opened.download('instances', 'c1', 'files', params={
                    'path': '/root/mine'}) as (headers, _chunks):
                self.assertEqual(('0400', '7', 'file'), (
                    headers['X-LXD-mode'], headers['x-lxd-uid'],
                    headers['X-LXD-type']))
