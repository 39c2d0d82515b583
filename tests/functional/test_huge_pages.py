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

"""Huge pages for instances, on hosts that have and can limit them."""

from __future__ import annotations

import os
import pathlib
import unittest

from nova import objects

from nova_lxd_py.virt.host import numa
from tests.fixtures import cpu_case
from tests.fixtures import lxd_daemon

SIZE = 32


def missing() -> str | None:
    """Return why huge pages cannot be tested here; None if they can."""
    if not numa.can_limit_huge_pages():
        return 'the kernel has no cgroup controller for huge pages'
    free = pathlib.Path('/sys/kernel/mm/hugepages/hugepages-2048kB/'
                        'free_hugepages')
    if not free.exists() or int(free.read_text()) < SIZE // 2:
        return f'needs {SIZE // 2} huge pages (vm.nr_hugepages)'
    return lxd_daemon.missing()


MISSING = missing()


@unittest.skipIf(MISSING, MISSING or '')
class HugePageTest(cpu_case.CpuTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.divide(set(), set())

    def limit(self, server: objects.Instance) -> int | None:
        """Return the limit of the instance's cgroup in bytes."""
        with open(f'/proc/{self.pid(server)}/cgroup') as stream:
            paths = [line.strip().split(':', 2)[1:] for line in stream]
        for controllers, path in paths:
            for root, name in (
                    ('/sys/fs/cgroup/hugetlb', 'limit_in_bytes'),
                    ('/sys/fs/cgroup/unified', 'max'),
                    ('/sys/fs/cgroup', 'max')):
                directory = path
                while directory not in ('', '/'):
                    file = f'{root}{directory}/hugetlb.2MB.{name}'
                    if os.path.exists(file):
                        text = pathlib.Path(file).read_text().strip()
                        return None if text == 'max' else int(text)
                    directory = os.path.dirname(directory)
        return None

    def test_limit(self) -> None:
        server = self.server({'hw:mem_page_size': '2048'}, memory_mb=SIZE)
        self.assertEqual(SIZE << 20, self.limit(server))

    def test_resize(self) -> None:
        server = self.server(memory_mb=SIZE)
        with self.running_on(server):
            self.resize(server, extra_specs={'hw:mem_page_size': 'large'})
            self.assertEqual(SIZE << 20, self.limit(server))
            self.revert(server)
            self.assertEqual(0, self.limit(server))

    def test_none_for_others(self) -> None:
        self.assertEqual(0, self.limit(self.server()))
