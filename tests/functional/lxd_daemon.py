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

"""A private LXD for functional tests and benchmarks.

It runs beside whatever LXD the host has, in a temporary directory of its own,
and leaves nothing behind: no process, no mount, no loop device. With the
environment variable LXD_SOCKET tests use the LXD that listens there instead,
and its pool LXD_POOL (``default``).
"""

from __future__ import annotations

import atexit
import contextlib
import grp
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from typing import Any

import fixtures

from tests.functional import busybox_image
from tests import raw_lxd

#: Seconds that the daemon may take to answer or to end.
DAEMON_TIMEOUT = 60

#: How often the daemon is started if it panics, and how it ends then.
STARTS = 3
GO_PANIC = 2


def missing() -> str | None:
    """Say what this machine lacks for an LXD of its own, if anything.

    :returns: a sentence fit for a skipped test, or None.
    """
    if os.environ.get('LXD_SOCKET'):
        return None
    if os.geteuid() != 0:
        return 'LXD needs root'
    for program, package in (('lxd', 'lxd'), ('mkfs.btrfs', 'btrfs-progs'),
                             ('newuidmap', 'uidmap')):
        if shutil.which(program) is None:
            return f'{program} is not installed (package {package})'
    if busybox_image.busybox() is None:
        return 'busybox is not installed (package busybox-static)'
    return None


