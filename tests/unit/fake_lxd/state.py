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

"""What the daemon's database and disks hold."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

from tests.unit.fake_lxd import clock
from tests.unit.fake_lxd import errors
from tests.unit.fake_lxd import terminals
from tests.unit.fake_lxd import tree

STOPPED, RUNNING, FROZEN = 'Stopped', 'Running', 'Frozen'
STATUS_CODES = {STOPPED: 102, RUNNING: 103, FROZEN: 110}


@dataclasses.dataclass
class Project:
    name: str
    config: dict[str, str]
    description: str = ''


@dataclasses.dataclass
class Profile:
    name: str
    config: dict[str, str] = dataclasses.field(default_factory=dict)
    devices: dict[str, dict[str, str]] = dataclasses.field(
        default_factory=dict)
    description: str = ''


@dataclasses.dataclass
class Pool:
    """A storage pool; sizes in bytes."""

    name: str
    driver: str = 'btrfs'
    config: dict[str, str] = dataclasses.field(default_factory=dict)
    description: str = ''
    total: int = 100 << 30
    used: int = 6 << 20
    status: str = 'Created'

    @property
    def has_quota(self) -> bool:
        return self.driver != 'dir'

    @property
    def has_block_devices(self) -> bool:
        return self.driver in ('lvm', 'ceph', 'zfs')


@dataclasses.dataclass
class Volume:
    """A custom storage volume.

    :ivar files: content and mode by path, of one made from a backup.
    """

    name: str
    pool: str
    config: dict[str, str] = dataclasses.field(default_factory=dict)
    description: str = ''
    content_type: str = 'filesystem'
    files: dict[str, tuple[bytes | None, int]] = dataclasses.field(
        default_factory=dict)


@dataclasses.dataclass
class Image:
    """An image as imported.

    :ivar parts: (field name, file name, content) of the export.
    :ivar rootfs: the root filesystem, or what LXD says when unpacking it.
    :ivar unpacked: bytes the root filesystem takes.
    :ivar metadata: its metadata.yaml.
    """

    fingerprint: str
    parts: list[tuple[str, str, bytes]]
    properties: dict[str, str]
    rootfs: tree.Tree | str
    architecture: str = 'x86_64'
    filename: str = ''
    public: bool = False
    auto_update: bool = False
    created_at: str = clock.NEVER
    expires_at: str = clock.NEVER
    last_used_at: str = clock.ZERO
    uploaded_at: str = dataclasses.field(default_factory=clock.now)
    profiles: list[str] = dataclasses.field(
        default_factory=lambda: ['default'])
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def size(self) -> int:
        return sum(len(content) for _field, _name, content in self.parts)

    @property
    def unpacked(self) -> int:
        return self.rootfs.size if isinstance(self.rootfs, tree.Tree) else 0


@dataclasses.dataclass
class Guest:
    """How what runs in a container behaves.

    :ivar ignores_shutdown: it never obeys a clean shutdown.
    :ivar shutdown_time: seconds it takes for one otherwise.
    """

    ignores_shutdown: bool = False
    shutdown_time: float = 0.0


@dataclasses.dataclass
class Snapshot:
    name: str
    config: dict[str, str]
    devices: dict[str, dict[str, str]]
    profiles: list[str]
    files: tree.Tree | None
    ephemeral: bool = False
    expires_at: str = clock.ZERO
    created_at: str = dataclasses.field(default_factory=clock.now)


@dataclasses.dataclass
class Instance:
    """A container.

    :ivar files: its root filesystem; None for source type "none".
    :ivar metadata: metadata.yaml of its image.
    :ivar busy: the power action that holds it, if any.
    :ivar too_low_quota: a quota below what is used, which btrfs did not let
        LXD take back.
    """

    name: str
    project: str
    config: dict[str, str]
    devices: dict[str, dict[str, str]]
    profiles: list[str]
    files: tree.Tree | None = None
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    architecture: str = 'x86_64'
    description: str = ''
    ephemeral: bool = False
    created_at: str = dataclasses.field(default_factory=clock.now)
    last_used_at: str = clock.NEVER
    status: str = STOPPED
    busy: str = ''
    pid: int = 0
    too_low_quota: int | None = None
    guest: Guest = dataclasses.field(default_factory=Guest)
    snapshots: dict[str, Snapshot] = dataclasses.field(default_factory=dict)
    logs: dict[str, bytes] = dataclasses.field(default_factory=dict)
    console: bytes | None = b''
    terminal: terminals.Console = dataclasses.field(
        default_factory=terminals.Console)
    usage: dict[str, Any] = dataclasses.field(default_factory=dict)
    stopped_event: threading.Event = dataclasses.field(
        default_factory=threading.Event)

    def print_line(self, text: str) -> None:
        """Print something on the guest's console."""
        data = text.encode() + b'\r\n'
        self.console = (self.console or b'') + data
        self.terminal.show(data)

    @property
    def path(self) -> str:
        return f'/1.0/instances/{self.name}'

    @property
    def is_running(self) -> bool:
        return self.status != STOPPED


class Store:
    """Everything by name. Whoever reads or writes holds ``lock``."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.projects = {'default': Project('default', {
            'features.images': 'true', 'features.networks': 'true',
            'features.profiles': 'true', 'features.storage.volumes': 'true',
        }, 'Default LXD project')}
        self.pools: dict[str, Pool] = {}
        self.profiles = {('default', 'default'): Profile(
            'default', description='Default LXD profile')}
        self.images: dict[tuple[str, str], Image] = {}
        self.aliases: dict[tuple[str, str], dict[str, str]] = {}
        self.instances: dict[tuple[str, str], Instance] = {}
        self.volumes: dict[tuple[str, str, str], Volume] = {}

    def project_with(self, feature: str, project: str, message: str) -> str:
        """Find the project whose things a project uses.

        :param feature: ``images``, ``profiles`` or ``storage.volumes``.
        :param message: LXD's words when there is no such project.
        """
        if project not in self.projects:
            raise errors.not_found(message)
        own = self.projects[project].config.get(f'features.{feature}')
        return project if own == 'true' else 'default'

    def instance(self, project: str, name: str) -> Instance:
        try:
            return self.instances[project, name]
        except KeyError:
            raise errors.not_found('Instance not found') from None

    def pool(self, name: str) -> Pool:
        try:
            return self.pools[name]
        except KeyError:
            raise errors.not_found('Storage pool not found') from None

    def instance_profiles(self, instance: Instance) -> list[Profile]:
        owner = self.project_with('profiles', instance.project,
                                  'Project not found')
        return [self.profiles[owner, name] for name in instance.profiles]

    def expanded(self, instance: Instance
                 ) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
        """Config and devices with what the profiles add."""
        config: dict[str, str] = {}
        devices: dict[str, dict[str, str]] = {}
        for profile in self.instance_profiles(instance):
            config.update(profile.config)
            devices.update(profile.devices)
        return ({**config, **instance.config},
                {key: dict(value) for key, value
                 in {**devices, **instance.devices}.items()})
