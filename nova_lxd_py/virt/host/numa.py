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

"""NUMA topology of the host for Nova's scheduler and claims.

Nova fits instances with dedicated CPUs, huge pages or ``hw:numa_nodes`` to
this topology, and keeps account of their usage itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import os
import pathlib
from typing import Any

from nova import exception
from nova import objects
from nova.virt import hardware
from oslo_utils import units

from nova_lxd_py.virt.host import cpus

#: Sizes of huge pages in KiB that LXD can limit, and LXD's names of them.
HUGE_PAGES = {64: '64KB', 1024: '1MB', 2048: '2MB', 1048576: '1GB'}

#: Where the kernel shows that huge pages can be limited: with cgroup v1, and
#: with v2. LXD does not use controllers of v2 beside v1.
_CONTROLLER_V1 = '/sys/fs/cgroup/hugetlb'
_CONTROLLERS_V2 = '/sys/fs/cgroup/cgroup.controllers'


def small_page_kb() -> int:
    """Return the size of this machine's ordinary pages in KiB."""
    return os.sysconf('SC_PAGE_SIZE') // units.Ki


def can_limit_huge_pages() -> bool:
    """Return whether this machine's kernel has the hugetlb controller."""
    if os.path.ismount(_CONTROLLER_V1):
        return True
    try:
        return 'hugetlb' in pathlib.Path(_CONTROLLERS_V2).read_text().split()
    except OSError:
        return False


def topology(resources: Mapping[str, Any], sets: cpus.CPUSets,
             huge_pages: bool) -> objects.NUMATopology | None:
    """Return the NUMA topology of the host.

    :param resources: LXD's resources.
    :param sets: the division of the host's CPUs.
    :param huge_pages: whether instances can have huge pages.
    :returns: the topology without usage; None if LXD knows only the number of
        CPUs.
    """
    present = cpus.processors(resources['cpu'])
    if not present:
        return None
    memory = resources['memory']
    nodes = {node['numa_node']: node for node in memory.get('nodes') or ()}
    if not nodes:
        # A kernel without NUMA.
        nodes = {0: memory}
    size = memory.get('hugepages_size', 0) // units.Ki
    reserved = hardware.numa_get_reserved_huge_pages()
    cells = []
    for number in sorted({*nodes, *(each.node for each in present)}):
        cells.append(_cell(
            number, [each for each in present if each.node == number],
            nodes.get(number, {'total': 0}), sets,
            size if huge_pages else 0, reserved.get(number, {})))
    return objects.NUMATopology(cells=cells)


def _cell(number: int, present: Sequence[cpus.Processor],
          memory: Mapping[str, Any], sets: cpus.CPUSets, huge_page_kb: int,
          reserved: Mapping[int, int]) -> objects.NUMACell:
    every = {each.number for each in present}
    shared = every if sets.shared is None else every & sets.shared
    dedicated = every & sets.dedicated
    siblings = {each.siblings & (shared | dedicated) for each in present}
    huge = memory.get('hugepages_total', 0) // units.Ki
    small = small_page_kb()
    pages = [objects.NUMAPagesTopology(
        size_kb=small, total=(memory['total'] // units.Ki - huge) // small,
        used=0, reserved=reserved.get(small, 0))]
    if huge and huge_page_kb in HUGE_PAGES:
        pages.append(objects.NUMAPagesTopology(
            size_kb=huge_page_kb, total=huge // huge_page_kb, used=0,
            reserved=reserved.get(huge_page_kb, 0)))
    return objects.NUMACell(
        id=number, cpuset=shared, pcpuset=dedicated,
        memory=memory['total'] // units.Mi, cpu_usage=0, memory_usage=0,
        pinned_cpus=set(), mempages=pages,
        siblings=sorted((set(each) for each in siblings if each), key=min),
        socket=present[0].socket if present else None)


def huge_page_limits(flavor: Any, wanted: Any, available: bool,
                     host_kb: int = 0) -> dict[str, str]:
    """Return the huge page limits of an instance.

    An instance that does not request huge pages gets a limit of 0, so that it
    cannot take pages that Nova has assigned to other instances.

    :param flavor: the instance's :class:`nova.objects.Flavor`, for messages.
    :param wanted: its :class:`nova.objects.InstanceNUMATopology` as fitted to
        this host by Nova, or None.
    :param available: whether LXD on this host can limit huge pages.
    :param host_kb: size of the host's huge pages in KiB; 0 if it has none.
    :returns: ``limits.hugepages.*``, which add up to the flavor's memory.
    :raises nova.exception.InvalidInput: if LXD does not support the size.
    :raises nova.exception.ComputeResourcesUnavailable: if this host cannot
        limit huge pages; Nova reschedules.
    """
    limits: dict[str, int] = {}
    if available and host_kb in HUGE_PAGES:
        limits[_limit_key(host_kb)] = 0
    for cell in wanted.cells if wanted else ():
        size = cell.pagesize if 'pagesize' in cell else None
        # Below zero is a request that Nova has not fitted to a host.
        if not size or 0 < size <= small_page_kb():
            continue
        if size > 0 and size not in HUGE_PAGES:
            raise exception.InvalidInput(reason=(
                f'flavor {flavor.name} requests memory pages of {size} KiB '
                f'(hw:mem_page_size), but LXD supports only '
                f'{", ".join(map(str, sorted(HUGE_PAGES)))} KiB'))
        if size < 0 or not available:
            raise exception.ComputeResourcesUnavailable(reason=(
                f'flavor {flavor.name} requests huge pages '
                f'(hw:mem_page_size), which LXD on this host cannot limit'))
        key = _limit_key(size)
        limits[key] = limits.get(key, 0) + cell.memory
    return {key: f'{size}MiB' for key, size in limits.items()}


def _limit_key(size_kb: int) -> str:
    return f'limits.hugepages.{HUGE_PAGES[size_kb]}'
