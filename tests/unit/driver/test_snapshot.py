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

import errno
import threading
from typing import Any

import fixtures
from nova.compute import power_state
from nova.compute import task_states
from nova import exception
from nova import objects

from tests.fixtures import driver_host
from tests.fixtures import fake_driver_host
from tests.fixtures.fake_lxd import fixture
from tests.fixtures import memory_cinder


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
        """What is attached is neither copied nor held."""
        volume, ports = self.storage.volume(), self.host.ports()
        info = memory_cinder.described(volume.mapping())
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
                             ('GET', '/1.0/instances')):
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
        self.lxd.stop()
        self.assertRaises(exception.HypervisorUnavailable, self.take, server)

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
                project=self.host.project, alias=f'snapshot-{server.uuid}-7')
            clean_up()
            self.assert_lxd_keeps_nothing(server)

    # -- quiesce ------------------------------------------------------------

    def with_volume(self, image: objects.ImageMeta | None = None
                    ) -> tuple[objects.Instance, memory_cinder.Volume]:
        volume = self.storage.volume()
        image = image or self.host.image()
        return self.host.spawn(
            self.host.instance(image), image,
            block_device_info=memory_cinder.described(
                volume.mapping())), volume

    def test_quiesce(self) -> None:
        image = self.host.image(os_require_quiesce='yes')
        server, volume = self.with_volume(image)
        self.storage.before('mounts.sync_device', lambda: self.assert_state(
            power_state.PAUSED, server))
        self.driver.quiesce(self.context, server, image)
        self.assert_state(power_state.PAUSED, server)
        self.assertEqual(1, volume.disk.synced)
        for _time in range(2):
            self.driver.unquiesce(self.context, server, image)
            self.assert_state(power_state.RUNNING, server)

    def test_quiesce_that_nobody_asked_for(self) -> None:
        server, volume = self.with_volume()
        self.assertRaises(
            exception.InstanceQuiesceNotSupported, self.driver.quiesce,
            self.context, server, server.image_meta)
        self.assert_state(power_state.RUNNING, server)
        self.assertEqual(1, volume.disk.synced)

    def test_quiesce_while_storage_hangs(self) -> None:
        image = self.host.image(os_require_quiesce='yes')
        server, volume = self.with_volume(image)
        self.storage.fail('mounts.sync_device', TimeoutError(
            errno.ETIMEDOUT, 'fsync did not finish'))
        self.assertRaises(
            exception.InstanceQuiesceNotSupported, self.driver.quiesce,
            self.context, server, image)
        self.assertEqual(0, volume.disk.synced)
        self.assert_state(power_state.RUNNING, server)
        self.assertNotIn('user.nova.quiesced', self.config(server))

    def test_quiesce_leaves_other_servers_volumes(self) -> None:
        server, _volume = self.with_volume()
        _other, volume = self.with_volume()
        self.assertRaises(
            exception.InstanceQuiesceNotSupported, self.driver.quiesce,
            self.context, server, server.image_meta)
        self.assertEqual(0, volume.disk.synced)

    def test_quiesce_fails(self) -> None:
        image = self.host.image(os_require_quiesce='yes')
        server = self.host.spawn(self.host.instance(image), image)
        self.lxd.fail_operation('PUT', '/1.0/instances/*/state',
                                where={'action': 'freeze'})
        self.assertRaises(exception.NovaException, self.driver.quiesce,
                          self.context, server, image)
        self.assert_state(power_state.RUNNING, server)

    def test_restart_of_nova_compute_ends_it(self) -> None:
        image = self.host.image(os_require_quiesce='yes')
        server = self.host.spawn(self.host.instance(image), image)
        self.driver.quiesce(self.context, server, image)
        self.host.restart_driver()
        self.assert_state(power_state.RUNNING, server)
        self.assertNotIn('user.nova.quiesced', self.config(server))

    # -- thawing whatever happens to LXD ------------------------------------

    def quiesced(self) -> tuple[objects.Instance, objects.ImageMeta]:
        image = self.host.image(os_require_quiesce='yes')
        server = self.host.spawn(self.host.instance(image), image)
        self.driver.quiesce(self.context, server, image)
        self.assert_state(power_state.PAUSED, server)
        return server, image

    def assert_thawed(self, server: objects.Instance) -> None:
        self.lxd.wait_for(
            lambda: 'user.nova.quiesced' not in self.config(server))
        self.assert_state(power_state.RUNNING, server)

    def test_lxd_restarts_while_it_is_unquiesced(self) -> None:
        server, image = self.quiesced()
        self.lxd.stop()
        starter = threading.Timer(1.5, self.lxd.start)
        starter.start()
        self.addCleanup(starter.join)
        self.driver.unquiesce(self.context, server, image)
        self.assert_thawed(server)

    def test_lxd_is_back_long_after_unquiesce(self) -> None:
        server, image = self.quiesced()
        driver_host.CONF.set_override('request_timeout', 1, 'lxd')
        self.lxd.stop()
        self.assertRaises(exception.HypervisorUnavailable,
                          self.driver.unquiesce, self.context, server, image)
        self.lxd.start()
        self.assert_thawed(server)

    def test_frozen_until_unquiesce_although_lxd_restarts(self) -> None:
        server, image = self.quiesced()
        reconnected = threading.Event()
        thaw = self.driver._services.snapshot.thaw

        def thaw_and_tell() -> None:
            thaw()
            reconnected.set()

        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.server.snapshot.SnapshotOps.thaw',
            lambda _self: thaw_and_tell()))
        self.lxd.restart()
        self.assertTrue(reconnected.wait(20))
        self.assert_state(power_state.PAUSED, server)
        self.driver.unquiesce(self.context, server, image)
        self.assert_thawed(server)

    def test_thawed_periodically(self) -> None:
        server, image = self.quiesced()
        self.lxd.fail_operation('PUT', '/1.0/instances/*/state', 'no',
                                where={'action': 'unfreeze'})
        self.assertRaises(exception.NovaException, self.driver.unquiesce,
                          self.context, server, image)
        self.assert_state(power_state.PAUSED, server)
        self.driver.manage_image_cache(self.context, [server])
        self.assert_thawed(server)

    def test_one_that_cannot_be_thawed_keeps_no_other_frozen(self) -> None:
        servers = [self.quiesced()[0] for _number in range(2)]
        self.lxd.fail_operation('PUT', '/1.0/instances/*/state', 'no',
                                where={'action': 'unfreeze'})
        self.host.restart_driver()
        self.assertEqual(1, sum('user.nova.quiesced' in self.config(server)
                                for server in servers))
