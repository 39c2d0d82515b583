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

"""One volume given to one server and taken away again, step by step.

The device is in the guest only while the host is connected: it is taken out
first and put in last.
"""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import dataclasses
import os
from typing import Any

from nova.compute import power_state
from nova import context as nova_context
from nova import exception
from nova import objects
from oslo_log import log as logging
from oslo_utils import excutils

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.privileged import fuser
from nova_lxd_py.virt.volume import base
from nova_lxd_py.virt.volume import device_identity
from nova_lxd_py.virt.volume import filesystems
from nova_lxd_py.virt.volume import lxd_devices
from nova_lxd_py.virt.volume import manager
from nova_lxd_py.virt.volume import usage

LOG = logging.getLogger(__name__)

#: What makes the path of a device one that no host has.
_NOTHING = '.nothing'
#: What LXD says where it has left the node or the mount of a device.
_LEFTOVER = ('file exists', 'device or resource busy')
#: Errors that leave open what LXD has done.
UNANSWERED = (errors.Unreachable, errors.OperationLost,
              errors.DeadlineExceeded)


@dataclasses.dataclass(frozen=True)
class _Doubt:
    """A server that may have a volume, although Nova was told that it has
    not: LXD was gone."""

    instance: objects.Instance
    guest: lxd_guest.Guest
    connection_info: dict[str, Any]
    mountpoint: str


