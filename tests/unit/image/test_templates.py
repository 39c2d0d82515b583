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

"""Templates that servers are cloned from, and uid ranges."""

from __future__ import annotations

import threading
import time
from typing import Any

import ddt
import fixtures
from nova import exception
from nova import objects
from oslo_config import fixture as config_fixture
from oslotest import base

from nova_lxd_py import conf
from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.guest import uid_ranges
from nova_lxd_py.virt.image import templates
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import session
from tests.fixtures import fake_lxd
from tests.fixtures.fake_lxd import fixture as fake_fixture

objects.register_all()

DAY = 86400
ROOT = {'root': {'type': 'disk', 'path': '/', 'pool': 'default'}}
ISOLATED = 'security.idmap.isolated'
BASE = 'security.idmap.base'


class TemplateTestCase(base.BaseTestCase):

    pool_driver = 'btrfs'

    def setUp(self) -> None:
        super().setUp()
        self.lxd = self.useFixture(fake_lxd.FakeLXD(
            pool_driver=self.pool_driver, project='nova'))
        self.cfg = self.useFixture(config_fixture.Config(conf.CONF))
        self.cfg.config(group='lxd', endpoint=self.lxd.endpoint)
        self.cfg.config(
            group='image_cache', remove_unused_base_images=True,
            remove_unused_original_minimum_age_seconds=DAY)
        self.capacity = 100
        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.host.subordinate_ids.capacity',
            lambda path: self.capacity))
        self.session = session.Session(conf.CONF.lxd)
        self.session.connect()
        self.guests = registry.GuestRegistry(self.session)
        self.store = self.new_store()
        self.image = self.lxd.add_image(project='nova', used=True)

    def new_store(self) -> templates.TemplateStore:
        return templates.TemplateStore(self.session, self.guests)

    def instance(self, project: str = 'p1', **extra_specs: str
                 ) -> objects.Instance:
        return objects.Instance(
            uuid='5f6e1b3a-0000-4000-8000-000000000001', project_id=project,
            flavor=objects.Flavor(
                name='f', root_gb=1, memory_mb=64, vcpus=1,
                extra_specs={f'lxd:{key}': value for key, value
                             in extra_specs.items()}))

    def source_for(self, project: str = 'p1', image: str = '',
                   **extra_specs: str) -> tuple[Any, Any]:
        return self.store.source_for(self.instance(project, **extra_specs),
                                     image or self.image)

    def spawn(self, name: str, project: str = 'p1', **kwargs: Any
              ) -> lxd_guest.Guest:
        source, config = self.source_for(project, **kwargs)
        guest = self.guests.create(name, source, {
            lxd_guest.KEY_ROLE: lxd_guest.ROLE_SERVER,
            lxd_guest.KEY_UUID: name, lxd_guest.KEY_PROJECT: project,
            **config}, ROOT)
        guest.start()
        return guest.reload()

    def templates(self) -> list[lxd_guest.Guest]:
        return [guest for guest in self.guests.all()
                if templates.KEY_TEMPLATE in guest.config]

    def holders(self) -> list[lxd_guest.Guest]:
        return [guest for guest in self.guests.all()
                if guest.name.startswith('nova-uids-')]

    def assertFromImage(self, source: Any) -> None:
        self.assertEqual({'type': 'image', 'fingerprint': self.image}, source)


