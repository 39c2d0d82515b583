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
"""Snapshots, backups and shelving through the real API."""

from __future__ import annotations

import time
from typing import Any

from openstack import exceptions

from tests.fixtures import cloud
from tests.fixtures import turns

#: Seconds that an image may take; LXD makes one at a time.
IMAGE_TIMEOUT = 300


class SnapshotTest(cloud.CloudTestCase):

    together = 4

    def snapshot(self, server: Any) -> Any:
        """Make an image; return it when it is active and the task is over."""
        image = self.cloud.compute.create_server_image(
            server.id, self.unique('snapshot'))
        self.addCleanup(self.cloud.image.delete_image, image.id,
                        ignore_missing=True)
        return self.finished(server, image)

    def finished(self, server: Any, image: Any) -> Any:
        def active() -> Any:
            found = self.cloud.image.get_image(image.id)
            task = self.cloud.compute.get_server(server.id).task_state
            return found if found.status == 'active' and not task else None
        return cloud.wait_for('the image', active, IMAGE_TIMEOUT)

    def assert_nothing_in_lxd(self, server: Any) -> None:
        self.assertEqual(['server'], [
            found['config']['user.nova.role']
            for found in self.host.instances_of(server.id)])
        aliases = self.host.query(
            f'/1.0/images/aliases?project={cloud.LXD_PROJECT}')
        self.assertEqual([], [url for url in aliases if server.id in url])

    def test_running_server_goes_on_and_its_image_boots(self) -> None:
        server = self.boot()
        self.execute(server, 'echo kept > /root/kept')
        init = self.execute(server, 'cat /proc/1/stat').split()[21]
        for _turn in range(2):
            image = self.snapshot(server)
            self.assertEqual(('raw', 'bare'), (image.disk_format,
                                               image.container_format))
            self.assert_nothing_in_lxd(server)
        # Field 22 is when the process was started.
        self.assertEqual(init, self.execute(
            server, 'cat /proc/1/stat').split()[21])
        copy = self.boot(image=image.id)
        self.assertEqual('kept', self.execute(copy, 'cat /root/kept'))
        self.wait_answer(self.floating_ip(copy.id))
        ports = [port.id for port in self.ports(server.id)]
        self.delete(server.id)
        self.assert_gone(server.id, ports)

    def test_other_states(self) -> None:
        server = self.boot()
        compute = self.cloud.compute
        for enter, status in ((compute.pause_server, 'PAUSED'),
                              (None, None), (compute.stop_server, 'SHUTOFF'),
                              (compute.start_server, 'ACTIVE'),
                              (compute.suspend_server, 'SUSPENDED')):
            if enter is None:
                compute.unpause_server(server.id)
                self.wait_status(server.id, 'ACTIVE')
                continue
            enter(server.id)
            self.wait_status(server.id, status)
            self.snapshot(server)
            self.assertEqual(status, compute.get_server(server.id).status)
            self.assert_nothing_in_lxd(server)
        compute.resume_server(server.id)
        self.wait_status(server.id, 'ACTIVE')

    def test_backup_rotation(self) -> None:
        server = self.boot()
        kind = self.unique('daily')
        self.addCleanup(self._delete_backups, kind)
        names = [self.unique('backup') for _number in range(3)]
        for name in names:
            self.cloud.compute.backup_server(server.id, name, kind, 2)

            def done(name: str = name) -> bool:
                found = self.cloud.image.find_image(name)
                task = self.cloud.compute.get_server(server.id).task_state
                return bool(found and found.status == 'active' and not task)
            cloud.wait_for('the backup', done, IMAGE_TIMEOUT)
        self.assertEqual(set(names[1:]), {
            image.name for image in self._backups(kind)})
        self.assert_nothing_in_lxd(server)

    def _backups(self, kind: str) -> list[Any]:
        return [image for image in self.cloud.image.images(
            visibility='private')
            if image.properties.get('backup_type') == kind]

    def _delete_backups(self, kind: str) -> None:
        for image in self._backups(kind):
            self.cloud.image.delete_image(image.id, ignore_missing=True)

    def test_shelve_and_unshelve_twice(self) -> None:
        server = self.boot()
        self.execute(server, 'echo kept > /root/kept')
        ports = [port.id for port in self.ports(server.id)]
        for _turn in range(2):
            self.cloud.compute.shelve_server(server.id)
            self.wait_status(server.id, 'SHELVED_OFFLOADED', IMAGE_TIMEOUT)
            self.assert_gone(server.id, ports)
            self.cloud.compute.unshelve_server(server.id)
            self.wait_status(server.id, 'ACTIVE', IMAGE_TIMEOUT)
            self.assertEqual('kept', self.execute(server, 'cat /root/kept'))
        self.wait_answer(self.floating_ip(server.id))

    def test_delete_in_the_middle(self) -> None:
        server = self.boot(cloud.distribution(), 'lxd.small')
        ports = [port.id for port in self.ports(server.id)]
        image = self.cloud.compute.create_server_image(
            server.id, self.unique('snapshot'))
        self.addCleanup(self.cloud.image.delete_image, image.id,
                        ignore_missing=True)
        cloud.wait_for('the copy', lambda: len(
            self.host.instances_of(server.id)) == 2, 60, 0.05)
        self.delete(server.id)
        self.assert_gone(server.id, ports)

        def image_is_gone() -> bool:
            try:
                return self.cloud.image.get_image(
                    image.id).status == 'deleted'
            except exceptions.NotFoundException:
                return True
        cloud.wait_for('the image to be deleted', image_is_gone, 60)
        aliases = self.host.query(
            f'/1.0/images/aliases?project={cloud.LXD_PROJECT}')
        self.assertEqual([], [url for url in aliases if server.id in url])

    @turns.alone
    def test_restart_of_nova_compute_in_the_middle(self) -> None:
        server = self.boot(cloud.distribution(), 'lxd.small')
        image = self.cloud.compute.create_server_image(
            server.id, self.unique('snapshot'))
        self.addCleanup(self.cloud.image.delete_image, image.id,
                        ignore_missing=True)
        cloud.wait_for('the copy', lambda: len(
            self.host.instances_of(server.id)) == 2, 60, 0.05)
        cloud.quickstart('restart', 'nova-compute')
        cloud.wait_for('the task to end', lambda: self.cloud.compute.
                       get_server(server.id).task_state is None, 120)
        self.assertEqual('ACTIVE', self.cloud.compute.get_server(
            server.id).status)
        cloud.wait_for('a clean LXD', lambda: len(
            self.host.instances_of(server.id)) == 1, 30)
        # Until it reports itself, it ends tasks that were begun before.
        since = time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime())
        cloud.wait_for('nova-compute', lambda: all(
            service.updated_at > since for service in
            self.admin.compute.services(binary='nova-compute')), 60)
        self.snapshot(server)
        self.assert_nothing_in_lxd(server)
