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

"""What a change of the host's CPU sets means for the servers it has.

An operator may divide the host's CPUs anew while nova-compute is stopped. When
it starts, running servers move to the CPUs that they are to have now, before
any new server may count on CPUs of its own.
"""

from __future__ import annotations

from collections.abc import Iterable

from nova import exception
from nova import objects
from oslo_log import log as logging

from nova_lxd_py.virt import exception_mapping
from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.server import guest_config

LOG = logging.getLogger(__name__)

_KEYS = ('limits.cpu', 'limits.cpu.allowance')
_ROLES = (lxd_guest.ROLE_SERVER, lxd_guest.ROLE_RESCUE)


def follow(guests: registry.GuestRegistry, definitions: guest_config.GuestConfigBuilder,
           instances: Iterable[objects.Instance]) -> None:
    """Have servers run on the CPUs that they are to have.

    One request to LXD, and one more for each server that changes.

    :param guests: the driver's LXD instances.
    :param definitions: what they should look like.
    :param instances: Nova's servers on this host.
    :raises exception_mapping.StartupError: a server has no CPUs any more.
    """
    present: dict[str, list[lxd_guest.Guest]] = {}
    for guest in guests.all():
        if guest.role in _ROLES:
            present.setdefault(guest.uuid, []).append(guest)
    for instance in instances:
        if instance.uuid not in present or instance.deleted:
            continue
        wanted = _limits(definitions, instance)
        for guest in present[instance.uuid] if wanted else ():
            _move(instance, guest, wanted)


def _limits(definitions: guest_config.GuestConfigBuilder, instance: objects.Instance
            ) -> dict[str, str | None]:
    try:
        config = definitions.config(instance.flavor, instance.numa_topology)
    except exception.ComputeResourcesUnavailable as exc:
        raise exception_mapping.StartupError(
            f'Server {instance.uuid} cannot stay on this host as it is '
            f'configured: {exc.kwargs["reason"]}. Restore the option, or move '
            f'the server away or delete it first') from exc
    except exception.InvalidInput as exc:
        # It is refused where the server is started the next time.
        LOG.warning('Leaving its CPUs as they are: %s', exc,
                    instance=instance)
        return {}
    return {key: config.get(key) for key in _KEYS}


def _move(instance: objects.Instance, guest: lxd_guest.Guest,
          wanted: dict[str, str | None]) -> None:
    if all(guest.config.get(key) == value for key, value in wanted.items()):
        return
    LOG.info('Moving %s from CPUs %s to %s', guest.name,
             guest.config.get('limits.cpu', 'of any number'),
             wanted['limits.cpu'], instance=instance)
    try:
        guest.update(config=wanted)
    except errors.LXDError as exc:
        LOG.warning('It stays on its CPUs until its next start: %s', exc,
                    instance=instance)
