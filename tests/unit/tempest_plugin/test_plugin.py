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


"""The plugin, as tempest loads it."""

from __future__ import annotations

import importlib.metadata
import os
import unittest

from oslo_config import cfg

try:
    from tempest.test_discover import plugins
except ImportError:
    plugins = None


@unittest.skipIf(plugins is None, 'tempest is not installed')
class PluginTest(unittest.TestCase):

    def setUp(self) -> None:
        super().setUp()
        [entry] = importlib.metadata.entry_points(
            group='tempest.test_plugins', name='nova_lxd_py')
        self.plugin = entry.load()()

    def test_kind(self) -> None:
        self.assertIsInstance(self.plugin, plugins.TempestPlugin)

    def test_tests_are_found(self) -> None:
        directory, top = self.plugin.load_tests()
        found = unittest.TestLoader().discover(directory, top_level_dir=top)
        names = {type(test).__name__ for suite in found for cases in suite
                 for test in cases}
        self.assertIn('LimitsTest', names)
        self.assertNotIn('_FailedTest', names)
        self.assertTrue(os.path.isfile(
            os.path.join(top, 'nova_lxd_py/tempest/plugin.py')))

    def test_options(self) -> None:
        conf = cfg.ConfigOpts()
        self.plugin.register_opts(conf)
        conf([])
        self.assertEqual(500, conf.lxd.longest_pause)
        self.assertFalse(conf.lxd.mounted_volumes)
        [(section, options)] = self.plugin.get_opt_lists()
        self.assertEqual('lxd', section)
        self.assertEqual({option.dest for option in options},
                         set(conf.lxd))
