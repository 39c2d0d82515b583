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

"""Images of servers, through the driver as Nova calls it."""

from __future__ import annotations

from typing import Any

from nova.compute import power_state
from nova.compute import task_states
from nova import exception
from nova import objects

from tests.fixtures import disks
from tests.fixtures import fake_driver_host
from tests.fixtures.fake_lxd import fixture


class SnapshotTest(fake_driver_host.FakeDriverTestCase):

    def take(self, server: objects.Instance) -> str:
        """Make an image.

        :returns: its id.
        """
        self.states: list[str] = []
        image = self.host.glance.create(None, {'name': 'backup'})
        self.image_id = image['id']
        self.driver.snapshot(
            self.context, server, image['id'],
            lambda task_state, expected_state=None:
            self.states.append(task_state))
        return image['id']

    def assert_lxd_keeps_nothing(self, server: objects.Instance) -> None:
        self.assertEqual([server.name], list(self.host.own()))
        self.assertEqual([], [alias for _project, alias
                              in self.lxd.daemon.store.aliases
                              if alias.startswith('snapshot-')])

    def test_a_new_server_of_it(self) -> None:
        server = self.host.spawn(injected_files=[('/etc/motd', b'mine\n')])
        image_id = self.take(server)
        self.assertEqual([task_states.IMAGE_PENDING_UPLOAD,
                          task_states.IMAGE_UPLOADING], self.states)
        self.assert_lxd_keeps_nothing(server)
        self.assert_state(power_state.RUNNING, server)
        image = self.host.glance.get(None, image_id)
        self.assertEqual(('raw', 'bare', 'active', 'backup'), tuple(
            image[key] for key in ('disk_format', 'container_format',
                                   'status', 'name')))
        meta = self.host.glance.meta(image_id)
        copy = self.host.spawn(self.host.instance(meta), meta)
        self.assertEqual(
            b'mine\n', self.host.fake(copy).files.get('/etc/motd').content)

    def test_nothing_of_the_driver_is_in_it(self) -> None:
        server = self.host.spawn()
        image_id = self.take(server)
        self.assertNotIn(server.uuid.encode(),
                         self.host.glance.data(image_id))
        self.assertNotIn('user.nova', str(self.host.glance.get(
            None, image_id)))

    def test_stopped_server_with_volumes_and_ports(self) -> None:
        """Attached devices are neither copied nor kept busy."""
        volume, ports = self.storage.volume(), self.host.ports()
        info = disks.described(volume.mapping())
        server = self.host.spawn(network_info=ports, block_device_info=info)
        self.driver.power_off(server)
        seen: dict[str, Any] = {}
        self.lxd.before('POST', '/1.0/images', lambda request: seen.update(
            self.lxd.instance(f'{server.name}-snapshot').devices))
        self.take(server)
        self.assertEqual({'disk', 'none'},
                         {device['type'] for device in seen.values()})
        self.assert_state(power_state.SHUTDOWN, server)
        self.driver.destroy(self.context, server, ports, info)
        self.assert_nothing_left()

    def test_frozen_meanwhile_where_the_image_asks(self) -> None:
        image = self.host.image(os_require_quiesce='yes')
        server = self.host.spawn(self.host.instance(
            image, system_metadata={'image_os_require_quiesce': 'True'}),
            image)
        seen: list[str] = []
        self.lxd.before(
            'POST', '/1.0/instances', lambda request: seen.append(
                self.host.fake(server).status),
            where={'name': f'{server.name}-snapshot'})
        self.take(server)
        self.assertEqual(['Frozen'], seen)
        self.assert_state(power_state.RUNNING, server)
        self.lxd.fail_next('POST', '/1.0/instances')
        self.assertRaises(exception.NovaException, self.take, server)
        self.assert_state(power_state.RUNNING, server)
        self.assertNotIn('user.nova.quiesced', self.config(server))

    # -- failures -----------------------------------------------------------

    def test_lxd_refuses_a_step(self) -> None:
        server = self.host.spawn()
        for method, path in (('POST', '/1.0/instances'),
                             ('POST', '/1.0/images'),
                             ('GET', '/1.0/images/*/export'),
                             ('GET', '/1.0/instances/*-snapshot')):
            with self.subTest(path=path):
                self.lxd.fail_next(method, path)
                self.assertRaises(exception.NovaException, self.take, server)
                self.assert_lxd_keeps_nothing(server)
                self.assert_state(power_state.RUNNING, server)

    def test_lxd_fails_at_a_step(self) -> None:
        server = self.host.spawn()
        for path in ('/1.0/instances', '/1.0/images'):
            for after in (False, True):
                with self.subTest(path=path, after=after):
                    self.lxd.fail_operation('POST', path, 'No space left',
                                            after=after)
                    self.assertRaises(exception.NovaException, self.take,
                                      server)
                    self.assert_lxd_keeps_nothing(server)

    def test_compression_that_lxd_lacks(self) -> None:
        self.lxd.daemon.compressions = {'gzip', 'none'}
        server = self.host.spawn()
        data = self.host.glance.data(self.take(server))
        self.assertEqual(b'\x1f\x8b', data[:2])

    def test_glance_refuses(self) -> None:
        server = self.host.spawn()
        self.host.glance.update = self._refuse
        self.assertRaises(exception.ImageNotAuthorized, self.take, server)
        self.assert_lxd_keeps_nothing(server)

    def _refuse(self, context: Any, image_id: str, *args: Any, **kwargs: Any
                ) -> Any:
        raise exception.ImageNotAuthorized(image_id=image_id)

    def test_glance_has_fewer_bytes(self) -> None:
        """An upload that broke and went on is no image."""
        server = self.host.spawn()
        update = self.host.glance.update

        def shorter(*args: Any, **kwargs: Any) -> Any:
            return {**update(*args, **kwargs), 'size': 12}
        self.host.glance.update = shorter
        self.assertRaises(exception.ImageUnacceptable, self.take, server)
        self.assert_lxd_keeps_nothing(server)

    def test_glance_does_not_read_to_the_end(self) -> None:
        server = self.host.spawn()

        def lazy(context: Any, image_id: str, info: Any, data: Any = None,
                 **kwargs: Any) -> Any:
            return {'size': len(data.read(100))}
        self.host.glance.update = lazy
        self.assertRaises(exception.ImageUnacceptable, self.take, server)
        self.assert_lxd_keeps_nothing(server)

    def test_deleted_meanwhile(self) -> None:
        server = self.host.spawn()

        def delete(request: Any) -> None:
            self.driver.destroy(self.context, server, [])
        self.lxd.before('POST', '/1.0/images', delete)
        self.assertRaises(exception.InstanceNotFound, self.take, server)
        self.assert_nothing_left()

    def test_unknown_server(self) -> None:
        server = self.host.instance(self.host.image())
        self.assertRaises(exception.InstanceNotRunning, self.take, server)

    def test_lxd_is_gone(self) -> None:
        server = self.host.spawn()
        with self.host.lxd_down():
            self.assertRaises(exception.HypervisorUnavailable, self.take,
                              server)

    # -- what crashes leave -------------------------------------------------

    def test_leftovers_go(self) -> None:
        """With the next image, and when nova-compute starts."""
        server = self.host.spawn()
        for clean_up in (lambda: self.take(server),
                         self.host.restart_driver):
            self.lxd.api.must(
                'POST', '/1.0/instances', {
                    'name': f'{server.name}-snapshot', 'profiles': [],
                    'source': {'type': 'copy', 'source': server.name},
                    'config': {
                        'user.nova.uuid': server.uuid,
                        'user.nova.lxd_name': f'{server.name}-snapshot',
                        'user.nova.role': 'snapshot'},
                    'devices': {}}, params={'project': self.host.project})
            self.lxd.add_image(
                fixture.unified_image(
                    {'etc/x': server.uuid.encode()}),
                project=self.host.project, alias=f'snapshot-{server.uuid}')
            clean_up()
            self.assert_lxd_keeps_nothing(server)
