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

"""Leftovers of servers that are not on this host.

A build that fails after a crash or while LXD cannot be reached can leave a
config drive, which may hold a password, or ephemeral disks; interrupted
operations leave auxiliary LXD instances, and interrupted migrations what has
come to the destination, or has stayed on the source. Nova asks this host to
delete only servers that it has here. The driver finds the others by its keys.
"""

from __future__ import annotations

from collections.abc import Mapping
import time
from typing import Any

from nova.compute import vm_states
from nova import conf as nova_conf
from nova import context as nova_context
from nova import exception
from nova import objects
from oslo_log import log as logging
from oslo_utils import uuidutils

from nova_lxd_py.virt.guest import disk_view
from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.guest import roles
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import session as lxd
from nova_lxd_py.virt.server import local_disks
from nova_lxd_py.virt.storage import ephemeral_disks

CONF = nova_conf.CONF
LOG = logging.getLogger(__name__)

#: Seconds between the sweep that finds something and the one that removes it.
MIN_AGE = 600

#: LXD instances that are of no use without the server's own.
_AUXILIARY_ROLES = roles.AUXILIARY | {roles.INCOMING, roles.MOVED}

#: States of servers whose migration may still be confirmed, reverted or
#: repaired, so that what it has left on the source is needed.
_UNDECIDED = frozenset({vm_states.RESIZED, vm_states.ERROR})


class _Leftovers:
    """What LXD has of one server."""

    def __init__(self) -> None:
        self.guests: list[lxd_guest.Guest] = []
        self.volumes: list[Mapping[str, Any]] = []


class OrphanSweeper:
    """Removes custom volumes and auxiliary LXD instances without a server.

    :param session: the LXD session.
    :param guests: the driver's LXD instances.
    :param disks: config drives and ephemeral disks.
    """

    def __init__(self, session: lxd.Session, guests: registry.GuestRegistry,
                 disks: local_disks.LocalDisks) -> None:
        self._session = session
        self._guests = guests
        self._disks = disks
        self._volumes = ('storage-pools', session.options.storage_pool,
                         'volumes', 'custom')
        #: When leftovers were found first, by the UUID of their server.
        self._found: dict[str, float] = {}

    def sweep(self, context: nova_context.RequestContext,
              min_age: float | None = None) -> None:
        """Remove leftovers; errors are logged only.

        :param context: an administrator's context, to look servers up in Nova.
        :param min_age: seconds for which a sweep must have known them,
            :data:`MIN_AGE` by default; 0 only while nova-compute starts, when
            it builds nothing.
        """
        if min_age is None:
            min_age = MIN_AGE
        try:
            guests = self._guests.all()
            found = self._find(guests)
        except errors.LXDError as exc:
            LOG.warning('Could not look for leftovers of servers: %s', exc)
            return
        if not min_age:
            # A crash may have come between a change of devices and this.
            for guest in guests:
                guest.show_disks()
        disk_view.sweep({guest.name for guest in guests}, min_age)
        now = time.monotonic()
        self._found = {uuid: self._found.get(uuid, now) for uuid in found}
        for uuid, since in self._found.items():
            if now - since < min_age:
                continue
            try:
                # First without the lock, which a build holds for long.
                if not _is_here(context, uuid):
                    with self._guests.lock(uuid):
                        self._remove(context, uuid)
            except Exception as exc:
                # Not only LXD: Nova's database may be unreachable.
                LOG.warning('Could not remove leftovers of a server: %s', exc,
                            instance_uuid=uuid)

    def _find(self, guests: list[lxd_guest.Guest]) -> dict[str, _Leftovers]:
        """List leftovers by the UUID of their server.

        :param guests: all guests.
        """
        present = {guest.uuid for guest in guests
                   if guest.role not in _AUXILIARY_ROLES}
        found: dict[str, _Leftovers] = {}
        for guest in guests:
            if (guest.role in _AUXILIARY_ROLES and
                    uuidutils.is_uuid_like(guest.uuid) and
                    guest.uuid not in present):
                found.setdefault(guest.uuid, _Leftovers()).guests.append(guest)
        for volume in self._session.get(*self._volumes,
                                        params={'recursion': 1}):
            uuid = volume['config'].get(lxd_guest.KEY_UUID, '')
            if (uuidutils.is_uuid_like(uuid) and uuid not in present and
                    local_disks.is_of(volume, objects.Instance(uuid=uuid))):
                found.setdefault(uuid, _Leftovers()).volumes.append(volume)
        return found

    def _remove(self, context: nova_context.RequestContext, uuid: str) -> None:
        """Remove leftovers of one server; its lock is held."""
        # A build may have finished while the lock was waited for.
        leftovers = self._find(self._guests.all()).get(uuid)
        if leftovers is None or _is_here(context, uuid):
            return
        for guest in leftovers.guests:
            LOG.warning('Removing LXD instance %s, whose server is not on '
                        'this host', guest.name, instance_uuid=uuid)
            guest.delete()
        for volume in leftovers.volumes:
            LOG.warning('Removing LXD volume %s, whose server is not on this '
                        'host', volume['name'], instance_uuid=uuid)
        if leftovers.volumes:
            instance = objects.Instance(uuid=uuid)
            self._disks.delete_ephemeral(
                instance, None, ephemeral_disks.count_of(
                    [volume['name'] for volume in leftovers.volumes],
                    ephemeral_disks.volume_name(instance, '')))
            self._disks.delete_config_drive(instance, None)


def _is_here(context: nova_context.RequestContext, uuid: str) -> bool:
    """Return whether Nova has a server on this host, or changes it right now
    so that it may come here, or back."""
    try:
        instance = objects.Instance.get_by_uuid(context, uuid,
                                                expected_attrs=[])
    except exception.InstanceNotFound:
        return False
    return (instance.host == CONF.host or instance.task_state is not None or
            instance.vm_state in _UNDECIDED)
