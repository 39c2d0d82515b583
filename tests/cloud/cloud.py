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

"""The cloud of devstack/quickstart.sh, for the tests from end to end.

Servers are made and looked at as a user would, through the APIs and SSH; what
is left of them is looked for on the host itself.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import json
import os
import pathlib
import socket
import subprocess
import time
from typing import Any, TypeVar
import uuid

import openstack
from openstack import connection
from openstack import exceptions
import testtools

T = TypeVar('T')

REPO = pathlib.Path(__file__).resolve().parents[2]
QUICKSTART = REPO / 'devstack' / 'quickstart.sh'
PREFIX = pathlib.Path(os.environ.get('QUICKSTART_PREFIX', '/opt/nova-lxd'))
USER_CLOUD = 'nova-lxd'
ADMIN_CLOUD = 'nova-lxd-admin'
KEY = 'quickstart'
LXD_PROJECT = 'nova'
POOL = 'nova'

# Seconds. The host may be busy with other things, so they are generous; a
# test that says how fast something has to be has its own limit.
BOOT_TIMEOUT = 120
ACTION_TIMEOUT = 60
SSH_TIMEOUT = 90

# What the quickstart takes for a slow machine.
PATIENCE = int(os.environ.get('QUICKSTART_PATIENCE', '1'))

TINY = 'tiny'


def distribution() -> str:
    """Name of the system image, and of the user in it.

    The quickstart builds it from the packages of the host's distribution.
    """
    for line in pathlib.Path('/etc/os-release').read_text().splitlines():
        name, _, value = line.partition('=')
        if name == 'ID':
            return value.strip('"')
    return 'debian'


def connect(name: str = USER_CLOUD) -> connection.Connection:
    """A connection with the quickstart's clouds.yaml and no other."""
    config = openstack.config.OpenStackConfig(
        config_files=[str(PREFIX / 'clouds.yaml')], load_envvars=False)
    return connection.Connection(config=config.get_one(cloud=name))


