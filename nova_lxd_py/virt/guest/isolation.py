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

"""Isolation of the user ids of instances from each other, by their flavor."""

from __future__ import annotations

import enum
from typing import Any

from nova import exception

from nova_lxd_py import extra_specs
from nova_lxd_py.virt.guest import flavor as lxd_flavor


class Isolation(enum.StrEnum):
    """Isolation of the user ids of an instance from those of others."""

    SERVER = 'server'
    PROJECT = 'project'
    OFF = 'off'
    #: Root in the instance is root of the host.
    PRIVILEGED = 'privileged'


def select(flavor: Any, mode: str, *, free_ranges: int, shift_is_free: bool,
           can_clone: bool) -> Isolation:
    """Select the isolation of an instance's user ids.

    ``lxd:privileged_allowed`` and ``lxd:isolated`` of the flavor take
    precedence over ``[lxd] idmap_isolation``. ``lxd:isolated=false`` requests
    LXD's default range, for example to share custom volumes.

    :param flavor: the :class:`nova.objects.Flavor`.
    :param mode: ``[lxd] idmap_isolation``.
    :param free_ranges: number of ranges of 65536 ids on the host, see
        :func:`nova_lxd_py.virt.host.subordinate_ids.capacity`.
    :param shift_is_free: whether LXD mounts root disks idmapped, so that a
        range per instance costs nothing.
    :param can_clone: whether instances can be cloned from a template with
        shifted files (``[lxd] fast_spawn`` and a suitable pool).
    :returns: the isolation.
    :raises nova.exception.InvalidInput: if the flavor is contradictory.
    :raises nova.exception.ComputeResourcesUnavailable: if the flavor requires
        a range that this host does not have; Nova reschedules.
    """
    lxd_flavor.check(flavor)
    if lxd_flavor.flag(flavor, extra_specs.PRIVILEGED):
        return Isolation.PRIVILEGED
    wanted = lxd_flavor.flag(flavor, extra_specs.ISOLATED)
    if wanted:
        if free_ranges < 1:
            raise exception.ComputeResourcesUnavailable(reason=(
                f'flavor {flavor.name} has {extra_specs.ISOLATED}=true, '
                f'but the host has no free user ids for it; extend the entry '
                f'of root in /etc/subuid and /etc/subgid'))
        return Isolation.SERVER
    if wanted is False or mode == Isolation.OFF or free_ranges < 1:
        return Isolation.OFF
    if mode == 'auto':
        if can_clone and not shift_is_free:
            return Isolation.PROJECT
        return Isolation.SERVER
    return Isolation(mode)


def config(isolation: Isolation) -> dict[str, str]:
    """Convert an isolation to LXD configuration.

    :param isolation: the isolation.
    :returns: ``security.idmap.isolated``; for PROJECT, the caller adds the
        range of the project (``security.idmap.base``).
    """
    isolated = isolation in (Isolation.SERVER, Isolation.PROJECT)
    return {'security.idmap.isolated': 'true' if isolated else 'false'}
