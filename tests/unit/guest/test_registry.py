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

"""The registry of LXD instances: locks and what is forgotten with them."""

from __future__ import annotations

import threading

import fixtures
from nova import objects

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.guest import roles
from nova_lxd_py.virt.lxd import errors
from tests.fixtures import session_case

UUID = '0c1e9f0a-1111-4222-8333-444455556666'
OTHER = '0c1e9f0a-1111-4222-8333-444455557777'

objects.register_all()


class ChangingTestCase(session_case.SessionTestCase):

    def setUp(self):
        super().setUp()
        self.guests = registry.GuestRegistry(self.session)
        self.forgotten = []
        self.guests.on_change(
            lambda instance: self.forgotten.append(instance.uuid))
        self.server = objects.Instance(id=1, uuid=UUID)

    def test_forgets_after_a_change(self):
        with self.guests.changing(self.server):
            self.assertEqual([], self.forgotten)
        self.assertEqual([UUID], self.forgotten)

    def test_forgets_after_a_change_that_failed_half_way(self):
        def fail():
            with self.guests.changing(self.server):
                raise KeyError

        self.assertRaises(KeyError, fail)
        self.assertEqual([UUID], self.forgotten)

    def test_changes_of_one_instance_never_interleave(self):
        inside = threading.Event()
        order = []

        def change():
            inside.set()
            with self.guests.changing(self.server):
                order.append('second')

        with self.guests.changing(self.server):
            thread = threading.Thread(target=change)
            thread.start()
            inside.wait(5)
            thread.join(0.3)
            self.assertTrue(thread.is_alive())
            order.append('first')
        thread.join(5)
        self.assertEqual(['first', 'second'], order)

    def test_changes_of_two_instances_do_not_wait(self):
        with self.guests.changing(self.server), \
                self.guests.changing(objects.Instance(id=2, uuid=OTHER)):
            pass
        self.assertEqual([OTHER, UUID], self.forgotten)


class CopiesTestCase(session_case.SessionTestCase):
    """LXD instances that an operator has copied from a server's."""

    def setUp(self):
        super().setUp()
        self.log = self.useFixture(fixtures.FakeLogger())
        self.guests = registry.GuestRegistry(self.session)
        self.server = objects.Instance(id=1, uuid=UUID)
        self.name = self.server.name
        self.guests.create(
            self.name, {'type': 'image', 'alias': 'tiny'},
            {lxd_guest.KEY_UUID: UUID,
             lxd_guest.KEY_ROLE: roles.SERVER},
            {'root': {'type': 'disk', 'path': '/', 'pool': 'default'}})

    def copy(self, name, source=None):
        source = source or self.name
        body = self.session.get('instances', source)
        self.session.post('instances', body={
            'name': name, 'config': body['config'],
            'devices': body['devices'], 'profiles': [],
            'source': {'type': 'copy', 'source': source}})

    def names(self):
        return [guest.name for guest in self.guests.all()]

    def test_a_copy_is_not_the_server(self):
        self.copy('backup')
        self.assertEqual([self.name], self.names())
        self.assertEqual([self.name], [
            guest.name for guest in self.guests.of(self.server)])
        self.assertEqual(self.name, self.guests.get(self.server).name)

    def test_a_copy_survives_the_server(self):
        self.copy('backup')
        self.guests.delete_all(self.server)
        self.assertEqual(['backup'], list(self.lxd.instances))
        self.assertEqual([], self.names())
        self.assertIsNone(self.guests.find(self.server))

    def test_lost_answer_of_a_deletion(self):
        """The others are deleted as well."""
        self.guests.create(
            f'{self.name}-rescue', {'type': 'image', 'alias': 'tiny'},
            {lxd_guest.KEY_UUID: UUID,
             lxd_guest.KEY_ROLE: roles.RESCUE},
            {'root': {'type': 'disk', 'path': '/', 'pool': 'default'}})
        self.lxd.drop_connection(
            'DELETE', f'/1.0/instances/{self.name}-rescue', after=True)
        self.guests.delete_all(self.server)
        self.assertEqual({}, self.lxd.instances)

    def test_auxiliary_instances_before_the_first_list(self):
        self.post_auxiliary('probe')
        self.assertEqual([self.name, f'{self.name}-probe'], self.names_of())

    def test_auxiliary_instances_in_a_list(self):
        self.post_auxiliary('probe')
        self.guests.all()
        self.assertEqual([self.name, f'{self.name}-probe'], self.names_of())

    def test_auxiliary_instances_that_were_read_by_name(self):
        self.guests.all()
        self.post_auxiliary('probe')
        self.assertEqual([self.name], self.names_of())
        self.guests.by_name(f'{self.name}-probe')
        self.assertEqual([self.name, f'{self.name}-probe'], self.names_of())

    def test_auxiliary_instances_of_others(self):
        self.guests.all()
        self.post_auxiliary('probe')
        self.guests.all()
        with self.lxd.recording() as requests:
            self.guests.of(objects.Instance(id=2, uuid=OTHER))
        self.assertEqual(['GET /1.0/instances/instance-00000002',
                          'GET /1.0/instances'], [
            str(request) for request in requests])

    def post_auxiliary(self, role):
        """Create an instance without the registry."""
        self.session.post('instances', body={
            'name': f'{self.name}-{role}', 'profiles': [],
            'config': {lxd_guest.KEY_UUID: UUID, lxd_guest.KEY_ROLE: role},
            'devices': {'root': {'type': 'disk', 'path': '/',
                                 'pool': 'default'}},
            'source': {'type': 'none'}})

    def names_of(self):
        return [guest.name for guest in self.guests.of(self.server)]

    def test_deletion_of_one_that_was_started_meanwhile(self):
        guest = self.guests.get(self.server)
        self.guests.get(self.server).start()
        guest.delete()
        self.assertEqual({}, self.lxd.instances)

    def test_the_log_has_each_name_once(self):
        for name in ('backup', 'other'):
            self.copy(name)
            for _time in range(2):
                self.guests.all()
        self.assertEqual(2, self.log.output.count('Ignoring LXD instance'))
        self.assertIn(f'other, which was copied or renamed by hand from '
                      f'{self.name}', self.log.output)

    def test_a_copy_in_place_of_the_server(self):
        self.copy('backup')
        self.guests.delete_all(self.server)
        self.copy(self.name, 'backup')
        self.assertEqual(self.name, self.guests.get(self.server).name)

    def test_a_copy_with_the_name_that_nova_gives_now(self):
        self.copy('server-1')
        self.useFixture(fixtures.MonkeyPatch(
            'nova.objects.Instance.name', 'server-1'))
        self.assertEqual(self.name, self.guests.get(self.server).name)
        self.guests.delete_all(self.server)
        self.assertRaises(errors.InstanceNotFound, self.guests.get,
                          self.server)

    def test_servers_of_earlier_versions(self):
        self.session.patch('instances', self.name, body={'config': {
            lxd_guest.KEY_LXD_NAME: ''}})
        self.assertEqual([self.name], self.names())


class CreateTestCase(session_case.SessionTestCase):

    def test_isolated_instance_that_cannot_be_created(self):
        """LXD says why only when the operation ends."""
        self.lxd.fail_operation('POST', '/1.0/instances', 'no space left')
        error = self.refused(
            errors.OperationFailed,
            registry.GuestRegistry(self.session).create, 'c1',
            {'type': 'image', 'alias': 'tiny'},
            {'security.idmap.isolated': 'true'},
            {'root': {'type': 'disk', 'path': '/', 'pool': 'default'}})
        self.assertIn('no space left', str(error))
