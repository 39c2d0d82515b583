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

"""Cinder volumes for tests, without Cinder.

What stands in for Cinder's back ends is what a machine without storage
networks can have: a loop device, as os-brick's ``local`` connector takes it,
and a file on a "share" that is a folder of this host. All that the driver and
os-brick do with them is real.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import subprocess
import sys
from typing import Any
import uuid

import fixtures
from nova import exception
from nova import objects
import os_brick
from os_brick.privileged import default as brick_privileged
from oslo_utils import units

from nova_lxd_py import conf
from nova_lxd_py.virt import privileged

CONF = conf.CONF

PASSWORD = 'open-sesame-1b4f'


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True,
                          text=True).stdout.strip()


def reboot_host(patches: Any) -> None:
    """Have the driver see that the host has been rebooted.

    :param patches: has ``useFixture``; undoes it.
    """
    file = pathlib.Path(patches.useFixture(fixtures.TempDir()).path) / 'boot'
    file.write_text(f'{uuid.uuid4()}\n')
    patches.useFixture(fixtures.MonkeyPatch(
        'nova_lxd_py.virt.volume.devices._BOOT_ID', file))


def _mounts() -> set[str]:
    """What is mounted below Nova's own directory."""
    return {line for line in
            pathlib.Path('/proc/self/mounts').read_text().splitlines()
            if line.split()[1].startswith(CONF.state_path + '/')}


class Volume:
    """One volume, attached by Nova's account.

    :param folder: where its content is kept.
    :param size: bytes.

    :ivar id: Cinder's id.
    :ivar file: what holds its content.
    """

    kind = ''

    def __init__(self, folder: pathlib.Path, size: int = units.Gi) -> None:
        self.id = str(uuid.uuid4())
        self.size = size
        self.file = folder / f'volume-{self.id}'
        with open(self.file, 'wb') as stream:
            stream.truncate(size)

    def data(self) -> dict[str, Any]:
        """What the back end tells of the connection."""
        raise NotImplementedError()

    def connection(self, **data: Any) -> dict[str, Any]:
        """Describe the connection as Nova hands it to the driver."""
        return {'driver_volume_type': self.kind, 'serial': self.id,
                'data': {**self.data(), 'access_mode': 'rw',
                         'auth_password': PASSWORD, **data}}

    def checksum(self, length: int) -> str:
        """Checksum of the first bytes, as they are on the storage."""
        with open(self.file, 'rb') as stream:
            return hashlib.sha256(stream.read(length)).hexdigest()

    def extend(self, size: int) -> None:
        """What Cinder does with an attached volume."""
        with open(self.file, 'r+b') as stream:
            stream.truncate(size)
        self.size = size

    def close(self) -> None:
        """Delete it, as Cinder would."""
        self.file.unlink(missing_ok=True)


class LocalVolume(Volume):
    """A block device of this host."""

    kind = 'local'

    def __init__(self, folder: pathlib.Path, size: int = units.Gi) -> None:
        super().__init__(folder, size)
        self.device = _run('losetup', '--find', '--show', str(self.file))
        # As back ends have it that know the device by a name of their own.
        self.link = self.file.with_suffix('.device')
        self.link.symlink_to(self.device)

    def data(self) -> dict[str, Any]:
        return {'device_path': str(self.link)}

    def extend(self, size: int) -> None:
        super().extend(size)
        _run('losetup', '--set-capacity', self.device)

    def close(self) -> None:
        subprocess.run(['losetup', '--detach', self.device], check=False)
        self.link.unlink(missing_ok=True)
        super().close()


class FileVolume(Volume):
    """A file on a share."""

    kind = 'nfs'

    def data(self) -> dict[str, Any]:
        return {'export': f'fileserver:{self.file.parent}',
                'name': self.file.name, 'options': None, 'format': 'raw'}


class Storage(fixtures.Fixture):
    """A back end, and what the host has of it.

    :param kind: LocalVolume or FileVolume.
    :param database: whether the test has Nova's database, which is stood in
        for otherwise.
    :param daemon: whether the driver does what needs root through a daemon, as
        it does in operation, instead of in this process.
    """

    def __init__(self, kind: type[Volume], database: bool = False,
                 daemon: bool = False) -> None:
        super().__init__()
        self._kind = kind
        self._daemon = daemon
        self._database = database
        self._made: list[Volume] = []

    def _setUp(self) -> None:
        self.folder = pathlib.Path(
            self.useFixture(fixtures.TempDir()).path)
        brick_privileged.set_client_mode(False)
        self.addCleanup(brick_privileged.set_client_mode, True)
        if self._daemon:
            self._use_daemon()
        else:
            privileged.context.set_client_mode(False)
            self.addCleanup(privileged.context.set_client_mode, True)
        self._stand_in_for_nfs()
        self._mounts = _mounts()
        if not self._database:
            self.useFixture(fixtures.MonkeyPatch(
                'nova.objects.BlockDeviceMapping.get_by_volume_and_instance',
                lambda *args: self._block_device(*args[-2:])))
        os_brick.setup(CONF)
        self.addCleanup(self._close)

    def _use_daemon(self) -> None:
        helper = pathlib.Path(sys.executable).parent / 'privsep-helper'
        config = self.folder / 'privsep.conf'
        config.write_text('[DEFAULT]\n')
        group = 'nova_lxd_py_privileged'
        CONF.set_override('helper_command',
                          f'{helper} --config-file {config}', group)
        self.addCleanup(CONF.clear_override, 'helper_command', group)
        privileged.context.set_client_mode(True)
        self.addCleanup(privileged.context.stop)

    def _stand_in_for_nfs(self) -> None:
        folder = pathlib.Path(self.useFixture(fixtures.TempDir()).path)
        script = folder / 'mount'
        # This kernel may have no NFS client.
        script.write_text('''#!/bin/sh
for last; do
    case $last in
    fileserver:*) share=${last#fileserver:} ;;
    esac
done
[ -z "$share" ] || exec /bin/mount --bind "$share" "$last"
exec /bin/mount "$@"
''')
        script.chmod(0o755)
        self.useFixture(fixtures.EnvironmentVariable(
            'PATH', f'{folder}:{os.environ["PATH"]}'))

    def volume(self, size: int = units.Gi) -> Volume:
        """Make a volume."""
        made = self._kind(self.folder, size)
        self._made.append(made)
        return made

    def delete(self, volume: Volume) -> None:
        """Delete a volume."""
        self._made.remove(volume)
        volume.close()

    def left_on_host(self) -> set[str]:
        """Loop devices and mounts that the driver has made and not removed."""
        own = {volume.device for volume in self._made
               if isinstance(volume, LocalVolume)}
        found = set()
        for name in os.listdir('/sys/block'):
            with contextlib.suppress(OSError):
                file = pathlib.Path(
                    f'/sys/block/{name}/loop/backing_file').read_text()
                if f'/dev/{name}' not in own and any(
                        volume.id in file for volume in self._made):
                    found.add(f'/dev/{name} on {file.strip()}')
        return found | (_mounts() - self._mounts)

    def _block_device(self, volume_id: str, instance_uuid: str) -> Any:
        """Look a volume up as Nova's conductor does."""
        for volume in self._made:
            if volume.id == volume_id:
                return objects.BlockDeviceMapping(
                    volume_size=volume.size // units.Gi, tag=None)
        raise exception.VolumeBDMNotFound(volume_id=volume_id)

    def _close(self) -> None:
        for volume in self._made:
            volume.close()
