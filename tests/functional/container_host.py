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

"""Containers with ports, for the functional tests of networking."""

from __future__ import annotations

import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
from typing import Any

import fixtures

#: Seconds for anything that LXD is asked for.
TIMEOUT = 60

#: TCP ports of a guest: one sends back what it gets, one swallows it.
ECHO = 7
DISCARD = 9

_INITTAB = f"""\
::sysinit:/etc/rc
::respawn:/bin/nc -ll -p {ECHO} -e /bin/cat
::respawn:/bin/nc -ll -p {DISCARD} -e /etc/discard
"""

_RC = """\
#!/bin/sh
ip link set lo up
ip link set eth0 up
ip addr add $ADDRESS dev eth0
"""

# Tells when it has everything, so that the sender can measure.
_DISCARD = """\
#!/bin/sh
head -c $(head -n 1) > /dev/null
echo done
"""

_APPLETS = ('sh', 'ip', 'ping', 'nc', 'cat', 'echo', 'head', 'reboot',
            'poweroff', 'tc')


def missing() -> str | None:
    """Say what this machine lacks for such containers, if anything."""
    for program, package in (('lxd', 'lxd'), ('lxc', 'lxd-client'),
                             ('busybox', 'busybox-static')):
        if shutil.which(program) is None:
            return f'{program} is not installed (package {package})'
    if os.geteuid() != 0:
        return 'LXD needs root'
    return None


def write_image(path: pathlib.Path) -> None:
    """Write a unified LXD image of busybox, which takes 2 MB."""
    busybox = shutil.which('busybox')
    assert busybox is not None
    with tarfile.open(path, 'w') as tar:
        def add(name: str, content: bytes | None = None,
                target: str | None = None) -> None:
            info = tarfile.TarInfo(name)
            info.mode = 0o755
            if target is not None:
                info.type, info.linkname = tarfile.SYMTYPE, target
            elif content is None:
                info.type = tarfile.DIRTYPE
            else:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content or b''))

        metadata = {'architecture': os.uname().machine, 'creation_date': 1}
        add('metadata.yaml', json.dumps(metadata).encode())
        for name in ('', *'bin dev etc proc root run sbin sys tmp'.split()):
            add(f'rootfs/{name}')
        add('rootfs/bin/busybox', pathlib.Path(busybox).read_bytes())
        for name in _APPLETS:
            add(f'rootfs/bin/{name}', target='busybox')
        add('rootfs/sbin/init', target='../bin/busybox')
        add('rootfs/etc/inittab', _INITTAB.encode())
        add('rootfs/etc/rc', _RC.encode())
        add('rootfs/etc/discard', _DISCARD.encode())
        add('rootfs/etc/passwd', b'root:x:0:0::/root:/bin/sh\n')
        add('rootfs/etc/group', b'root:x:0:\n')


class ContainerHost(fixtures.Fixture):
    """An LXD of our own, with a tiny image to make containers from."""

    def _setUp(self) -> None:
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix='lxd-',
                                                       dir='/tmp'))
        self.addCleanup(shutil.rmtree, self.directory, ignore_errors=True)
        self._environment = dict(os.environ, LXD_DIR=str(self.directory),
                                 LXC_CONF=str(self.directory / 'client'))
        self._daemon: subprocess.Popen[bytes] | None = None
        self.addCleanup(self._unmount)
        self.addCleanup(self.stop)
        self.start()
        self._run('lxc', 'storage', 'create', 'default', 'dir')
        image = self.directory / 'image.tar'
        write_image(image)
        self._run('lxc', 'image', 'import', str(image), '--alias', 'tiny')

    def start(self) -> None:
        """Start the daemon."""
        self._daemon = subprocess.Popen(
            ['lxd', '--group', 'root', '--logfile',
             str(self.directory / 'daemon.log')],
            env=self._environment, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._run('lxd', 'waitready', f'--timeout={TIMEOUT}')

    def stop(self) -> None:
        """Stop the daemon as a restart of its service does it.

        Containers and their network go on.
        """
        if self._daemon is not None:
            self._daemon.send_signal(signal.SIGTERM)
            self._daemon.wait(TIMEOUT)
            self._daemon = None

    def create(self, name: str, config: dict[str, str],
               devices: dict[str, dict[str, str]]) -> None:
        """Make a container."""
        root = {'type': 'disk', 'path': '/', 'pool': 'default'}
        self._query('POST', '/1.0/instances', {
            'name': name, 'source': {'type': 'image', 'alias': 'tiny'},
            'profiles': [], 'config': {**config, 'boot.autostart': 'false'},
            'devices': {'root': root, **devices}})

    def delete(self, name: str) -> None:
        """Delete a container, running or not."""
        self._run('lxc', 'delete', '--force', name)

    def set_state(self, name: str, action: str, force: bool = False) -> None:
        """Start, stop, restart... a container."""
        self._query('PUT', f'/1.0/instances/{name}/state',
                    {'action': action, 'force': force, 'timeout': 10})

    def state(self, name: str) -> dict[str, Any]:
        """Return LXD's view of a container's state."""
        return self._query('GET', f'/1.0/instances/{name}/state')

    def wait_for_status(self, name: str, status: str) -> None:
        """Wait until LXD says Running or Stopped."""
        deadline = time.monotonic() + TIMEOUT
        while self.state(name)['status'] != status:
            if time.monotonic() > deadline:
                raise TimeoutError(f'{name} is not {status}')
            time.sleep(0.1)

    def execute(self, name: str, *command: str) -> str:
        """Run a command in a container and return what it printed."""
        return self._run('lxc', 'exec', name, '--', *command)

    def _query(self, method: str, path: str,
               body: dict[str, Any] | None = None) -> Any:
        command = ['lxc', 'query', '--wait', '-X', method, path]
        if body is not None:
            command += ['-d', json.dumps(body)]
        printed = self._run(*command)
        return json.loads(printed) if printed else None

    def _run(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self._environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            timeout=TIMEOUT)
        if done.returncode:
            raise RuntimeError(f'{" ".join(command)} failed: '
                               f'{done.stdout}{done.stderr}')
        return done.stdout

    def _unmount(self) -> None:
        # LXD leaves these to its service manager.
        for name in ('devlxd', 'shmounts'):
            subprocess.run(['umount', '-l', str(self.directory / name)],
                           stderr=subprocess.DEVNULL)
