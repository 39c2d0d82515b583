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

"""Servers boot, get what was requested, and leave nothing behind."""

from __future__ import annotations

import base64
import json
import os
from typing import Any

from tests.fixtures import cloud
from tests.fixtures import turns

USER_DATA = '#!/bin/sh\necho "made by user data" >/root/user-data-was-here\n'


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


class SystemServer(cloud.CloudTestCase):
    """One server of the system image, for all tests that only inspect it."""

    server: Any = None
    address: str

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        with cls.turn_of_class():
            cls.server = cls._create(
                cls.cloud, cloud.distribution(), 'lxd.small',
                {'user_data': encoded(USER_DATA),
                 'name': cls.unique('system')})
            try:
                cls.server = cls.wait_status(
                    cls.server.id, 'ACTIVE', cloud.BOOT_TIMEOUT)
                cls.address = cls.floating_ip(cls.server.id)
                cls.ssh(cls.address, 'true')
            except BaseException:
                cls.delete(cls.server.id)
                raise

    @classmethod
    def tearDownClass(cls) -> None:
        if cls.server is not None:
            with cls.turn_of_class():
                cls.delete(cls.server.id)
        super().tearDownClass()

    def guest(self, command: str) -> str:
        return self.ssh(self.address, command)

    def test_hostname(self) -> None:
        self.assertEqual(self.server.name, self.guest('hostname'))

    def test_user_data_ran(self) -> None:
        self.guest('sudo cloud-init status --wait >/dev/null; true')
        self.assertEqual('made by user data',
                         self.guest('sudo cat /root/user-data-was-here'))

    def test_metadata_service(self) -> None:
        metadata = json.loads(self.guest(
            'python3 -c "import urllib.request as r; print(r.urlopen('
            "'http://169.254.169.254/openstack/latest/meta_data.json'"
            ').read().decode())"'))
        self.assertEqual(self.server.id, metadata['uuid'])

    def test_limits_of_the_flavor(self) -> None:
        self.assertEqual('1', self.guest('nproc'))
        limit = self.guest('cat /sys/fs/cgroup/memory.max 2>/dev/null ||'
                           ' cat /sys/fs/cgroup/memory/'
                           'memory.limit_in_bytes 2>/dev/null || echo none')
        if not limit.isdigit():
            total = self.guest("awk '/^MemTotal/ { print $2 }' /proc/meminfo")
            limit = str(int(total) * 1024)
        self.assertEqual(512 * 1024 ** 2, int(limit))

    def test_root_disk_has_the_flavors_size(self) -> None:
        if self.host.query(
                f'/1.0/storage-pools/{cloud.POOL}')['driver'] == 'dir':
            self.skipTest('This storage pool has no quotas')
        done = self.try_ssh(
            self.address, 'sudo dd if=/dev/zero of=/too-big bs=1M count=6000'
            ' 2>&1; sudo rm -f /too-big', timeout=120)
        self.assertRegex(done.stdout, 'No space left|quota exceeded')

    def test_mtu_and_mac(self) -> None:
        port = self.ports(self.server.id)[0]
        network = self.cloud.network.get_network(port.network_id)
        self.assertEqual(str(network.mtu),
                         self.guest('cat /sys/class/net/eth0/mtu'))
        self.assertEqual(port.mac_address,
                         self.guest('cat /sys/class/net/eth0/address'))

    def test_unprivileged_and_isolated(self) -> None:
        first = self.guest('cat /proc/self/uid_map').split()
        self.assertEqual('0', first[0])
        self.assertNotEqual('0', first[1])

    def test_console_log(self) -> None:
        def has_boot() -> bool:
            log = self.cloud.compute.get_server_console_output(
                self.server.id)['output']
            return 'login:' in log or 'cloud-init' in log.lower()
        cloud.wait_for('the boot in the console log', has_boot, 60, 1)
        log = self.cloud.compute.get_server_console_output(
            self.server.id, length=3)['output']
        self.assertLessEqual(len(log.splitlines()), 3)

    def test_security_group_filters(self) -> None:
        group = self.cloud.network.create_security_group(
            name=self.unique('test'))
        self.addCleanup(self.cloud.network.delete_security_group, group)
        self.guest('nohup python3 -m http.server 8080'
                   ' >/dev/null 2>&1 </dev/null & sleep 1')
        self.assertFalse(self.answers(self.address, 8080))
        rule = self.cloud.network.create_security_group_rule(
            security_group_id=group.id, direction='ingress',
            ether_type='IPv4', protocol='tcp', port_range_min=8080,
            port_range_max=8080)
        self.cloud.compute.add_security_group_to_server(self.server, group)
        self.addCleanup(
            self.cloud.compute.remove_security_group_from_server,
            self.server, group)
        cloud.wait_for('the opened port',
                       lambda: self.answers(self.address, 8080), 20)
        self.cloud.network.delete_security_group_rule(rule)
        cloud.wait_for('the closed port',
                       lambda: not self.answers(self.address, 8080), 20)


