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

"""Quotas of btrfs pools; that they are set is in tests/functional."""

from __future__ import annotations

import os

import fixtures
from oslotest import base

from nova_lxd_py.virt import privileged
from nova_lxd_py.virt.privileged import btrfs


class ArgumentsTest(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        privileged.context.set_client_mode(False)
        self.addCleanup(privileged.context.set_client_mode, True)
        self.pool = self.useFixture(fixtures.TempDir()).path
        os.makedirs(f'{self.pool}/containers/c1')

    def test_refused(self) -> None:
        for pool, container, size in (
                ('pool', 'c1', 1), (self.pool, '', 1), (self.pool, '..', 1),
                (self.pool, 'a/b', 1), (self.pool, 'c1\0', 1),
                (self.pool, 'c1', 0), (self.pool, 'c1', 1 << 63),
                (self.pool, 'c1', '1')):
            self.assertRaises(ValueError, btrfs.set_quota, pool, container,
                              size)

    def test_not_there(self) -> None:
        self.assertRaises(FileNotFoundError, btrfs.set_quota, self.pool, 'c2',
                          1)

    def test_no_subvolume(self) -> None:
        self.assertRaises(OSError, btrfs.set_quota, self.pool, 'c1', 1)

    def test_links(self) -> None:
        os.symlink('c1', f'{self.pool}/containers/link')
        self.assertRaises(OSError, btrfs.set_quota, self.pool, 'link', 1)