def run(*command: str, env: dict[str, str] | None = None, timeout: float = 60,
        check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs a program; what it said is in the error when it fails."""
    done = subprocess.run(
        command, env=dict(os.environ, **(env or {})), text=True,
        timeout=timeout * PATIENCE, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if check and done.returncode:
        raise AssertionError(
            f'{" ".join(command)} failed ({done.returncode}): '
            f'{done.stdout}{done.stderr}')
    return done


def quickstart(*arguments: str, timeout: float = 180) -> str:
    """Runs devstack/quickstart.sh, once nobody else does."""
    deadline = time.monotonic() + timeout * PATIENCE
    while True:
        done = run(str(QUICKSTART), *arguments, timeout=timeout, check=False,
                   env={'QUICKSTART_PREFIX': str(PREFIX)})
        output = done.stdout + done.stderr
        busy = 'Another quickstart command' in output
        if not busy or time.monotonic() > deadline:
            break
        time.sleep(1)
    if done.returncode:
        raise AssertionError(f'quickstart.sh {arguments} failed: {output}')
    return output


def wait_for(what: str, condition: Callable[[], T], timeout: float,
             interval: float = 0.3) -> T:
    """Waits until ``condition`` is true and returns what it returned."""
    deadline = time.monotonic() + timeout * PATIENCE
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > deadline:
            raise AssertionError(
                f'Waited {timeout} s for {what}; last: {result!r}')
        time.sleep(interval)


class Host:
    """What the compute host itself knows about servers."""

    def __init__(self) -> None:
        self._lxd = {'LXD_DIR': str(PREFIX / 'lxd'),
                     'INCUS_DIR': str(PREFIX / 'lxd'),
                     'HOME': str(PREFIX / 'data' / 'lxd-client')}
        self._ovs = {'OVS_RUNDIR': str(PREFIX / 'run' / 'ovs')}

    def lxc(self, *arguments: str) -> str:
        return run('lxc', '--project', LXD_PROJECT, *arguments,
                   env=self._lxd).stdout

    def query(self, path: str) -> Any:
        """A GET of LXD's REST API."""
        return json.loads(run('lxc', 'query', path, env=self._lxd).stdout)

    def instances(self) -> list[dict[str, Any]]:
        return self.query(
            f'/1.0/instances?recursion=1&project={LXD_PROJECT}')

    def instances_of(self, server_id: str) -> list[dict[str, Any]]:
        """The LXD instances that belong to a server, rescue ones included."""
        return [instance for instance in self.instances()
                if instance['config'].get('user.nova.uuid') == server_id]

    def name_of(self, server_id: str) -> str:
        found = [i for i in self.instances_of(server_id)
                 if i['config'].get('user.nova.role') == 'server']
        if len(found) != 1:
            raise AssertionError(
                f'{len(found)} LXD instances for server {server_id}')
        return found[0]['name']

    def volumes(self) -> set[str]:
        """Names of all volumes of the driver's project, with their type."""
        return {f'{volume["type"]}/{volume["name"]}' for volume in self.query(
            f'/1.0/storage-pools/{POOL}/volumes?recursion=1'
            f'&project={LXD_PROJECT}')}

    def ovs_ports(self) -> set[str]:
        return set(run('ovs-vsctl', '--timeout=30', 'list-ports', 'br-int',
                       env=self._ovs).stdout.split())

    @staticmethod
    def links() -> set[str]:
        return set(os.listdir('/sys/class/net'))

    def left_of(self, server_id: str, port_ids: list[str]) -> list[str]:
        """Whatever the host still has of a deleted server, as text."""
        left = [f'LXD instance {instance["name"]}'
                for instance in self.instances_of(server_id)]
        left += [f'LXD volume {name}' for name in self.volumes()
                 if server_id in name]
        for port_id in port_ids:
            left += [f'Open vSwitch port {name}' for name in self.ovs_ports()
                     if port_id[:11] in name]
            left += [f'interface {name}' for name in self.links()
                     if port_id[:11] in name]
        for path in pathlib.Path('/sys/block').glob('loop*/loop/backing_file'):
            # Others come and go.
            with contextlib.suppress(OSError):
                if server_id in path.read_text():
                    left.append(f'loop device {path.parts[3]}')
        state = PREFIX / 'data' / 'nova'
        left += [f'file {path}' for path in state.rglob(f'*{server_id}*')]
        return left


class CloudTestCase(testtools.TestCase):
    """Base class: connections, servers that are always cleaned up, SSH."""

    cloud: connection.Connection
    admin: connection.Connection
    host: Host

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        if os.geteuid():
            raise cls.skipException('Needs root, to look at the host')
        if not (PREFIX / 'clouds.yaml').exists():
            raise cls.skipException(
                f'No quickstart cloud at {PREFIX}: devstack/quickstart.sh up')
        cls.cloud = connect()
        try:
            cls.cloud.authorize()
        except exceptions.SDKException as exc:
            raise cls.skipException(
                f'The quickstart cloud at {PREFIX} does not answer '
                f'(devstack/quickstart.sh up): {exc}') from exc
        cls.admin = connect(ADMIN_CLOUD)
        cls.host = Host()

    # -- servers

    @classmethod
    def unique(cls, what: str) -> str:
        return f'{what}-{uuid.uuid4().hex[:8]}'

    def create(self, image: str | None = TINY, flavor: str = 'lxd.tiny',
               cloud: connection.Connection | None = None,
               **arguments: Any) -> Any:
        """Asks for a server and returns at once.

        :param image: name or id of an image, None for none
        :param cloud: connection of another project than the usual one
        :param arguments: to the Compute API; ``networks`` defaults to one
            port in the network "private"
        """
        cloud = cloud or self.cloud
        server = self._create(cloud, image, flavor, arguments)
        self.addCleanup(self.delete, server.id, cloud)
        return server

    @classmethod
    def _create(cls, cloud: connection.Connection, image: str | None,
                flavor: str, arguments: dict[str, Any]) -> Any:
        if image is not None:
            arguments['image_id'] = cls.image_id(cloud, image)
        if 'networks' not in arguments:
            private = cloud.network.find_network(
                'private', ignore_missing=False)
            arguments['networks'] = [{'uuid': private.id}]
        arguments.setdefault('name', cls.unique('test'))
        arguments.setdefault('key_name', KEY)
        if arguments['key_name'] is None:
            del arguments['key_name']
        flavor_id = cloud.compute.find_flavor(
            flavor, ignore_missing=False).id
        return cloud.compute.create_server(flavor_id=flavor_id, **arguments)

    @staticmethod
    def image_id(cloud: connection.Connection, name: str) -> str:
        """The newest image of a name: an update replaces them one by one."""
        images = list(cloud.image.images(name=name, sort='created_at:desc'))
        return (images[0].id if images else
                cloud.image.find_image(name, ignore_missing=False).id)

    def boot(self, image: str | None = TINY, flavor: str = 'lxd.tiny',
             **arguments: Any) -> Any:
        """Makes a server and waits until it is ACTIVE."""
        server = self.create(image, flavor, **arguments)
        return self.wait_status(
            server.id, 'ACTIVE', BOOT_TIMEOUT, arguments.get('cloud'))

    @classmethod
    def wait_status(cls, server_id: str, status: str,
                    timeout: float = ACTION_TIMEOUT,
                    cloud: connection.Connection | None = None) -> Any:
        """Waits for a status and for the end of the task that led there."""
        compute = (cloud or cls.cloud).compute
        seen: list[str] = []

        def reached() -> Any:
            server = compute.get_server(server_id)
            now = f'{server.status}/{server.task_state}'
            if not seen or seen[-1] != now:
                seen.append(now)
            if server.status == 'ERROR' and status != 'ERROR':
                raise AssertionError(
                    f'Server {server.name} went to ERROR, not {status}: '
                    f'{(server.fault or {}).get("message")} '
                    f'(states: {seen})')
            return (server if server.status == status and
                    server.task_state is None else None)

        try:
            return wait_for(f'status {status}', reached, timeout)
        except AssertionError as exc:
            raise AssertionError(f'{exc}; states: {seen}') from None

    @classmethod
    def delete(cls, server_id: str,
               cloud: connection.Connection | None = None,
               timeout: float = ACTION_TIMEOUT) -> None:
        """Deletes a server, if there, and waits until it is gone."""
        cloud = cloud or cls.cloud
        for address in list(cls._addresses(cloud, server_id)):
            cloud.network.delete_ip(address, ignore_missing=True)
        cloud.compute.delete_server(server_id, ignore_missing=True)

        def gone() -> bool:
            try:
                server = cloud.compute.get_server(server_id)
            except exceptions.NotFoundException:
                return True
            if server.status == 'ERROR' and server.task_state is None:
                cloud.compute.delete_server(server_id, ignore_missing=True)
            return False

        wait_for(f'the end of server {server_id}', gone, timeout)

    @classmethod
    def _addresses(cls, cloud: connection.Connection, server_id: str) -> Any:
        for port in cloud.network.ports(device_id=server_id):
            yield from cloud.network.ips(port_id=port.id)

    @classmethod
    def ports(cls, server_id: str) -> list[Any]:
        return list(cls.cloud.network.ports(device_id=server_id))

    @staticmethod
    def fixed_ip(server: Any) -> str:
        return next(address['addr'] for addresses in server.addresses.values()
                    for address in addresses
                    if address['OS-EXT-IPS:type'] == 'fixed')

    def assert_gone(self, server_id: str, port_ids: list[str]) -> None:
        """Nothing of a server is left on the host, soon after its end."""
        def nothing() -> bool:
            return not self.host.left_of(server_id, port_ids)
        try:
            wait_for('a clean host', nothing, 10)
        except AssertionError:
            self.assertEqual([], self.host.left_of(server_id, port_ids))

    # -- talking to guests

    def execute(self, server: Any, script: str) -> str:
        """Run a shell script in a server's container, as root."""
        return self.host.lxc('exec', self.host.name_of(server.id), '--',
                             'sh', '-c', script).strip()

    def started_at(self, server: Any) -> str:
        """When the guest's init was started; another time after a boot."""
        return self.execute(server, 'cat /proc/1/stat').split()[21]

    @classmethod
    def floating_ip(cls, server_id: str, port_id: str | None = None) -> str:
        """Gives a server's only port a floating IP; delete() takes it back."""
        if port_id is None:
            port_id = cls.ports(server_id)[0].id
        public = cls.cloud.network.find_network(
            'public', ignore_missing=False)
        created = cls.cloud.network.create_ip(
            floating_network_id=public.id, port_id=port_id)
        return str(created.floating_ip_address)

    @classmethod
    def try_ssh(cls, address: str, command: str, user: str | None = None,
                timeout: float = 30) -> subprocess.CompletedProcess[str]:
        """One attempt. ``user`` defaults to the system image's."""
        try:
            return run(
                'ssh', '-i', str(PREFIX / 'keys' / 'id_ed25519'),
                '-o', 'BatchMode=yes', '-o', 'ConnectTimeout=3',
                '-o', 'StrictHostKeyChecking=no', '-o', 'LogLevel=ERROR',
                '-o', 'UserKnownHostsFile=/dev/null',
                '-o', 'ServerAliveInterval=5',
                f'{user or distribution()}@{address}', command,
                timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess([], 255, '', 'timeout')

    @classmethod
    def ssh(cls, address: str, command: str, user: str | None = None,
            timeout: float = SSH_TIMEOUT) -> str:
        """Runs a command in a guest, waiting for the guest to let us in."""
        deadline = time.monotonic() + timeout * PATIENCE
        while True:
            done = cls.try_ssh(address, command, user)
            if done.returncode == 0:
                return done.stdout.strip()
            # 255 is ssh itself: not there yet.
            if done.returncode != 255 or time.monotonic() > deadline:
                raise AssertionError(
                    f'ssh {address} {command!r}: {done.returncode} '
                    f'{done.stdout}{done.stderr}')
            time.sleep(0.5)

    @staticmethod
    def answers(address: str, port: int = 22, timeout: float = 2) -> bool:
        """True when a TCP port of a guest is open."""
        try:
            socket.create_connection((address, port), timeout).close()
        except OSError:
            return False
        return True

    def wait_answer(self, address: str, timeout: float = SSH_TIMEOUT) -> None:
        wait_for(f'an answer of {address}', lambda: self.answers(address),
                 timeout)
