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

"""Devices of instances: what LXD accepts, and what starts."""

from __future__ import annotations

from tests.unit.fake_lxd import config_keys
from tests.unit.fake_lxd import errors
from tests.unit.fake_lxd import state

Devices = dict[str, dict[str, str]]

TYPES = frozenset("""
    none nic disk unix-char unix-block usb gpu infiniband proxy unix-hotplug
    tpm pci
    """.split())

_OPTIONS = {
    'nic': frozenset("""
        type nictype network parent name hwaddr mtu host_name vlan gvrp
        boot.priority limits.ingress limits.egress limits.max
        maas.subnet.ipv4 maas.subnet.ipv6 security.mac_filtering
        security.ipv4_filtering security.ipv6_filtering
        security.port_isolation ipv4.address ipv6.address ipv4.routes
        ipv6.routes mode queue.tx.length
        """.split()),
    'disk': frozenset("""
        type path source pool size size.state readonly recursive required
        shift optional propagation limits.read limits.write limits.max
        raw.mount.options boot.priority ceph.user_name ceph.cluster_name
        """.split()),
    'unix-block': frozenset(
        'type source path major minor uid gid mode required'.split()),
    'unix-char': frozenset(
        'type source path major minor uid gid mode required'.split()),
}

#: Characters of a network interface's name at most.
_LONGEST_INTERFACE = 15

NIC_TYPES = frozenset(
    'physical p2p bridged macvlan sriov ipvlan routed'.split())


def root_of(devices: Devices) -> dict[str, str] | None:
    for device in devices.values():
        if device.get('type') == 'disk' and device.get('path') == '/':
            return device
    return None


def check(devices: Devices) -> None:
    """Refuse devices that are wrong in themselves."""
    if root_of(devices) is None:
        raise errors.bad_request(
            'Failed detecting root disk device: No root device could be '
            'found')
    for key, device in sorted(devices.items()):
        try:
            _check_one(key, device, devices)
        except errors.APIError as exc:
            raise errors.bad_request(
                f'Device validation failed for "{key}": {exc.text}'
            ) from None


def _check_one(key: str, device: dict[str, str], devices: Devices) -> None:
    kind = device.get('type')
    if not kind:
        raise errors.bad_request(
            f'Failed loading device "{key}": Missing device type in config')
    if kind not in TYPES or (kind == 'nic' and device.get(
            'nictype', 'bridged') not in NIC_TYPES):
        raise errors.bad_request(
            f'Failed loading device "{key}": Unsupported device type')
    for option in sorted(device):
        if (option not in _OPTIONS.get(kind, frozenset(device)) and
                not option.startswith('user.')):
            raise errors.bad_request(f'Invalid device option "{option}"')
    if kind == 'nic':
        if not device.get('parent') and device.get('nictype') in (
                'physical', 'macvlan', 'sriov'):
            raise errors.bad_request(
                'Invalid value for device option "parent": Required value')
        name = device.get('name')
        if name and any(other.get('name') == name
                        for other in nics(devices).values()
                        if other is not device):
            raise errors.bad_request(
                f'Invalid value for device option "name": Duplicate NIC name '
                f'detected "{name}"')
    elif kind == 'disk':
        if device.get('path') == '/' and not device.get('pool'):
            raise errors.bad_request(
                'Root disk entry must have a "pool" property set')
        if device.get('size'):
            try:
                config_keys.size_in_bytes(device['size'])
            except errors.APIError as exc:
                raise errors.bad_request(
                    f'Invalid value for device option "size": {exc.text}'
                ) from None


def check_added(daemon, instance: state.Instance, devices: Devices) -> None:
    """Refuse disks whose source is missing, as LXD does when adding them."""
    for key, device in sorted(devices.items()):
        if device.get('type') != 'disk' or device.get('path') == '/':
            continue
        source, pool = device.get('source', ''), device.get('pool')
        if pool:
            owner = daemon.store.project_with(
                'storage.volumes', instance.project, 'Project not found')
            if (owner, pool, source) not in daemon.store.volumes:
                raise errors.not_found(
                    f'Failed add validation for device "{key}": Failed '
                    f'loading custom volume: Storage volume not found')
        elif (device.get('required', 'true') != 'false'
                and not _exists(daemon.host_paths, source)):
            raise errors.internal(
                f'Failed add validation for device "{key}": Missing source '
                f'path "{source}" for disk "{key}"')


def start(daemon, instance: state.Instance, devices: Devices) -> None:
    """Bring devices up, or fail as LXD does."""
    for key, device in sorted(devices.items()):
        kind = device.get('type')
        if kind == 'nic':
            _start_nic(daemon, instance, key, device)
        elif kind in ('unix-block', 'unix-char'):
            path = device.get('source') or device.get('path') or ''
            if device.get('required') != 'false' and not device.get(
                    'major') and not _exists(daemon.host_paths, path):
                raise errors.bad_request(
                    f'Failed to start device "{key}": The required device '
                    f"path doesn't exist and the major and minor settings "
                    f'are not specified')


def _start_nic(daemon, instance: state.Instance, key: str,
               device: dict[str, str]) -> None:
    parent = device.get('parent', '')
    if parent and (len(parent) > _LONGEST_INTERFACE or
                   not _exists(daemon.host_interfaces, parent)):
        raise errors.bad_request(
            f'Failed to start device "{key}": Parent device \'{parent}\' '
            f"doesn't exist")
    volatile = f'volatile.{key}.'
    if device.get('nictype') == 'physical':
        instance.config.update({
            volatile + 'host_name': parent,
            volatile + 'last_state.created': 'false',
            volatile + 'last_state.hwaddr': '9e:bc:47:56:81:a2',
            volatile + 'last_state.mtu': '1500'})
    else:
        instance.config[volatile + 'host_name'] = device.get(
            'host_name') or 'veth' + instance.config['volatile.uuid'][:8]
    if not device.get('hwaddr') and device.get('nictype') != 'physical':
        instance.config.setdefault(volatile + 'hwaddr', '00:16:3e:11:22:33')


def stop(instance: state.Instance, keys: list[str]) -> None:
    """Forget what devices had while they were up."""
    for key in keys:
        for suffix in ('host_name', 'last_state.created',
                       'last_state.hwaddr', 'last_state.mtu'):
            instance.config.pop(f'volatile.{key}.{suffix}', None)


def _exists(known: set[str] | None, name: str) -> bool:
    return known is None or name in known


def nics(devices: Devices) -> dict[str, dict[str, str]]:
    return {key: device for key, device in devices.items()
            if device.get('type') == 'nic'}
