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

from tempest import config
from tempest.lib import decorators

from nova_lxd_py.tempest.tests import base

CONF = config.CONF


class MountedVolumesTest(base.LXDScenarioTest):
    """Volumes in filesystem mode."""

    @classmethod
    def skip_checks(cls):
        super().skip_checks()
        if not CONF.service_available.cinder:
            raise cls.skipException('Cinder is not available')
        if not CONF.lxd.mounted_volumes:
            raise cls.skipException('[lxd] mounted_volumes is false')

    @decorators.idempotent_id('a6b6f1c0-4f4b-4b9e-9d0c-0c6d36f7b009')
    def test_files_move_with_the_volume(self):
        volume = self.create_volume(
            metadata={'lxd_volume_mode': 'filesystem'})
        server = self.boot()
        guest = self.log_in(server)
        self.nova_volume_attach(server, volume)
        path = self.mount_point(guest)
        guest.exec_command(f'echo kept | sudo tee {path}/file')
        guest.exec_command('sync')
        self.nova_volume_detach(server, volume)
        self.assertEqual('', self.mount_point(guest))
        other = self.boot()
        guest = self.log_in(other)
        self.nova_volume_attach(other, volume)
        path = self.mount_point(guest)
        self.assertEqual('kept', guest.exec_command(
            f'cat {path}/file').strip())
        # Independent of the uid ranges that the servers have on their hosts.
        self.assertEqual('root', guest.exec_command(
            f'stat -c %U {path}/file').strip())

    def mount_point(self, guest):
        return guest.exec_command(
            "awk '$2 ~ \"^/mnt/\" { print $2 }' /proc/mounts").strip()
