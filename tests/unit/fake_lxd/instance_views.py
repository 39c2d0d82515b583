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

"""Instances as LXD shows them."""

from __future__ import annotations

from typing import Any

from tests.unit.fake_lxd import config_keys
from tests.unit.fake_lxd import devices
from tests.unit.fake_lxd import errors
from tests.unit.fake_lxd import instance_rules
from tests.unit.fake_lxd import routing
from tests.unit.fake_lxd import snapshots
from tests.unit.fake_lxd import state


def shown(daemon, instance: state.Instance, recursion: int = 1
          ) -> dict[str, Any]:
    """One instance; with recursion 2, its state and snapshots too."""
    config, expanded = daemon.store.expanded(instance)
    answer: dict[str, Any] = {
        'architecture': instance.architecture,
        'config': dict(instance.config),
        'devices': {key: dict(value)
                    for key, value in instance.devices.items()},
        'ephemeral': instance.ephemeral,
        'profiles': list(instance.profiles), 'stateful': False,
        'description': instance.description,
        'created_at': instance.created_at, 'expanded_config': config,
        'expanded_devices': expanded, 'name': instance.name,
        'status': instance.status,
        'status_code': state.STATUS_CODES[instance.status],
        'last_used_at': instance.last_used_at, 'location': 'none',
        'type': 'container', 'project': instance.project}
    if recursion > 1:
        answer['backups'] = None
        answer['state'] = _state(daemon, instance)
        answer['snapshots'] = [
            snapshots.shown(daemon, instance, snapshot)
            for snapshot in instance.snapshots.values()] or None
    return answer


def _counters() -> dict[str, int]:
    return {f'{what}_{way}': 0 for what in ('bytes', 'packets', 'errors')
            for way in ('received', 'sent')} | {
                'packets_dropped_outbound': 0, 'packets_dropped_inbound': 0}


def _interface(hwaddr: str, host_name: str, mtu: int, kind: str
               ) -> dict[str, Any]:
    return {'addresses': [], 'counters': _counters(), 'hwaddr': hwaddr,
            'host_name': host_name, 'mtu': mtu, 'state': 'up', 'type': kind}


def _state(daemon, instance: state.Instance) -> dict[str, Any]:
    config, wanted = daemon.store.expanded(instance)
    running = instance.is_running
    usage = instance.usage
    network: dict[str, Any] | None = None
    if running:
        network = {'lo': _interface('', '', 65536, 'loopback')}
        for index, (key, nic) in enumerate(sorted(
                devices.nics(wanted).items())):
            physical = nic.get('nictype') == 'physical'
            network[nic.get('name') or f'eth{index}'] = _interface(
                nic.get('hwaddr') or config.get(f'volatile.{key}.hwaddr', ''),
                '' if physical else config.get(
                    f'volatile.{key}.host_name', ''),
                int(nic.get('mtu') or 1500), 'broadcast')
        for name, values in usage.get('network', {}).items():
            network.setdefault(name, _interface('', '', 1500, 'broadcast'))
            network[name].update(values)
    disk: dict[str, Any] = {}
    root = devices.root_of(wanted) or {}
    pool = daemon.store.pools.get(root.get('pool', ''))
    if pool is not None and pool.has_quota:
        disk['root'] = {'usage': instance_rules.disk_usage(instance)}
    memory = usage.get('memory', 3 << 20) if running else 0
    return {
        'status': instance.status,
        'status_code': state.STATUS_CODES[instance.status], 'disk': disk,
        'memory': {'usage': memory, 'usage_peak': memory, 'swap_usage': 0,
                   'swap_usage_peak': 0},
        'network': network, 'pid': instance.pid,
        'processes': usage.get('processes', 2) if running else 0,
        'cpu': {'usage': usage.get('cpu', 13593276) if running else 0}}


@routing.route('GET', '/1.0/instances')
def list_instances(daemon, request):
    recursion = int(request.query.get('recursion') or 0)
    everything = request.query.get('all-projects') in ('true', '1')
    if everything and request.query.get('project'):
        raise errors.bad_request(
            'Cannot specify a project when requesting all projects')
    with daemon.store.lock:
        found = [instance for (project, _), instance
                 in sorted(daemon.store.instances.items())
                 if everything or project == request.project]
        if recursion:
            return routing.sync([shown(daemon, instance, recursion)
                                 for instance in found])
        return routing.sync([
            instance.path + ('' if instance.project == 'default'
                             else f'?project={instance.project}')
            for instance in found])


@routing.route('GET', '/1.0/instances/{name}')
def get_instance(daemon, request, name):
    with daemon.store.lock:
        instance = daemon.store.instance(request.project, name)
        full = int(request.query.get('recursion') or 0) > 0
        return routing.sync(shown(daemon, instance, 2 if full else 1),
                            etag_of=instance_rules.etag_of(instance))


@routing.route('GET', '/1.0/instances/{name}/metadata')
def get_metadata(daemon, request, name):
    with daemon.store.lock:
        instance = daemon.store.instance(request.project, name)
        found = {'architecture': '', 'creation_date': 0, 'expiry_date': 0,
                 'properties': None, 'templates': None, **instance.metadata}
        return routing.sync(found, etag_of=(found,))


@routing.route('GET', '/1.0/instances/{name}/state')
def get_state(daemon, request, name):
    with daemon.store.lock:
        return routing.sync(_state(
            daemon, daemon.store.instance(request.project, name)))


def root_size(daemon, instance: state.Instance) -> int | None:
    """The quota of the root disk in bytes, if it has one."""
    _config, wanted = daemon.store.expanded(instance)
    size = (devices.root_of(wanted) or {}).get('size')
    return config_keys.size_in_bytes(size) if size else None
