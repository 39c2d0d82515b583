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

"""Which instance options exist, and what they may be."""

from __future__ import annotations

import re

from tests.unit.fake_lxd import errors

_BOOLEANS = frozenset("""
    boot.autostart limits.memory.swap linux.kernel_modules.required
    migration.incremental.memory nvidia.runtime security.devlxd
    security.devlxd.images security.idmap.isolated security.nesting
    security.privileged security.protection.delete security.protection.shift
    security.syscalls.deny_compat security.syscalls.deny_default
    security.syscalls.intercept.bpf security.syscalls.intercept.bpf.devices
    security.syscalls.intercept.mknod security.syscalls.intercept.mount
    security.syscalls.intercept.mount.shift
    security.syscalls.intercept.sched_setscheduler
    security.syscalls.intercept.setxattr snapshots.schedule.stopped
    """.split())

_SIZES = frozenset("""
    limits.hugepages.64KB limits.hugepages.1MB limits.hugepages.2MB
    limits.hugepages.1GB
    """.split())

_INTEGERS = frozenset("""
    boot.autostart.delay boot.autostart.priority boot.host_shutdown_timeout
    boot.stop.priority limits.cpu.priority limits.disk.priority
    limits.memory.swap.priority limits.network.priority limits.processes
    security.idmap.base security.idmap.size
    """.split())

_TEXTS = frozenset("""
    boot.autostart cloud-init.network-config cloud-init.user-data
    cloud-init.vendor-data cluster.evacuate limits.cpu limits.cpu.allowance
    limits.memory limits.memory.enforce linux.kernel_modules
    nvidia.driver.capabilities nvidia.require.cuda nvidia.require.driver
    raw.apparmor raw.idmap raw.lxc raw.seccomp
    security.syscalls.allow security.syscalls.deny
    security.syscalls.intercept.mount.allowed
    security.syscalls.intercept.mount.fuse snapshots.schedule
    snapshots.pattern snapshots.expiry
    """.split())

_PREFIXES = ('user.', 'image.', 'environment.', 'linux.sysctl.',
             'limits.kernel.')

_VOLATILE = frozenset("""
    volatile.apply_template volatile.apply_quota volatile.apply_nvram
    volatile.base_image volatile.cloud-init.instance-id
    volatile.evacuate.origin volatile.idmap.base volatile.idmap.current
    volatile.idmap.next volatile.last_state.idmap volatile.last_state.power
    volatile.uuid volatile.vsock_id
    """.split())

_VOLATILE_OF_DEVICE = re.compile(
    r'volatile\..+\.(hwaddr|name|host_name|mtu|created|id|vlan|spoofcheck|'
    r'last_state\..+|apply_quota|ceph_rbd|driver|uuid|quota)$')

_SIZE = re.compile(r'\d+(B|kB|MB|GB|TB|PB|EB|KiB|MiB|GiB|TiB|PiB|EiB)?$')
_UNITS = {'': 1, 'B': 1, 'kB': 10**3, 'MB': 10**6, 'GB': 10**9,
          'TB': 10**12, 'PB': 10**15, 'EB': 10**18, 'KiB': 1 << 10,
          'MiB': 1 << 20, 'GiB': 1 << 30, 'TiB': 1 << 40, 'PiB': 1 << 50,
          'EiB': 1 << 60}


def size_in_bytes(text: str) -> int:
    """Read a size as LXD does: MB is decimal, MiB is binary."""
    if not _SIZE.match(text):
        raise errors.bad_request(f'Invalid value: {text}')
    digits = re.match(r'\d+', text).group()  # type: ignore[union-attr]
    return int(digits) * _UNITS[text[len(digits):]]


def check(config: dict[str, str]) -> None:
    """Refuse unknown keys and impossible values, in LXD's words."""
    for key, value in sorted(config.items()):
        if not _known(key):
            raise errors.bad_request(f'Unknown configuration key: {key}')
        if value:
            _check_value(key, value)


def _known(key: str) -> bool:
    return (key in _BOOLEANS or key in _INTEGERS or key in _TEXTS
            or key in _SIZES or key.startswith(_PREFIXES)
            or key in _VOLATILE or bool(_VOLATILE_OF_DEVICE.match(key)))


def _check_value(key: str, value: str) -> None:
    if key in _BOOLEANS:
        if value.lower() not in ('true', 'false', '1', '0', 'yes', 'no',
                                 'on', 'off'):
            raise errors.bad_request(f'Invalid value for a boolean "{value}"')
    elif key in _INTEGERS:
        if not re.match(r'-?\d+$', value):
            raise errors.bad_request(
                f'Invalid value for an integer "{value}"')
    elif key == 'limits.memory':
        if not (value.endswith('%') and value[:-1].isdigit()):
            size_in_bytes(value)
    elif key in _SIZES:
        size_in_bytes(value)
    elif key == 'limits.cpu':
        if not re.match(r'\d+([-,]\d+)*$', value):
            raise errors.bad_request('Invalid CPU limit syntax')
    elif key == 'limits.cpu.allowance':
        if not re.match(r'(\d+%|\d+ms/\d+ms)$', value):
            raise errors.bad_request(f'Invalid CPU allowance: {value}')
    elif key == 'raw.lxc':
        for line in value.splitlines():
            if line.strip() and not line.startswith('#') and '=' not in line:
                raise errors.bad_request(f'Invalid raw.lxc line: {line}')
    elif key == 'volatile.uuid':
        if not re.match(r'[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$', value):
            raise errors.bad_request('Invalid UUID')