class CloneTestCase(TemplateTestCase):

    def test_first_server_of_new_image(self) -> None:
        new = self.lxd.add_image(fake_fixture.unified_image(
            {'etc/new': b'x'}), project='nova')
        first, config = self.source_for(image=new)
        self.assertEqual({'type': 'image', 'fingerprint': new}, first)
        self.assertEqual([], self.templates())
        # Also if the first has not come to anything yet.
        second, second_config = self.source_for(image=new)
        self.assertEqual(self.templates()[0].name, second['source'])
        self.assertEqual(config[BASE], second_config[BASE])

    def test_first_server_here_of_used_image(self) -> None:
        source, config = self.source_for()
        template, = self.templates()
        self.assertEqual({'type': 'copy', 'source': template.name,
                          'instance_only': True}, source)
        self.assertEqual('true', config[ISOLATED])
        self.assertEqual('65536', config['security.idmap.size'])
        self.assertEqual(template.config['volatile.idmap.base'], config[BASE])

    def test_template(self) -> None:
        self.source_for()
        template, = self.templates()
        self.assertEqual('Stopped', template.status)
        self.assertEqual(['root'], list(template.devices))
        self.assertEqual(template.config['volatile.idmap.next'],
                         template.config['volatile.last_state.idmap'])
        self.assertEqual('false', template.config['boot.autostart'])
        # Nothing of the image has been run, not even LXD's own templates.
        self.assertEqual('create', template.config['volatile.apply_template'])
        self.assertEqual([], self.guests.servers())

    def test_clone(self) -> None:
        self.spawn('s1')
        clone = self.spawn('s2')
        template, = self.templates()
        self.assertEqual(template.config[BASE], clone.config[BASE])
        self.assertNotIn(templates.KEY_TEMPLATE, clone.config)
        self.assertEqual(lxd_guest.ROLE_SERVER, clone.role)
        self.assertEqual(['root'], list(clone.devices))
        self.assertEqual(
            ['s1', 's2'], sorted(g.name for g in self.guests.servers()))

    def test_unused_mark_is_not_inherited(self) -> None:
        self.source_for()
        template, = self.templates()
        template.update(config={templates.KEY_UNUSED: '17'})
        clone = self.spawn('s1')
        self.assertNotIn(templates.KEY_UNUSED, clone.config)
        self.assertNotIn(templates.KEY_UNUSED, template.reload().config)

    def test_later_servers_cost_two_requests(self) -> None:
        self.source_for()
        with self.lxd.recording() as requests:
            self.source_for()
        self.assertEqual(['GET', 'GET'],
                         [entry.method for entry in requests])

    def test_projects_are_apart(self) -> None:
        first, second = self.spawn('s1', 'p1'), self.spawn('s2', 'p2')
        self.assertNotEqual(first.config[BASE], second.config[BASE])
        self.assertEqual(2, len(self.templates()))
        third = self.spawn('s3', 'p1')
        self.assertEqual(first.config[BASE], third.config[BASE])

    def test_images_of_a_project_share_the_range(self) -> None:
        other = self.lxd.add_image(fake_fixture.unified_image(
            {'etc/other': b'x'}), project='nova', used=True)
        first, second = self.spawn('s1'), self.spawn('s2', image=other)
        self.assertEqual(first.config[BASE], second.config[BASE])
        self.assertEqual(2, len(self.templates()))
        self.assertEqual(1, len(self.holders()))

    def test_driver_restart(self) -> None:
        first = self.source_for()
        self.store = self.new_store()
        self.assertEqual(first, self.source_for())
        self.assertEqual(1, len(self.templates()))

    def test_holder_deleted_by_hand(self) -> None:
        server = self.spawn('s1')
        for guest in self.holders() + self.templates():
            guest.delete()
        # Ranges of others come and go meanwhile.
        self.spawn('s2', 'p2')
        self.assertEqual(server.config[BASE],
                         self.spawn('s3').config[BASE])

    def test_common_range(self) -> None:
        self.cfg.config(group='lxd', idmap_isolation='off')
        source, config = self.source_for('p1')
        self.assertEqual('copy', source['type'])
        self.assertEqual('false', config[ISOLATED])
        self.assertNotIn(BASE, config)
        self.assertEqual(source, self.source_for('p2')[0])
        self.assertEqual([], self.holders())
        self.assertEqual('Running', self.spawn('s1').status)

    def test_create(self) -> None:
        calls: list[Any] = []
        self.assertEqual('made', self.store.create(
            self.instance(), self.image,
            lambda source, config: calls.append(source['type']) or 'made'))
        self.assertEqual(['copy'], calls)

    def test_create_falls_back_to_the_image(self) -> None:
        calls: list[Any] = []

        def make(source: Any, config: Any) -> str:
            calls.append((source['type'], BASE in config))
            if source['type'] == 'copy':
                raise errors.NotFound('LXD: Instance not found')
            return 'made'

        self.assertEqual('made', self.store.create(
            self.instance(), self.image, make))
        self.assertEqual([('copy', True), ('image', True)], calls)

    def test_create_gives_up(self) -> None:
        def fail(source: Any, config: Any) -> None:
            raise errors.OperationFailed(source['type'])

        exc = self.assertRaises(errors.OperationFailed, self.store.create,
                                self.instance(), self.image, fail)
        self.assertEqual('image', exc.message)

        def time_out(source: Any, config: Any) -> None:
            raise errors.DeadlineExceeded(source['type'])

        exc = self.assertRaises(errors.DeadlineExceeded, self.store.create,
                                self.instance(), self.image, time_out)
        self.assertEqual('copy', exc.message)

    def test_range_for_servers_from_elsewhere(self) -> None:
        config = self.store.uid_range(self.instance())
        self.assertEqual(self.spawn('s1').config[BASE], config[BASE])


