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

"""The check that the root of an instance is what LXD has made."""

from __future__ import annotations

import pathlib
from unittest import mock

import fixtures

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import root_check
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.privileged import rootfs_check
from tests.fixtures import session_case


class RootCheckTestCase(session_case.SessionTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.create()
        self.top = pathlib.Path(self.useFixture(fixtures.TempDir()).path)
        self.cfg.config(group='lxd', directory=str(self.top))
        self.root = (self.top / 'storage-pools' / 'default' / 'containers' /
                     'nova_c1' / 'rootfs')

    def check(self) -> None:
        root_check.ensure_own_root(self.session, lxd_guest.Guest(
            self.session, self.session.get('instances', 'c1')))

    def test_directory(self) -> None:
        self.root.mkdir(parents=True)
        self.check()

    def test_replaced(self) -> None:
        self.root.parent.mkdir(parents=True)
        self.root.symlink_to('/')
        self.assertRaises(errors.OperationFailed, self.check)

    def test_pool_that_is_not_mounted(self) -> None:
        self.check()
        self.root.parents[2].mkdir(parents=True)
        self.check()

    def test_only_root_can_look(self) -> None:
        self.root.mkdir(parents=True)
        for found in (rootfs_check.PRESENT, rootfs_check.ABSENT):
            with (mock.patch.object(rootfs_check, 'find',
                                    side_effect=PermissionError),
                  mock.patch.object(rootfs_check, 'find_as_root',
                                    return_value=found) as asked):
                self.check()
            asked.assert_called_once_with(
                str(self.top / 'storage-pools' / 'default'), 'nova_c1')

    def test_directory_of_lxd(self) -> None:
        self.assertEqual(str(self.top),
                         root_check.lxd_directory(self.session))
        self.cfg.config(group='lxd', directory='')
        self.assertEqual(
            str(pathlib.Path(self.lxd.endpoint).resolve().parent),
            root_check.lxd_directory(self.session))
