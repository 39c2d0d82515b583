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

"""Leftovers of instances that Nova does not have, on a real LXD."""

from __future__ import annotations

from typing import Any
import unittest
from unittest import mock

from nova.compute import power_state
from nova import exception
from nova import objects

from tests.fixtures import driver_host
from tests.fixtures import lxd_daemon

NO_LXD = lxd_daemon.missing()


@unittest.skipIf(NO_LXD, NO_LXD or '')
class OrphansTest(unittest.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.host = driver_host.DriverHost()
        self.host.setUp()
        self.addCleanup(self.host.cleanUp)
        self.nova: dict[str, objects.Instance] = {}
        patcher = mock.patch.object(objects.Instance, 'get_by_uuid',
                                    self._look_up)
        patcher.start()
        self.addCleanup(patcher.stop)

    def _look_up(self, _context: Any, uuid: str, **_kwargs: Any
                 ) -> objects.Instance:
        try:
            return self.nova[uuid]
        except KeyError:
            raise exception.InstanceNotFound(instance_id=uuid) from None

    def api(self, method: str, path: str, body: Any = None) -> Any:
        return self.host.lxd.api.must(method, path, body,
                                      params={'project': self.host.project})

    def test_removed_when_nova_compute_starts(self) -> None:
        image = self.host.image()
        info = {'root_device_name': '/dev/sda', 'swap': None,
                'block_device_mapping': [], 'ephemerals': [
                    {'size': 1, 'device_name': '/dev/sdb',
                     'guest_format': None}]}
        gone, kept = (self.host.spawn(
            self.host.instance(image, config_drive='True', ephemeral_gb=1),
            image, block_device_info=info) for _number in range(2))
        self.nova[kept.uuid] = kept
        pool = f'/1.0/storage-pools/{self.host.lxd.pool}/volumes/custom'
        self.api('POST', pool, {'name': 'foreign', 'type': 'custom',
                                'config': {}})
        # The image of a server, interrupted together with its deletion.
        self.api('POST', '/1.0/instances', {
            'name': f'{gone.name}-snapshot', 'profiles': [],
            'source': {'type': 'copy', 'source': gone.name},
            'config': {'user.nova.role': 'snapshot',
                       'user.nova.lxd_name': f'{gone.name}-snapshot'},
            'devices': {name: {'type': 'none'} for name in
                        ('config-drive', 'ephemeral0')}})
        self.api('PUT', f'/1.0/instances/{gone.name}/state',
                 {'action': 'stop', 'force': True})
        self.api('DELETE', f'/1.0/instances/{gone.name}')
        own = {'foreign', f'config-drive-{kept.uuid}',
               f'ephemeral-{kept.uuid}-0'}
        self.assertEqual({*own, f'config-drive-{gone.uuid}',
                          f'ephemeral-{gone.uuid}-0'},
                         set(self.host.lxd_volumes()))
        self.host.driver.manage_image_cache(self.host.context, [kept])
        self.assertEqual(5, len(self.host.lxd_volumes()))
        self.host.restart_driver()
        self.assertEqual(own, set(self.host.lxd_volumes()))
        self.assertEqual({kept.name}, {
            name for name, entry in self.host.lxd_instances().items()
            if entry['config'].get('user.nova.role') != 'template'})
        self.assertEqual(power_state.RUNNING, self.host.state(kept))
