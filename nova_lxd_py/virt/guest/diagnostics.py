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

"""Diagnostics of servers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nova.compute import power_state
from nova import objects
from nova.objects import diagnostics as diagnostics_object
from nova.virt import configdrive
from oslo_utils import timeutils
from oslo_utils import units

from nova_lxd_py.virt.guest import disk_view
from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry

#: Nova accepts the names of its own drivers only; the field for the hypervisor
#: has the real one.
DRIVER = 'libvirt'
HYPERVISOR = 'lxd'

#: LXD's counters of a network interface, by Nova's names.
_COUNTERS = {
    'rx_octets': 'bytes_received', 'rx_packets': 'packets_received',
    'rx_errors': 'errors_received', 'rx_drop': 'packets_dropped_inbound',
    'tx_octets': 'bytes_sent', 'tx_packets': 'packets_sent',
    'tx_errors': 'errors_sent', 'tx_drop': 'packets_dropped_outbound',
}


class Diagnostics:
    """Reads usage figures of servers for operators.

    :param guests: the driver's LXD instances.
    """

    def __init__(self, guests: registry.GuestRegistry) -> None:
        self._guests = guests

    def read(self, instance: objects.Instance
             ) -> diagnostics_object.Diagnostics:
        """Read the figures in Nova's form.

        See :meth:`nova.virt.driver.ComputeDriver.get_instance_diagnostics`.
        LXD measures the CPUs of a container together and knows nothing of
        requests to its disks.

        :param instance: the instance; a stopped one has few figures.
        :returns: CPU time in nanoseconds, memory in MiB, traffic in bytes.
        :raises errors.InstanceNotFound: if LXD does not have it.
        """
        guest = self._guests.active(instance)
        state = guest.state()
        found = diagnostics_object.Diagnostics(
            state=power_state.STATE_MAP[guest.power_state], driver=DRIVER,
            hypervisor=HYPERVISOR, hypervisor_os='linux',
            uptime=_uptime(guest),
            config_drive=configdrive.required_by(instance))
        found.memory_details = diagnostics_object.MemoryDiagnostics(
            maximum=instance.flavor.memory_mb,
            used=_memory(state, 'usage', units.Mi))
        found.add_cpu(id=0, time=_cpu_time(state))
        found.num_cpus = instance.flavor.vcpus
        for _name, device, counters in _interfaces(guest, state):
            found.add_nic(mac_address=device.get('hwaddr'), **counters)
        for key, device in guest.devices.items():
            if device.get('type') == 'disk' and not disk_view.is_part(key):
                found.add_disk()
        return found

    def read_plain(self, instance: objects.Instance) -> dict[str, Any]:
        """Read the figures as API microversions before 2.48 have them, named
        as those of other drivers where they mean the same.

        See :meth:`nova.virt.driver.ComputeDriver.get_diagnostics`.

        :param instance: the instance; a stopped one has few figures.
        :returns: CPU time in nanoseconds, memory in KiB, traffic and disk
            usage in bytes.
        :raises errors.InstanceNotFound: if LXD does not have it.
        """
        guest = self._guests.active(instance)
        state = guest.state()
        found: dict[str, Any] = {
            'cpu0_time': _cpu_time(state),
            'memory': instance.flavor.memory_mb * units.Ki,
            'memory-used': _memory(state, 'usage', units.Ki),
            'memory-peak': _memory(state, 'usage_peak', units.Ki),
            'memory-swap': _memory(state, 'swap_usage', units.Ki),
            'processes': state['processes'],
            'uptime': _uptime(guest),
        }
        for name, _device, counters in _interfaces(guest, state):
            for key, value in counters.items():
                found[f'{name}_{key.removesuffix("_octets")}'] = value
        for name, disk in (state.get('disk') or {}).items():
            found[f'{name}_usage'] = disk['usage']
        return {key: value for key, value in found.items()
                if value is not None}


def _cpu_time(state: Mapping[str, Any]) -> int | None:
    return _measured(state['cpu']['usage'])


def _memory(state: Mapping[str, Any], what: str, unit: int) -> int | None:
    used = _measured(state['memory'][what])
    return None if used is None else used // unit


def _measured(value: int) -> int | None:
    """Return None for -1, LXD's value for what the kernel does not report."""
    return value if value >= 0 else None


def _uptime(guest: lxd_guest.Guest) -> int | None:
    """Return the uptime of a guest in seconds."""
    started = guest.started_at
    if started is None:
        return None
    # The clocks of two hosts may differ.
    return max(0, int(timeutils.delta_seconds(
        timeutils.normalize_time(started), timeutils.utcnow())))


def _interfaces(guest: lxd_guest.Guest, state: Mapping[str, Any]
                ) -> Iterator[tuple[str, Mapping[str, str], dict[str, int]]]:
    """List the ports of a guest: its name for each, LXD's device, and Nova's
    counters, which only a running one has."""
    network = state['network'] or {}
    nics = [device for device in guest.devices.values()
            if device.get('type') == 'nic']
    for device in sorted(nics, key=lambda device: (
            len(device.get('name', '')), device.get('name', ''))):
        name = _name_in_guest(device, network)
        counters = network[name]['counters'] if name in network else {}
        yield name, device, {key: counters[source]
                             for key, source in _COUNTERS.items()
                             if source in counters}


def _name_in_guest(device: Mapping[str, str], network: Mapping[str, Any]
                   ) -> str:
    """Find a port among the interfaces of a guest, which may have renamed it
    and have made others with the same address on top of it."""
    given = device.get('name', '')
    same = [name for name, interface in network.items()
            if interface.get('hwaddr') == device.get('hwaddr')]
    return given if given in same or not same else same[0]