class AttachSteps:
    """The steps that everything done with volumes of servers consists of.

    Locks of server and volume must be held.

    :param volumes: connects the host to volumes.
    :param mounted: mounts the filesystems on them, where they are to be
        mounted.
    :param who: knows which guests have a volume.
    """

    def __init__(self, volumes: manager.VolumeManager,
                 mounted: filesystems.Filesystems, who: usage.VolumeUsage
                 ) -> None:
        self._volumes = volumes
        self._filesystems = mounted
        self._holders = who
        #: By volume, whose lock has to be held.
        self._doubts: dict[str, _Doubt] = {}

    def connect(self, context: nova_context.RequestContext,
                instance: objects.Instance,
                connection_info: dict[str, Any], path: str,
                size_gb: int | None, undo: contextlib.ExitStack,
                probe: bool = True,
                encrypted: dict[str, Any] | None = None) -> dict[str, str]:
        """Connect the host to a volume, and describe it as an LXD device.

        :param context: for asking Cinder.
        :param instance: the server that is to have it.
        :param connection_info: Cinder's description of the connection, which
            gets what later steps need to know.
        :param path: where the guest is to find it.
        :param size_gb: GiB that it has, if that is known.
        :param undo: gets what takes the connection back.
        :param probe: whether the filesystem on it is to be looked for, or
            made.
        :param encrypted: how it is encrypted, if Nova says so.
        :returns: the LXD device.
        :raises nova.exception.VolumeAttachFailed: it cannot be connected, or
            is not to be.
        """
        identifier = manager.volume_id(connection_info)
        self._settle(instance, identifier)
        connected = self._holders.check_exclusive(
            instance, identifier, bool(connection_info.get('multiattach')))
        mode = self._filesystems.choose(context, instance, connection_info,
                                        identifier)
        source = self._volumes.connect(
            instance, connection_info, size_gb, context=context,
            encrypted=encrypted, shared=connected)
        if not connected:
            undo.callback(self.drop, instance, connection_info, force=True)
        self._holders.check_device_conflict(instance, identifier, source)
        recorded = {lxd_devices.KEY_BOOT: lxd_devices.boot_id()}
        if mode == filesystems.FILESYSTEM:
            with manager.explained('mount', instance, identifier,
                                   exception.VolumeAttachFailed):
                return {**self._filesystems.device(connection_info,
                                                   identifier, path, probe),
                        lxd_devices.KEY_SOURCE: source, **recorded}
        if connection_info['data'].get('qos_specs'):
            LOG.warning('Volume %s has front-end QoS limits, which LXD cannot '
                        'apply to block devices; use the limits of the '
                        'storage (consumer: back-end)', identifier,
                        instance=instance)
        return {'type': 'unix-block', 'source': source, 'path': path,
                **recorded}

    def _settle(self, instance: objects.Instance, identifier: str) -> None:
        """Take a volume back that another server may have, although Nova was
        told that it has not.

        :raises nova.exception.VolumeAttachFailed: that server uses it, or
            LXD is still gone.
        """
        doubt = self._doubts.get(identifier)
        if doubt is None or doubt.instance.uuid == instance.uuid:
            return
        try:
            with contextlib.suppress(errors.NotFound):
                self.detach_device(doubt.instance, doubt.guest.reload(),
                                   doubt.connection_info, doubt.mountpoint)
            self.disconnect(doubt.instance, doubt.connection_info, force=False)
            self._doubts.pop(identifier, None)
        except (errors.LXDError, exception.DeviceDetachFailed,
                exception.VolumeDetachFailed) as error:
            LOG.error('Volume %(volume)s may be in %(guest)s, to which '
                      'attaching it has failed, and cannot be taken back: '
                      '%(error)s', {'volume': identifier,
                                    'guest': doubt.guest.name,
                                    'error': error}, instance=instance)
            raise exception.VolumeAttachFailed(
                volume_id=identifier,
                reason=f'server {doubt.instance.uuid}, to which attaching it '
                       'has failed, may have it; reboot that server hard, or '
                       'attach the volume to it and detach it') from None

    def attach_device(self, instance: objects.Instance, guest: lxd_guest.Guest,
                      connection_info: dict[str, Any], mountpoint: str,
                      device: Mapping[str, str], undo: contextlib.ExitStack) -> None:
        """Put a connected volume into a guest.

        :param instance: the server.
        :param guest: its LXD instance.
        :param connection_info: as :meth:`connect` left it.
        :param mountpoint: the device name of the volume.
        :param device: what :meth:`connect` returned.
        :param undo: what takes the connection back.
        :raises errors.LXDError: LXD refuses it.
        """
        # LXD may have done it although it reports a failure, or its answer is
        # lost. The host must not be disconnected as long as that may be.
        identifier = manager.volume_id(connection_info)
        name = lxd_devices.name(identifier)
        before = guest.devices.get(name)
        try:
            try:
                guest.add_devices({name: device})
            except errors.OperationFailed as error:
                if not any(sign in error.message for sign in _LEFTOVER):
                    raise
                clear_leftover(guest, name, device)
                guest.add_devices({name: device})
        except errors.LXDError as failure:
            with excutils.save_and_reraise_exception():
                try:
                    guest.update(devices={name: before})
                    if before is None and isinstance(failure, UNANSWERED):
                        # It may have crashed in the middle, and be back.
                        clear_leftover(guest, name, device)
                except errors.LXDError as error:
                    undo.pop_all()
                    self._doubts[identifier] = _Doubt(
                        instance, guest, connection_info, mountpoint)
                    LOG.error('Volume %(volume)s stays connected, since LXD '
                              'may have given it to the guest: %(error)s',
                              {'volume': identifier, 'error': error},
                              instance=instance)
        self._doubts.pop(identifier, None)

    def disconnect(self, instance: objects.Instance,
                   connection_info: dict[str, Any], *, force: bool) -> None:
        """Disconnect the host from a volume that a server has lost, unless
        another server has it too.

        :param instance: the server.
        :param connection_info: Cinder's description of the connection.
        :param force: the server is being deleted: nothing is raised.
        :raises nova.exception.VolumeDetachFailed: something of it is left.
        """
        identifier = manager.volume_id(connection_info)
        # A build that was refused the volume of another server ends here, too.
        others = self._holders.others(instance, identifier)
        if others:
            LOG.info('Volume %(volume)s stays connected for %(others)s',
                     {'volume': identifier, 'others': ', '.join(
                         guest.name for guest in others)},
                     instance=instance)
            return
        self.drop(instance, connection_info, force=force)

    def drop(self, instance: objects.Instance,
             connection_info: dict[str, Any], *, force: bool) -> None:
        """Unmount a volume that nobody uses, and disconnect the host. See
        :meth:`disconnect`.
        """
        identifier = manager.volume_id(connection_info)
        try:
            with manager.explained('unmount', instance, identifier,
                                   exception.VolumeDetachFailed):
                self._filesystems.unmount(identifier, force)
        except exception.VolumeDetachFailed:
            if not force:
                raise
        self._volumes.disconnect(instance, connection_info, force=force)
        self._doubts.pop(identifier, None)

    def mount(self, instance: objects.Instance, guest: lxd_guest.Guest,
              connection_info: dict[str, Any]) -> None:
        """Mount a volume for a guest, if it is to have it mounted.

        :param instance: the server.
        :param guest: its LXD instance, just read.
        :param connection_info: as :meth:`connect` left it.
        :raises nova.exception.VolumeAttachFailed: it cannot be mounted.
        """
        identifier = manager.volume_id(connection_info)
        if filesystems.is_filesystem(connection_info):
            with manager.explained('mount', instance, identifier,
                                   exception.VolumeAttachFailed):
                self._filesystems.mount(guest, connection_info, identifier)

    def detach_device(self, instance: objects.Instance, guest: lxd_guest.Guest,
                      connection_info: dict[str, Any], mountpoint: str) -> None:
        """Take a volume out of a guest that does not use it.

        :param instance: the server.
        :param guest: its LXD instance, with the volume or without.
        :param connection_info: Cinder's description of the connection.
        :param mountpoint: the device name of the volume.
        :raises nova.exception.DeviceDetachFailed: the guest uses it; it stays
            there.
        """
        identifier = manager.volume_id(connection_info)
        name = lxd_devices.name(identifier)
        device = lxd_devices.of_guest(guest).get(name)
        if device is None:
            self.clear(guest, connection_info, mountpoint)
            return
        if not lxd_devices.is_current(guest, device):
            # Whoever uses its block device by now has another volume there.
            guest.update(devices={name: None})
            return
        init = init_process(guest, identifier, device)
        check_not_in_use(guest, init, device, mountpoint)
        guest.update(devices={name: None})
        try:
            # Something may have opened it in the last moment.
            if device['type'] == 'disk':
                self._filesystems.release(
                    identifier, lxd_devices.source(device), mountpoint)
            else:
                check_not_in_use(guest, init, device, mountpoint)
        except exception.DeviceDetachFailed:
            with excutils.save_and_reraise_exception():
                self.mount(instance, guest, connection_info)
                guest.update(devices={name: device})
                LOG.info('Volume %s has gone back to the guest, which uses it',
                         identifier, instance=instance)

    def clear(self, guest: lxd_guest.Guest,
              connection_info: dict[str, Any], mountpoint: str) -> None:
        """Take out of a running guest what LXD may have put there when it
        crashed before it wrote down that the guest has the volume.

        :param guest: the guest, which does not have it as far as LXD knows.
        :param connection_info: Cinder's description of the connection.
        :param mountpoint: the device name of the volume.
        :raises nova.exception.DeviceDetachFailed: the guest uses it; it stays
            there.
        """
        if guest.power_state not in (power_state.RUNNING, power_state.PAUSED):
            return
        try:
            path = lxd_devices.guest_path(mountpoint)
        except exception.InvalidDevicePath:
            # Nova asks for it, too, after a volume was refused for its path.
            return
        identifier = manager.volume_id(connection_info)
        usable = True
        if self._filesystems.is_prepared(identifier):
            device = {'type': 'disk', 'path': filesystems.guest_directory(path),
                      'source': self._filesystems.target(identifier)}
            usable = self._filesystems.is_mounted(identifier)
        else:
            device = {'type': 'unix-block', 'path': path, 'source': (
                base.device_path(connection_info) or
                self._volumes.connections().get(identifier) or
                '/dev/' + identifier)}
        # Where another volume is, there is nothing of this one.
        if any(other.get('path') == device['path']
               for other in guest.devices.values()):
            return
        if usable:
            check_not_in_use(guest, init_process(guest, identifier, device),
                             device, mountpoint)
        clear_leftover(guest, lxd_devices.name(identifier), device)


