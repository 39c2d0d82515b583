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

"""Which CPUs of the host servers run on.

Nova's ``[compute] cpu_shared_set`` and ``cpu_dedicated_set`` divide the host's
CPUs. A server whose flavor or image asks for dedicated CPUs gets those that
Nova's claim has chosen for it, and nobody else runs there: as soon as one of
the options is set, every server is confined to a set of CPUs. While none is
set, LXD spreads servers over all CPUs.

A container has no virtual CPUs: its processes run on any CPU of its set. A
server on the shared set therefore also has a ceiling of CPU time, as many CPUs
as the flavor has, and what needs virtual CPUs that differ from each other
(``mixed``, real time) cannot be had.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
import dataclasses
from typing import Any

from nova import exception
from nova.objects import fields
from nova.virt import hardware
from oslo_utils import strutils

_DEDICATED = fields.CPUAllocationPolicy.DEDICATED
_MIXED = fields.CPUAllocationPolicy.MIXED

SPEC_POLICY = 'hw:cpu_policy'
SPEC_REALTIME = 'hw:cpu_realtime'


@dataclasses.dataclass(frozen=True)
class Processor:
    """One CPU of the host: a thread that is online.

    :ivar number: the kernel's number of it.
    :ivar node: its NUMA node.
    :ivar socket: its socket.
    :ivar siblings: the CPUs that share its core, itself included.
    """

    number: int
    node: int
    socket: int
    siblings: frozenset[int]


@dataclasses.dataclass(frozen=True)
class CPUSets:
    """How an operator divides the host's CPUs.

    :ivar shared: CPUs for servers that share them; None if no option is set,
        so that servers may run on all.
    :ivar dedicated: CPUs of which each belongs to one server at most.
    """

    shared: frozenset[int] | None
    dedicated: frozenset[int]


def processors(cpu: Mapping[str, Any]) -> list[Processor]:
    """List the CPUs that LXD may use.

    :param cpu: the ``cpu`` part of LXD's resources.
    :returns: CPUs in the order of their numbers; none if LXD does not know
        more than how many there are.
    """
    found = []
    for socket in cpu.get('sockets') or ():
        for core in socket.get('cores') or ():
            threads = [thread for thread in core.get('threads') or ()
                       if thread.get('online', True)]
            siblings = frozenset(thread['id'] for thread in threads)
            found += [Processor(thread['id'], thread.get('numa_node', 0),
                                socket.get('socket', 0), siblings)
                      for thread in threads]
    return sorted(found, key=lambda processor: processor.number)


def configured() -> CPUSets:
    """Read ``[compute] cpu_shared_set`` and ``cpu_dedicated_set``.

    :returns: the sets, which need not exist on the host.
    :raises nova.exception.Invalid: an option is no list of CPUs.
    """
    shared = hardware.get_cpu_shared_set()
    dedicated = hardware.get_cpu_dedicated_set()
    if shared is None and dedicated is None:
        return CPUSets(None, frozenset())
    return CPUSets(frozenset(shared or ()), frozenset(dedicated or ()))


def check(flavor: Any) -> None:
    """See that a flavor does not ask for what no container can have.

    :param flavor: the :class:`nova.objects.Flavor`.
    :raises nova.exception.InvalidInput: naming the extra spec to correct.
    """
    specs = flavor.extra_specs
    if specs.get(SPEC_POLICY) == _MIXED:
        raise _no_mixture(flavor)
    if strutils.bool_from_string(specs.get(SPEC_REALTIME)):
        raise exception.InvalidInput(reason=(
            f'flavor {flavor.name} has {SPEC_REALTIME}, but LXD has no real '
            f'time scheduling for containers; remove it'))


def cpuset(flavor: Any, topology: Any, sets: CPUSets,
           present: Iterable[Processor]) -> frozenset[int] | None:
    """Find the CPUs on which a server runs.

    :param flavor: the server's :class:`nova.objects.Flavor`.
    :param topology: its :class:`nova.objects.InstanceNUMATopology` as Nova has
        fitted it to this host, or None.
    :param sets: how the host's CPUs are divided.
    :param present: the host's CPUs.
    :returns: their numbers, or None for all that there are.
    :raises nova.exception.InvalidInput: no container can have what is asked
        for.
    :raises nova.exception.ComputeResourcesUnavailable: this host cannot give
        it; Nova tries another one.
    """
    check(flavor)
    policy = topology.cpu_policy if topology else None
    if policy == _MIXED:
        raise _no_mixture(flavor)
    if policy == _DEDICATED:
        return _pinned(flavor, topology, sets)
    if flavor.extra_specs.get(SPEC_POLICY) == _DEDICATED:
        raise exception.ComputeResourcesUnavailable(reason=(
            f'flavor {flavor.name} asks for dedicated CPUs, and Nova has not '
            f'chosen any on this host'))
    if sets.shared is not None and not sets.shared:
        raise exception.ComputeResourcesUnavailable(reason=(
            'all CPUs of the host for servers are for those with dedicated '
            'CPUs; set [compute] cpu_shared_set as well'))
    if not topology:
        return sets.shared
    nodes = {cell.id for cell in topology.cells}
    found = frozenset(
        processor.number for processor in present if processor.node in nodes
        and (sets.shared is None or processor.number in sets.shared))
    if not found:
        raise exception.ComputeResourcesUnavailable(reason=(
            f'there are no CPUs for sharing on NUMA node '
            f'{", ".join(map(str, sorted(nodes)))}'))
    return found


def _pinned(flavor: Any, topology: Any, sets: CPUSets) -> frozenset[int]:
    if topology.cpuset_reserved:
        raise exception.InvalidInput(reason=(
            f'flavor {flavor.name} asks for a CPU for an emulator, and '
            f'containers have none; remove hw:emulator_threads_policy'))
    chosen = frozenset(topology.cpu_pinning)
    if not chosen:
        raise exception.ComputeResourcesUnavailable(reason=(
            'Nova has not chosen dedicated CPUs on this host for the server'))
    foreign = chosen - sets.dedicated
    if foreign:
        raise exception.ComputeResourcesUnavailable(reason=(
            f'the server owns CPU {listed(foreign)}, which is not in '
            f'[compute] cpu_dedicated_set any more'))
    return chosen


def _no_mixture(flavor: Any) -> exception.InvalidInput:
    return exception.InvalidInput(reason=(
        f'flavor {flavor.name} or the image mixes dedicated and shared CPUs '
        f'({SPEC_POLICY}=mixed), but the processes of a container run on any '
        f'of its CPUs; use dedicated or shared'))


def listed(numbers: Iterable[int]) -> str:
    """Write CPUs for people.

    :param numbers: numbers of CPUs.
    :returns: such as ``0-3,6``.
    """
    return hardware.format_cpu_spec(set(numbers))


def lxd_set(numbers: Iterable[int]) -> str:
    """Write a set of CPUs for LXD, which takes a lone number for a count.

    :param numbers: numbers of CPUs.
    :returns: such as ``0-3,6``, or ``1-1`` for one CPU.
    """
    text = listed(numbers)
    return f'{text}-{text}' if text.isdigit() else text
