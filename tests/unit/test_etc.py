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

import configparser
import importlib
import json
import pathlib
import re
import tempfile

from oslo_config import generator
from oslo_rootwrap import wrapper
from oslotest import base

from nova_lxd_py.virt.guest import flavor
from nova_lxd_py.virt import privileged

ROOT = pathlib.Path(__file__).resolve().parents[2]
ETC = ROOT / 'etc'
MATRIX = ROOT / 'doc' / 'source' / 'support-matrix.ini'


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

    def test_own_context(self):
        path = privileged.context.pypath
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


class MetadefsTestCase(base.BaseTestCase):
    """etc/metadefs/compute-lxd-flavor.json."""

    def test_has_every_extra_spec(self):
        definitions = json.loads(
            (ETC / 'metadefs' / 'compute-lxd-flavor.json').read_text())
        self.assertEqual(set(flavor.KNOWN_SPECS),
                         set(definitions['properties']))


class SupportMatrixTestCase(base.BaseTestCase):
    """doc/source/support-matrix.ini."""

    def setUp(self):
        super().setUp()
        self.matrix = configparser.ConfigParser(interpolation=None)
        self.matrix.read(MATRIX)

    def _operations(self):
        return [name for name in self.matrix.sections()
                if name.startswith('operation.')]

    def test_has_rows(self):
        self.assertGreater(len(self._operations()), 30)

    def test_named_tests_exist(self):
        """Each claim names an existing test."""
        for name in self._operations():
            section = self.matrix[name]
            tests = re.findall(
                r'\btests\.[\w.]*\w', section.get('driver-notes.lxd', ''))
            if section['driver.lxd'] in ('complete', 'partial'):
                self.assertNotEqual([], tests, f'{name} names no test')
            for test in tests:
                self._find(test)

    def _find(self, path):
        words = path.split('.')
        # Tests that need root or a cloud cannot be imported everywhere, so
        # the file is parsed instead.
        for count in range(len(words), 0, -1):
            file = ROOT.joinpath(*words[:count]).with_suffix('.py')
            if file.is_file():
                break
        else:
            self.fail(f'There is no test module for {path}')
        text = file.read_text()
        for name in words[count:]:
            self.assertRegex(text, rf'(?:class|def) {name}\b', path)

    def test_capabilities_agree(self):
        """The capabilities of the driver agree with the matrix."""
        driver = importlib.import_module('nova_lxd_py.virt.driver')
        capabilities = driver.LXDDriver.capabilities
        for operation, capability in (
                ('operation.attach-interface', 'supports_attach_interface'),
                ('operation.extend-volume', 'supports_extend_volume'),
                ('operation.attach-tagged-interface',
                 'supports_tagged_attach_interface'),
                ('operation.device-tags', 'supports_device_tagging'),
                ('operation.attach-tagged-volume',
                 'supports_tagged_attach_volume'),
                ('operation.multiattach-volume', 'supports_multiattach'),
                ('operation.trusted-certs', 'supports_trusted_certs')):
            self.assertEqual(
                self.matrix[operation]['driver.lxd'] != 'missing',
                bool(capabilities.get(capability)), operation)
        # Nova has no such capability.
        self.assertEqual(
            self.matrix['operation.swap-volume']['driver.lxd'] != 'missing',
            'swap_volume' in vars(driver.LXDDriver))