class RealLXD(contextlib.AbstractContextManager['RealLXD']):
    """A daemon with a storage pool; its default profile has a root disk.

    :param driver: of the storage pool, ``btrfs`` (on a loop file) or
        ``dir``.
    :param size: of the loop file, which is sparse.

    :ivar endpoint: its unix socket, for ``[lxd] endpoint``.
    :ivar pool: name of the storage pool.
    :ivar api: sends requests to it.
    """

    def __init__(self, driver: str = 'btrfs', size: str = '8GiB') -> None:
        self.driver = driver
        self.size = size
        self.pool = os.environ.get('LXD_POOL', 'default')
        self.directory: pathlib.Path | None = None
        self._given = os.environ.get('LXD_SOCKET')
        self._process: subprocess.Popen[bytes] | None = None
        self._images: dict[tuple[str, str], str] = {}
        self.endpoint = self._given or ''

    # -- life ---------------------------------------------------------------

    def __enter__(self) -> RealLXD:
        if self._given:
            self.api = raw_lxd.Client(self._given)
            return self
        # Paths of unix sockets end at 107 bytes: not below a long TMPDIR.
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix='lxd-',
                                                       dir='/tmp'))
        self.endpoint = str(self.directory / 'unix.socket')
        self.api = raw_lxd.Client(self.endpoint, timeout=120)
        try:
            self.start()
            self._initialise()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def _initialise(self) -> None:
        config = {'size': self.size} if self.driver == 'btrfs' else {}
        self.api.must('POST', '/1.0/storage-pools', {
            'name': self.pool, 'driver': self.driver, 'config': config})
        self.set_root_device('default')

    def set_root_device(self, project: str) -> None:
        """Give a project's default profile a root disk on the pool."""
        self.api.must('PUT', '/1.0/profiles/default', {
            'description': '', 'config': {}, 'devices': {'root': {
                'type': 'disk', 'path': '/', 'pool': self.pool}}},
            params={'project': project})

    @property
    def environment(self) -> dict[str, str]:
        """What ``lxc`` needs in its environment to talk to this LXD."""
        if self.directory is None:
            return {}
        return {'LXD_DIR': str(self.directory)}

    def start(self) -> None:
        """Start the daemon, and wait until it answers.

        LXD 5.0 panics when the end of a container with a ``unix-block``
        device is reported to it before it has prepared itself, as after a
        crash in the middle of a stop. It is started again then, which is
        what its service does.
        """
        for _start in range(STARTS):
            if self._is_started():
                return
            if self._process is None or self._process.poll() != GO_PANIC:
                break
        raise RuntimeError(f'LXD does not start:\n{self.log()}')

    def _is_started(self) -> bool:
        assert self.directory is not None
        group = grp.getgrgid(os.getegid()).gr_name
        with open(self.directory / 'daemon.log', 'ab') as log:
            self._process = subprocess.Popen(
                ['lxd', '--group', group], stdout=log, stderr=log,
                stdin=subprocess.DEVNULL, cwd='/', start_new_session=True,
                env={**os.environ, **self.environment})
        deadline = time.monotonic() + DAEMON_TIMEOUT
        while time.monotonic() < deadline and self._process.poll() is None:
            if self._is_ready():
                return True
            time.sleep(0.05)
        return False

    def _is_ready(self) -> bool:
        try:
            # The socket answers earlier than this does.
            return self.api.request('GET', '/internal/ready').status == 200
        except OSError:
            return False

    def log(self) -> str:
        """What the daemon has written so far."""
        assert self.directory is not None
        return (self.directory / 'daemon.log').read_text(errors='replace')

    def stop(self) -> None:
        """Stop the daemon; containers run on."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Let the daemon crash; containers run on."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        self.stop()
        self.start()

    def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(number)
        try:
            self._process.wait(DAEMON_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def close(self) -> None:
        """Stop containers and daemon, and remove every trace of them."""
        if self.directory is None:
            return
        with contextlib.suppress(Exception):
            if self._process is None or self._process.poll() is not None:
                self.start()
            self.stop_instances()
        self.stop()
        self._kill_leftovers()
        for mount in reversed(self._mounts()):
            subprocess.run(['umount', '--lazy', mount], check=False,
                           capture_output=True)
        self._detach_loops()
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory = None

    def stop_instances(self) -> None:
        """Stop all instances of all projects by force."""
        running = [
            instance for instance in self.api.must(
                'GET', '/1.0/instances',
                params={'recursion': 1, 'all-projects': 'true'})
            if instance['status'] != 'Stopped']
        threads = [threading.Thread(target=self.api.call, args=(
            'PUT', f'/1.0/instances/{instance["name"]}/state',
            {'action': 'stop', 'force': True}),
            kwargs={'params': {'project': instance['project']}})
            for instance in running]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _kill_leftovers(self) -> None:
        """End helpers of the daemon, which may hold mounts of ours."""
        marks = (f'LXD_DIR={self.directory}'.encode(),
                 str(self.directory).encode() + b'/')
        for entry in pathlib.Path('/proc').iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            with contextlib.suppress(OSError):
                environment = (entry / 'environ').read_bytes().split(b'\0')
                command = (entry / 'cmdline').read_bytes()
                if not command.startswith((b'lxd\0', b'lxd ', b'[lxc monitor]',
                                           b'/usr/bin/lxd', b'/usr/sbin/lxd')):
                    continue
                if marks[0] in environment or marks[1] in command:
                    os.kill(int(entry.name), signal.SIGKILL)

    def _mounts(self) -> list[str]:
        with open('/proc/self/mountinfo') as source:
            found = [line.split()[4] for line in source]
        return [mount for mount in found
                if mount == str(self.directory)
                or mount.startswith(f'{self.directory}/')]

    def _detach_loops(self) -> None:
        assert self.directory is not None
        for disk in self.directory.glob('disks/*.img'):
            listed = subprocess.run(
                ['losetup', '--noheadings', '--output', 'NAME',
                 '--associated', str(disk)],
                check=False, capture_output=True, text=True)
            for device in listed.stdout.split():
                subprocess.run(['losetup', '--detach', device], check=False,
                               capture_output=True)

    def wait_for_operations(self) -> None:
        """Wait until it has done what it was asked for."""
        deadline = time.monotonic() + DAEMON_TIMEOUT
        while any(operation['class'] == 'task' for operation in self.api.must(
                'GET', '/1.0/operations', params={
                    'recursion': 1, 'all-projects': 'true'}).get(
                        'running', ())):
            if time.monotonic() > deadline:
                raise RuntimeError('LXD does not finish what it does')
            time.sleep(0.05)

    # -- contents -----------------------------------------------------------

    def add_project(self, name: str) -> None:
        """Create a project with images, profiles and volumes of its own."""
        self.api.must('POST', '/1.0/projects', {'name': name, 'config': {
            'features.images': 'true', 'features.profiles': 'true',
            'features.storage.volumes': 'true'}})
        self.set_root_device(name)

    def add_image(self, content: bytes | None = None, *,
                  project: str = 'default', alias: str = 'busybox') -> str:
        """Import an image, by default a busybox, unless it is there.

        :returns: its fingerprint.
        """
        known = self._images.get((project, alias))
        if known is not None:
            return known
        params = {'project': project}
        fingerprint = self.api.must(
            'POST', '/1.0/images', content or busybox_image.unified(),
            headers={'Content-Type': 'application/octet-stream'},
            params=params)['fingerprint']
        self.api.must('POST', '/1.0/images/aliases', {
            'name': alias, 'target': fingerprint}, params=params)
        self._images[project, alias] = fingerprint
        return fingerprint


class LXDDaemon(fixtures.Fixture):
    """A :class:`RealLXD` for one test or class, as attribute ``lxd``."""

    def __init__(self, driver: str = 'btrfs', size: str = '8GiB') -> None:
        super().__init__()
        self._driver = driver
        self._size = size

    def _setUp(self) -> None:
        self.lxd = RealLXD(self._driver, self._size).__enter__()
        self.addCleanup(self.lxd.close)


_shared: dict[str, RealLXD] = {}


def shared(driver: str = 'btrfs') -> RealLXD:
    """One daemon for all tests of this process, stopped when it ends.

    Tests that use it work in a project of their own and do not restart it.

    :param driver: of the storage pool.
    """
    if driver not in _shared:
        _shared[driver] = RealLXD(driver).__enter__()
        atexit.register(_shared[driver].close)
    return _shared[driver]
