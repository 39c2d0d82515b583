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

"""The compute host's inventory, traits, resources and uptime.

Inventory comes from LXD, so that it describes the machine and the pool that
LXD uses, even if nova-compute runs in a container. CPU features, memory in
use, CPU statistics and uptime are read from ``/proc``, if LXD is local. The
number of requests does not depend on the number of instances.
"""

from __future__ import annotations

from collections.abc import Mapping
import json
import os
import re
import time
from typing import Any

from nova import conf as nova_conf
from nova import exception
from nova.objects import fields
from nova import utils
from os_brick.initiator import connector
from oslo_utils import units
from oslo_utils import versionutils

from nova_lxd_py.virt.host import cpus
from nova_lxd_py.virt.host import numa
from nova_lxd_py.virt.host import passthrough
from nova_lxd_py.virt.host import subordinate_ids
from nova_lxd_py.virt.host import traits as host_traits
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import session as lxd

CONF = nova_conf.CONF

VCPU = 'VCPU'
PCPU = 'PCPU'
MEMORY_MB = 'MEMORY_MB'
DISK_GB = 'DISK_GB'


class Host:
    """The compute host, as LXD describes it.

    :param session: the LXD session.
    """

    def __init__(self, session: lxd.Session) -> None:
        self._session = session
        self._options = session.options
        self._project: dict[str, Any] | None = None
        self._resources: dict[str, Any] | None = None
        self._features: frozenset[str] | None = None
        self._huge_pages: bool | None = None

    # -- constant while nova-compute runs -----------------------------------

    @property
    def nodename(self) -> str:
        """Name of the compute node, which must never change."""
        return CONF.host

    def pool_driver(self) -> str:
        """Return the storage driver of the pool, such as ``btrfs``.

        :raises errors.LXDError: if the request fails.
        """
        return self._session.storage_pool()['driver']

    def idmap_capacity(self) -> int | None:
        """Return the number of uid ranges for instances.

        :returns: how many ranges of 65536 ids there are, including those in
            use; None if LXD is remote.
        """
        if not self._session.is_local:
            return None
        return subordinate_ids.capacity(self._session.endpoint)

    def _read_resources(self) -> dict[str, Any]:
        self._resources = self._session.get('resources')
        return self._resources

    def _processors(self) -> dict[str, Any]:
        resources = self._resources or self._read_resources()
        return resources['cpu']

    def processors(self) -> list[cpus.Processor]:
        """List the CPUs of the host that are online.

        :raises errors.LXDError: if the request fails.
        """
        return cpus.processors(self._processors())

    def has_huge_pages(self) -> bool:
        """Return whether huge pages can be limited per instance.

        :returns: whether LXD supports it, and the kernel, if LXD is local;
            the host need not have huge pages.
        """
        if self._huge_pages is None:
            self._huge_pages = (
                self._session.has_extension('limits_hugepages') and
                (not self._session.is_local or numa.can_limit_huge_pages()))
        return self._huge_pages

    def huge_page_kb(self) -> int:
        """Return the size of the huge pages that the host has reserved.

        :returns: KiB, 0 if there are none.
        :raises errors.LXDError: if the request fails.
        """
        memory = (self._resources or self._read_resources())['memory']
        if not memory.get('hugepages_total'):
            return 0
        return memory.get('hugepages_size', 0) // units.Ki

    def _shared_count(self, sets: cpus.CPUSets) -> int:
        """Count the CPUs for instances with shared CPUs."""
        if sets.shared is None:
            return count_processors(self._processors())
        return len(sets.shared)

    # -- Nova's compute node ------------------------------------------------

    def available_resource(self, nodename: str) -> dict[str, Any]:
        """Return the host's resources for Nova's compute node.

        See :meth:`nova.virt.driver.ComputeDriver.get_available_resource`.
        It takes two requests to LXD.

        :param nodename: name of the compute node.
        :returns: the resources. The CPU usage is 0, because Nova's resource
            tracker keeps account of it.
        :raises errors.LXDError: if a request fails.
        """
        resources = self._read_resources()
        memory, memory_used = self._memory()
        total, used = self._pool_space()
        environment = self._session.server['environment']
        sets = cpus.configured()
        topology = numa.topology(resources, sets, self.has_huge_pages())
        return {
            'hypervisor_hostname': nodename,
            # Also for Incus: images name this hypervisor type.
            'hypervisor_type': fields.HVType.LXD,
            'hypervisor_version': version_number(
                environment['server_version']),
            'supported_instances': [
                (arch, fields.HVType.LXD, fields.VMMode.EXE)
                for arch in self.architectures()],
            'vcpus': self._shared_count(sets),
            'vcpus_used': 0,
            'memory_mb': memory // units.Mi,
            'memory_mb_used': memory_used // units.Mi,
            'local_gb': total // units.Gi,
            'local_gb_used': -(-used // units.Gi),
            'disk_available_least': (total - used) // units.Gi,
            'cpu_info': json.dumps(self._cpu_info(resources['cpu'])),
            'numa_topology': topology._to_json() if topology else None,
        }

    def architectures(self) -> list[str]:
        """List the architectures whose images the host can run.

        :returns: Nova's names, the host's native one first.
        """
        found = []
        for name in self._session.server['environment']['architectures']:
            try:
                arch = fields.Architecture.canonicalize(name)
            except exception.InvalidArchitectureName:
                # An architecture that Nova does not know, so no image has it.
                continue
            if arch not in found:
                found.append(arch)
        return found

    def _memory(self) -> tuple[int, int]:
        """Return total and used memory in bytes."""
        if not self._session.is_local:
            memory = (self._resources or self._read_resources())['memory']
            return memory['total'], memory['used']
        # LXD reports memory that the kernel reserves at boot as used.
        figures = {}
        with open('/proc/meminfo', encoding='ascii') as stream:
            for line in stream:
                words = line.split()
                figures[words[0]] = int(words[1]) * units.Ki
        total = figures['MemTotal:']
        return total, total - figures['MemAvailable:']

    def _pool_space(self) -> tuple[int, int]:
        """Return total and used space of the pool in bytes."""
        space = self._session.get(
            'storage-pools', self._options.storage_pool, 'resources')['space']
        return space['total'], space['used']

    def _cpu_info(self, cpu: dict[str, Any]) -> dict[str, Any]:
        sockets = cpu.get('sockets') or [{}]
        cores = sockets[0].get('cores') or [{}]
        return {
            'arch': (self.architectures() or [''])[0],
            'vendor': sockets[0].get('vendor', ''),
            'model': sockets[0].get('name', ''),
            'topology': {'sockets': len(sockets), 'cores': len(cores),
                         'threads': len(cores[0].get('threads') or [None])},
            'features': sorted(self._cpu_features()),
        }

    def _cpu_features(self) -> frozenset[str]:
        """Return the features of the host's CPUs, cached."""
        if self._features is None:
            # Containers run on the host's CPUs without virtualization.
            self._features = (host_traits.local_cpu_features()
                              if self._session.is_local else frozenset())
        return self._features

    # -- Placement ----------------------------------------------------------

    def update_provider_tree(self, provider_tree: Any, nodename: str,
                             ratios: Mapping[str, float],
                             reserved_disk_gb: int) -> None:
        """Report inventory and traits of the host to Placement.

        See :meth:`nova.virt.driver.ComputeDriver.update_provider_tree`. It
        takes one request to LXD, after the first time. Providers and traits
        that do not belong to the driver are not changed.

        :param provider_tree: the provider tree to update.
        :param nodename: name of the root provider, which is this host.
        :param ratios: allocation ratio of each resource class.
        :param reserved_disk_gb: GiB of the pool that are not available to
            instances.
        :raises errors.LXDError: if a request fails.
        """
        present = provider_tree.data(nodename)
        sets = cpus.configured()
        totals = {
            VCPU: self._shared_count(sets),
            PCPU: len(sets.dedicated),
            MEMORY_MB: self._memory()[0] // units.Mi,
            DISK_GB: self._pool_space()[0] // units.Gi,
        }
        reserved = {
            VCPU: CONF.reserved_host_cpus,
            PCPU: 0,
            MEMORY_MB: CONF.reserved_host_memory_mb,
            DISK_GB: reserved_disk_gb,
        }
        inventory = {name: data for name, data in present.inventory.items()
                     if name not in totals}
        for name, total in totals.items():
            # Placement does not accept a total of 0.
            if total < 1:
                continue
            # Dedicated CPUs cannot be overcommitted; Nova has no allocation
            # ratio for them.
            ratio = 1.0 if name == PCPU else ratios[name]
            inventory[name] = {
                'total': total, 'min_unit': 1, 'max_unit': total,
                'step_size': 1, 'allocation_ratio': ratio,
                'reserved': min(reserved[name], total)}
        provider_tree.update_inventory(nodename, inventory)

        traits = self.traits()
        gone = (host_traits.owned(present.traits) - traits)
        if gone:
            provider_tree.remove_traits(nodename, *gone)
        provider_tree.add_traits(nodename, *traits)

    def traits(self) -> frozenset[str]:
        """Return the traits of the host that the driver reports.

        :raises errors.LXDError: if a request fails.
        """
        environment = self._session.server['environment']
        found = {
            host_traits.architecture(arch) for arch in self.architectures()}
        found |= host_traits.from_cpu_features(
            self.architectures(), self._cpu_features(),
            (self._processors().get('sockets') or [{}])[0].get('vendor', ''))
        if self._is_hyperthreading():
            found.add(host_traits.HYPERTHREADING)
        found |= host_traits.from_server(environment)
        found.add(host_traits.pool(self.pool_driver()))
        found |= host_traits.from_project(self._project_config())
        found |= host_traits.from_devices(passthrough.present(
            self._resources or self._read_resources(),
            self._options.passthrough_devices))
        if (self._options.idmap_isolation != 'off' and
                self.idmap_capacity() != 0):
            found.add(host_traits.ISOLATED_IDMAP)
        return frozenset(trait for trait in found if trait)

    def _is_hyperthreading(self) -> bool:
        return any(len(core.get('threads') or ()) > 1
                   for socket in self._processors().get('sockets') or ()
                   for core in socket.get('cores') or ())

    def _project_config(self) -> dict[str, str]:
        if self._project is None:
            try:
                self._project = self._session.get(
                    'projects', self._session.project)['config']
            except errors.PermissionDenied:
                # A restricted certificate may not read the project; LXD
                # enforces its restrictions.
                self._project = {}
        return self._project

    # -- other methods of the driver API ------------------------------------

    def volume_connector(self) -> dict[str, Any]:
        """Return the connector properties of this host for Cinder.

        See :meth:`nova.virt.driver.ComputeDriver.get_volume_connector`.
        """
        return connector.get_connector_properties(
            utils.get_root_helper(), CONF.my_block_storage_ip,
            multipath=self._options.volume_use_multipath,
            enforce_multipath=self._options.volume_enforce_multipath,
            host=CONF.host)

    def uptime(self) -> str:
        """Return the uptime of the host in the format of ``uptime``.

        Clients parse the format, which includes the number of users; it is
        always 0, so that it is not disclosed.

        :raises NotImplementedError: if LXD is remote.
        """
        if not self._session.is_local:
            raise NotImplementedError()
        with open('/proc/uptime', encoding='ascii') as stream:
            seconds = float(stream.read().split()[0])
        with open('/proc/loadavg', encoding='ascii') as stream:
            load = stream.read().split()[:3]
        return (f' {time.strftime("%H:%M:%S")} up {_span(int(seconds))},  '
                f'0 users,  load average: {", ".join(load)}')

    def cpu_stats(self) -> dict[str, int]:
        """Return the CPU times of the host since it booted.

        See :meth:`nova.virt.driver.ComputeDriver.get_host_cpu_stats`.

        :returns: nanoseconds of kernel, idle, user and iowait, and the
            frequency in MHz, 0 if unknown.
        :raises NotImplementedError: if LXD is remote.
        """
        if not self._session.is_local:
            raise NotImplementedError()
        with open('/proc/stat', encoding='ascii') as stream:
            ticks = [int(word) for word in stream.readline().split()[1:9]]
        user, nice, system, idle, iowait, irq, softirq, steal = ticks
        tick = 10 ** 9 // os.sysconf('SC_CLK_TCK')
        return {'kernel': (system + irq + softirq + steal) * tick,
                'idle': idle * tick, 'user': (user + nice) * tick,
                'iowait': iowait * tick, 'frequency': self._frequency()}

    def _frequency(self) -> int:
        cores = [core for socket in self._processors().get('sockets') or ()
                 for core in socket.get('cores') or ()]
        return max((core.get('frequency', 0) for core in cores), default=0)


def count_processors(cpu: dict[str, Any]) -> int:
    """Count the CPUs that LXD may use.

    :param cpu: the ``cpu`` part of LXD's resources.
    :returns: number of threads that are online.
    """
    threads = [thread for socket in cpu.get('sockets') or ()
               for core in socket.get('cores') or ()
               for thread in core.get('threads') or ()]
    online = [thread for thread in threads if thread.get('online', True)]
    return len(online) or cpu['total']


def version_number(text: str) -> int:
    """Convert a version of LXD or Incus to the integer that Nova uses.

    :param text: such as ``5.0.2`` or ``5.21.3 LTS``.
    :returns: such as 5000002; 0 if it does not begin with a number.
    """
    match = re.match(r'\d+(?:\.\d+){0,2}', text)
    if match is None:
        return 0
    parts = (match.group().split('.') + ['0', '0'])[:3]
    return versionutils.convert_version_to_int('.'.join(parts))


def _span(seconds: int) -> str:
    minutes = seconds // 60 % 60
    hours = seconds // 3600 % 24
    days = seconds // 86400
    text = f'{hours:2d}:{minutes:02d}' if hours else f'{minutes} min'
    if days:
        text = f'{days} day{"s" if days > 1 else ""}, {text}'
    return text
