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
"""Locks on directories, against other processes."""

from __future__ import annotations

from collections.abc import Callable
import os
import signal
import time
import types
from unittest import mock

import fixtures
from oslotest import base

from nova_lxd_py.virt import exception_mapping
from nova_lxd_py.virt.preflight import directory_locks
from nova_lxd_py.virt import privileged
from nova_lxd_py.virt.privileged import lock_files


class Options(types.SimpleNamespace):
    __getitem__ = object.__getattribute__


class DirectoryLocksTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        privileged.context.set_client_mode(False)
        self.addCleanup(privileged.context.set_client_mode, True)
        self.directory = self.useFixture(fixtures.TempDir()).path
        patch = mock.patch.object(directory_locks, 'PATIENCE', 30)
        patch.start()
        self.addCleanup(patch.stop)

    def options(self, name: str, **values: str) -> Options:
        return Options(**{option: os.path.join(self.directory, name, option)
                          for option in directory_locks.OPTIONS} | values)

    def locks(self, options: Options) -> directory_locks.DirectoryLocks:
        locks = directory_locks.DirectoryLocks(options)
        self.addCleanup(locks.release)
        return locks

    def other_process(self, options: Options, then: Callable[[], object]
                      ) -> int:
        """Have another process take the locks.

        :param then: what it does when it has them.
        """
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            try:
                locks = directory_locks.DirectoryLocks(options)
                locks.take('first')
                os.write(writing, b'.')
                then()
                locks.release()
            finally:
                os._exit(0)
        os.close(writing)
        self.assertEqual(b'.', os.read(reading, 1))
        os.close(reading)

        def end() -> None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)

        self.addCleanup(end)
        return child

    def test_directories_of_their_own(self) -> None:
        self.other_process(self.options('one'), signal.pause)
        self.locks(self.options('two')).take('second')

    def test_each_shared_directory_is_refused(self) -> None:
        directory_locks.PATIENCE = 0.1
        theirs = self.options('one')
        child = self.other_process(theirs, signal.pause)
        for option in directory_locks.OPTIONS:
            ours = self.options('two', **{option: theirs[option]})
            error = self.assertRaises(exception_mapping.StartupError,
                                      self.locks(ours).take, 'second')
            self.assertIn(f'[lxd] {option} is {theirs[option]}, which '
                          f'nova-compute of host first (process {child}) '
                          f'uses', str(error))
        # What the failures had taken is free.
        self.other_process(self.options('two'), signal.pause)

    def test_other_name_of_the_directory(self) -> None:
        directory_locks.PATIENCE = 0.1
        theirs = self.options('one')
        self.other_process(theirs, signal.pause)
        os.symlink('one', os.path.join(self.directory, 'link'))
        self.assertRaises(exception_mapping.StartupError,
                          self.locks(self.options('link')).take, 'second')

    def test_after_a_crash(self) -> None:
        options = self.options('one')
        child = self.other_process(options, signal.pause)
        os.kill(child, signal.SIGKILL)
        self.locks(options).take('second')
        path = lock_files.path(options.volume_root_directory)
        with open(path) as file:
            self.assertEqual(f'nova-compute of host second (process '
                             f'{os.getpid()})\n', file.read())

    def test_child_of_a_crashed_process(self) -> None:
        """It may hang in a system call on storage that does not answer."""
        options = self.options('one')
        reading, writing = os.pipe()

        def leave_child() -> None:
            grandchild = os.fork()
            if not grandchild:
                signal.pause()
            os.write(writing, b'%d' % grandchild)
            os._exit(0)

        self.other_process(options, leave_child)
        grandchild = int(os.read(reading, 20))
        self.addCleanup(os.kill, grandchild, signal.SIGKILL)
        self.locks(options).take('second')

    def test_last_process_is_about_to_end(self) -> None:
        options = self.options('one')
        self.other_process(options, lambda: time.sleep(0.3))
        start = time.monotonic()
        self.locks(options).take('second')
        self.assertLess(time.monotonic() - start, 25)

    def test_start_and_stop(self) -> None:
        options = self.options('one')
        locks = self.locks(options)
        locks.take('first')
        locks.take('first')
        locks.release()
        locks.release()
        self.other_process(options, signal.pause)

    def test_file_that_cannot_be_created(self) -> None:
        with open(os.path.join(self.directory, 'file'), 'w'):
            pass
        options = self.options('file')
        error = self.assertRaises(exception_mapping.StartupError,
                                  self.locks(options).take, 'first')
        self.assertIn('[lxd] volume_root_directory is '
                      f'{options.volume_root_directory}, whose lock file',
                      str(error))

    def test_where_only_root_may_write(self) -> None:
        """As in /run."""
        options = self.options('one')
        with (mock.patch('os.access', lambda *args: False),
              mock.patch('builtins.open', side_effect=PermissionError)):
            locks = self.locks(options)
            # Not for the user himself, either: fasteners opens it.
            self.assertRaises(exception_mapping.StartupError, locks.take,
                              'first')
        about = os.stat(lock_files.path(options.volume_root_directory))
        self.assertEqual((os.geteuid(), 0o644 & ~self.umask()),
                         (about.st_uid, about.st_mode & 0o777))
        locks.take('first')

    @staticmethod
    def umask() -> int:
        mask = os.umask(0)
        os.umask(mask)
        return mask
