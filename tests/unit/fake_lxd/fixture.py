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

"""The fixture that tests use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import fnmatch
import hashlib
import io
import os
import shutil
import tarfile
import tempfile
import time
from typing import Any

import fixtures

from tests.unit.fake_lxd import certificates
from tests.unit.fake_lxd import clock
from tests.unit.fake_lxd import daemon
from tests.unit.fake_lxd import execution  # noqa: F401 - registers routes
from tests.unit.fake_lxd import faults
from tests.unit.fake_lxd import files as _files  # noqa: F401 - as above
from tests.unit.fake_lxd import image_content
from tests.unit.fake_lxd import instance_creation  # noqa: F401 - as above
from tests.unit.fake_lxd import instance_views  # noqa: F401 - as above
from tests.unit.fake_lxd import instances as _instances  # noqa: F401
from tests.unit.fake_lxd import power
from tests.unit.fake_lxd import projects  # noqa: F401 - as above
from tests.unit.fake_lxd import routing
from tests.unit.fake_lxd import server
from tests.unit.fake_lxd import state
from tests.unit.fake_lxd import storage  # noqa: F401 - as above
from tests.unit.fake_lxd import transport


def tarball(content: dict[str, bytes | None], mode: str = 'w:gz') -> bytes:
    """Build a tarball in memory.

    :param content: file content by path; None makes a folder.
    :param mode: as for tarfile.
    """
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            if data is None:
                member.type, member.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(member)
            else:
                member.size, member.mode = len(data), 0o755
                archive.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def unified_image(files: dict[str, bytes | None] | None = None,
                  architecture: str = 'x86_64') -> bytes:
    """Build a small image that LXD imports.

    :param files: what is in its root filesystem besides an init.
    """
    content: dict[str, bytes | None] = {
        'metadata.yaml': f'architecture: {architecture}\n'
                         f'creation_date: 1700000000\n'
                         f'properties:\n  os: tiny\n'.encode(),
        'rootfs': None, 'rootfs/sbin': None, 'rootfs/sbin/init': b'init',
        'rootfs/etc': None,
        'rootfs/etc/passwd': b'root:x:0:0:root:/root:/bin/sh\n',
        'rootfs/root': None}
    for name, data in (files or {}).items():
        content[f'rootfs/{name.lstrip("/")}'] = data
    return tarball(content)


class FakeLXD(fixtures.Fixture):
    """A running fake LXD.

    Out of the box it has a btrfs pool ``default`` and, in every project, a
    profile ``default`` without devices.

    :param pool_driver: driver of the pool, ``btrfs`` or ``dir``.
    :param project: a project to create besides ``default``; None for none.

    :ivar endpoint: path of its socket, for ``[lxd] endpoint``.
    :ivar folder: a temporary folder, gone at the end of the test.
    :ivar daemon: the daemon: settings, state and log of requests.
    """

    def __init__(self, pool_driver: str = 'btrfs',
                 project: str | None = None) -> None:
        super().__init__()
        self._pool_driver = pool_driver
        self._project = project

    def _setUp(self) -> None:
        # Paths of unix sockets may have 107 bytes only, so not in a
        # temporary folder below another one.
        self.folder = tempfile.mkdtemp(prefix='flxd')
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        self.endpoint = os.path.join(self.folder, 'unix.socket')
        self.daemon = daemon.Daemon()
        self.daemon.resources = server.resources()
        self.daemon.store.pools['default'] = state.Pool(
            'default', self._pool_driver)
        if self._project:
            self.add_project(self._project)
        self._server: transport.UnixServer | None = None
        self.daemon.is_up = False
        self.addCleanup(self.stop)
        self.start()

    # -- the daemon as a whole ----------------------------------------------

    def start(self) -> None:
        """Start the daemon; instances that stopped meanwhile start too."""
        if self._server is None:
            self._server = transport.UnixServer(self.endpoint, self.daemon)
            self.daemon.is_up = True
            power.daemon_start(self.daemon)
            self._server.begin()

    def stop(self) -> None:
        """Stop the daemon: operations are lost, containers run on."""
        if self._server is not None:
            self.daemon.is_up = False
            self.daemon.operations.forget_all()
            self.daemon.faults.clear()
            self.daemon.events.close_all()
            self._server.end()
            self._server = None

    def restart(self) -> None:
        self.stop()
        self.start()

    def listen_https(self, clients: dict[str, bool]) -> tuple[str, str]:
        """Listen on TLS as well.

        :param clients: which client certificates (paths) LXD trusts.
        :returns: the URL, and the path of the server's certificate.
        """
        certificate = certificates.make(self.folder, 'server')
        listener = transport.TLSServer(self.daemon, certificate, clients)
        listener.begin()
        self.addCleanup(listener.end)
        return listener.endpoint, certificate[0]

    def close_websockets(self, goodbye: bool = False) -> None:
        """Break the events websockets off.

        :param goodbye: with a close frame instead of a dead connection.
        """
        self.daemon.events.close_all(goodbye)

    # -- failures -----------------------------------------------------------

    def _arm(self, kind: str, method: str, path: str, times: int | None,
             where: dict[str, Any] | None, **kwargs: Any) -> faults.Fault:
        return self.daemon.faults.arm(faults.Fault(
            kind, f'{method} {path}', where or {}, times, **kwargs))

    def fail_next(self, method: str, path: str, code: int = 500,
                  error: str = 'Internal error', *, times: int | None = 1,
                  where: dict[str, Any] | None = None) -> faults.Fault:
        """Refuse a request.

        :param method: HTTP method, or ``*``.
        :param path: shell pattern of the path, for example
            ``/1.0/instances/*/state``; no query.
        :param times: how many times; None is always.
        :param where: what the JSON body must hold, for example
            ``{'action': 'start'}``.
        :returns: the fault: ``hits`` counts, ``release()`` disarms.
        """
        return self._arm('fail', method, path, times, where, code=code,
                         error=error)

    def fail_operation(self, method: str, path: str,
                       error: str = 'Something failed', *,
                       times: int | None = 1, after: bool = False,
                       where: dict[str, Any] | None = None) -> faults.Fault:
        """Accept a request, and let its operation fail.

        :param after: it fails when everything is done.
        """
        return self._arm('operation', method, path, times, where,
                         error=error, after=after)

    def hang_operation(self, method: str, path: str, *,
                       times: int | None = 1,
                       where: dict[str, Any] | None = None) -> faults.Fault:
        """Accept a request, and do nothing until ``release()``."""
        return self._arm('hang', method, path, times, where)

    def delay(self, method: str, path: str, seconds: float, *,
              times: int | None = 1,
              where: dict[str, Any] | None = None) -> faults.Fault:
        """Let a request wait before LXD looks at it."""
        return self._arm('delay', method, path, times, where,
                         seconds=seconds)

    def drop_connection(self, method: str, path: str, *,
                        times: int | None = 1, after: bool = False,
                        where: dict[str, Any] | None = None
                        ) -> faults.Fault:
        """Break the connection off instead of answering.

        :param after: only when LXD has done what was asked.
        """
        return self._arm('drop-response' if after else 'drop', method, path,
                         times, where)

    def before(self, method: str, path: str,
               action: Callable[[routing.Request], None], *,
               times: int | None = 1,
               where: dict[str, Any] | None = None) -> faults.Fault:
        """Run a function before LXD looks at a request; for races."""
        return self._arm('call', method, path, times, where, action=action)

    # -- requests -----------------------------------------------------------

    @property
    def requests(self) -> list[daemon.Logged]:
        """Every request so far, oldest first."""
        return list(self.daemon.requests)

    def count(self, method: str = '*', path: str = '*') -> int:
        """Count the requests that match shell patterns."""
        return sum(fnmatch.fnmatchcase(entry.method, method)
                   and fnmatch.fnmatchcase(entry.path, path)
                   for entry in self.requests)

    def clear_requests(self) -> None:
        self.daemon.requests.clear()

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[daemon.Logged]]:
        """Collect the requests made in the body of a with statement."""
        before = len(self.daemon.requests)
        found: list[daemon.Logged] = []
        try:
            yield found
        finally:
            found.extend(self.daemon.requests[before:])

    # -- guests -------------------------------------------------------------

    def instance(self, name: str, project: str | None = None
                 ) -> state.Instance:
        """Find an instance's state; without project in any."""
        with self.daemon.store.lock:
            for key, instance in self.daemon.store.instances.items():
                if key[1] == name and project in (None, key[0]):
                    return instance
        raise KeyError(name)

    @property
    def instances(self) -> dict[str, state.Instance]:
        """All instances by name (of all projects)."""
        with self.daemon.store.lock:
            return {key[1]: instance for key, instance
                    in self.daemon.store.instances.items()}

    def guest_poweroff(self, name: str) -> None:
        power.guest_poweroff(self.daemon, self.instance(name))

    def guest_reboot(self, name: str) -> None:
        power.guest_reboot(self.daemon, self.instance(name))

    # -- contents -----------------------------------------------------------

    def add_project(self, name: str, **config: str) -> None:
        """Create a project with everything of its own."""
        with self.daemon.store.lock:
            self.daemon.store.projects[name] = state.Project(name, {
                'features.images': 'true', 'features.profiles': 'true',
                'features.storage.volumes': 'true', **config})
            self.daemon.store.profiles[name, 'default'] = state.Profile(
                'default', description=f'Default LXD profile for project '
                                       f'{name}')

    def add_image(self, content: bytes | None = None, *,
                  project: str = 'default', alias: str | None = None,
                  properties: dict[str, str] | None = None,
                  used: bool = False) -> str:
        """Put an image into the store, by default a tiny one.

        :param used: whether an instance has been made from it before.
        :returns: its fingerprint.
        """
        read = image_content.unified(content or unified_image())
        image = state.Image(
            read.fingerprint, read.parts,
            {**(read.metadata.get('properties') or {}), **(properties or {})},
            read.rootfs, architecture=read.metadata['architecture'],
            created_at=read.created_at, metadata=read.metadata)
        if used:
            image.last_used_at = clock.now()
        with self.daemon.store.lock:
            self.daemon.store.images[project, image.fingerprint] = image
            if alias:
                self.daemon.store.aliases[project, alias] = {
                    'target': image.fingerprint, 'description': ''}
        return image.fingerprint

    def wait_for(self, condition: Callable[[], Any], timeout: float = 5.0
                 ) -> Any:
        """Wait until a condition holds; for what happens in threads."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            result = condition()
            if result:
                return result
            time.sleep(0.005)
        raise AssertionError('the condition did not come true in time')


def fingerprint(content: bytes) -> str:
    """LXD's fingerprint of a unified image."""
    return hashlib.sha256(content).hexdigest()
