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

"""Two compute hosts: servers on both, and servers that change hosts.

The second host is added for these tests and taken away afterwards, unless the
cloud has it already.
"""

from __future__ import annotations

import os
import signal
from typing import Any

from tests.fixtures import cloud
from tests.fixtures import cloud_volumes

SECOND = cloud.PREFIX / 'compute-2'
NAMESPACE = 'nova-lxd-compute-2'
DISK = '/dev/vdb'
#: Seconds; a migration starts and stops a server and copies its disk.
MOVE_TIMEOUT = 180


class TwoHostsTest(cloud_volumes.VolumeTools, cloud.CloudTestCase):

    alone = True
    together_arguments: dict[str, Any] = {}

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        if not SECOND.exists():
            cls.addClassCleanup(cloud.quickstart, 'up', '--computes', '1')
            cloud.quickstart('up', '--computes', '2', timeout=400)
        cls.first_name = (cloud.PREFIX / 'data' / 'host').read_text().strip()
        cls.second_name = f'{cls.first_name}-2'
        cls.second = cloud.Host(SECOND, NAMESPACE)
        # Only administrators choose hosts, and each user has its own keys.
        cls.chooser = cloud.connect(cloud.ADMIN_CLOUD,
                                    auth={'project_name': 'demo'})
        key = cls.chooser.compute.create_keypair(
            name=cls.unique('key'), public_key=(
                cloud.PREFIX / 'keys' / 'id_ed25519.pub').read_text())
        cls.addClassCleanup(cls.chooser.compute.delete_keypair, key)
        cls.key = key.name

    # -- helpers

    def boot_at(self, host: str, **arguments: Any) -> Any:
        """Boot a server on a host."""
        server = self.create(
            cloud=self.chooser, key_name=self.key,
            availability_zone=f'nova:{host}', **arguments)
        return self.wait_status(server.id, 'ACTIVE', cloud.BOOT_TIMEOUT)

    def host_of(self, server: Any) -> str:
        return self.admin.compute.get_server(server.id).compute_host

    def migrate(self, server: Any, host: str) -> None:
        self.admin.compute.post(
            f'/servers/{server.id}/action', json={'migrate': {'host': host}},
            microversion='2.56').raise_for_status()
        self.wait_status(server.id, 'VERIFY_RESIZE', MOVE_TIMEOUT)
        self.assertEqual(host, self.host_of(server))

    def confirm(self, server: Any) -> None:
        self.cloud.compute.confirm_server_resize(server.id)
        self.wait_status(server.id, 'ACTIVE', MOVE_TIMEOUT)

    def assert_only_at(self, host: cloud.Host, server: Any) -> None:
        """Check that the server is on one host, and nothing of it on the
        other one."""
        other = self.host if host is self.second else self.second
        self.assertEqual(1, len(host.instances_of(server.id)))
        ports = [port.id for port in self.ports(server.id)]

        def left() -> list[str]:
            # Both hosts see the loop devices of their common kernel.
            return [text for text in other.left_of(server.id, ports)
                    if 'loop device' not in text]
        try:
            cloud.wait_for('a clean host', lambda: not left(), 20)
        except AssertionError:
            self.assertEqual([], left())

    def guest(self, address: str, command: str) -> str:
        return self.ssh(address, command, user='root')

    def fill(self, address: str, path: str) -> str:
        return self.guest(
            address, 'dd if=/dev/urandom of=/tmp/data bs=1M count=4 '
            f'2>/dev/null; dd if=/tmp/data of={path} bs=1M conv=fsync '
            '2>/dev/null; sha256sum </tmp/data')

    def sum(self, address: str, path: str) -> str:
        return self.guest(address, f'dd if={path} bs=1M count=4 2>/dev/null |'
                          'sha256sum')

    def volume(self, kind: str) -> Any:
        created = self.cloud.block_storage.create_volume(
            size=1, name=self.unique('test'), volume_type=kind)
        self.addCleanup(self.delete_volume, created.id)
        return self.wait_volume(created.id, 'available')

    # -- tests

    def test_servers_on_both(self) -> None:
        """They reach each other, the metadata service and the outside, and
        their security groups filter."""
        here = self.boot_at(self.first_name)
        there = self.boot_at(self.second_name)
        self.assertEqual(1, len(self.second.instances_of(there.id)))
        addresses = [self.floating_ip(server.id) for server in (here, there)]
        for address, server, other in zip(addresses, (here, there),
                                          (there, here)):
            # Open vSwitch's userspace datapath drops the first packet for a
            # host whose address it has to resolve.
            ping = f'ping -c 3 -W 2 {self.fixed_ip(other)} || true'
            cloud.wait_for('all packets', lambda: (
                '3 packets received' in self.guest(address, ping)), 30)
            self.assertIn(server.id, self.guest(
                address, 'wget -q -O - http://169.254.169.254/openstack/'
                'latest/meta_data.json'))
        self.guest(addresses[1], 'httpd -p 8080 -h /etc')
        self.assertFalse(self.answers(addresses[1], 8080))
        group = self.cloud.network.create_security_group(
            name=self.unique('test'))
        self.addCleanup(self.cloud.network.delete_security_group, group)
        self.cloud.network.create_security_group_rule(
            security_group_id=group.id, direction='ingress',
            ether_type='IPv4', protocol='tcp', port_range_min=8080,
            port_range_max=8080)
        self.cloud.compute.add_security_group_to_server(there, group)
        cloud.wait_for('the opened port',
                       lambda: self.answers(addresses[1], 8080), 20)
        self.cloud.compute.remove_security_group_from_server(there, group)
        cloud.wait_for('the closed port',
                       lambda: not self.answers(addresses[1], 8080), 20)
        error = self.assertRaises(AssertionError, cloud.quickstart, 'up',
                                  '--computes', '1')
        self.assertIn(there.name, str(error))
        ports = [port.id for port in self.ports(there.id)]
        self.delete(there.id)
        self.assertEqual([], self.second.left_of(there.id, ports))

    def test_migrate_and_confirm(self) -> None:
        """Root disk, volume, ports and floating IP come along."""
        side = self.cloud.network.create_network(name=self.unique('side'))
        self.addCleanup(self.cloud.network.delete_network, side)
        self.cloud.network.create_subnet(
            network_id=side.id, ip_version=4, cidr='10.98.0.0/24',
            gateway_ip=None)
        private = self.cloud.network.find_network('private')
        server = self.boot_at(self.first_name, networks=[
            {'uuid': private.id}, {'uuid': side.id}])
        port = next(port for port in self.ports(server.id)
                    if port.network_id == private.id)
        address = self.floating_ip(server.id, port.id)
        volume = self.volume('loop')
        self.attach(server, volume, DISK)
        written = {path: self.fill(address, path)
                   for path in ('/root/data', DISK)}
        macs = self.guest(address, 'cat /sys/class/net/eth*/address')
        self.assertEqual(2, len(macs.split()))
        for host, name in ((self.second, self.second_name),
                           (self.host, self.first_name)):
            self.migrate(server, name)
            self.assertEqual(written, {path: self.sum(address, path)
                                       for path in written})
            self.confirm(server)
            self.assert_only_at(host, server)
            self.assertEqual(macs, self.guest(
                address, 'cat /sys/class/net/eth*/address'))
        self.detach(server, volume)
        self.assert_released(volume.id)

    def test_migrate_and_revert(self) -> None:
        server = self.boot_at(self.second_name)
        address = self.floating_ip(server.id)
        self.guest(address, 'echo before >/root/state; sync')
        self.migrate(server, self.first_name)
        self.assertEqual('before', self.guest(address, 'cat /root/state'))
        self.guest(address, 'echo after >/root/state; sync')
        self.cloud.compute.revert_server_resize(server.id)
        self.wait_status(server.id, 'ACTIVE', MOVE_TIMEOUT)
        self.assertEqual(self.second_name, self.host_of(server))
        self.assertEqual('before', self.guest(address, 'cat /root/state'))
        self.assert_only_at(self.second, server)

    def test_resize_to_the_other(self) -> None:
        """With a config drive that is a device as well, and a volume that is
        a file, both loop devices of the hosts' common kernel."""
        flavors = []
        for ram in (256, 512):
            flavor = self.admin.compute.create_flavor(
                name=self.unique('flavor'), vcpus=1, ram=ram, disk=2)
            self.addCleanup(self.admin.compute.delete_flavor, flavor.id)
            self.admin.compute.create_flavor_extra_specs(
                flavor.id, {'lxd:config_drive_device': 'true'})
            flavors.append(flavor)
        server = self.boot_at(self.first_name, flavor=flavors[0].name,
                              config_drive=True)
        address = self.floating_ip(server.id)
        volume = self.volume('nfs')
        self.attach(server, volume, DISK)
        written = self.fill(address, DISK)
        label = 'head -c 32816 /dev/disk/by-label/config-2 | tail -c 8'
        self.assertEqual('config-2', self.guest(address, label))
        [service] = self.admin.compute.services(
            host=self.first_name, binary='nova-compute')
        self.admin.compute.disable_service(service)
        self.addCleanup(self.admin.compute.enable_service, service)
        self.cloud.compute.resize_server(server.id, flavors[1].id)
        self.wait_status(server.id, 'VERIFY_RESIZE', MOVE_TIMEOUT)
        self.assertEqual(self.second_name, self.host_of(server))
        self.confirm(server)
        self.assert_only_at(self.second, server)
        [found] = self.second.instances_of(server.id)
        self.assertEqual('512MiB', found['config']['limits.memory'])
        self.assertEqual(written, self.sum(address, DISK))
        self.assertEqual('config-2', self.guest(address, label))
        self.assertIn(server.id, self.guest(
            address, 'cat /config-drive/openstack/latest/meta_data.json'))

    def test_evacuate(self) -> None:
        """The second host fails, and comes back when the server runs on the
        first one."""
        server = self.boot_at(self.second_name)
        address = self.floating_ip(server.id)
        volume = self.volume('nfs')
        self.attach(server, volume, DISK)
        written = self.fill(address, DISK)
        [service] = self.admin.compute.services(
            host=self.second_name, binary='nova-compute')
        self.addCleanup(self.force_down, service, False)
        # Starts it if a failure has left it killed.
        self.addCleanup(cloud.quickstart, 'up', '--computes', '2')
        pid = (SECOND / 'run' / 'nova-compute.pid').read_text().split()[0]
        os.kill(int(pid), signal.SIGKILL)
        self.second.lxc('stop', '--force', self.second.name_of(server.id))
        self.force_down(service, True)
        self.admin.compute.post(
            f'/servers/{server.id}/action',
            json={'evacuate': {'host': self.first_name}}, microversion='2.67'
        ).raise_for_status()
        cloud.wait_for('the server on the first host', lambda: (
            self.host.instances_of(server.id) and
            self.cloud.compute.get_server(server.id).status == 'ACTIVE'),
            MOVE_TIMEOUT)
        self.assertEqual(written, self.sum(address, DISK))
        self.assertEqual(1, len(self.second.instances_of(server.id)))
        cloud.quickstart('restart', 'nova-compute-2')
        cloud.wait_for('an empty second host', lambda: not (
            self.second.instances_of(server.id)), 60)
        self.assertEqual(written, self.sum(address, DISK))
        self.assert_only_at(self.host, server)
        self.force_down(service, False)
        self.detach(server, volume)
        self.assert_released(volume.id)

    def force_down(self, service: Any, down: bool) -> None:
        # Nova allows a host to come back only after its clean-up.
        cloud.wait_for('a change of the service', lambda: (
            self.admin.compute.put(
                f'/os-services/{service.id}', json={'forced_down': down},
                microversion='2.53').status_code == 200), 60, 1)
