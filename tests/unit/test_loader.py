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


"""How Nova finds the driver: the module that a .pth file imports."""

from __future__ import annotations

from importlib import util
import sys
import unittest
from unittest import mock

from nova import version

from nova_lxd_py import loader
from nova_lxd_py.virt import driver


def load(path: str, name: str = 'loaded_again'):
    """Run a module as an interpreter does when it starts."""
    spec = util.spec_from_file_location(name, path)
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class LoaderTest(unittest.TestCase):

    def setUp(self) -> None:
        super().setUp()
        patched = mock.patch.object(sys, 'meta_path', list(sys.meta_path))
        patched.start()
        self.addCleanup(patched.stop)

    def test_one_name_only(self) -> None:
        module = load(loader.__file__)
        self.assertIs(module.NovaVirtLXDFinder, sys.meta_path[-1])
        module.install()
        self.assertEqual(1, sys.meta_path.count(module.NovaVirtLXDFinder))
        find = module.NovaVirtLXDFinder.find_spec
        for name in ('nova.virt', 'nova.virt.libvirt', 'lxd', 'os'):
            self.assertIsNone(find(name))
        found = find(module.ALIAS)
        self.assertIs(driver.LXDDriver, load(found.origin).LXDDriver)

    def test_old_nova(self) -> None:
        origin = loader.NovaVirtLXDFinder.find_spec(loader.ALIAS).origin
        with mock.patch.object(version.version_info, 'version_string',
                               lambda: '30.1.0'):
            with self.assertRaisesRegex(ImportError, 'Nova 31'):
                load(origin)
        with mock.patch.object(version.version_info, 'version_string',
                               lambda: '0.0.1'):
            load(origin)
