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

"""The LXD instances that belong to this nova-compute."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import threading
from typing import Any

from nova.compute import power_state
from nova import exception
from oslo_concurrency import lockutils
from oslo_log import log as logging

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import pending
from nova_lxd_py.virt.guest import roles
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import operations
from nova_lxd_py.virt.lxd import session as lxd

LOG = logging.getLogger(__name__)


class GuestRegistry:
    """Finds, creates and locks the LXD instances of this nova-compute.

    :param session: the LXD session, bound to the driver's project.
    """

    def __init__(self, session: lxd.Session) -> None:
        self._session = session
        self._forget: Callable[[Any], None] = lambda instance: None
        #: Names of the copies of servers that the log has.
        self._copies: set[str] = set()
        #: Names of auxiliary instances by the UUID of their server. They are
        #: found by a list of all, or before they are requested.
        self._auxiliary: dict[str, set[str]] = {}
        self._auxiliary_lock = threading.Lock()
        self._is_listed = False
        #: Instances that are being created, for the watcher of LXD's events.
        self.pending = pending.PendingInstances()

    @property
    def project(self) -> str:
        """LXD project of the instances."""
        return self._session.project

    def all(self) -> list[lxd_guest.Guest]:
        """List all LXD instances that the driver created, with one request.

        :returns: guests of every role; foreign instances in the project, and
            copies that an operator has made of ours, are left out.
        """
        infos = self._session.get('instances', params={'recursion': 1})
        guests = [lxd_guest.Guest(self._session, info) for info in infos]
        self._log_copies(guests)
        ours = [guest for guest in guests if guest.is_ours]
        for guest in ours:
            self._note(guest.name, guest.config)
        self._is_listed = True
        return ours

    def _note(self, name: str, config: Mapping[str, str]) -> None:
        """Note an instance if it is auxiliary."""
        if config.get(lxd_guest.KEY_ROLE) in roles.AUXILIARY:
            with self._auxiliary_lock:
                self._auxiliary.setdefault(
                    config.get(lxd_guest.KEY_UUID, ''), set()).add(name)

    def _names_of(self, instance: Any) -> list[str]:
        """Return the names of all LXD instances that a server may have, its
        own one first."""
        names = roles.lxd_names(instance)
        if not self._is_listed:
            return names
        with self._auxiliary_lock:
            known = set(self._auxiliary.get(instance.uuid, ()))
        return [names[0], *sorted(known)]

    def _log_copies(self, guests: list[lxd_guest.Guest]) -> None:
        """Log once the names of instances that are copies of servers."""
        copies = {guest.name: guest for guest in guests if guest.is_copy}
        for name in sorted(copies.keys() - self._copies):
            LOG.warning('Ignoring LXD instance %s, which was copied or '
                        'renamed by hand from %s', name,
                        copies[name].config[lxd_guest.KEY_LXD_NAME],
                        instance_uuid=copies[name].uuid)
        self._copies = set(copies)

    def servers(self) -> list[lxd_guest.Guest]:
        """List the LXD instances with the server role, with one request."""
        return [guest for guest in self.all()
                if guest.role == roles.SERVER]

    def of(self, instance: Any) -> list[lxd_guest.Guest]:
        """Find all LXD instances of one server: its own and others that were
        created for it, such as its rescue instance.

        Looks for auxiliary instances that have been requested, or listed,
        since nova-compute started. :mod:`.orphans` removes any other.

        :param instance: the :class:`nova.objects.Instance`.
        :returns: guests, its own one first; empty if LXD has none.
        """
        found = []
        for name in self._names_of(instance):
            with contextlib.suppress(errors.InstanceNotFound):
                guest = self.by_name(name)
                if guest.is_ours and guest.uuid == instance.uuid:
                    found.append(guest)
            if not found:
                # Names come from a template that an operator may change, and
                # others may be left where its own one is gone.
                return [guest for guest in self.all()
                        if guest.uuid == instance.uuid]
        return found

    def get(self, instance: Any, role: str = roles.SERVER
            ) -> lxd_guest.Guest:
        """Find the LXD instance of a server.

        :param instance: the :class:`nova.objects.Instance`.
        :param role: one of those in :mod:`.roles`.
        :returns: the guest.
        :raises errors.InstanceNotFound: if LXD has none for this uuid.
        """
        name = roles.lxd_name(instance, role)
        with contextlib.suppress(errors.InstanceNotFound):
            guest = self.by_name(name)
            if (guest.is_ours and guest.uuid == instance.uuid and
                    guest.role == role):
                return guest
        # Names come from a template that an operator may change; if the
        # server's own instance has its name, another one would have it too.
        own = roles.lxd_name(instance)
        found = name != own and self._is_own(own, instance)
        for other in () if found else self.all():
            if other.uuid == instance.uuid and other.role == role:
                return other
        raise errors.InstanceNotFound(
            f'LXD has no {role} instance for server {instance.uuid}')

    def _is_own(self, name: str, instance: Any) -> bool:
        """Whether an LXD instance of this name is the server's own one."""
        with contextlib.suppress(errors.InstanceNotFound):
            guest = self.by_name(name)
            return guest.is_ours and guest.uuid == instance.uuid
        return False

    def by_name(self, name: str) -> lxd_guest.Guest:
        """Read an LXD instance by its name, foreign ones included.

        :param name: name of the LXD instance.
        :returns: the guest.
        :raises errors.InstanceNotFound: if LXD has none.
        """
        guest = lxd_guest.Guest(self._session,
                                self._session.get('instances', name))
        if guest.is_ours:
            self._note(name, guest.config)
        return guest

    def active(self, instance: Any) -> lxd_guest.Guest:
        """Find the LXD instance that currently acts as a server: its rescue
        instance while it is rescued, else its own.

        :param instance: the :class:`nova.objects.Instance`.
        :returns: the guest.
        :raises errors.InstanceNotFound: if LXD has none.
        """
        guest = self.get(instance)
        if guest.is_rescued:
            return self.find(instance, roles.RESCUE) or guest
        return guest

    def reclaim(self, instance: Any) -> lxd_guest.Guest | None:
        """Make what a migration has copied to this host, or left behind on
        it, the server's LXD instance; if Nova has the server here.

        Nothing else has to be repaired: the next start does that.

        :param instance: the :class:`nova.objects.Instance`.
        :returns: the guest, None if there is none, or only an incomplete one.
        """
        for guest in self.of(instance):
            if (guest.role == roles.MOVED or
                    (guest.role == roles.INCOMING and
                     guest.config.get(lxd_guest.KEY_COMPLETE) == 'true')):
                LOG.info('LXD instance %s is the server from now on; a '
                         'migration had marked it as %s', guest.name,
                         guest.role, instance=instance)
                guest.update(config={
                    lxd_guest.KEY_ROLE: roles.SERVER,
                    lxd_guest.KEY_MIGRATION: None,
                    lxd_guest.KEY_COMPLETE: None})
                return guest
        return None

    def find(self, instance: Any, role: str = roles.SERVER
             ) -> lxd_guest.Guest | None:
        """Find the LXD instance of a server as :meth:`get` does, None if LXD
        has none."""
        try:
            return self.get(instance, role)
        except errors.InstanceNotFound:
            return None

    def create(self, name: str, source: Mapping[str, Any],
               config: Mapping[str, str],
               devices: Mapping[str, Mapping[str, str]],
               timeout: float | None = None,
               progress: operations.Progress | None = None,
               architecture: str = '') -> lxd_guest.Guest:
        """Create an LXD instance without starting it.

        :param name: name of the LXD instance.
        :param source: the ``source`` of LXD's ``POST /1.0/instances``.
        :param config: all its configuration keys.
        :param devices: all its devices; profiles are never used.
        :param timeout: seconds; ``[lxd] operation_timeout`` by default.
        :param progress: see :meth:`.operations.Operation.wait`.
        :param architecture: LXD's name of its architecture, which the source
            does not tell if it is another LXD.
        :returns: the new guest.
        :raises errors.LXDError: if LXD cannot create it. LXD keeps nothing
            of it then, unless its answer was lost: it may create it later.
        """
        config = {**config, lxd_guest.KEY_LXD_NAME: name}
        body = {
            'name': name, 'type': 'container', 'source': dict(source),
            'config': config, 'profiles': [],
            'devices': {key: dict(value) for key, value in devices.items()}}
        if architecture:
            body['architecture'] = architecture
        # LXD may create it whatever becomes of the request.
        self._note(name, config)
        patience = timeout or self._session.operation_timeout
        try:
            self._create(name, config, body, patience, progress)
        except errors.AlreadyExists as exc:
            # LXD repeats a transaction that its database reports as failed.
            # If it had succeeded, LXD stumbles over its own record.
            if not self._delete_record(name, config):
                raise
            LOG.warning('Creating LXD instance %s again, which LXD has '
                        'recorded and not created: %s', name, exc,
                        instance_uuid=config[lxd_guest.KEY_UUID])
            self._create(name, config, body, patience, progress)
        return self.by_name(name)

    def _delete_record(self, name: str, config: Mapping[str, str]) -> bool:
        """Delete what LXD has of an instance that it failed to create for a
        server.

        :returns: False if there is another instance, or one that runs.
        """
        if lxd_guest.KEY_UUID not in config:
            return False
        with contextlib.suppress(errors.InstanceNotFound):
            guest = self.by_name(name)
            if (guest.power_state != power_state.SHUTDOWN or
                    any(guest.config.get(key) != config.get(key) for key in (
                        lxd_guest.KEY_UUID, lxd_guest.KEY_ROLE,
                        lxd_guest.KEY_LXD_NAME))):
                return False
            guest.delete()
        return True

    def _create(self, name: str, config: Mapping[str, str],
                body: dict[str, Any], patience: float,
                progress: operations.Progress | None) -> None:
        with self.pending.expected(name, config) as announced:
            if config.get('security.idmap.isolated') != 'true':
                self._session.post('instances', timeout=patience, body=body,
                                   progress=progress)
            else:
                # While LXD 5.0 creates an instance it counts it as one with a
                # range from id 0 on, and hands out ranges twice or below the
                # host's subordinate ids.
                # The slot before the lock: a thread that waits for the lock
                # must not have the slot that the lock's holder waits for.
                with self._session.slot(f'post instances {name}'):
                    with lockutils.lock('lxd-uid-ranges',
                                        lock_file_prefix=None):
                        operation = self._session.submit('post', 'instances',
                                                         body=body)
                        pending.wait_for_range(self._session, name, operation,
                                               announced, patience)
                    operation.wait(patience, progress)

    def delete_all(self, instance: Any,
                   guests: Iterable[lxd_guest.Guest] | None = None) -> None:
        """Delete all LXD instances of a server with their root disks.

        :param instance: the :class:`nova.objects.Instance`.
        :param guests: what :meth:`of` has just returned, if the caller has
            asked it and has the instance's lock.
        :raises nova.exception.InstancePowerOffFailure: if one cannot be
            stopped.
        :raises errors.LXDError: if LXD cannot delete one.
        """
        # All of it in one slot: LXD's database would be busy with the reads
        # of those that wait.
        with self._session.slot(f'delete instances of {instance.uuid}'):
            self._delete_all(instance, self.of(instance)
                             if guests is None else guests)

    def _delete_all(self, instance: Any, guests: Iterable[lxd_guest.Guest]
                    ) -> None:
        # A rescue instance has the root disk of the server's own instance as
        # a device, so the server's own one is the last.
        for guest in sorted(guests, key=lambda guest:
                            guest.role == roles.SERVER):
            try:
                guest.delete()
            except errors.LXDError as exc:
                try:
                    stopped = (guest.reload().power_state ==
                               power_state.SHUTDOWN)
                except errors.NotFound:
                    # Deleted; only LXD's answer was lost.
                    continue
                if not stopped:
                    LOG.error('Could not stop LXD instance %s: %s',
                              guest.name, exc, instance=instance)
                    raise exception.InstancePowerOffFailure(
                        reason='LXD could not stop it; the log of '
                               'nova-compute has the reason') from exc
                raise
        with self._auxiliary_lock:
            self._auxiliary.pop(instance.uuid, None)

    # -- changes ------------------------------------------------------------

    def on_change(self, forget: Callable[[Any], None]) -> None:
        """Register the cache of power states.

        :param forget: called with the :class:`nova.objects.Instance` after
            each change (:meth:`changing`), successful or not.
        """
        self._forget = forget

    def lock(self, uuid: str) -> contextlib.AbstractContextManager[Any]:
        """Keep operations on one instance from being interleaved.

        :param uuid: UUID of the instance.
        :returns: a context manager that holds the lock.
        """
        return lockutils.lock(f'lxd-instance-{self._session.project}-{uuid}',
                              lock_file_prefix=None)

    @contextlib.contextmanager
    def changing(self, instance: Any) -> Iterator[None]:
        """Hold the lock of one instance while it is changed, and drop its
        cached power state afterwards.

        Nova serialises only some operations itself. Different instances never
        wait for each other here. The lock cannot be taken twice by a thread.

        :param instance: the :class:`nova.objects.Instance`.
        """
        with self.lock(instance.uuid):
            try:
                yield
            finally:
                self._forget(instance)
