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

import os
import shutil
import subprocess
import time
from typing import Any

from tests.functional import busybox_image
from tests.functional import lxd_daemon

#: Seconds for anything that LXD is asked for.
TIMEOUT = 60

#: TCP ports of a guest: one sends back what it gets, one swallows it.
ECHO = 7
DISCARD = 9

_INITTAB = f"""\
::sysinit:/bin/sh /etc/network
::respawn:/bin/busybox nc -ll -p {ECHO} -e /bin/cat
::respawn:/bin/busybox nc -ll -p {DISCARD} -e /bin/sh /etc/discard
"""

# In the environment of the container.
_NETWORK = """\
ip link set lo up
ip link set eth0 up
ip addr add $ADDRESS dev eth0
"""

# Tells when it has everything, so that the sender can measure.
_DISCARD = """\
read size
head -c $size > /dev/null
echo done
"""


def missing() -> str | None:
    """Say what this machine lacks for such containers, if anything."""
    if shutil.which('lxc') is None:
        return 'lxc is not installed (package lxd-client)'
    return lxd_daemon.missing()


class ContainerHost(lxd_daemon.LXDDaemon):
    """An LXD of our own, with an image of containers that talk."""

    def __init__(self) -> None:
        super().__init__('dir')

    def _setUp(self) -> None:
        super()._setUp()
        self._image = self.lxd.add_image(busybox_image.unified({
            'etc/inittab': _INITTAB.encode(),
            'etc/network': _NETWORK.encode(),
            'etc/discard': _DISCARD.encode()}), alias='network')

    def create(self, name: str, address: str,
               devices: dict[str, dict[str, str]]) -> None:
        """Make a container, which does not run yet.

        :param address: of its eth0, with the length of its prefix.
        :param devices: LXD devices, the ports among them.
        """
        self.lxd.api.must('POST', '/1.0/instances', {
            'name': name, 'devices': devices, 'config': {
                'environment.ADDRESS': address, 'boot.autostart': 'false'},
            'source': {'type': 'image', 'fingerprint': self._image}})

    def delete(self, name: str) -> None:
        """Delete a container, running or not."""
        if self.state(name)['status'] != 'Stopped':
            self.lxd.api.call('PUT', f'/1.0/instances/{name}/state',
                              {'action': 'stop', 'force': True})
        self.lxd.api.must('DELETE', f'/1.0/instances/{name}')

    def set_state(self, name: str, action: str) -> None:
        """Start, stop or restart a container."""
        deadline = time.monotonic() + TIMEOUT
        while True:
            answer = self.lxd.api.call(
                'PUT', f'/1.0/instances/{name}/state',
                {'action': action, 'force': action != 'start'})
            # LXD reports a guest as stopped before it has finished with it.
            if 'busy' not in answer.error or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        if answer.error:
            raise RuntimeError(f'{action} of {name}: {answer.error}')

    def state(self, name: str) -> dict[str, Any]:
        """Return LXD's view of a container's state."""
        return self.lxd.api.must('GET', f'/1.0/instances/{name}/state')

    def wait_for_status(self, name: str, status: str) -> None:
        """Wait until LXD says Running or Stopped."""
        deadline = time.monotonic() + TIMEOUT
        while self.state(name)['status'] != status:
            if time.monotonic() > deadline:
                raise TimeoutError(f'{name} is not {status}')
            time.sleep(0.1)

    def execute(self, name: str, command: str) -> str:
        """Run a shell command in a container and return what it printed."""
        done = subprocess.run(
            ['lxc', 'exec', name, '--', 'sh', '-c', command],
            env={**os.environ, **self.lxd.environment},
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=TIMEOUT, check=False)
        if done.returncode:
            raise RuntimeError(f'{command} in {name} failed: '
                               f'{done.stdout}{done.stderr}')
        return done.stdout
