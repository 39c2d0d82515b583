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

from collections.abc import Mapping
import contextlib
from typing import Any

from oslo_concurrency import lockutils

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import pending
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import operations
from nova_lxd_py.virt.lxd import session as lxd


class GuestRegistry:
    """The LXD instances that belong to this nova-compute.

    :param session: the way to LXD, bound to the driver's project.
    """

    def __init__(self, session: lxd.Session) -> None:
        self._session = session
        #: Those that are being made, for whoever follows LXD's events.
        self.arrivals = pending.PendingInstances()

    def all(self) -> list[lxd_guest.Guest]:
        """List everything of ours, whatever its role, with one request.

        :returns: guests; foreign instances in the project are left out.
        """
        infos = self._session.get('instances', params={'recursion': 1})
        return [guest for guest in (lxd_guest.Guest(self._session, info)
                                    for info in infos) if guest.is_ours]

    def servers(self) -> list[lxd_guest.Guest]:
        """List the instances that are servers, with one request."""
        return [guest for guest in self.all()
                if guest.role == lxd_guest.ROLE_SERVER]

    def of(self, instance: Any) -> list[lxd_guest.Guest]:
        """List all that LXD has of a server: its own instance and others that
        serve it, such as its rescue instance.

        :param instance: the :class:`nova.objects.Instance`.
        :returns: guests; none if LXD does not know the server.
        """
        return [guest for guest in self.all() if guest.uuid == instance.uuid]

    def get(self, instance: Any, role: str = lxd_guest.ROLE_SERVER
            ) -> lxd_guest.Guest:
        """Find the LXD instance of a server.

        :param instance: the :class:`nova.objects.Instance`.
        :param role: ROLE_SERVER, ROLE_RESCUE or ROLE_SNAPSHOT.
        :returns: the guest.
        :raises errors.NotFound: LXD has none for this uuid.
        """
        name = lxd_guest.lxd_name(instance, role)
        with contextlib.suppress(errors.NotFound):
            guest = self.by_name(name)
            if guest.uuid == instance.uuid:
                return guest
        # Names come from a template that an operator may change.
        for other in self.all():
            if other.uuid == instance.uuid and other.role == role:
                return other
        raise errors.NotFound(
            f'LXD has no {role} instance for server {instance.uuid}')

    def by_name(self, name: str) -> lxd_guest.Guest:
        """Read an instance by LXD's name for it, whosoever it is.

        :param name: LXD's name.
        :returns: the guest.
        :raises errors.NotFound: LXD has none.
        """
        return lxd_guest.Guest(self._session,
                               self._session.get('instances', name))

    def active(self, instance: Any) -> lxd_guest.Guest:
        """Find the LXD instance that runs for a server at the moment: its
        rescue instance while it is rescued, else its own.

        :param instance: the :class:`nova.objects.Instance`.
        :returns: the guest.
        :raises errors.NotFound: LXD has none.
        """
        guest = self.get(instance)
        if guest.config.get(lxd_guest.KEY_RESCUED) == 'true':
            return self.find(instance, lxd_guest.ROLE_RESCUE) or guest
        return guest

    def find(self, instance: Any, role: str = lxd_guest.ROLE_SERVER
             ) -> lxd_guest.Guest | None:
        """As :meth:`get`, with None for a server that LXD does not have."""
        try:
            return self.get(instance, role)
        except errors.NotFound:
            return None

    def create(self, name: str, source: Mapping[str, Any],
               config: Mapping[str, str],
               devices: Mapping[str, Mapping[str, str]],
               timeout: float | None = None,
               progress: operations.Progress | None = None
               ) -> lxd_guest.Guest:
        """Make an LXD instance; it is not started.

        :param name: LXD's name for it.
        :param source: where its root disk comes from, as LXD's API has it.
        :param config: all its configuration keys.
        :param devices: all its devices; profiles are never used.
        :param timeout: seconds; ``[lxd] operation_timeout`` by default.
        :param progress: see :meth:`.operations.Operation.wait`.
        :returns: the new guest.
        :raises errors.LXDError: LXD could not make it, and has kept nothing.
        """
        body = {
            'name': name, 'type': 'container', 'source': dict(source),
            'config': dict(config), 'profiles': [],
            'devices': {key: dict(value) for key, value in devices.items()}}
        patience = timeout or self._session.operation_timeout
        with self.arrivals.expected(name, config) as announced:
            if config.get('security.idmap.isolated') != 'true':
                self._session.post('instances', timeout=patience, body=body,
                                   progress=progress)
            else:
                # LXD 5.0 takes an instance that it is just making for one
                # with a range from id 0 on, and gives ranges away twice or
                # below the host's subordinate ids.
                with lockutils.lock('lxd-uid-ranges', lock_file_prefix=None):
                    operation = self._session.submit('post', 'instances',
                                                     body=body)
                    pending.wait_for_range(self._session, name, operation,
                                           announced, patience)
                operation.wait(patience, progress)
        return self.by_name(name)

    @staticmethod
    def lock(uuid: str) -> contextlib.AbstractContextManager[Any]:
        """Keep two operations on one server from interleaving.

        Nova serialises only some operations itself; different servers never
        wait for each other here.

        :param uuid: the server's uuid.
        :returns: a context manager that holds the server's lock.
        """
        return lockutils.lock(f'lxd-instance-{uuid}', lock_file_prefix=None)
