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
"""Lock files, of which root creates those in directories of its own."""

from __future__ import annotations

import os

import fixtures
from oslotest import base

from nova_lxd_py.virt import privileged
from nova_lxd_py.virt.privileged import lock_files


class LockFilesTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        privileged.context.set_client_mode(False)
        self.addCleanup(privileged.context.set_client_mode, True)
        self.directory = self.useFixture(fixtures.TempDir()).path

    def test_create(self) -> None:
        directory = os.path.join(self.directory, 'new', 'mounts')
        lock_files.create(directory, os.geteuid())
        about = os.stat(f'{directory}.nova-compute.lock')
        self.assertEqual((0, os.geteuid()), (about.st_size, about.st_uid))
        self.assertFalse(os.path.exists(directory))

    def test_existing_file_stays(self) -> None:
        directory = os.path.join(self.directory, 'mounts')
        precious = os.path.join(self.directory, 'precious')
        with open(precious, 'w') as file:
            file.write('content')
        before = os.stat(precious)
        for link in (os.link, os.symlink):
            link(precious, f'{directory}.nova-compute.lock')
            lock_files.create(directory, os.geteuid())
            after = os.stat(precious)
            self.assertEqual((before.st_uid, before.st_mode, before.st_size),
                             (after.st_uid, after.st_mode, after.st_size))
            os.unlink(f'{directory}.nova-compute.lock')

    def test_dangling_link_is_not_followed(self) -> None:
        directory = os.path.join(self.directory, 'mounts')
        target = os.path.join(self.directory, 'target')
        os.symlink(target, f'{directory}.nova-compute.lock')
        lock_files.create(directory, os.geteuid())
        self.assertFalse(os.path.exists(target))

    def test_wrong_arguments(self) -> None:
        for directory, uid in (('relative', 0), ('/a\0b', 0), (1, 0),
                               ('/mounts', -1), ('/mounts', '0')):
            self.assertRaises(ValueError, lock_files.create, directory, uid)
