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

"""One volume of a server put in place of another, with its content.

Nova asks for it when a volume moves to other storage, or when its owner wants
that. A container has no disk below which storage could be exchanged: whoever
has the old one open would go on with it. So a volume in use is refused, and a
server stands still from the last look at it until the new one is in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
import contextlib
import json
import time
from typing import Any

from nova.compute import power_state
from nova import context as nova_context
from nova import exception
from nova import objects
from oslo_log import log as logging

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.privileged import block_copy
from nova_lxd_py.virt.volume import attach_steps
from nova_lxd_py.virt.volume import base
from nova_lxd_py.virt.volume import device_identity
from nova_lxd_py.virt.volume import filesystems
from nova_lxd_py.virt.volume import lxd_devices
from nova_lxd_py.virt.volume import manager

LOG = logging.getLogger(__name__)

#: On an instance while a volume is exchanged: what it had before, as JSON.
KEY_SWAP = 'user.nova.volume_swap'

#: Seconds between lines in the log about how far a copy is.
_REPORT = 10.0


class VolumeSwapper:
    """Exchanges volumes.

    :param guests: the driver's LXD instances.
    :param mounted: mounts the filesystems on volumes.
    :param steps: connects, disconnects and mounts.
    """

    def __init__(self, guests: registry.GuestRegistry,
                 mounted: filesystems.Filesystems,
                 steps: attach_steps.AttachSteps) -> None:
        self._guests = guests
        self._filesystems = mounted
        self._steps = steps

    def swap(self, context: nova_context.RequestContext,
             instance: objects.Instance, old: dict[str, Any],
             new: dict[str, Any], mountpoint: str, size_gb: int | None
             ) -> None:
        """Put a volume in place of another one, with the same content.

        Until the old volume is disconnected, each failure takes everything
        back. See :meth:`nova.virt.driver.ComputeDriver.swap_volume`.

        :param instance: the server.
        :param old: the connection of the volume that it has.
        :param new: the connection of the volume that it gets, which gets what
            detaching needs to know.
        :param mountpoint: the device name of both.
        :param size_gb: GiB of the new volume, if it is larger.
        :raises nova.exception.DeviceDetachFailed: the server uses the old one.
        :raises nova.exception.VolumeAttachFailed: the new one cannot be used.
        :raises nova.exception.VolumeDetachFailed: the host could not be
            disconnected from the old one.
        """
        leaving, coming = manager.volume_id(old), manager.volume_id(new)
        if leaving == coming:
            raise exception.InvalidVolume(
                reason='a volume cannot be exchanged for itself')
        # Cinder gives the new volume the old one's id when it has moved a
        # volume. On this host it keeps the one that it came with.
        new[manager.LOCAL_ID] = coming
        first, second = sorted((leaving, coming))
        with (self._guests.changing(instance), manager.lock(first),
              manager.lock(second), contextlib.ExitStack() as undo):
            guest = self._guests.active(instance)
            before = lxd_devices.of_guest(guest).get(lxd_devices.name(leaving))
            if before is None:
                raise exception.InvalidVolume(
                    reason='the server does not have the old volume')
            if guest.power_state == power_state.SHUTDOWN:
                # What LXD has noted for it may be another device by now.
                raise exception.InvalidVolume(
                    reason='the server does not run; start it first')
            if before['type'] == lxd_devices.ROOT:
                raise exception.InvalidVolume(
                    reason='the server has booted from it')
            self._filesystems.adopt(old, new, coming)
            device = self._steps.connect(
                context, instance, new, lxd_devices.guest_path(mountpoint),
                size_gb or None, undo, probe=False)
            with manager.explained('copy', instance, coming,
                                   exception.VolumeAttachFailed):
                size = _checked_size(before, device, new)
            self._hold_still(guest, before, leaving, mountpoint, undo)
            with manager.explained('copy', instance, leaving,
                                   exception.VolumeAttachFailed):
                _copy(instance, lxd_devices.source(before),
                      lxd_devices.source(device), size)
            self._steps.mount(instance, guest, new)
            self._switch(instance, guest, old, new, before, device, undo)
            if filesystems.is_filesystem(new):
                # A mount elsewhere in the guest shows only now.
                self._filesystems.release(leaving, lxd_devices.source(before),
                                          mountpoint)
                if size_gb:
                    with manager.growing(instance, coming):
                        self._filesystems.grow(new, coming)
            # From here on the old volume must never be given back: its device
            # may become another volume's.
            guest.update(config={KEY_SWAP: None})
            self._steps.disconnect(instance, old, force=False)
            undo.pop_all()
            _quietly_thaw(instance, guest)
        LOG.info('Volume %(new)s is in place of volume %(old)s at %(path)s',
                 {'new': coming, 'old': leaving, 'path': device['path']},
                 instance=instance)

    def _hold_still(self, guest: lxd_guest.Guest,
                    device: Mapping[str, str], identifier: str,
                    mountpoint: str, undo: contextlib.ExitStack) -> None:
        """Keep everything in a guest from using a volume."""
        init = attach_steps.init_process(guest, identifier, device)
        attach_steps.check_not_in_use(guest, init, device, mountpoint)
        if guest.power_state == power_state.RUNNING:
            undo.callback(_thaw, guest)
            guest.update(config={lxd_guest.KEY_QUIESCED: 'true'})
            guest.freeze()
            attach_steps.check_not_in_use(guest, init, device, mountpoint)
        if device['type'] == 'disk':
            undo.callback(self._filesystems.thaw, identifier)
            self._filesystems.freeze(identifier)

    def _switch(self, instance: objects.Instance, guest: lxd_guest.Guest,
                old: dict[str, Any], new: dict[str, Any],
                before: Mapping[str, str], device: Mapping[str, str],
                undo: contextlib.ExitStack) -> None:
        """Give a guest the new volume for the old one, in one step."""
        leaving, coming = (lxd_devices.name(manager.volume_id(connection))
                           for connection in (old, new))
        noted = {KEY_SWAP: json.dumps({'old': leaving, 'new': coming,
                                       'device': dict(before)})}

        def back(_kind: Any, failure: BaseException | None, _trace: Any
                 ) -> None:
            try:
                self._filesystems.thaw(manager.volume_id(old))
                if filesystems.is_filesystem(old):
                    self._steps.mount(instance, guest, old)
                if isinstance(failure, attach_steps.UNANSWERED):
                    # It may have crashed in the middle: what is in the guest
                    # is not what LXD has written down.
                    guest.update(devices={coming: None, leaving: None},
                                 config=noted)
                    for name, each in ((coming, device), (leaving, before)):
                        attach_steps.clear_leftover(guest, name, each)
                guest.update(devices={coming: None, leaving: before},
                             config={KEY_SWAP: None})
            except (errors.LXDError, exception.NovaException) as error:
                # Neither may be disconnected.
                undo.pop_all()
                LOG.error('Volume %(volume)s stays connected, since LXD may '
                          'have given it to the guest: %(error)s',
                          {'volume': manager.volume_id(new), 'error': error},
                          instance=instance)
                _quietly_thaw(instance, guest)
        # Runs before all that has been done so far is taken back.
        undo.push(back)
        guest.update(devices={leaving: None, coming: device}, config=noted)
        # Whoever was to write to the old filesystem is gone from it.
        self._filesystems.thaw(manager.volume_id(old))

    def recover(self) -> None:
        """Put right what the end of nova-compute has interrupted.

        Nova knows of the old volume only.
        """
        for guest in self._guests.all():
            kept = guest.config.get(KEY_SWAP)
            # Nothing on a guest that was paused tells whether a filesystem of
            # its stands still. Those of guests that run cannot, and may be on
            # storage that does not answer.
            if (kept or lxd_guest.KEY_QUIESCED in guest.config or
                    guest.power_state != power_state.RUNNING):
                for name, device in lxd_devices.of_guest(guest).items():
                    if device['type'] == 'disk':
                        with _tolerated(guest):
                            self._filesystems.thaw(lxd_devices.volume(name))
            if kept:
                with _tolerated(guest):
                    self._take_back(guest, json.loads(kept))

    def _take_back(self, guest: lxd_guest.Guest, kept: dict[str, Any]
                   ) -> None:
        LOG.warning('%(guest)s gets %(old)s back, for which %(new)s was about '
                    'to be exchanged when nova-compute ended; the host may '
                    'still be connected to both',
                    {'guest': guest.name, 'old': kept['old'],
                     'new': kept['new']})
        self._filesystems.thaw(lxd_devices.volume(kept['old']))
        try:
            guest.update(devices={kept['new']: None,
                                  kept['old']: kept['device']},
                         config={KEY_SWAP: None})
        except errors.LXDError as error:
            LOG.error('%(guest)s cannot have %(old)s back before it is '
                      'rebooted hard: %(error)s',
                      {'guest': guest.name, 'old': kept['old'],
                       'error': error})


@contextlib.contextmanager
def _tolerated(guest: lxd_guest.Guest) -> Iterator[None]:
    """Keep what is wrong with one guest from those that come after it."""
    try:
        yield
    except Exception as error:
        LOG.error('What the end of nova-compute has interrupted at volumes of '
                  '%(guest)s cannot be put right before it is rebooted hard: '
                  '%(kind)s: %(error)s', {
                      'guest': guest.name, 'kind': type(error).__name__,
                      'error': error})


def _checked_size(before: Mapping[str, str], device: Mapping[str, str],
                  new: dict[str, Any]) -> int:
    """See that the content of one volume fits on another.

    :returns: bytes of the old volume.
    """
    old_size, new_size = (device_identity.size(lxd_devices.source(each))
                          for each in (before, device))
    if new_size < old_size:
        raise base.Refused(f'it has {new_size} bytes, and the old volume has '
                           f'{old_size}')
    if filesystems.is_read_only(new):
        raise base.Refused('it is read-only')
    return old_size


def _copy(instance: objects.Instance, source: str, target: str, size: int
          ) -> None:
    """Copy a whole volume, and tell how far that is."""
    began = reported = time.monotonic()
    written = 0
    for offset in range(0, size, block_copy.CHUNK):
        written += block_copy.copy(source, target, offset,
                                   min(block_copy.CHUNK, size - offset))
        now = time.monotonic()
        if now - reported > _REPORT:
            reported = now
            done = offset + block_copy.CHUNK
            LOG.info('Copied %(done)d of %(size)d MiB of a volume, '
                     '%(rate)d MiB/s', {
                         'done': done >> 20, 'size': size >> 20,
                         'rate': (done >> 20) / (now - began)},
                     instance=instance)
    LOG.info('Copied a volume of %(size)d MiB, %(written)d of which were not '
             'blank, in %(seconds).1f seconds', {
                 'size': size >> 20, 'written': written >> 20,
                 'seconds': time.monotonic() - began}, instance=instance)


def _thaw(guest: lxd_guest.Guest) -> None:
    guest.unfreeze()
    guest.update(config={lxd_guest.KEY_QUIESCED: None})


def _quietly_thaw(instance: objects.Instance, guest: lxd_guest.Guest
                  ) -> None:
    if lxd_guest.KEY_QUIESCED not in guest.config:
        return
    try:
        _thaw(guest)
    except errors.LXDError as error:
        LOG.error('It stands still until nova-compute is restarted or it is '
                  'rebooted hard: %s', error, instance=instance)