class BootTest(cloud.CloudTestCase):

    def test_servers_reach_each_other(self) -> None:
        servers = [self.create() for _ in range(2)]
        first, second = (self.wait_status(
            server.id, 'ACTIVE', cloud.BOOT_TIMEOUT) for server in servers)
        address = self.floating_ip(first.id)
        # The second one may still be getting its address.
        ping = f'ping -c 3 -W 2 {self.fixed_ip(second)} || true'
        cloud.wait_for('all packets', lambda: (
            '3 packets received' in self.ssh(address, ping, user='root')), 60)

    def test_config_drive(self) -> None:
        model = self.admin.compute.find_flavor('lxd.tiny',
                                               ignore_missing=False)
        flavor = self.admin.compute.create_flavor(
            name=self.unique('drive'), vcpus=model.vcpus, ram=model.ram,
            disk=model.disk)
        self.addCleanup(self.admin.compute.delete_flavor, flavor.id)
        self.admin.compute.create_flavor_extra_specs(
            flavor.id, {'lxd:config_drive_device': 'true'})
        server = self.boot(
            flavor=flavor.name, config_drive=True, user_data=encoded(
                '#!/bin/sh\necho from the drive >/tmp/user-data\n'))
        address = self.floating_ip(server.id)
        metadata = json.loads(self.ssh(
            address, 'cat /config-drive/openstack/latest/meta_data.json',
            user='root'))
        self.assertEqual(server.id, metadata['uuid'])
        self.assertEqual('from the drive',
                         self.ssh(address, 'cat /tmp/user-data', user='root'))
        self.assertEqual(server.name,
                         self.ssh(address, 'hostname', user='root'))
        # It contains passwords and keys.
        self.assertEqual(
            '', self.ssh(address, 'find /config-drive -perm /o+rwx'
                         ' ! -type d', user='root'))
        # The same content on a disk with that label.
        device = '/dev/disk/by-label/config-2'
        self.assertEqual('config-2', self.ssh(
            address, f'head -c 32840 {device} | tail -c 32', user='root'
        ).partition(' ')[0])
        self.assertNotEqual('0', self.ssh(
            address, f'grep -a -c {server.id} {device}', user='root'))
        ports = [port.id for port in self.ports(server.id)]
        self.delete(server.id)
        self.assert_gone(server.id, ports)

    @turns.alone
    def test_delete_leaves_nothing(self) -> None:
        before = self.host.volumes()
        server = self.boot()
        ports = [port.id for port in self.ports(server.id)]
        name = self.host.name_of(server.id)
        self.assertTrue(self.host.left_of(server.id, ports))
        self.delete(server.id)
        self.assert_gone(server.id, ports)
        self.assertNotIn(f'container/{name}',
                         self.host.volumes() - before)
        self.assertEqual([], list(self.cloud.network.ports(
            device_id=server.id)))


class BadImageTest(cloud.CloudTestCase):

    def upload(self, content: bytes) -> str:
        image = self.cloud.image.create_image(
            self.unique('bad'), disk_format='raw', container_format='bare',
            allow_duplicates=True)
        self.addCleanup(self.cloud.image.delete_image, image.id)
        self.cloud.image.put(
            f'/images/{image.id}/file', data=content,
            headers={'Content-Type': 'application/octet-stream',
                     'Accept': ''}).raise_for_status()
        return image.id

    def refused(self, image_id: str) -> str:
        server = self.create(image_id)
        server = self.wait_status(server.id, 'ERROR', cloud.BOOT_TIMEOUT)
        ports = [port.id for port in self.ports(server.id)]
        self.assertEqual([], self.host.left_of(server.id, ports))
        aliases = self.host.query(
            f'/1.0/images/aliases?project={cloud.LXD_PROJECT}')
        self.assertFalse([a for a in aliases if image_id in a])
        self.delete(server.id)
        self.assert_gone(server.id, ports)
        return server.fault['message']

    def test_garbage(self) -> None:
        image_id = self.upload(os.urandom(300000))
        self.assertRegex(self.refused(image_id), f'(?i){image_id}.*format')

    def test_truncated(self) -> None:
        images = cloud.PREFIX / 'cache' / 'images'
        content = next(images.glob('tiny-*.tar.gz')).read_bytes()
        image_id = self.upload(content[:len(content) // 2])
        self.assertIn(image_id, self.refused(image_id))

    def test_virtual_machine_disk(self) -> None:
        header = b'QFI\xfb' + (3).to_bytes(4, 'big')
        image_id = self.upload(header + bytes(300000))
        self.assertRegex(self.refused(image_id), '(?i)qcow2')
