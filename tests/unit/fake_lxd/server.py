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

"""What LXD says of itself and of its host."""

from __future__ import annotations

import copy
from typing import Any

from tests.unit.fake_lxd import routing

_ENVIRONMENT: dict[str, Any] = {
    'addresses': [], 'architectures': ['x86_64', 'i686'],
    'certificate': '', 'certificate_fingerprint': '', 'driver': 'lxc',
    'driver_version': '5.0.2', 'firewall': 'nftables', 'kernel': 'Linux',
    'kernel_architecture': 'x86_64',
    'kernel_features': {
        'idmapped_mounts': 'true', 'netnsid_getifaddrs': 'true',
        'seccomp_listener': 'true', 'seccomp_listener_continue': 'true',
        'shiftfs': 'false', 'uevent_injection': 'true',
        'unpriv_fscaps': 'true'},
    'kernel_version': '6.1.0-18-amd64',
    'lxc_features': {
        'cgroup2': 'true', 'core_scheduling': 'true', 'devpts_fd': 'true',
        'idmapped_mounts_v2': 'true', 'mount_injection_file': 'true',
        'network_gateway_device_route': 'true', 'network_ipvlan': 'true',
        'network_l2proxy': 'true', 'network_phys_macvlan_mtu': 'true',
        'network_veth_router': 'true', 'pidfd': 'true',
        'seccomp_allow_deny_syntax': 'true', 'seccomp_notify': 'true',
        'seccomp_proxy_send_notify_fd': 'true'},
    'os_name': 'Debian GNU/Linux', 'os_version': '12', 'project': 'default',
    'server': 'lxd', 'server_clustered': False,
    'server_event_mode': 'full-mesh', 'server_name': 'host1',
    'server_pid': 4711, 'server_version': '5.0.2', 'storage': 'btrfs',
    'storage_version': '6.2',
    'storage_supported_drivers': [
        {'Name': 'dir', 'Version': '1', 'Remote': False},
        {'Name': 'btrfs', 'Version': '6.2', 'Remote': False}],
}

_GIB = 1 << 30


def _thread(id_: int) -> dict[str, Any]:
    return {'id': id_, 'numa_node': 0, 'thread': 0, 'online': True,
            'isolated': False}


def resources(cpus: int = 4, memory: int = 16 * _GIB) -> dict[str, Any]:
    """A host, as ``GET /1.0/resources`` shows it.

    :param cpus: number of threads, one a core.
    :param memory: bytes.
    """
    cores = [{'core': id_, 'die': 0, 'threads': [_thread(id_)],
              'frequency': 2000} for id_ in range(cpus)]
    return {
        'cpu': {'architecture': 'x86_64', 'total': cpus, 'sockets': [{
            'name': 'AMD EPYC', 'vendor': 'AuthenticAMD', 'socket': 0,
            'cache': [{'level': 1, 'type': 'Data', 'size': 32768}],
            'cores': cores}]},
        'memory': {
            'nodes': [{'numa_node': 0, 'hugepages_used': 0,
                       'hugepages_total': 0, 'used': 2 * _GIB,
                       'total': memory}],
            'hugepages_total': 0, 'hugepages_used': 0,
            'hugepages_size': 2 << 20, 'used': 2 * _GIB, 'total': memory},
        'gpu': {'cards': [], 'total': 0},
        'network': {'cards': [], 'total': 0},
        'storage': {'disks': [], 'total': 0},
        'usb': {'devices': [], 'total': 0},
        'pci': {'devices': [], 'total': 0},
        'system': {'uuid': '', 'vendor': '', 'product': '', 'family': '',
                   'version': '', 'sku': '', 'serial': '', 'type': 'physical',
                   'firmware': None, 'chassis': None, 'motherboard': None},
    }


@routing.route('GET', '/')
def versions(daemon, request):
    return routing.sync(['/1.0'])


@routing.route('GET', '/1.0')
def server(daemon, request):
    answer = {'config': {}, 'api_extensions': daemon.extensions,
              'api_status': 'stable', 'api_version': '1.0',
              'auth': 'trusted' if request.trusted else 'untrusted',
              'public': False, 'auth_methods': ['tls']}
    if request.trusted:
        environment = copy.deepcopy(_ENVIRONMENT)
        environment.update(daemon.environment)
        answer['environment'] = environment
    return routing.sync(answer, etag_of=(answer['config'],))


@routing.route('GET', '/1.0/resources')
def get_resources(daemon, request):
    return routing.sync(daemon.resources)


@routing.route('GET', '/1.0/cluster')
def cluster(daemon, request):
    answer = {'server_name': '', 'enabled': False, 'member_config': []}
    return routing.sync(answer, etag_of=(answer,))


@routing.route('GET', '/1.0/networks')
def networks(daemon, request):
    return routing.sync(['/1.0/networks/lo', '/1.0/networks/eth0'])


@routing.route('GET', '/1.0/certificates')
def certificates(daemon, request):
    return routing.sync([])
