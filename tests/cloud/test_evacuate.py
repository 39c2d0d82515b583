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

"""Evacuation from a failed host, and the clean-up when it returns."""

from __future__ import annotations

from collections.abc import Callable
import os
import pathlib
import signal
import tempfile
from typing import Any

from tests.fixtures import cloud
from tests.fixtures import cloud_volumes
from tests.fixtures import other_host

PROJECT = 'nova-other'


class Evacuation:
    """Helpers for evacuations."""

    alone = True

    def setUp(self) -> None:
        super().setUp()
        # Nova and Placement remember a host for a while after it has gone.
        self.other = self.unique('other')

    def kill_nova_compute(self) -> Any:
        """Make the host fail, as far as Nova can see.

        :returns: its service.
        """
        service = next(found for found in self.admin.compute.services(
            binary='nova-compute') if found.host != self.other)
        pid = int((cloud.PREFIX / 'run' / 'nova-compute.pid'
                   ).read_text().split()[0])
        self.addCleanup(self.force_down, service, False)
        self.addCleanup(cloud.quickstart, 'restart', 'nova-compute')
        os.kill(pid, signal.SIGKILL)
        self.force_down(service, True)
        return service

    def force_down(self, service: Any, down: bool) -> None:
        # Nova allows a host to come back only after its clean-up.
        cloud.wait_for('a change of the service', lambda: (
            self.admin.compute.put(
                f'/os-services/{service.id}', json={'forced_down': down},
                microversion='2.53').status_code == 200), 60, 1)

    def remove_project(self) -> None:
        """Delete the LXD project of the other host."""
        for path in ('instances', 'images'):
            for url in self.host.query(f'/1.0/{path}?project={PROJECT}'):
                name = url.partition('?')[0].rpartition('/')[2]
                self.host.lxc('delete' if path == 'instances' else 'image',
                              *(['delete'] if path == 'images' else []),
                              name, '--project', PROJECT)
        self.host.lxc('project', 'delete', PROJECT)

    @staticmethod
    def remove_directories(root: str) -> None:
        """Remove directories, which must be empty and not mounted."""
        os.unlink(f'{root}.nova-compute.lock')
        for directory, _directories, _files in os.walk(root, topdown=False):
            os.rmdir(directory)

    def there(self, server: Any) -> list[dict[str, Any]]:
        return [found for found in self.host.query(
            f'/1.0/instances?recursion=1&project={PROJECT}')
            if found['config'].get('user.nova.uuid') == server.id]

    def evacuate(self, server: Any, check: Callable[[], None]) -> None:
        """Evacuate a server to another host, and let the first one come back.

        :param server: without ports, which cannot be bound where no agent of
            Neutron's runs.
        :param check: called when it runs on the other host, and again when
            the first one has cleaned up.
        """
        self.addCleanup(self.remove_project)
        # Searchable by every user, which root filesystems on volumes need.
        mounts = tempfile.mkdtemp(dir='/run')
        os.chmod(mounts, 0o711)
        self.addCleanup(self.remove_directories, mounts)
        with other_host.running(
                self.admin, self.other, f'[lxd]\nproject = {PROJECT}\n'
                f'volume_root_directory = {mounts}\n'):
            try:
                self._evacuate(server, check)
            finally:
                self.delete(server.id, self.admin)
            self.assertEqual([], self.there(server))

    def fence(self, server: Any) -> None:
        """Ensure that a server does not run on the failed host."""

    def _evacuate(self, server: Any, check: Callable[[], None]) -> None:
        service = self.kill_nova_compute()
        self.fence(server)
        self.admin.compute.post(
            f'/servers/{server.id}/action',
            json={'evacuate': {'host': self.other}}, microversion='2.67'
        ).raise_for_status()
        cloud.wait_for('the server on the other host', lambda: (
            self.there(server) and self.admin.compute.get_server(
                server.id).status == 'ACTIVE'), cloud.BOOT_TIMEOUT)
        check()
        # The failed host comes back.
        self.assertEqual(1, len(self.host.instances_of(server.id)))
        cloud.quickstart('restart', 'nova-compute')
        cloud.wait_for('an empty old host', lambda: not (
            self.host.instances_of(server.id)), 60)
        self.assertEqual('Running', self.there(server)[0]['status'])
        check()
        self.force_down(service, False)


class EvacuateTest(Evacuation, cloud.CloudTestCase):

    def test_there_and_leftovers_here(self) -> None:
        server = self.boot(networks='none', key_name=None)
        self.evacuate(server, lambda: None)


class EvacuateFromVolumeTest(
        Evacuation, cloud_volumes.BootFromVolumeTools,
        cloud.CloudTestCase):

    volume_type = 'loop'
    volume = ''

    def fence(self, server: Any) -> None:
        """Two hosts have two kernels, each with its own mount of the volume,
        and a dead one has none."""
        self.host.lxc('stop', '--force', self.host.name_of(server.id))
        for line in pathlib.Path('/proc/self/mounts').read_text().splitlines():
            target = line.split()[1]
            if target.endswith(f'/{self.volume}'):
                cloud.run('umount', target)

    def test_content_stays(self) -> None:
        """The clean-up of the failed host does not touch the volume."""
        server, self.volume = self.from_image()
        filled = self.fill(server)

        def check() -> None:
            [found] = self.there(server)
            self.assertEqual(filled, self.host.execute(
                found['name'], 'sha256sum </root/data', PROJECT).strip())
        self.evacuate(server, check)
