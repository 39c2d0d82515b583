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

"""The steps of attaching one volume to one instance, and of detaching it.

The guest has the LXD device of a volume only while the host is connected: the
device is added last and removed first.
"""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import functools
from typing import Any

from nova.compute import power_state
from nova import context as nova_context
from nova import exception
from nova import objects
from nova.virt import block_device
from nova.volume import cinder
from oslo_config import cfg
from oslo_log import log as logging
from oslo_utils import excutils

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.volume import base
from nova_lxd_py.virt.volume import connections
from nova_lxd_py.virt.volume import in_use
from nova_lxd_py.virt.volume import lxd_devices
from nova_lxd_py.virt.volume import mode_selection
from nova_lxd_py.virt.volume import modes
from nova_lxd_py.virt.volume import qos
from nova_lxd_py.virt.volume import usage

LOG = logging.getLogger(__name__)

#: Errors after which it is unknown what LXD has done.
UNANSWERED = (errors.Unreachable, errors.OperationLost,
              errors.DeadlineExceeded)


class VolumeAttacher:
    """Attaches and detaches volumes. Locks of instance and volume must be
    held.

    :param options: the ``[lxd]`` option group.
    :param host_connections: connects the host to volumes.
    :param volume_usage: knows which guests have a volume.

    :ivar modes: the ways in which guests get volumes.
    """

    def __init__(self, options: cfg.ConfigOpts.GroupAttr,
                 host_connections: connections.VolumeConnections,
                 volume_usage: usage.VolumeUsage) -> None:
        self.modes = mode_selection.ModeSelection(options)
        self._connections = host_connections
        self._usage = volume_usage

    # -- the host -----------------------------------------------------------

    def connect(self, context: nova_context.RequestContext,
                instance: objects.Instance,
                connection_info: dict[str, Any], mountpoint: str,
                size_gb: int | None, undo: contextlib.ExitStack, *,
                root: bool = False, probed: bool = False,
                encryption: dict[str, Any] | None = None
                ) -> lxd_devices.GuestChanges:
        """Connect the host to a volume and prepare the volume for its guest.

        :param context: for requests to Cinder and the key manager.
        :param instance: the instance that is to have the volume.
        :param connection_info: Cinder's description of the connection; what
            later steps need is added to it.
        :param mountpoint: device name of the volume.
        :param size_gb: size of the volume in GiB; Cinder is asked if it is
            None.
        :param undo: gets a callback that disconnects the host.
        :param root: whether the instance boots from the volume.
        :param probed: whether it is known what is on the volume, or will be.
        :param encryption: how the volume is encrypted, if Nova says so.
        :returns: what the LXD instance needs; :meth:`mount` has to follow
            before the guest gets it.
        :raises nova.exception.VolumeAttachFailed: if the volume cannot be
            connected or must not be used.
        """
        self._connections.check_supported(connection_info)
        identifier = connections.volume_id(connection_info)

        @functools.cache
        def ask_cinder() -> Mapping[str, Any]:
            # Not by the ID that the volume had when the host was connected.
            return cinder.API().get(
                context, block_device.get_volume_id(connection_info))

        if size_gb is None:
            size_gb = ask_cinder().get('size')
        mode: modes.Mode = self.modes.root
        if not root:
            mode = self.modes.choose(instance, connection_info, ask_cinder)
        mode.check(instance, connection_info)
        qos.check(instance, connection_info)
        sharing = bool(connection_info.get('multiattach'))
        if not sharing:
            self._reclaim(context, instance, connection_info)
        attached = self._usage.check_exclusive(instance, identifier, sharing)
        path = self._connections.connect(
            instance, connection_info, size_gb, context=context,
            encryption_metadata=encryption, shared=attached)
        if not attached:
            undo.callback(self.drop, instance, identifier, connection_info,
                          force=True)
        self._usage.check_device_conflict(instance, identifier, path)
        connection_info[modes.KEY_MODE] = mode.name
        with connections.map_exceptions('prepare', instance, identifier,
                                        exception.VolumeAttachFailed):
            mode.prepare(connection_info, probed)
        changes = mode.describe(connection_info, mountpoint)
        qos.add(changes, connection_info)
        return changes

    def _reclaim(self, context: nova_context.RequestContext,
                 instance: objects.Instance, connection_info: dict[str, Any]
                 ) -> None:
        """Detach a volume from guests to which attaching it has failed.

        LXD may have stopped answering when it had attached the volume, so that
        this could not be undone. Nova has dropped its record of the volume at
        that instance then.

        :raises nova.exception.VolumeAttachFailed: if such a guest uses the
            volume, or LXD does not answer.
        """
        identifier = connections.volume_id(connection_info)
        for guest in self._usage.other_users(instance, identifier):
            device = lxd_devices.of_guest(guest)[identifier]
            if device['type'] == modes.ROOT or usage.recorded(
                    context.elevated(), guest.uuid, identifier):
                continue
            LOG.warning('Detaching volume %(volume)s from %(guest)s, to which '
                        'attaching it has failed',
                        {'volume': identifier, 'guest': guest.name},
                        instance=instance)
            try:
                self.detach_device(
                    instance, guest, {**connection_info,
                                      **mode_selection.connection_of(
                                          identifier, device)},
                    device['path'])
                self.drop(instance, identifier, dict(connection_info),
                          force=False)
            except (errors.LXDError, exception.DeviceDetachFailed,
                    exception.VolumeDetachFailed) as error:
                LOG.error('Could not detach volume %(volume)s from %(guest)s: '
                          '%(error)s', {'volume': identifier,
                                        'guest': guest.name, 'error': error},
                          instance=instance)
                raise exception.VolumeAttachFailed(
                    volume_id=identifier,
                    reason=f'server {guest.uuid}, to which attaching it has '
                           'failed, may have it; hard reboot that server, or '
                           'attach the volume to it and detach it') from None

    def mount(self, instance: objects.Instance | None,
              guest: lxd_guest.Guest, connection_info: dict[str, Any]) -> None:
        """Mount a connected volume for a guest, if its mode needs it.

        :param instance: the instance, if known.
        :param guest: its LXD instance, just read.
        :param connection_info: as :meth:`connect` left it.
        :raises nova.exception.VolumeAttachFailed: if it cannot be mounted.
        """
        identifier = connections.volume_id(connection_info)
        with connections.map_exceptions('mount', instance, identifier,
                                        exception.VolumeAttachFailed):
            self.modes.of(connection_info).mount(guest, connection_info)

    def disconnect(self, instance: objects.Instance,
                   connection_info: dict[str, Any], *, force: bool) -> None:
        """Disconnect the host from a volume that an instance no longer has.

        It stays connected for other guests that have the volume.

        :param instance: the instance.
        :param connection_info: Cinder's description of the connection.
        :param force: log errors only.
        :raises nova.exception.VolumeDetachFailed: if something is left of it.
        """
        identifier = connections.volume_id(connection_info)
        # A build that was refused another server's volume ends here, too.
        others = self._usage.other_users(instance, identifier)
        if others:
            LOG.info('Volume %(volume)s stays connected for %(others)s',
                     {'volume': identifier, 'others': ', '.join(
                         guest.name for guest in others)},
                     instance=instance)
            return
        self.drop(instance, identifier, connection_info, force=force)

    def drop(self, instance: objects.Instance | None, identifier: str,
             connection_info: dict[str, Any] | None, *, force: bool) -> None:
        """Unmount a volume that no guest has and disconnect the host.

        :param instance: the instance that had it, if known.
        :param identifier: Cinder's ID of the volume.
        :param connection_info: Cinder's description of the connection; None if
            only the ID of the volume is known.
        :param force: log errors only, and remove what is in use as soon as it
            is released.
        :raises nova.exception.VolumeDetachFailed: if something is left of it.
        """
        with connections.map_exceptions(
                'unmount', instance, identifier, exception.VolumeDetachFailed,
                log_only=force):
            self.modes.unmount(identifier, connection_info, force)
        if connection_info is None:
            self._connections.forget(instance, identifier, force=force)
        else:
            self._connections.disconnect(instance, connection_info,
                                         force=force)

    # -- the guest ----------------------------------------------------------

    def attach_device(self, instance: objects.Instance, guest: lxd_guest.Guest,
                      identifier: str, device: Mapping[str, str],
                      undo: contextlib.ExitStack) -> None:
        """Add the LXD device of a connected and mounted volume to a guest.

        :param instance: the instance.
        :param guest: its LXD instance.
        :param identifier: Cinder's ID of the volume.
        :param device: the LXD device.
        :param undo: disconnects the host.
        :raises errors.LXDError: if LXD refuses it.
        """
        # LXD may have done it although it reports a failure, or its answer is
        # lost. The host must not be disconnected as long as that may be.
        name = lxd_devices.name(identifier)
        before = guest.devices.get(name)
        try:
            lxd_devices.add(guest, name, device)
        except errors.LXDError as failure:
            with excutils.save_and_reraise_exception():
                try:
                    guest.update(devices={name: before})
                    if before is None and isinstance(failure, UNANSWERED):
                        # It may have crashed in the middle, and be back.
                        lxd_devices.clear_leftover(guest, name, device)
                except errors.LXDError as error:
                    if not _has_been_undone(guest, name, before, error):
                        undo.pop_all()
                        LOG.error('Volume %(volume)s stays connected, since '
                                  'LXD may have attached it to the guest: '
                                  '%(error)s', {'volume': identifier,
                                                'error': error},
                                  instance=instance)

    def detach_device(self, instance: objects.Instance, guest: lxd_guest.Guest,
                      connection_info: dict[str, Any], mountpoint: str
                      ) -> None:
        """Remove the LXD device of a volume from a guest that does not use it.

        :param instance: the instance.
        :param guest: its LXD instance, with the volume or without.
        :param connection_info: Cinder's description of the connection.
        :param mountpoint: device name of the volume.
        :raises nova.exception.DeviceDetachFailed: if the guest uses the
            volume, which it keeps.
        """
        identifier = connections.volume_id(connection_info)
        name = lxd_devices.name(identifier)
        device = lxd_devices.of_guest(guest).get(identifier)
        if device is None:
            self.clear(guest, connection_info, mountpoint)
            return
        if not lxd_devices.is_current(guest, device):
            # By now its block device is another volume's.
            guest.update(devices={name: None})
            return
        use = in_use.VolumeUse(guest, identifier, device, mountpoint)
        use.check()
        guest.update(devices={name: None})
        try:
            self.check_released(use)
        except exception.DeviceDetachFailed:
            with excutils.save_and_reraise_exception():
                self.mount(instance, guest, connection_info)
                guest.update(devices={name: device})
                LOG.info('Attached volume %s to the guest again, which uses '
                         'it', identifier, instance=instance)

    def check_released(self, use: in_use.VolumeUse) -> None:
        """Check that a guest has not begun to use a volume at the moment when
        its device was removed, and unmount the volume.

        :param use: the guest's use of the volume, since before that.
        :raises nova.exception.DeviceDetachFailed: if the guest uses it.
        """
        if use.device['type'] == 'disk':
            self.modes.filesystem.release(
                use.identifier, lxd_devices.source(use.device), use.mountpoint)
        else:
            use.check()

    def clear(self, guest: lxd_guest.Guest,
              connection_info: dict[str, Any], mountpoint: str) -> None:
        """Remove from a running guest what LXD may have put there when it
        crashed before it recorded that the guest has the volume.

        :param guest: the guest, which does not have it as far as LXD knows.
        :param connection_info: Cinder's description of the connection.
        :param mountpoint: device name of the volume.
        :raises nova.exception.DeviceDetachFailed: if the guest uses the
            volume, which it keeps.
        """
        if guest.power_state not in (power_state.RUNNING, power_state.PAUSED):
            return
        try:
            path = lxd_devices.guest_path(mountpoint)
        except exception.InvalidDevicePath:
            # Nova also detaches a volume that was refused for its path.
            return
        identifier = connections.volume_id(connection_info)
        mounted = self.modes.filesystem
        usable = True
        if mounted.is_prepared(identifier):
            device = {'type': 'disk', 'source': mounted.target(identifier),
                      'path': lxd_devices.mounted_path(path)}
            usable = mounted.is_mounted(identifier)
        else:
            known = self._connections.known().get(identifier)
            device = {'type': 'unix-block', 'path': path, 'source': (
                base.device_path(connection_info) or
                (known.path if known else '/dev/' + identifier))}
        # Where another volume is, there is nothing of this one.
        if any(other.get('path') == device['path']
               for other in guest.devices.values()):
            return
        if usable:
            in_use.VolumeUse(guest, identifier, device, mountpoint).check()
        lxd_devices.clear_leftover(guest, lxd_devices.name(identifier), device)


def _has_been_undone(guest: lxd_guest.Guest, name: str,
                     before: Mapping[str, str] | None,
                     error: errors.LXDError) -> bool:
    """Whether LXD has removed a device although it reports a failure: it
    writes to a root disk that is full after everything else."""
    if not isinstance(error, errors.DiskFull):
        return False
    try:
        return guest.reload().devices.get(name) == before
    except errors.LXDError:
        return False
