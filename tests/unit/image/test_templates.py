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

from typing import Any

import ddt
import fixtures
from nova import exception
from nova import objects

from nova_lxd_py.virt.guest import roles
from nova_lxd_py.virt.image import templates
from nova_lxd_py.virt.lxd import errors
from tests.fixtures import concurrent_calls
from tests.fixtures.fake_lxd import fixture as fake_fixture
from tests.fixtures import template_case

objects.register_all()

BASE = template_case.BASE
ISOLATED = template_case.ISOLATED


class CloneTestCase(template_case.TemplateTestCase):

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
        self.assertEqual(roles.SERVER, clone.role)
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
class DecisionTestCase(template_case.TemplateTestCase):

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


class FailureTestCase(template_case.TemplateTestCase):

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


class ConcurrencyTestCase(template_case.TemplateTestCase):

    def test_one_template(self) -> None:
        results = concurrent_calls.run_all([self.source_for] * 8)
        self.assertEqual([results[0]] * 8, results)
        self.assertEqual('copy', results[0][0]['type'])
        self.assertEqual(1, len(self.templates()))
        self.assertEqual(1, len(self.holders()))

    def test_ranges_do_not_overlap(self) -> None:
        """LXD gives a range away twice to instances made at once."""
        def server(number: int) -> str:
            return self.spawn(f's{number}', f'p{number % 4}', **(
                {'isolated': 'true'} if number % 3 == 0 else {})).name

        results = concurrent_calls.run_all([
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
