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

"""A session with a fake LXD, for the tests of what builds on it."""

from __future__ import annotations

from oslo_config import fixture as config_fixture
from oslotest import base

from nova_lxd_py import conf
from nova_lxd_py.virt import errors
from nova_lxd_py.virt import session
from tests.unit import fake_lxd


class SessionTestCase(base.BaseTestCase):

    def setUp(self):
        super().setUp()
        self.lxd = self.useFixture(fake_lxd.FakeLXD(project='nova'))
        self.lxd.add_image(project='nova', alias='tiny')
        self.cfg = self.useFixture(config_fixture.Config(conf.CONF))
        self.cfg.config(group='lxd', endpoint=self.lxd.endpoint,
                        project='nova', request_timeout=5)
        self.session = session.Session(conf.CONF.lxd)

    def create(self, name='c1', start=False, **config):
        self.session.post('instances', body={
            'name': name, 'source': {'type': 'image', 'alias': 'tiny'},
            'profiles': [], 'config': config, 'devices': {'root': {
                'type': 'disk', 'path': '/', 'pool': 'default'}}})
        if start:
            self.session.put('instances', name, 'state', body={
                'action': 'start'})

    def status(self):
        return self.lxd.instance('c1').status

    def refused(self, kind, function, *args, **kwargs):
        """Have a call fail with exactly this class of error."""
        error = self.assertRaises(errors.LXDError, function, *args, **kwargs)
        self.assertIs(kind, type(error), str(error))
        return error