def clear_leftover(guest: lxd_guest.Guest, name: str,
                   device: Mapping[str, str]) -> None:
    """Have LXD remove the node or the mount of a device that it was about to
    give to a guest when it crashed: it would not make it again before the
    guest is restarted.

    :param guest: the guest.
    :param name: of the LXD device.
    :param device: the LXD device.
    """
    # One without a source is not made, but removed with all that bears its
    # name.
    guest.add_devices({name: {
        **device, 'source': device['source'] + _NOTHING,
        'required': 'false'}})
    guest.update(devices={name: None})


def init_process(guest: lxd_guest.Guest, identifier: str,
                 device: Mapping[str, str]) -> int:
    """Find the first process of a guest that has a volume.

    :param guest: the guest, just read.
    :param identifier: Cinder's id of the volume.
    :param device: the volume as LXD device.
    :returns: its process id on the host; 0 if nothing runs there.
    """
    if guest.power_state == power_state.SHUTDOWN:
        return 0
    with contextlib.suppress(OSError):
        found = fuser.find_init(
            guest.container, identifier, os.stat(device['source']).st_dev
            if device['type'] == 'disk' else 0)
        if found:
            return found
    try:
        return max(guest.state()['pid'], 0)
    except errors.NotFound:
        return 0


def check_not_in_use(guest: lxd_guest.Guest, init: int,
                     device: Mapping[str, str], mountpoint: str) -> None:
    """See that no process of a guest uses a volume.

    :param guest: the guest.
    :param init: its first process.
    :param device: the volume as LXD device.
    :param mountpoint: the device name of the volume.
    :raises nova.exception.DeviceDetachFailed: some do.
    """
    if not init:
        return
    number = filesystem = 0
    try:
        if device['type'] == 'disk':
            filesystem = os.stat(device['source']).st_dev
        else:
            number = device_identity.device_number(device['source'])
    except (device_identity.WrongDevice, OSError):
        # Nobody can use what is not there.
        return
    using = fuser.find_users(init, number, filesystem)
    if using:
        LOG.info('%(device)s of %(guest)s is open in processes %(pids)s of '
                 'the host', {'device': mountpoint, 'guest': guest.name,
                              'pids': using})
        raise exception.DeviceDetachFailed(
            device=mountpoint,
            reason=f'{len(using)} processes of the server use it; end them '
                   f'first')
