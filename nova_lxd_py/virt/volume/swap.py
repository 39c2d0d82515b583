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

"""Swapping a volume of a server with another one, which gets its content.

Nova asks for it when a volume moves to other storage, or when its owner wants
that. A container has no disk below which storage could be replaced: whatever
has the old volume open would go on with it. So a volume in use is refused, and
others are detached, copied and attached again; the server runs meanwhile, and
has neither volume.

The LXD instance says until the new volume is attached what it had before: if
LXD or nova-compute ends in between, the old volume is attached again. Adding
the new volume and removing that note is one change of the LXD instance.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from nova_lxd_py.virt.volume import attachment
from nova_lxd_py.virt.volume import base
from nova_lxd_py.virt.volume import connections
from nova_lxd_py.virt.volume import device_identity
from nova_lxd_py.virt.volume import in_use
from nova_lxd_py.virt.volume import lxd_devices
from nova_lxd_py.virt.volume import mode_selection
from nova_lxd_py.virt.volume import modes
from nova_lxd_py.virt.volume import statistics

LOG = logging.getLogger(__name__)

#: Key of an LXD instance during a swap: what it had before, as JSON.
KEY_SWAP = 'user.nova.volume_swap'

#: Seconds between log lines about the progress of a copy.
_REPORT_INTERVAL = 10.0


class VolumeSwapper:
    """Swaps volumes.

    :param guests: the driver's LXD instances.
    :param attacher: the steps for one volume.
    """

    def __init__(self, guests: registry.GuestRegistry,
                 attacher: attachment.VolumeAttacher) -> None:
        self._guests = guests
        self._attacher = attacher

    def swap(self, context: nova_context.RequestContext,
             instance: objects.Instance, old: dict[str, Any],
             new: dict[str, Any], mountpoint: str, size_gb: int | None
             ) -> None:
        """Replace a volume by another one with the same content.

        Each failure until the new volume is attached leaves the old one
        attached. See :meth:`nova.virt.driver.ComputeDriver.swap_volume`.

        :param instance: the instance.
        :param old: connection of the volume that it has.
        :param new: connection of the volume that it gets; what detaching needs
            is added to it.
        :param mountpoint: device name of both.
        :param size_gb: size of the new volume in GiB, if it is larger.
        :raises nova.exception.DeviceDetachFailed: if the server uses the old
            volume.
        :raises nova.exception.VolumeAttachFailed: if the new one cannot be
            used.
        """
        leaving, coming = connections.volume_id(old), connections.volume_id(
            new)
        if leaving == coming:
            raise exception.InvalidVolume(
                reason='a volume cannot be swapped with itself')
        # Cinder gives the new volume the old one's ID when it has moved a
        # volume. On this host it keeps the ID with which it was connected.
        new[connections.LOCAL_ID] = coming
        first, second = sorted((leaving, coming))
        with (self._guests.changing(instance), connections.lock(first),
              connections.lock(second), contextlib.ExitStack() as undo):
            guest = self._guests.active(instance)
            before = _device_to_swap(guest, leaving)
            _adopt_mode(old, new)
            device = self._attacher.connect(
                context, instance, new, mountpoint, size_gb or None, undo,
                probed=True).devices[lxd_devices.name(coming)]
            with connections.map_exceptions('swap', instance, coming,
                                            exception.VolumeAttachFailed):
                size = _checked_size(before, device, new)
            self._detach(instance, guest, before, (leaving, coming), device,
                         mountpoint, undo)
            with connections.map_exceptions('copy', instance, leaving,
                                            exception.VolumeAttachFailed):
                _copy(instance, lxd_devices.source(before),
                      lxd_devices.source(device), size)
            # The instance has not written the copy.
            device.update(statistics.store(lxd_devices.KEY_COUNTERS,
                                           lxd_devices.source(device)))
            self._attacher.mount(instance, guest, new)
            guest.update(devices={lxd_devices.name(coming): device},
                         config={KEY_SWAP: None})
            # From here on the old volume must not be attached again: its
            # device may become another volume's.
            undo.pop_all()
            try:
                self._attacher.disconnect(instance, old, force=False)
            except (errors.LXDError, exception.NovaException) as error:
                # Nova would take a failure for one of the whole swap.
                LOG.error('Volume %(old)s has been swapped with %(new)s, but '
                          'the host could not be disconnected from it: '
                          '%(error)s', {'old': leaving, 'new': coming,
                                        'error': error}, instance=instance)
        LOG.info('Swapped volume %(old)s with volume %(new)s at %(path)s',
                 {'old': leaving, 'new': coming, 'path': device['path']},
                 instance=instance)

    def _detach(self, instance: objects.Instance, guest: lxd_guest.Guest,
                before: Mapping[str, str], identifiers: tuple[str, str],
                device: Mapping[str, str], mountpoint: str,
                undo: contextlib.ExitStack) -> None:
        """Detach the old volume from a guest that does not use it.

        :param undo: gets what attaches it again.
        """
        leaving, coming = identifiers
        use = in_use.VolumeUse(guest, leaving, before, mountpoint)
        use.check()
        note: dict[str, Any] = {
            'old': lxd_devices.name(leaving),
            'new': lxd_devices.name(coming), 'device': dict(before)}

        def attach_again(_kind: Any, failure: BaseException | None,
                         _trace: Any) -> None:
            try:
                if isinstance(failure, attachment.UNANSWERED):
                    # LXD may have crashed in the middle: what is in the guest
                    # is not what LXD has recorded.
                    guest.update(devices={note['old']: None,
                                          note['new']: None})
                    for name, each in ((note['new'], device),
                                       (note['old'], before)):
                        lxd_devices.clear_leftover(guest, name, each)
                self._restore(guest, note)
            except (errors.LXDError, exception.NovaException) as error:
                # Neither may be disconnected.
                undo.pop_all()
                LOG.error('Volumes %(old)s and %(new)s stay connected, since '
                          'the swap of one with the other could not be rolled '
                          'back: %(error)s', {'old': leaving, 'new': coming,
                                              'error': error},
                          instance=instance)
        # Runs before the host is disconnected from the new volume.
        undo.push(attach_again)
        guest.update(devices={note['old']: None},
                     config={KEY_SWAP: json.dumps(note)})
        self._attacher.check_released(use)

    def restore(self, guest: lxd_guest.Guest) -> None:
        """Attach the old volume again where a swap was interrupted.

        Nova knows of the old volume only. The instance's lock must be held.

        :param guest: the guest, just read.
        :raises Exception: if it cannot be attached.
        """
        note = _note(guest)
        if not note:
            return
        LOG.warning('Attaching %(old)s to %(guest)s again: swapping it with '
                    '%(new)s was interrupted',
                    {'guest': guest.name, 'old': note['old'],
                     'new': note['new']}, instance_uuid=guest.uuid)
        if guest.power_state == power_state.SHUTDOWN:
            # Nova names the volume when it starts the server.
            guest.update(devices={note['new']: None}, config={KEY_SWAP: None})
        else:
            with connections.lock(lxd_devices.volume(note['old'])):
                self._restore(guest, note)

    def _restore(self, guest: lxd_guest.Guest, note: dict[str, Any]
                 ) -> None:
        identifier = lxd_devices.volume(note['old'])
        device = note['device']
        guest.update(devices={note['new']: None, note['old']: None})
        connection_info = mode_selection.connection_of(identifier, device)
        self._attacher.mount(None, guest, connection_info)
        lxd_devices.add(guest, note['old'], device)
        guest.update(config={KEY_SWAP: None})


def _note(guest: lxd_guest.Guest) -> dict[str, Any]:
    return json.loads(guest.config.get(KEY_SWAP, '{}'))


def noted(guest: lxd_guest.Guest) -> set[str]:
    """List the volumes that a guest has, or had before, while it has neither.

    :param guest: the guest, just read.
    :returns: Cinder's IDs of the volumes of an unfinished swap.
    """
    note = _note(guest)
    return {lxd_devices.volume(note[key]) for key in ('old', 'new') if note}


def _device_to_swap(guest: lxd_guest.Guest, identifier: str
                    ) -> Mapping[str, str]:
    """Return the LXD device of a volume that can be swapped.

    :raises nova.exception.InvalidVolume: if it cannot.
    """
    device = lxd_devices.of_guest(guest).get(identifier)
    if device is None:
        reason = 'the server does not have the old volume'
    elif guest.power_state == power_state.SHUTDOWN:
        # What LXD has recorded may be another device by now.
        reason = 'the server does not run; start it first'
    elif device['type'] == modes.ROOT:
        reason = 'the server runs from it'
    else:
        return device
    raise exception.InvalidVolume(reason=reason)


def _adopt_mode(old: Mapping[str, Any], new: dict[str, Any]) -> None:
    """Have a volume attached as the one is whose content it gets."""
    new[modes.KEY_MODE] = old.get(modes.KEY_MODE, modes.BLOCK)
    if modes.KEY_KIND in old:
        new[modes.KEY_KIND] = old[modes.KEY_KIND]


def _checked_size(before: Mapping[str, str], device: Mapping[str, str],
                  new: dict[str, Any]) -> int:
    """Validate that the content of one volume fits on another.

    :returns: size of the old volume in bytes.
    :raises base.Refused: if it does not, or the other one is read-only.
    """
    old_size, new_size = (device_identity.size(lxd_devices.source(each))
                          for each in (before, device))
    if new_size < old_size:
        raise base.Refused(f'it has {new_size} bytes, and the old volume has '
                           f'{old_size}')
    if modes.is_read_only(new):
        raise base.Refused('it is read-only')
    return old_size


def _copy(instance: objects.Instance, source: str, target: str, size: int
          ) -> None:
    """Copy a whole volume and log the progress."""
    began = reported = time.monotonic()
    written = 0
    for offset in range(0, size, block_copy.CHUNK):
        written += block_copy.copy(source, target, offset,
                                   min(block_copy.CHUNK, size - offset))
        now = time.monotonic()
        if now - reported > _REPORT_INTERVAL:
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
