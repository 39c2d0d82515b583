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

"""Checks of the root directory of a container on a storage pool."""

from __future__ import annotations

import os
import pathlib

import fixtures
from oslotest import base

from nova_lxd_py.virt.privileged import rootfs_check


class FindTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.pool = pathlib.Path(self.useFixture(fixtures.TempDir()).path)
        self.root = self.pool / 'containers' / 'c1' / 'rootfs'

    def find(self, name: str = 'c1') -> str:
        return rootfs_check.find(str(self.pool), name)

    def test_directory(self) -> None:
        self.root.mkdir(parents=True)
        self.assertEqual(rootfs_check.PRESENT, self.find())

    def test_not_mounted(self) -> None:
        self.assertEqual(rootfs_check.ABSENT, self.find())
        self.root.parent.mkdir(parents=True)
        self.assertEqual(rootfs_check.ABSENT, self.find())

    def test_link(self) -> None:
        (self.pool / 'elsewhere' / 'rootfs').mkdir(parents=True)
        self.root.parent.mkdir(parents=True)
        for target in ('/', '/nowhere', '../../elsewhere/rootfs'):
            os.symlink(target, self.root)
            self.assertEqual(rootfs_check.REPLACED, self.find())
            self.root.unlink()

    def test_link_above(self) -> None:
        (self.pool / 'elsewhere' / 'rootfs').mkdir(parents=True)
        self.root.parent.parent.mkdir()
        os.symlink('../elsewhere', self.root.parent)
        self.assertEqual(rootfs_check.REPLACED, self.find())

    def test_file(self) -> None:
        self.root.parent.mkdir(parents=True)
        self.root.touch()
        self.assertEqual(rootfs_check.REPLACED, self.find())

    def test_names(self) -> None:
        for name in ('', '.', '..', 'a/b', 'a\0b'):
            self.assertRaises(ValueError, self.find, name)
