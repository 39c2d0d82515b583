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

"""Sample configuration, rootwrap filters, metadefs and support matrix."""

from __future__ import annotations

import pathlib
import tempfile

from oslo_config import generator
from oslo_rootwrap import wrapper
from oslotest import base

from nova_lxd_py.virt import privileged

ROOT = pathlib.Path(__file__).resolve().parents[2]
ETC = ROOT / 'etc'


class SampleConfigurationTestCase(base.BaseTestCase):
    """etc/nova/nova-lxd-py.conf.sample."""

    def test_is_current(self):
        with tempfile.TemporaryDirectory() as directory:
            output = pathlib.Path(directory) / 'sample'
            generator.main([
                '--config-file',
                str(ETC / 'nova' / 'nova-lxd-py-config-generator.conf'),
                '--output-file', str(output)])
            self.assertEqual(
                output.read_text(),
                (ETC / 'nova' / 'nova-lxd-py.conf.sample').read_text(),
                'The sample is out of date: run tox -e genconfig.')


class RootwrapFiltersTestCase(base.BaseTestCase):
    """etc/nova/rootwrap.d/lxd.filters."""

    def _allowed(self, *command):
        # oslo.rootwrap adds a filter for privsep-helper with any arguments.
        return any(each.match(list(command)) for each in
                   wrapper.load_filters([str(ETC / 'nova' / 'rootwrap.d')])
                   if each.name != 'privsep-helper')

    def _helper(self, context, *files, socket='/tmp/tmpab12/privsep.sock'):
        # The order of arguments in oslo.privsep, which is kept stable for
        # such filters.
        options = [word for file in files for word in ('--config-file', file)]
        return ['privsep-helper', *options, '--privsep_context', context,
                '--privsep_sock_path', socket]

    def test_own_contexts(self):
        for context in (privileged.context, privileged.network_context):
            path = context.pypath
            self.assertTrue(self._allowed(
                *self._helper(path, '/etc/nova/nova.conf')))
            self.assertTrue(self._allowed(
                *self._helper(path, '/etc/nova/nova.conf',
                              '/etc/nova/nova-compute.conf')))

    def test_os_vif_context(self):
        self.assertTrue(self._allowed(*self._helper(
            'vif_plug_ovs.privsep.vif_plug', '/etc/nova/nova.conf')))

    def test_nothing_else(self):
        path = privileged.context.pypath
        for words in (
                self._helper('os.system', '/etc/nova/nova.conf'),
                self._helper(path, '/tmp/nova.conf'),
                self._helper(path, '/etc/../tmp/nova.conf'),
                self._helper(path, '/etc/nova/nova.conf', socket='/root/x'),
                ['sh', '-c', 'id']):
            self.assertFalse(self._allowed(*words), words)
