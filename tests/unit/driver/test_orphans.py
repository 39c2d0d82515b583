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

"""Leftovers of servers that are not on this host, through the driver."""

from __future__ import annotations

import threading
from typing import Any

import fixtures
from nova.compute import task_states
from nova.compute import vm_states
from nova import exception
from nova import objects

from tests.fixtures import disks
from tests.fixtures import driver_host
from tests.fixtures import fake_driver_host


class OrphansTest(fake_driver_host.FakeDriverTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.nova: dict[str, objects.Instance] = {}
        self.useFixture(fixtures.MonkeyPatch(
            'nova.objects.Instance.get_by_uuid', self._look_up))
        self.age(0)

    def _look_up(self, _cls: Any, context: Any, uuid: str, **kwargs: Any
                 ) -> objects.Instance:
        self.assertTrue(context.is_admin)
        try:
            return self.nova[uuid]
        except KeyError:
            raise exception.InstanceNotFound(instance_id=uuid) from None

    def age(self, seconds: float) -> None:
        """Have a sweep remove what is older than that."""
        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.server.orphans.MIN_AGE', seconds))

    def make(self) -> objects.Instance:
        image = self.host.image()
        info = disks.described(ephemerals=[
            {'size': 1, 'device_name': '/dev/sdb', 'guest_format': None}])
        server = self.host.spawn(
            self.host.instance(image, config_drive='True', ephemeral_gb=1),
            image, block_device_info=info)
        self.nova[server.uuid] = server
        return server

    def orphan(self) -> objects.Instance:
        """Leave the volumes of a server that Nova has no more."""
        server = self.make()
        self.api('PUT', f'/1.0/instances/{server.name}/state',
                 {'action': 'stop', 'force': True})
        self.api('DELETE', f'/1.0/instances/{server.name}')
        del self.nova[server.uuid]
        self.assertEqual(self.volumes(server), set(self.host.lxd_volumes()))
        return server

    def api(self, method: str, path: str, body: Any = None) -> Any:
        return self.lxd.api.must(method, path, body,
                                 params={'project': self.host.project})

    def volumes(self, server: objects.Instance) -> set[str]:
        return {f'config-drive-{server.uuid}', f'ephemeral-{server.uuid}-0'}

    def sweep(self) -> None:
        self.driver.manage_image_cache(self.context, list(self.nova.values()))

    def assert_kept(self, server: objects.Instance) -> None:
        for do in (self.sweep, self.sweep, self.host.restart_driver):
            do()
            self.assertEqual(self.volumes(server),
                             set(self.host.lxd_volumes()))

    # -- volumes ------------------------------------------------------------

    def test_when_nova_compute_starts(self) -> None:
        self.age(600)
        self.orphan()
        self.host.restart_driver()
        self.assert_nothing_left()

    def test_periodically(self) -> None:
        self.orphan()
        self.sweep()
        self.assert_nothing_left()

    def test_numbers_with_a_gap(self) -> None:
        """Somebody has deleted an ephemeral disk by hand."""
        server = self.orphan()
        self.api('POST', '/1.0/storage-pools/default/volumes/custom/'
                 f'ephemeral-{server.uuid}-0',
                 {'name': f'ephemeral-{server.uuid}-2'})
        self.sweep()
        self.assert_nothing_left()

    def test_lxd_has_the_server(self) -> None:
        """Whatever Nova says."""
        server = self.make()
        del self.nova[server.uuid]
        self.lxd.clear_requests()
        self.assert_kept(server)
        self.assertEqual(0, self.lxd.count('DELETE', '*'))

    def test_not_at_once(self) -> None:
        server = self.orphan()
        self.age(600)
        for _time in range(2):
            self.sweep()
            self.assertEqual(self.volumes(server),
                             set(self.host.lxd_volumes()))
        self.age(0)
        self.sweep()
        self.assert_nothing_left()

    def test_of_a_server_that_went_to_another_host(self) -> None:
        server = self.orphan()
        server.host = 'other'
        self.nova[server.uuid] = server
        self.sweep()
        self.assert_nothing_left()

    def test_kept_while_the_server_is_here(self) -> None:
        self.assert_kept(self.make())

    def test_kept_while_nova_has_the_server_here(self) -> None:
        server = self.orphan()
        self.nova[server.uuid] = server
        self.assert_kept(server)

    def test_kept_while_nova_brings_the_server(self) -> None:
        server = self.orphan()
        server.host = 'other'
        self.nova[server.uuid] = server
        for state in (task_states.SCHEDULING, task_states.RESIZE_MIGRATING,
                      task_states.REBUILDING):
            server.task_state = state
            self.assert_kept(server)

    def test_kept_while_nova_does_not_answer(self) -> None:
        server = self.orphan()
        self.useFixture(fixtures.MonkeyPatch(
            'nova.objects.Instance.get_by_uuid',
            lambda *args, **kwargs: 1 // 0))
        self.assert_kept(server)

    def test_kept_if_it_is_not_the_drivers(self) -> None:
        server = self.orphan()
        for name in (f'ephemeral-{self.uuid()}-0', 'config-drive-mine'):
            self.api('POST', '/1.0/storage-pools/default/volumes/custom',
                     {'name': name, 'type': 'custom', 'config': {}})
        before = set(self.host.lxd_volumes()) - self.volumes(server)
        self.assertEqual(2, len(before))
        self.sweep()
        self.assertEqual(before, set(self.host.lxd_volumes()))

    def uuid(self) -> str:
        return self.host.instance().uuid

    def test_a_build_that_begins_meanwhile(self) -> None:
        server = self.orphan()
        lock = self.driver._services.guests.lock(server.uuid)
        with lock:
            thread = threading.Thread(target=self.sweep)
            thread.start()
            thread.join(0.5)
            self.assertTrue(thread.is_alive())
            self.nova[server.uuid] = server
        thread.join(10)
        self.assertEqual(self.volumes(server), set(self.host.lxd_volumes()))

    def test_lxd_is_in_trouble(self) -> None:
        server = self.orphan()
        self.lxd.fail_next('DELETE', '*/volumes/custom/config-drive-*')
        self.sweep()
        self.assertIn(f'config-drive-{server.uuid}', self.host.lxd_volumes())
        self.sweep()
        self.assert_nothing_left()
        self.lxd.fail_next('GET', '*/volumes/custom')
        self.sweep()

    # -- what a deletion does not look for ----------------------------------

    def deleted(self) -> objects.Instance:
        """Delete a server that has more than the driver can know of."""
        image = self.host.image()
        server = self.host.spawn(self.host.instance(image), image)
        # Its events would tell the driver.
        self.driver._services.watcher.stop()
        for role in ('probe', 'unpacked', 'snapshot', 'rescue'):
            self.auxiliary(server, role)
        self.api('POST', '/1.0/storage-pools/default/volumes/custom', {
            'name': f'ephemeral-{server.uuid}-0', 'type': 'custom',
            'config': {'user.nova.uuid': server.uuid,
                       'user.nova.role': 'ephemeral'}})
        self.driver.destroy(self.context, server, [])
        self.assertEqual(4, len(self.host.own()))
        self.assertEqual(1, len(self.host.lxd_volumes()))
        return server

    def test_unknown_leftovers_of_a_deleted_server(self) -> None:
        self.deleted()
        self.sweep()
        self.assert_nothing_left()
        self.age(600)
        self.deleted()
        self.host.restart_driver()
        self.assert_nothing_left()

    # -- LXD instances ------------------------------------------------------

    def auxiliary(self, server: objects.Instance, role: str) -> str:
        name = f'{server.name}-{role}'
        self.api('POST', '/1.0/instances', {
            'name': name, 'source': {'type': 'none'}, 'profiles': [],
            'config': {'user.nova.uuid': server.uuid, 'user.nova.role': role},
            'devices': {'root': {'type': 'disk', 'path': '/',
                                 'pool': 'default'}}})
        return name

    def test_instances_without_their_server(self) -> None:
        gone, kept = self.host.instance(), self.make()
        for role in ('probe', 'unpacked', 'snapshot', 'rescue'):
            self.auxiliary(gone, role)
        names = {self.auxiliary(kept, role)
                 for role in ('probe', 'unpacked', 'snapshot', 'rescue')}
        self.sweep()
        self.assertEqual({kept.name, *names}, set(self.host.own()))
        self.assertEqual(self.volumes(kept), set(self.host.lxd_volumes()))

    def test_instances_of_a_server_that_is_being_built(self) -> None:
        server = self.host.instance()
        self.nova[server.uuid] = server
        name = self.auxiliary(server, 'unpacked')
        self.sweep()
        self.assertEqual([name], list(self.host.own()))

    # -- migrations ---------------------------------------------------------

    def migrated(self, role: str) -> objects.Instance:
        """Leave what a migration to or from another host can leave."""
        server = self.make()
        self.driver.power_off(server)
        guest = self.host.fake(server)
        guest.config['user.nova.role'] = role
        guest.config['user.nova.migration'] = '7'
        server.host = 'other'
        return server

    def test_migration_that_was_confirmed_elsewhere(self) -> None:
        for role in ('moved', 'incoming'):
            self.migrated(role)
            self.sweep()
            self.assertEqual({}, self.host.own())
            self.assertEqual([], self.host.lxd_volumes())

    def test_migration_of_a_deleted_server(self) -> None:
        for role in ('moved', 'incoming'):
            del self.nova[self.migrated(role).uuid]
            self.host.restart_driver()
            self.assertEqual({}, self.host.own())
            self.assertEqual([], self.host.lxd_volumes())

    def test_migration_under_way(self) -> None:
        for role in ('moved', 'incoming'):
            server = self.migrated(role)
            for task, state in (
                    (task_states.RESIZE_MIGRATING, vm_states.ACTIVE),
                    (task_states.RESIZE_FINISH, vm_states.ACTIVE),
                    (None, vm_states.RESIZED), (None, vm_states.ERROR)):
                server.task_state, server.vm_state = task, state
                self.assert_kept(server)
                self.assertIn(server.name, self.host.own())
            server.task_state, server.vm_state = None, vm_states.ACTIVE
            self.sweep()

    def test_migration_that_nova_has_given_to_this_host(self) -> None:
        for role in ('moved', 'incoming'):
            server = self.migrated(role)
            server.host = driver_host.CONF.host
            self.assert_kept(server)
            self.assertIn(server.name, self.host.own())
            server.host = 'other'
            self.sweep()
