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

"""Sets up the quickstart cloud through its APIs.

Called by quickstart.sh as ``cloud.py COMMAND``; everything it needs to know
comes in QS_* environment variables. Every command may be run again: what is
there already is left alone.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from typing import Any

import openstack
from openstack import connection
from openstack import exceptions

SERVICES = {
    'glance': ('image', 'QS_URL_GLANCE', ''),
    'placement': ('placement', 'QS_URL_PLACEMENT', ''),
    'neutron': ('network', 'QS_URL_NEUTRON', ''),
    'nova': ('compute', 'QS_URL_NOVA', '/v2.1'),
    'cinder': ('block-storage', 'QS_URL_CINDER', '/v3'),
}

# Address pools for networks that Neutron creates by default.
AUTOMATIC_NETS = '10.25.0.0/16'

# name, vCPUs, MiB of memory, GiB of root disk
FLAVORS = (
    ('lxd.nano', 1, 128, 1),
    ('lxd.tiny', 1, 256, 2),
    ('lxd.small', 1, 512, 5),
    ('lxd.medium', 2, 2048, 10),
    ('lxd.large', 4, 4096, 20),
)

#: States of migrations that have not ended; "finished" ones wait for their
#: confirmation.
MOVING = ('pre-migrating', 'migrating', 'post-migrating', 'finished')

SERVER_NAME = 'first'
SERVER_TIMEOUT = 300


def env(name: str) -> str:
    return os.environ[name]


def connect(user: str, project: str) -> connection.Connection:
    return openstack.connect(
        auth_url=env('QS_URL_KEYSTONE') + '/v3', username=user,
        password=env('QS_SECRET'), project_name=project,
        user_domain_name='Default', project_domain_name='Default',
        region_name=env('QS_REGION'), load_yaml_config=False,
        load_envvars=False)


@functools.cache
def admin() -> connection.Connection:
    return connect('admin', 'admin')


@functools.cache
def demo() -> connection.Connection:
    return connect('demo', 'demo')


def note(text: str) -> None:
    print(text, flush=True)


def identity() -> None:
    """Create users, projects, roles, services and endpoints."""
    cloud = admin()
    domain = 'default'
    roles = {role.name: role for role in cloud.identity.roles()}
    for name in ('service', 'member', 'reader'):
        if name not in roles:
            roles[name] = cloud.identity.create_role(name=name)
    projects = {p.name: p for p in cloud.identity.projects()}
    for name in ('service', 'demo'):
        if name not in projects:
            projects[name] = cloud.identity.create_project(
                name=name, domain_id=domain)
    users = {u.name: u for u in cloud.identity.users()}
    wanted = {name: about for name, about in SERVICES.items()
              if env(about[1])}
    accounts = [(name, 'service', ('admin', 'service')) for name in wanted]
    accounts.append(('demo', 'demo', ('member',)))
    accounts.append(('admin', 'demo', ('admin',)))
    for name, project, grants in accounts:
        if name not in users:
            users[name] = cloud.identity.create_user(
                name=name, domain_id=domain, password=env('QS_SECRET'))
        for role in grants:
            cloud.identity.assign_project_role_to_user(
                projects[project], users[name], roles[role])
    services = {s.name: s for s in cloud.identity.services()}
    endpoints = {(e.service_id, e.interface): e
                 for e in cloud.identity.endpoints()}
    for name, (kind, variable, path) in wanted.items():
        if name not in services:
            services[name] = cloud.identity.create_service(
                name=name, type=kind)
        url = env(variable) + path
        for interface in ('public', 'internal', 'admin'):
            endpoint = endpoints.get((services[name].id, interface))
            if endpoint is None:
                cloud.identity.create_endpoint(
                    service_id=services[name].id, interface=interface,
                    url=url, region_id=env('QS_REGION'))
            elif endpoint.url != url:
                cloud.identity.update_endpoint(endpoint, url=url)


def images() -> None:
    """Upload the guest images: NAME=FILE=KEY=DISTRO=GIB words, with the
    minimum size of the disk at the end."""
    cloud = admin()
    present: dict[str, list[Any]] = {}
    for image in cloud.image.images():
        present.setdefault(image.name, []).append(image)
    for word in env('QS_IMAGES').split():
        name, path, key, distro, min_disk = word.split('=')
        current = [image for image in present.get(name, ())
                   if image.properties.get('quickstart_key') == key and
                   image.status == 'active']
        stale = [image for image in present.get(name, ())
                 if image not in current and
                 'quickstart_key' in image.properties]
        if not current:
            note(f'Uploading image {name}')
            image = cloud.image.create_image(
                name, disk_format='raw', container_format='bare',
                visibility='public', min_disk=int(min_disk), min_ram=64,
                allow_duplicates=True, quickstart_key=key, os_distro=distro,
                hw_architecture=os.uname().machine, tags=['quickstart'])
            with open(path, 'rb') as content:
                cloud.image.put(
                    f'/images/{image.id}/file', data=content,
                    headers={'Content-Type': 'application/octet-stream',
                             'Accept': ''}).raise_for_status()
        for image in stale:
            cloud.image.delete_image(image)


def flavors() -> None:
    cloud = admin()
    present = {flavor.name for flavor in cloud.compute.flavors(details=False)}
    for name, vcpus, ram, disk in FLAVORS:
        if name not in present:
            cloud.compute.create_flavor(
                name=name, vcpus=vcpus, ram=ram, disk=disk, id=name)


def quotas() -> None:
    """Let the demo project have as many servers as the host can run."""
    admin().compute.update_quota_set(
        demo().current_project_id, instances=-1, cores=-1, ram=-1)


def volume_types() -> None:
    """Create a type for each back end, of the same name, and one more.

    The demo project may have as many volumes as the back ends can store.
    """
    cloud = admin()
    cloud.block_storage.update_quota_set(
        demo().current_project_id, volumes=-1, gigabytes=-1)
    wanted = {name: {'volume_backend_name': name}
              for name in env('QS_VOLUME_TYPES').split()}
    # Multiattach, which files on a share do not support.
    wanted['multiattach'] = {'volume_backend_name': 'loop',
                             'multiattach': '<is> True'}
    present = {kind.name for kind in cloud.block_storage.types()}
    for name, specs in wanted.items():
        if name not in present:
            cloud.block_storage.create_type(name=name, extra_specs=specs)


def keypair() -> None:
    cloud = demo()
    with open(env('QS_PUBLIC_KEY'), encoding='ascii') as source:
        public = source.read().strip()
    found = cloud.compute.find_keypair('quickstart')
    if found and found.public_key.strip() != public:
        cloud.compute.delete_keypair(found)
        found = None
    if not found:
        cloud.compute.create_keypair(name='quickstart', public_key=public)


def network() -> None:
    """Create networks, a router, and the demo project's rules and quota."""
    cloud = admin()
    public = cloud.network.find_network('public')
    if public is None:
        public = cloud.network.create_network(
            name='public', is_router_external=True, is_default=True,
            provider_network_type='flat', provider_physical_network='public')
    elif not any(found.is_default for found in
                 cloud.network.networks(is_router_external=True)):
        # One of an earlier quickstart.
        cloud.network.update_network(public, is_default=True)
    if not cloud.network.find_subnet_pool('automatic'):
        # "server create --nic auto" needs a default pool and a default
        # external network for projects without a network.
        cloud.network.create_subnet_pool(
            name='automatic', prefixes=[AUTOMATIC_NETS],
            default_prefix_length=26, is_shared=True, is_default=True)
    prefix = env('QS_PUBLIC_NET')
    if not cloud.network.find_subnet('public-subnet'):
        cloud.network.create_subnet(
            name='public-subnet', network_id=public.id, ip_version=4,
            cidr=f'{prefix}.0/24', gateway_ip=f'{prefix}.1',
            is_dhcp_enabled=False, allocation_pools=[
                {'start': f'{prefix}.10', 'end': f'{prefix}.250'}])
    cloud.network.update_quota(demo().current_project_id, ports=-1)
    cloud = demo()
    private = cloud.network.find_network('private', ignore_missing=True)
    if private is None:
        private = cloud.network.create_network(name='private')
    subnet = cloud.network.find_subnet('private-subnet')
    if subnet is None:
        subnet = cloud.network.create_subnet(
            name='private-subnet', network_id=private.id, ip_version=4,
            cidr=env('QS_PRIVATE_NET'),
            dns_nameservers=env('QS_NAMESERVERS').split())
    router = cloud.network.find_router('router')
    if router is None:
        router = cloud.network.create_router(
            name='router', external_gateway_info={'network_id': public.id})
    attached = any(ip['subnet_id'] == subnet.id
                   for port in cloud.network.ports(device_id=router.id)
                   for ip in port.fixed_ips)
    if not attached:
        cloud.network.add_interface_to_router(router, subnet_id=subnet.id)
    group = cloud.network.find_security_group(
        'default', project_id=cloud.current_project_id)
    for rule in ({'protocol': 'icmp'},
                 {'protocol': 'tcp', 'port_range_min': 22,
                  'port_range_max': 22}):
        try:
            cloud.network.create_security_group_rule(
                security_group_id=group.id, direction='ingress',
                ether_type='IPv4', **rule)
        except exceptions.ConflictException:
            pass


