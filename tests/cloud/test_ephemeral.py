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
"""Ephemeral disks and swap through the real API."""

from __future__ import annotations

from typing import Any

from tests.fixtures import cloud


class EphemeralTest(cloud.CloudTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.flavor = self.make_flavor(ephemeral=2, swap=64)

    def make_flavor(self, **fields: int) -> Any:
        flavor = self.admin.compute.create_flavor(
            name=self.unique('ephemeral'), ram=256, vcpus=1, disk=2, **fields)
        self.addCleanup(self.admin.compute.delete_flavor, flavor.id)
        return flavor

    def volumes_of(self, server: Any) -> list[str]:
        return sorted(name for name in self.host.volumes()
                      if name.startswith(f'custom/ephemeral-{server.id}'))

    def test_flavor(self) -> None:
        server = self.boot(flavor=self.flavor.name)
        self.assertEqual([f'custom/ephemeral-{server.id}-0'],
                         self.volumes_of(server))
        self.execute(server, 'echo kept > /mnt/file')
        swap = self.host.instances_of(server.id)[0]['config'][
            'limits.memory.swap']
        self.assertNotEqual('false', swap)
        for _turn in range(2):
            self.cloud.compute.reboot_server(server.id, 'HARD')
            self.wait_status(server.id, 'ACTIVE')
            self.assertEqual('kept', self.execute(server, 'cat /mnt/file'))
        ports = [port.id for port in self.ports(server.id)]
        self.delete(server.id)
        self.assert_gone(server.id, ports)

    def test_two_disks_of_own_sizes(self) -> None:
        image = self.cloud.image.find_image(cloud.TINY)
        # Nova's default limit is three disks, swap included.
        flavor = self.make_flavor(ephemeral=2)
        server = self.boot(flavor=flavor.name, block_device_mapping=[
            {'source_type': 'image', 'destination_type': 'local',
             'uuid': image.id, 'boot_index': 0,
             'delete_on_termination': True},
            {'source_type': 'blank', 'destination_type': 'local',
             'boot_index': -1, 'volume_size': 1,
             'delete_on_termination': True},
            {'source_type': 'blank', 'destination_type': 'local',
             'boot_index': -1, 'volume_size': 1, 'guest_format': 'ext4',
             'delete_on_termination': True}])
        self.assertEqual([f'custom/ephemeral-{server.id}-0',
                          f'custom/ephemeral-{server.id}-1'],
                         self.volumes_of(server))
        for path in ('/mnt', '/mnt/ephemeral1'):
            self.execute(server, f'echo {path} > {path}/file')
            self.assertEqual(path, self.execute(server, f'cat {path}/file'))

    def test_rebuild_gives_empty_ones(self) -> None:
        server = self.boot(flavor=self.flavor.name)
        self.execute(server, 'echo old > /mnt/file')
        image = self.cloud.image.find_image(cloud.TINY)
        self.cloud.compute.rebuild_server(server.id, image=image.id)
        self.wait_status(server.id, 'ACTIVE', cloud.BOOT_TIMEOUT)
        self.assertEqual('', self.execute(server, 'cat /mnt/file || true'))
        self.assertEqual(1, len(self.volumes_of(server)))

    def test_not_in_an_image(self) -> None:
        server = self.boot(flavor=self.flavor.name)
        self.execute(server, 'echo scratch > /mnt/file')
        image = self.cloud.compute.create_server_image(
            server.id, self.unique('snapshot'))
        self.addCleanup(self.cloud.image.delete_image, image.id,
                        ignore_missing=True)
        cloud.wait_for('the image', lambda: self.cloud.image.get_image(
            image.id).status == 'active', 300)
        copy = self.boot(image=image.id)
        self.assertEqual('', self.execute(copy, 'cat /mnt/file || true'))