@ddt.ddt
class DecisionTestCase(TemplateTestCase):

    def test_own_range(self) -> None:
        for specs, isolated in (({'isolated': 'true'}, 'true'),
                                ({'privileged_allowed': 'true'}, 'false')):
            source, config = self.source_for(**specs)
            self.assertFromImage(source)
            self.assertEqual({ISOLATED: isolated}, config)
        self.assertEqual([], self.guests.all())

    def test_mode_server(self) -> None:
        self.cfg.config(group='lxd', idmap_isolation='server')
        source, config = self.source_for()
        self.assertFromImage(source)
        self.assertEqual({ISOLATED: 'true'}, config)

    def test_no_fast_spawn(self) -> None:
        self.cfg.config(group='lxd', fast_spawn=False)
        source, config = self.source_for()
        self.assertFromImage(source)
        self.assertEqual({ISOLATED: 'true'}, config)

    def test_mode_project_without_fast_spawn(self) -> None:
        self.cfg.config(group='lxd', fast_spawn=False,
                        idmap_isolation='project')
        source, config = self.source_for()
        self.assertFromImage(source)
        self.assertIn(BASE, config)
        self.assertEqual(config, self.source_for()[1])
        self.assertNotEqual(config, self.source_for('p2')[1])
        self.assertEqual([], self.templates())

    def test_no_ranges_at_all(self) -> None:
        self.capacity = 0
        source, config = self.source_for()
        self.assertEqual('copy', source['type'])
        self.assertEqual('false', config[ISOLATED])
        self.assertRaises(exception.ComputeResourcesUnavailable,
                          self.source_for, isolated='true')

    @ddt.data(('zfs', {}, True), ('ceph', {}, True), ('dir', {}, False),
              ('lvm', {}, True), ('lvm', {'lvm.use_thinpool': 'false'},
                                  False))
    @ddt.unpack
    def test_pools(self, driver: str, config: dict[str, str], clones: bool
                   ) -> None:
        pool = self.lxd.daemon.store.pools['default']
        pool.driver = driver
        pool.config.update(config)
        self.assertEqual('copy' if clones else 'image',
                         self.source_for()[0]['type'])

    def test_no_shift_needed(self) -> None:
        """As where LXD mounts root disks idmapped."""
        self.lxd.daemon.idmapped_mounts = True
        source, config = self.source_for()
        self.assertFromImage(source)
        self.assertEqual({ISOLATED: 'true'}, config)
        self.assertEqual([], self.templates())
        with self.lxd.recording() as requests:
            self.source_for()
        self.assertEqual([], requests)

    def test_range_of_project_where_no_shift_is_needed(self) -> None:
        self.lxd.daemon.idmapped_mounts = True
        self.cfg.config(group='lxd', idmap_isolation='project')
        source, config = self.source_for()
        self.assertFromImage(source)
        self.assertIn(BASE, config)


class FailureTestCase(TemplateTestCase):

    def check(self) -> None:
        """The server is made from its image, in its project's range; later
        ones do not try again, until some time has passed."""
        with self.assertLogs('nova_lxd_py.virt.image.templates',
                             'WARNING') as logs:
            source, config = self.source_for()
        self.assertFromImage(source)
        self.assertIn(BASE, config)
        self.assertEqual([], self.templates())
        self.assertEqual(1, len(logs.output))
        with self.assertNoLogs('nova_lxd_py.virt.image.templates', 'WARNING'):
            self.assertFromImage(self.source_for()[0])
        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.image.templates.RETRY_AFTER', 0))
        self.assertEqual('copy', self.source_for()[0]['type'])

    def test_create(self) -> None:
        self.store.uid_range(self.instance())
        self.lxd.fail_operation(
            'POST', '/1.0/instances', 'Failed creating instance record',
            where={'source': {'type': 'image', 'fingerprint': self.image}})
        self.check()

    def test_update(self) -> None:
        self.store.uid_range(self.instance())
        self.lxd.fail_next('PUT', '/1.0/instances/nova-template-*')
        self.check()

    def test_start_unreachable(self) -> None:
        self.lxd.drop_connection('PUT', '/1.0/instances/*/state')
        self.check()

    def test_start_fails_before_the_shift(self) -> None:
        self.lxd.fail_operation('PUT', '/1.0/instances/*/state',
                                'Failed to mount')
        self.check()

    def test_it_starts(self) -> None:
        """Should LXD ever overlook what keeps it from starting."""
        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.image.templates._OBSTACLE_DEVICE',
            {'type': 'none'}))
        self.assertFromImage(self.source_for()[0])
        self.assertEqual([], self.templates())

    def test_no_range_left(self) -> None:
        self.lxd.daemon.uid_range = (100000, 65536)
        self.assertRaises(errors.OperationFailed, self.source_for)
        self.assertEqual([], self.guests.all())