def server_address(cloud: connection.Connection, server: Any) -> str:
    """Give the server a floating IP unless it has one."""
    port = next(iter(cloud.network.ports(device_id=server.id)))
    for address in cloud.network.ips(port_id=port.id):
        return str(address.floating_ip_address)
    public = cloud.network.find_network('public')
    created = cloud.network.create_ip(
        floating_network_id=public.id, port_id=port.id)
    return str(created.floating_ip_address)


def server() -> None:
    """Create the first server and print its floating IP."""
    cloud = demo()
    found = cloud.compute.find_server(SERVER_NAME, ignore_missing=True)
    if found:
        found = cloud.compute.get_server(found.id)
        if found.status == 'ERROR' and not found.launched_at:
            note(f'Server {SERVER_NAME} never ran; making it again')
            cloud.compute.delete_server(found)
            cloud.compute.wait_for_delete(found, interval=0.5, wait=60)
            found = None
    if found is None:
        image = cloud.image.find_image(
            env('QS_SERVER_IMAGE'), ignore_missing=False)
        private = cloud.network.find_network('private', ignore_missing=False)
        found = cloud.compute.create_server(
            name=SERVER_NAME, image_id=image.id,
            flavor_id=env('QS_SERVER_FLAVOR'), key_name='quickstart',
            networks=[{'uuid': private.id}])
    timeout = SERVER_TIMEOUT * int(env('QS_PATIENCE'))
    deadline = time.monotonic() + timeout
    while True:
        found = cloud.compute.get_server(found.id)
        if found.status != 'BUILD':
            break
        if time.monotonic() > deadline:
            sys.exit(f'Server {SERVER_NAME} is still {found.status} after '
                     f'{timeout} seconds; see nova-compute.log.')
        time.sleep(0.25)
    if found.status == 'ERROR':
        fault = (found.fault or {}).get('message', 'no reason given')
        sys.exit(f'Server {SERVER_NAME} went to ERROR: {fault}\n'
                 f'See nova-compute.log; delete the server and run up again.')
    address = server_address(cloud, found)
    with open(env('QS_ADDRESS_FILE'), 'w', encoding='ascii') as target:
        target.write(address + '\n')
    note(f'Server {SERVER_NAME} is {found.status} at {address}')


