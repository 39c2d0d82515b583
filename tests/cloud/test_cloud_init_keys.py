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

"""Guests that get their data from LXD itself ([lxd] cloud_init_keys)."""

from __future__ import annotations

import base64
from typing import Any

from tests.fixtures import cloud

CONF = cloud.PREFIX / 'etc' / 'nova' / 'nova-compute.conf'
#: Makes cloud-init use LXD's data source only, as at the first boot.
ASK_LXD = """
echo 'datasource_list: [LXD, None]' >/etc/cloud/cloud.cfg.d/99-lxd.cfg
rm -f /etc/cloud/ds-identify.cfg /home/*/.ssh/authorized_keys
cloud-init clean --logs
sync
"""


class CloudInitKeysTest(cloud.CloudTestCase):

    alone = True

    def setUp(self) -> None:
        super().setUp()
        before = CONF.read_bytes()
        self.addCleanup(cloud.quickstart, 'restart', 'nova-compute')
        self.addCleanup(CONF.write_bytes, before)
        with CONF.open('a') as file:
            file.write('[lxd]\ncloud_init_keys = true\n')
        cloud.quickstart('restart', 'nova-compute')

    def image(self) -> Any:
        """Return an image whose cloud-init uses LXD's data source only."""
        server = self.boot(cloud.distribution(), 'lxd.small')
        self.execute(server, 'cloud-init status --wait >/dev/null; ' + ASK_LXD)
        self.cloud.compute.stop_server(server.id)
        self.wait_status(server.id, 'SHUTOFF')
        image = self.cloud.compute.create_server_image(
            server.id, self.unique('asks-lxd'))
        self.addCleanup(self.cloud.image.delete_image, image.id)
        cloud.wait_for('the image', lambda: self.cloud.image.get_image(
            image.id).status == 'active', 300)
        return image

    def test_real_guest(self) -> None:
        server = self.boot(
            self.image().id, 'lxd.small', user_data=base64.b64encode(
                b'#!/bin/sh\necho "by LXD" >/root/user-data\n').decode())
        address = self.floating_ip(server.id)
        # The key pair came from LXD, or the login would fail.
        self.assertEqual(server.name, self.ssh(address, 'hostname'))
        self.ssh(address, 'sudo cloud-init status --wait >/dev/null; true')
        self.assertEqual('lxd', self.ssh(address, 'cloud-id'))
        self.assertEqual('by LXD',
                         self.ssh(address, 'sudo cat /root/user-data'))
        # Its network configuration is LXD's too, with Neutron's MTU.
        port = self.ports(server.id)[0]
        self.assertEqual(
            str(self.cloud.network.get_network(port.network_id).mtu),
            self.ssh(address, 'cat /sys/class/net/eth0/mtu'))
