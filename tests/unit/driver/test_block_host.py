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

"""The host in memory stands in for every function that runs as root."""

from __future__ import annotations

import importlib
import pkgutil
import unittest

from nova_lxd_py.virt import privileged
from tests.fixtures import fake_block_host

#: The first talk to a kernel that :class:`.fake_host.FakeHost` has, the second
#: need no root in the directories of tests.
_REAL = {'network', 'lock_files'}


class BlockHostTest(unittest.TestCase):

    def test_every_entry_point_has_a_fake(self) -> None:
        missing = []
        for module in pkgutil.iter_modules(privileged.__path__):
            if module.name in _REAL:
                continue
            loaded = importlib.import_module(
                f'{privileged.__name__}.{module.name}')
            missing += [
                f'{module.name}.{name}' for name, member
                in vars(loaded).items()
                if privileged.context.is_entrypoint(member)
                and not hasattr(fake_block_host.BlockHost,
                                f'_root_{module.name}__{name}')]
        self.assertEqual([], missing)