def second_host() -> str:
    return env('QS_HOST') + '-2'


def check_unused() -> None:
    """Fail with a message if Nova has servers on the second host, or servers
    that are leaving it or may return."""
    cloud = admin()
    host = second_host()
    servers = {server.id: server
               for server in cloud.compute.servers(all_projects=True)}
    here = {server.name for server in servers.values()
            if server.compute_host == host}
    moving = {servers[migration.instance_uuid].name
              for migration in cloud.compute.migrations(host=host)
              if migration.instance_uuid in servers and
              migration.status in MOVING}
    command = f'openstack --os-cloud {env("QS_CLOUD")}-admin server'
    if here:
        sys.exit(
            f'The compute host {host} has servers: {", ".join(sorted(here))}. '
            f'Delete them, or migrate each of them: {command} migrate --host '
            f'{env("QS_HOST")} --wait SERVER; {command} resize confirm SERVER')
    if moving:
        sys.exit(
            f'Servers that leave the compute host {host} may return: '
            f'{", ".join(sorted(moving))}. Confirm their migrations: '
            f'{command} resize confirm SERVER')


def forget_host() -> None:
    """Delete what Nova and Neutron know of the second host, which is
    stopped."""
    cloud = admin()
    check_unused()
    deadline = time.monotonic() + 60
    for service in list(cloud.compute.services(host=second_host())):
        while True:
            try:
                cloud.compute.delete_service(service)
                break
            except exceptions.HttpException as exc:
                # nova-api fails once if it does not know the resource
                # provider.
                if exc.status_code != 500 or time.monotonic() > deadline:
                    raise
                time.sleep(1)
    for agent in list(cloud.network.agents(host=second_host())):
        cloud.network.delete_agent(agent)


def health() -> None:
    """Fail with a message if an API or an agent does not work."""
    cloud = admin()
    problems = []
    hosts = [env('QS_HOST')]
    if env('QS_COMPUTES') == '2':
        hosts.append(second_host())
    services = list(cloud.compute.services())
    for service in services:
        if service.state != 'up' and service.host in hosts:
            problems.append(f'{service.binary} of {service.host} is '
                            f'{service.state}')
    for host in hosts:
        if not any(service.host == host and service.binary == 'nova-compute'
                   for service in services):
            problems.append(f'nova-compute of {host} never reported')
    names = [service.binary for service in services]
    for name in ('nova-conductor', 'nova-scheduler'):
        if name not in names:
            problems.append(f'{name} never reported')
    for agent in cloud.network.agents():
        if not agent.is_alive and agent.host in hosts:
            problems.append(f'{agent.agent_type} of {agent.host} is not '
                            f'alive')
    if env('QS_URL_CINDER'):
        for service in cloud.block_storage.services():
            if service.state != 'up':
                problems.append(f'{service.binary} at {service.host} is '
                                f'{service.state}')
    next(iter(cloud.image.images(limit=1)), None)
    if problems:
        sys.exit('; '.join(problems))


COMMANDS = {
    'identity': identity,
    'images': images,
    'flavors': flavors,
    'quotas': quotas,
    'keypair': keypair,
    'volume-types': volume_types,
    'network': network,
    'server': server,
    'check-unused': check_unused,
    'forget-host': forget_host,
    'health': health,
}


def main() -> None:
    for name in sys.argv[1:]:
        COMMANDS[name]()


if __name__ == '__main__':
    main()
