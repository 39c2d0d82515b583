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


"""LXD's errors as the Nova exceptions that have the right effect."""

from __future__ import annotations

from nova import exception
from nova import objects
from oslotest import base

from nova_lxd_py.virt import exception_mapping
from nova_lxd_py.virt.lxd import errors
from tests.fixtures import session_case

objects.register_all()

UUID = '0c1e9f0a-1111-4222-8333-444455556666'


@exception_mapping.map_all_exceptions
class Driver:
    """Raises what it is given."""

    def __init__(self, error):
        self._error = error

    def _fail(self):
        raise self._error

    def spawn(self, instance):
        self._fail()

    def destroy(self, instance):
        self._fail()

    def power_on(self, instance):
        self._fail()

    def list_instances(self):
        self._fail()


class MappingTestCase(base.BaseTestCase):

    def raised(self, error, method='power_on'):
        instance = objects.Instance(id=1, uuid=UUID)
        try:
            getattr(Driver(error), method)(instance)
        except Exception as exc:
            return exc

    def test_missing_instance(self):
        error = errors.InstanceNotFound('no instance')
        self.assertIsInstance(self.raised(error), exception.InstanceNotFound)

    def test_another_missing_object_is_no_missing_instance(self):
        error = errors.NotFound('Storage pool not found')
        self.assertIs(exception_mapping.LXDRequestFailed,
                      type(self.raised(error)))

    def test_nova_never_takes_a_failed_build_for_a_deleted_server(self):
        error = errors.InstanceNotFound('no instance')
        for method in ('spawn', 'destroy'):
            self.assertIs(exception_mapping.LXDRequestFailed,
                          type(self.raised(error, method)))

    def test_tenants_do_not_see_text_of_lxd(self):
        error = errors.OperationFailed('/var/lib/lxd/secret')
        self.assertNotIn('/var', str(self.raised(error)))

    def test_without_an_instance(self):
        self.assertRaises(exception_mapping.LXDRequestFailed,
                          Driver(errors.InstanceNotFound('x')).list_instances)

    def test_no_wrong_power_state_while_lxd_is_away(self):
        self.assertIsInstance(self.raised(errors.Unreachable('x')),
                              exception.HypervisorUnavailable)


class NotFoundTestCase(session_case.SessionTestCase):
    """Which of LXD's 404 mean an instance."""

    def test_instance(self):
        for path in (('instances', 'x'), ('instances', 'x', 'state')):
            self.refused(errors.InstanceNotFound, self.session.get, *path)
        self.refused(errors.InstanceNotFound, self.session.put, 'instances',
                     'x', 'state', body={'action': 'stop'})

    def test_source_of_a_copy(self):
        self.refused(errors.InstanceNotFound, self.session.post, 'instances',
                     body={'name': 'y', 'source': {
                         'type': 'copy', 'source': 'x'}})

    def test_other_objects(self):
        self.refused(errors.NotFound, self.session.get, 'storage-pools', 'x')
        self.refused(errors.NotFound, self.session.get, 'storage-pools',
                     'default', 'volumes', 'custom', 'x')
        self.refused(errors.NotFound, self.session.get, 'images', 'x')
        self.create()
        self.refused(errors.NotFound, self.session.get, 'instances', 'c1',
                     'files', params={'path': '/nothing'})
