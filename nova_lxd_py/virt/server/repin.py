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

"""Repinning: running servers follow a change of the host's CPU sets.

An operator may change ``[compute] cpu_shared_set`` and ``cpu_dedicated_set``
while nova-compute is stopped. When it starts, running guests are moved to the
CPUs that they are to have now, before a new server may be given CPUs of its
own.
"""

from __future__ import annotations

from collections.abc import Iterable

from nova import context as nova_context
from nova import exception
from nova import objects
from oslo_log import log as logging

from nova_lxd_py.virt import exception_mapping
from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.guest import roles
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.server import guest_config

LOG = logging.getLogger(__name__)

_KEYS = ('limits.cpu', 'limits.cpu.allowance')
_ROLES = (roles.SERVER, roles.RESCUE)


class RepinOps:
    """Moves guests to other CPUs.

    :param guests: the driver's LXD instances.
    :param guest_configs: what LXD instances have to look like.
    """

    def __init__(self, guests: registry.GuestRegistry,
                 guest_configs: guest_config.GuestConfigBuilder) -> None:
        self._guests = guests
        self._guest_configs = guest_configs

    def repin_host(self, host: str) -> None:
        """Apply the CPU sets of today to the guests of a host.

        For Nova 31 to 33, which do not pass their instances to the driver
        (``process_instances_at_startup``) when nova-compute starts.

        :param host: name of the compute service.
        :raises exception_mapping.StartupError: see :meth:`repin`.
        """
        self.repin(objects.InstanceList.get_by_host(
            nova_context.get_admin_context(), host,
            expected_attrs=['flavor', 'numa_topology']))

    def repin(self, instances: Iterable[objects.Instance]) -> None:
        """Apply the CPU sets of today to guests that run already.

        Takes one request to LXD, and one more for each guest that changes.

        :param instances: the instances that Nova has on this host.
        :raises exception_mapping.StartupError: if an instance has CPUs that
            the host no longer offers.
        """
        present: dict[str, list[lxd_guest.Guest]] = {}
        for guest in self._guests.all():
            if guest.role in _ROLES:
                present.setdefault(guest.uuid, []).append(guest)
        for instance in instances:
            if instance.uuid not in present or instance.deleted:
                continue
            wanted = self._limits(instance)
            for guest in present[instance.uuid] if wanted else ():
                _move(instance, guest, wanted)

    def _limits(self, instance: objects.Instance) -> dict[str, str | None]:
        try:
            config = self._guest_configs.config(instance.flavor,
                                                instance.numa_topology)
        except exception.ComputeResourcesUnavailable as exc:
            raise exception_mapping.StartupError(
                f'Server {instance.uuid} cannot stay on this host as it is '
                f'configured: {exc.kwargs["reason"]}. Restore the option, or '
                f'move the server away or delete it first') from exc
        except exception.InvalidInput as exc:
            # Refused with a fault when the server is started the next time.
            LOG.warning('Keeping CPU limits, since the flavor is not valid: '
                        '%s', exc, instance=instance)
            return {}
        return {key: config.get(key) for key in _KEYS}


def _move(instance: objects.Instance, guest: lxd_guest.Guest,
          wanted: dict[str, str | None]) -> None:
    if all(guest.config.get(key) == value for key, value in wanted.items()):
        return
    LOG.info('Moving LXD instance %s from CPUs %s to %s', guest.name,
             guest.config.get('limits.cpu', 'of any number'),
             wanted['limits.cpu'], instance=instance)
    try:
        guest.update(config=wanted)
    except errors.LXDError as exc:
        LOG.warning('Keeping vCPU pinning of LXD instance %s until its next '
                    'start: %s', guest.name, exc, instance=instance)
