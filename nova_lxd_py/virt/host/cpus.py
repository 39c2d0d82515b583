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

"""CPUs of the host on which instances run.

Nova's ``[compute] cpu_shared_set`` and ``cpu_dedicated_set`` divide the host's
CPUs. An instance with dedicated CPUs gets those that Nova's claim has chosen,
exclusively: as soon as one of the options is set, every instance is confined
to a set of CPUs. If none is set, LXD balances instances over all CPUs.

A container has no virtual CPUs: its processes run on any CPU of its set.
Therefore an instance on the shared set also has a CPU quota of as many CPUs as
the flavor has vCPUs, and features that need vCPUs that differ from each other
(``mixed``, real time) are not supported.
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
    """A CPU of the host: a thread that is online.

    :ivar number: the kernel's number of the CPU.
    :ivar node: its NUMA node.
    :ivar socket: its socket.
    :ivar siblings: the CPUs on the same core, including this one.
    """

    number: int
    node: int
    socket: int
    siblings: frozenset[int]


@dataclasses.dataclass(frozen=True)
class CPUSets:
    """Division of the host's CPUs.

    :ivar shared: CPUs for instances with shared CPUs; None if no option is
        set, so that instances run on all CPUs.
    :ivar dedicated: CPUs for instances with dedicated CPUs.
    """

    shared: frozenset[int] | None
    dedicated: frozenset[int]


def processors(cpu: Mapping[str, Any]) -> list[Processor]:
    """List the CPUs that LXD may use.

    :param cpu: the ``cpu`` part of LXD's resources.
    :returns: CPUs by ascending number; empty if LXD knows only the number of
        CPUs.
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
    :raises nova.exception.Invalid: if an option is not a list of CPUs.
    """
    shared = hardware.get_cpu_shared_set()
    dedicated = hardware.get_cpu_dedicated_set()
    if shared is None and dedicated is None:
        return CPUSets(None, frozenset())
    return CPUSets(frozenset(shared or ()), frozenset(dedicated or ()))


def check(flavor: Any) -> None:
    """Check that a flavor asks for no CPU feature that containers lack.

    :param flavor: the :class:`nova.objects.Flavor`.
    :raises nova.exception.InvalidInput: if it does; the message names the
        extra spec to correct.
    """
    specs = flavor.extra_specs
    if specs.get(SPEC_POLICY) == _MIXED:
        raise _mixed_unsupported(flavor)
    if strutils.bool_from_string(specs.get(SPEC_REALTIME)):
        raise exception.InvalidInput(reason=(
            f'flavor {flavor.name} has {SPEC_REALTIME}, but LXD has no real '
            f'time scheduling for containers; remove it'))


def cpuset(flavor: Any, topology: Any, sets: CPUSets,
           present: Iterable[Processor]) -> frozenset[int] | None:
    """Return the CPUs on which an instance runs.

    :param flavor: the instance's :class:`nova.objects.Flavor`.
    :param topology: its :class:`nova.objects.InstanceNUMATopology` as fitted
        to this host by Nova, or None.
    :param sets: the division of the host's CPUs.
    :param present: the host's CPUs.
    :returns: their numbers, or None for all CPUs.
    :raises nova.exception.InvalidInput: if containers do not support what is
        requested.
    :raises nova.exception.ComputeResourcesUnavailable: if this host cannot
        provide it; Nova reschedules.
    """
    check(flavor)
    policy = topology.cpu_policy if topology else None
    if policy == _MIXED:
        raise _mixed_unsupported(flavor)
    if policy == _DEDICATED:
        return _pinned(flavor, topology, sets)
    if flavor.extra_specs.get(SPEC_POLICY) == _DEDICATED:
        raise exception.ComputeResourcesUnavailable(reason=(
            f'flavor {flavor.name} requests dedicated CPUs, but Nova has not '
            f'assigned any on this host'))
    if sets.shared is not None and not sets.shared:
        raise exception.ComputeResourcesUnavailable(reason=(
            'all CPUs of the host are reserved for dedicated CPUs; set '
            '[compute] cpu_shared_set as well'))
    if not topology:
        return sets.shared
    nodes = {cell.id for cell in topology.cells}
    found = frozenset(
        processor.number for processor in present if processor.node in nodes
        and (sets.shared is None or processor.number in sets.shared))
    if not found:
        raise exception.ComputeResourcesUnavailable(reason=(
            f'there are no shared CPUs on NUMA node '
            f'{", ".join(map(str, sorted(nodes)))}'))
    return found


def _pinned(flavor: Any, topology: Any, sets: CPUSets) -> frozenset[int]:
    if topology.cpuset_reserved:
        raise exception.InvalidInput(reason=(
            f'flavor {flavor.name} requests a CPU for emulator threads, which '
            f'containers do not have; remove hw:emulator_threads_policy'))
    chosen = frozenset(topology.cpu_pinning)
    if not chosen:
        raise exception.ComputeResourcesUnavailable(reason=(
            'Nova has not assigned dedicated CPUs to the instance'))
    foreign = chosen - sets.dedicated
    if foreign:
        raise exception.ComputeResourcesUnavailable(reason=(
            f'CPU {format_cpus(foreign)} is assigned to the instance, but is '
            f'no longer in [compute] cpu_dedicated_set'))
    return chosen


def _mixed_unsupported(flavor: Any) -> exception.InvalidInput:
    return exception.InvalidInput(reason=(
        f'flavor {flavor.name} or the image mixes dedicated and shared CPUs '
        f'({SPEC_POLICY}=mixed), but the processes of a container run on any '
        f'of its CPUs; use dedicated or shared'))


def format_cpus(numbers: Iterable[int]) -> str:
    """Format a set of CPUs for messages.

    :param numbers: numbers of CPUs.
    :returns: such as ``0-3,6``.
    """
    return hardware.format_cpu_spec(set(numbers))


def format_lxd_cpus(numbers: Iterable[int]) -> str:
    """Format a set of CPUs for ``limits.cpu``.

    LXD takes a single number for a count of CPUs.

    :param numbers: numbers of CPUs.
    :returns: such as ``0-3,6``, or ``1-1`` for one CPU.
    """
    text = format_cpus(numbers)
    return f'{text}-{text}' if text.isdigit() else text