class CrashTestCase(TemplateTestCase):

    def crash(self, method: str, path: str) -> None:
        """Let nova-compute die at a request, as if by SIGKILL."""
        faults = [self.lxd.drop_connection(method, path, times=None),
                  self.lxd.drop_connection('DELETE', '*', times=None),
                  self.lxd.drop_connection('PUT', '*/nova-template-*/state',
                                           times=None)]
        self.source_for()
        for fault in faults:
            fault.release()
        self.store = self.new_store()

    def test_before_the_shift(self) -> None:
        self.store.uid_range(self.instance())
        self.crash('GET', '/1.0/instances/nova-template-*/metadata')
        self.assertEqual(1, len(self.templates()))
        self.assertEqual('Running', self.spawn('s1').status)
        self.assertEqual(1, len(self.templates()))

    def test_before_the_device_is_removed(self) -> None:
        self.store.uid_range(self.instance())
        faults = [self.lxd.drop_connection(
            'PUT', '/1.0/instances/nova-template-*', times=None,
            where={'ephemeral': False}),
            self.lxd.drop_connection('DELETE', '*', times=None)]
        self.source_for()
        for fault in faults:
            fault.release()
        self.store = self.new_store()
        self.assertEqual(2, len(self.templates()[0].devices))
        self.assertEqual('Running', self.spawn('s1').status)
        self.assertEqual(1, len(self.templates()[0].devices))

    def test_pruned(self) -> None:
        self.store.uid_range(self.instance())
        self.crash('GET', '/1.0/instances/nova-template-*/metadata')
        self.assertEqual([self.templates()[0].name], self.store.prune())

    def test_holder_without_its_range(self) -> None:
        """Killed between making the holder and writing down its range."""
        faults = [self.lxd.drop_connection(
            'PUT', '/1.0/instances/nova-uids-*', times=None)]
        self.assertRaises(errors.LXDError, self.source_for)
        for fault in faults:
            fault.release()
        self.store = self.new_store()
        server = self.spawn('s1')
        self.assertEqual(self.holders()[0].config['volatile.idmap.base'],
                         server.config[BASE])


