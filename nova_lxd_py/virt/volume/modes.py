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

"""The three ways in which a guest gets a volume.

``block``
    The guest gets the block device and does with it what it likes.
``filesystem``
    The host mounts the volume's filesystem, and the guest gets the mount. The
    kernel lets no unprivileged container mount a block device. It means that
    the host's kernel reads what is on a tenant's volume, so it happens only
    where the operator allows it, and only with the filesystems that are named
    in ``[lxd] volume_filesystems``.
``root``
    The same for the root filesystem: the guest boots from the volume. Its LXD
    instance is a placeholder, whose own root disk is empty; liblxc is told to
    use the directory at which the host has mounted the volume.

This module has what all modes have in common and the first; those for which
the host mounts the volume are in :mod:`.mounted_modes`.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
import dataclasses
from typing import Any

from nova import objects
from oslo_config import cfg

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.privileged import mounts
from nova_lxd_py.virt.volume import base
from nova_lxd_py.virt.volume import device_identity
from nova_lxd_py.virt.volume import io_counters
from nova_lxd_py.virt.volume import lxd_devices

BLOCK, FILESYSTEM, ROOT = 'block', 'filesystem', lxd_devices.ROOT

#: Key of a connection: the mode of the volume, as long as it is attached.
KEY_MODE = 'lxd_mode'
#: Key of a connection: the filesystem that was found or made on the volume.
KEY_KIND = 'lxd_filesystem'

#: Configuration key of LXD with options for liblxc.
KEY_RAW = 'raw.lxc'

#: Configuration keys of a guest that boots from a volume.
ROOT_KEYS = (KEY_RAW, lxd_guest.KEY_ROOT_VOLUME, lxd_guest.KEY_ROOT_DEVICE,
             lxd_guest.KEY_ROOT_BOOT, lxd_guest.KEY_ROOT_COUNTERS)

#: Changes to these keys when the host is disconnected from the volume.
DISCONNECTED: Mapping[str, str | None] = {
    lxd_guest.KEY_ROOT_DEVICE: None, lxd_guest.KEY_ROOT_BOOT: None,
    lxd_guest.KEY_ROOT_COUNTERS: None}


@dataclasses.dataclass(frozen=True)
class GuestChanges:
    """What the LXD instance needs for a connected volume.

    :ivar config: LXD configuration keys.
    :ivar devices: LXD devices by name.
    """

    config: dict[str, str] = dataclasses.field(default_factory=dict)
    devices: dict[str, dict[str, str]] = dataclasses.field(
        default_factory=dict)


def keep_counters(guest: lxd_guest.Guest | None, changes: GuestChanges
                  ) -> None:
    """Keep the stored counters of volumes that a guest has had before.

    The guest's usage of a volume is counted from when it was attached, and an
    LXD device that has not changed is not attached again.

    :param guest: the guest, just read; None if it does not exist yet.
    :param changes: what it needs for its connected volumes, which is changed.
    """
    if guest is None:
        return
    for name, device in changes.devices.items():
        _keep_key(lxd_devices.KEY_COUNTERS, guest.devices.get(name, {}),
                  device)
    had = {key: guest.config[key] for key in (
        *changes.config, lxd_guest.KEY_ROOT_COUNTERS) if key in guest.config}
    _keep_key(lxd_guest.KEY_ROOT_COUNTERS, had, changes.config)


def _keep_key(key: str, before: Mapping[str, str], after: dict[str, str]
              ) -> None:
    """Copy a key if nothing else differs."""
    if key in before and {**after, key: before[key]} == before:
        after[key] = before[key]


class Mode(abc.ABC):
    """One way in which a guest gets a volume.

    :param options: the ``[lxd]`` option group.
    """

    name: str

    def __init__(self, options: cfg.ConfigOpts.GroupAttr) -> None:
        self._options = options

    @abc.abstractmethod
    def check(self, instance: objects.Instance,
              connection_info: Mapping[str, Any], identifier: str) -> None:
        """Validate that a volume may be used in this mode.

        :param instance: the instance that is to have it.
        :param connection_info: Cinder's description of the connection, which
            has not been made yet.
        :param identifier: Cinder's ID of the volume.
        :raises nova.exception.NovaException: if it may not.
        """

    @abc.abstractmethod
    def prepare(self, connection_info: dict[str, Any], identifier: str,
                probed: bool) -> None:
        """Prepare a volume to which the host has just been connected.

        :param connection_info: Cinder's description of the connection.
        :param identifier: Cinder's ID of the volume.
        :param probed: whether it is known what is on the volume, or will be.
        :raises base.Refused: if the volume cannot be used.
        """

    @abc.abstractmethod
    def describe(self, connection_info: Mapping[str, Any], identifier: str,
                 mountpoint: str) -> GuestChanges:
        """Describe a connected volume for LXD.

        :param connection_info: Cinder's description of the connection.
        :param identifier: Cinder's ID of the volume.
        :param mountpoint: device name of the volume, which Nova or the tenant
            has chosen.
        :raises nova.exception.InvalidDevicePath: if that is no disk's name.
        """

    def mount(self, guest: lxd_guest.Guest, connection_info: dict[str, Any],
              identifier: str) -> None:
        """Mount a connected volume for a guest, where the mode needs it.

        What was mounted there before is unmounted. The filesystem grows to the
        size of the volume if it can.

        :param guest: the guest, just read, which does not use the mount yet.
        :param connection_info: Cinder's description of the connection.
        :param identifier: Cinder's ID of the volume.
        :raises base.Refused: if there is no usable filesystem, or the kernel
            cannot map its IDs.
        :raises OSError: if the kernel refuses.
        """

    def grow(self, connection_info: dict[str, Any], identifier: str) -> None:
        """Grow the mounted filesystem to the size of its volume.

        :param connection_info: Cinder's description of the connection.
        :param identifier: Cinder's ID of the volume.
        :raises OSError: if the kernel refuses.
        """

    @abc.abstractmethod
    def flush(self, identifier: str, path: str, deadline: float) -> None:
        """Write what the host has cached of a volume to its storage.

        :param identifier: Cinder's ID of the volume.
        :param path: path of its block device.
        :param deadline: seconds after which to give up.
        :raises OSError: if it cannot be written, or not in time.
        """

    def unmount(self, identifier: str, force: bool) -> None:
        """Unmount a volume, if it is mounted.

        :param identifier: Cinder's ID of the volume.
        :param force: even while something uses it.
        :raises OSError: if something uses it, without force.
        """


class BlockMode(Mode):
    """The guest gets the block device."""

    name = BLOCK

    def check(self, instance: objects.Instance,
              connection_info: Mapping[str, Any], identifier: str) -> None:
        """See :meth:`Mode.check`."""

    def prepare(self, connection_info: dict[str, Any], identifier: str,
                probed: bool) -> None:
        """See :meth:`Mode.prepare`."""
        # LXD gives guests write access to all block devices. Nor can the host
        # protect this one: the flag (BLKROSET) would outlive the attachment.
        if is_read_only(connection_info) and not device_identity.is_read_only(
                base.device_path(connection_info) or ''):
            raise base.Refused(
                'it is read-only, which the host cannot enforce for a block '
                'device of this back end; attach it as a filesystem')

    def describe(self, connection_info: Mapping[str, Any], identifier: str,
                 mountpoint: str) -> GuestChanges:
        """See :meth:`Mode.describe`."""
        path = base.device_path(connection_info) or ''
        return GuestChanges(devices={lxd_devices.name(identifier): {
            'type': 'unix-block',
            'source': path,
            'path': lxd_devices.guest_path(mountpoint),
            lxd_devices.KEY_BOOT: lxd_devices.boot_id(),
            **io_counters.store(lxd_devices.KEY_COUNTERS, path)}})

    def flush(self, identifier: str, path: str, deadline: float) -> None:
        """See :meth:`Mode.flush`."""
        mounts.sync_device(path, deadline)


def is_read_only(connection_info: Mapping[str, Any]) -> bool:
    """Whether nothing may be written to a volume."""
    return connection_info['data'].get('access_mode') == 'ro'
