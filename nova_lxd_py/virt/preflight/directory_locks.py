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
"""Directories that a nova-compute shares with no other one.

At its start the driver unmounts and closes what is below them and none of its
servers has. With a second nova-compute on the host, that would be volumes of
the other one's servers.
"""

from __future__ import annotations

import contextlib
import os

from oslo_concurrency import lockutils
from oslo_config import cfg
from oslo_log import log as logging

from nova_lxd_py.virt import exception_mapping
from nova_lxd_py.virt.privileged import lock_files

LOG = logging.getLogger(__name__)

#: Options of ``[lxd]`` with such directories.
OPTIONS = ('volume_root_directory', 'volume_mount_directory',
           'volume_share_directory', 'volume_encryption_directory')

#: Seconds to wait for another process, which may be the last nova-compute on
#: its way out.
PATIENCE = 10.0


class DirectoryLocks:
    """Locks of this nova-compute on its directories.

    The kernel releases them when the process ends, however that happens.

    :param options: the ``[lxd]`` option group.
    """

    def __init__(self, options: cfg.ConfigOpts.GroupAttr) -> None:
        self._options = options
        self._held: dict[str, lockutils.InterProcessLock] = {}

    def take(self, host: str) -> None:
        """Lock all directories. Idempotent.

        :param host: name of this compute host.
        :raises exception_mapping.StartupError: if another process has one, or
            a lock file cannot be created.
        """
        with contextlib.ExitStack() as undo:
            undo.callback(self.release)
            for option in OPTIONS:
                self._take(option, host)
            undo.pop_all()

    def release(self) -> None:
        """Unlock all directories. Idempotent."""
        while self._held:
            self._held.popitem()[1].release()

    def _take(self, option: str, host: str) -> None:
        directory = self._options[option]
        path = lock_files.path(directory)
        if path in self._held:
            return
        lock = lockutils.InterProcessLock(path)
        try:
            if not os.access(path, os.W_OK):
                self._create(directory)
            # POSIX locks: children do not have them, and a file that a crash
            # has left is not locked.
            taken = lock.acquire(timeout=PATIENCE, delay=0.1)
        except Exception as error:
            raise exception_mapping.StartupError(
                f'[lxd] {option} is {directory}, whose lock file {path} '
                f'nova-compute cannot use: {error}') from error
        if not taken:
            lock.lockfile.close()
            raise exception_mapping.StartupError(
                f'[lxd] {option} is {directory}, which {_read_owner(path)} '
                f'uses; each nova-compute on a host needs a directory of its '
                f'own')
        self._held[path] = lock
        lock.lockfile.truncate(0)
        lock.lockfile.write(f'nova-compute of host {host} (process '
                            f'{os.getpid()})\n')
        lock.lockfile.flush()

    @staticmethod
    def _create(directory: str) -> None:
        with contextlib.suppress(PermissionError, FileNotFoundError):
            with open(lock_files.path(directory), 'a'):
                return
        lock_files.create(directory, os.geteuid())


def _read_owner(path: str) -> str:
    with contextlib.suppress(OSError):
        with open(path, encoding='utf-8', errors='replace') as file:
            return file.read(300).strip() or 'another process'
    return 'another process'