class ConcurrencyTestCase(TemplateTestCase):

    def run_all(self, *actions: Any) -> list[Any]:
        results: list[Any] = [None] * len(actions)

        def run(number: int) -> None:
            try:
                results[number] = actions[number]()
            except Exception as exc:
                results[number] = exc

        threads = [threading.Thread(target=run, args=(number,))
                   for number in range(len(actions))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return results

    def test_one_template(self) -> None:
        results = self.run_all(*[self.source_for] * 8)
        self.assertEqual([results[0]] * 8, results)
        self.assertEqual('copy', results[0][0]['type'])
        self.assertEqual(1, len(self.templates()))
        self.assertEqual(1, len(self.holders()))

    def test_ranges_do_not_overlap(self) -> None:
        """LXD gives a range away twice to instances made at once."""
        def server(number: int) -> str:
            return self.spawn(f's{number}', f'p{number % 4}', **(
                {'isolated': 'true'} if number % 3 == 0 else {})).name

        results = self.run_all(*[
            lambda number=number: server(number) for number in range(12)])
        self.assertEqual({f's{number}' for number in range(12)},
                         set(results))
        owners: dict[str, set[str]] = {}
        for guest in self.guests.servers():
            number = int(guest.name[1:])
            owners.setdefault(guest.config['volatile.idmap.base'], set()).add(
                guest.name if number % 3 == 0 else f'p{number % 4}')
        self.assertEqual({1}, {len(found) for found in owners.values()})
        self.assertEqual(8, len(owners))


class PruneTestCase(TemplateTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.now = time.time()
        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.image.templates.time.time', lambda: self.now))

    def names(self) -> set[str]:
        return {guest.name for guest in self.guests.all()
                if guest.role == lxd_guest.ROLE_TEMPLATE}

    def test_used(self) -> None:
        self.spawn('s1')
        names = self.names()
        for _round in range(3):
            self.assertEqual([], self.store.prune())
            self.now += 9 * DAY
        self.assertEqual(names, self.names())

    def test_nothing_changes_while_used(self) -> None:
        self.spawn('s1')
        with self.lxd.recording() as requests:
            self.store.prune()
        self.assertEqual({'GET'}, {entry.method for entry in requests})

    def test_unused(self) -> None:
        self.spawn('s1').delete()
        self.store.prune()
        self.now += DAY - 10
        self.assertEqual([], self.store.prune())
        self.now += 20
        deleted = self.store.prune()
        self.assertEqual([name for name in deleted
                          if name.startswith('nova-template-')], deleted)
        # The range goes when nothing that was shifted to it is left.
        self.store.prune()
        self.now += DAY + 10
        self.assertEqual(1, len(self.store.prune()))
        self.assertEqual(set(), self.names())
        # And a new template can be made.
        self.spawn('s2')

    def test_no_range_left(self) -> None:
        """Projects without servers lose theirs then, but not at once."""
        first, size = self.lxd.daemon.uid_range[0], 65536
        self.lxd.daemon.uid_range = (first, 3 * size)
        self.spawn('s1', 'p1').delete()
        self.spawn('s2', 'p2')
        self.assertRaises(errors.OperationFailed, self.spawn, 's3', 'p3')
        self.now += uid_ranges.GRACE + 10
        self.spawn('s3', 'p3')
        self.assertEqual({'p2', 'p3'}, {
            guest.config[lxd_guest.KEY_PROJECT] for guest in
            self.guests.all()})
        # Who has servers keeps it.
        self.now += uid_ranges.GRACE + 10
        self.assertRaises(errors.OperationFailed, self.spawn, 's4', 'p1')
        self.assertIn('s2', self.lxd.instances)

    def test_used_again(self) -> None:
        self.spawn('s1').delete()
        self.store.prune()
        self.now += DAY + 10
        self.spawn('s2')
        self.assertEqual([], self.store.prune())

    def test_asked_for_again(self) -> None:
        self.spawn('s1').delete()
        self.store.prune()
        self.now += DAY + 10
        self.source_for()
        self.assertEqual([], self.store.prune())

    def test_server_of_another_project(self) -> None:
        self.spawn('s1', 'p1').delete()
        self.spawn('s2', 'p2')
        self.store.prune()
        self.now += DAY + 10
        deleted = self.store.prune()
        self.assertEqual(1, len(deleted))
        self.assertEqual('p2', self.templates()[0].config[
            lxd_guest.KEY_PROJECT])

    def test_image_is_gone(self) -> None:
        self.spawn('s1')
        self.session.delete('images', self.image)
        self.assertEqual(1, len(self.store.prune()))
        self.assertEqual([], self.templates())
        self.assertEqual(1, len(self.holders()))

    def test_never_at_once(self) -> None:
        """A server may just be about to be made from it."""
        self.cfg.config(group='image_cache',
                        remove_unused_original_minimum_age_seconds=0)
        self.source_for()
        self.assertEqual([], self.store.prune())
        self.now += 700
        self.assertEqual(1, len(self.store.prune()))

    def test_switched_off(self) -> None:
        self.cfg.config(group='image_cache', remove_unused_base_images=False)
        self.source_for()
        self.store.prune()
        self.now += 9 * DAY
        self.assertEqual([], self.store.prune())

    def test_foreign_instances(self) -> None:
        self.session.post('instances', body={
            'name': 'theirs', 'source': {'type': 'image',
                                         'fingerprint': self.image},
            'profiles': [], 'devices': ROOT})
        self.store.prune()
        self.now += 9 * DAY
        self.assertEqual([], self.store.prune())
        self.assertIn('theirs', self.lxd.instances)
