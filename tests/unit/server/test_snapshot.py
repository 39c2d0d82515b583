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
"""Images of servers: what can go wrong on the way from LXD to Glance."""

from __future__ import annotations

import hashlib
import threading

from nova.compute import power_state
from nova.compute import task_states
from nova import exception
from nova import objects

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.guest import roles
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import retry
from nova_lxd_py.virt.server import quiesce
from nova_lxd_py.virt.server import snapshot
from tests.fixtures import memory_glance
from tests.fixtures import session_case

objects.register_all()

UUID = '0c1e9f0a-1111-4222-8333-444455556666'
COPY = 'instance-00000001-snapshot'


class SnapshotTestCase(session_case.SessionTestCase):

    def setUp(self):
        super().setUp()
        self.guests = registry.GuestRegistry(self.session)
        self.glance = memory_glance.MemoryGlance()
        self.snapshots = snapshot.SnapshotOps(
            self.session, self.guests, self.glance,
            quiesce.Quiescer(self.session.options, self.guests, volumes=None))
        self.image_id = self.glance.create(None, {'name': 'backup'})['id']
        self.server = self.make_server()

    def make_server(self, **system_metadata):
        self.create('instance-00000001', start=True, **{
            lxd_guest.KEY_UUID: UUID,
            lxd_guest.KEY_ROLE: roles.SERVER})
        return objects.Instance(
            id=1, uuid=UUID, project_id='project', kernel_id='', ramdisk_id='',
            os_type='linux', system_metadata=system_metadata,
            image_ref='', flavor=objects.Flavor(extra_specs={}))

    def take(self, update_task_state=lambda **kwargs: None):
        self.snapshots.take(None, self.server, self.image_id,
                            update_task_state)

    def assert_clean(self):
        self.assertEqual(['instance-00000001'], sorted(self.lxd.instances))
        aliases = self.session.get('images', 'aliases')
        self.assertEqual(['/1.0/images/aliases/tiny'], [
            alias.partition('?')[0] for alias in aliases])
        self.assertEqual(1, len(self.session.get('images')))

    def test_glance_gets_what_lxd_made(self):
        self.take()
        image = self.glance.get(None, self.image_id)
        self.assertEqual(image['size'],
                         len(self.glance.data(self.image_id)))
        self.assertEqual(('active', 'raw', 'bare'), (
            image['status'], image['disk_format'],
            image['container_format']))
        self.assertEqual('linux', image['properties']['os_type'])
        self.assert_clean()

    def test_space_of_the_copy_is_free_during_the_upload(self):
        seen = {}

        def update_task_state(task_state, **kwargs):
            seen[task_state] = sorted(self.lxd.instances)
        self.take(update_task_state)
        self.assertEqual(['instance-00000001'],
                         seen[task_states.IMAGE_UPLOADING])

    def test_waits_for_other_operations_on_the_server(self):
        thread = threading.Thread(target=self.take)
        with self.guests.changing(self.server):
            thread.start()
            thread.join(0.3)
            self.assertEqual(['instance-00000001'], sorted(self.lxd.instances))
            self.assertTrue(thread.is_alive())
        thread.join(20)
        self.assert_clean()

    def test_thawing_survives_an_lxd_in_trouble(self):
        self.lxd.fail_next('GET', '/1.0/instances')
        quiesce.Quiescer(self.session.options, self.guests,
                         volumes=None).thaw()

    def test_fingerprints_differ(self):
        """Each image is one that LXD does not have yet."""
        seen = []
        for _turn in range(2):
            self.image_id = self.glance.create(None, {'name': 'x'})['id']
            self.take()
            seen.append(hashlib.sha256(
                self.glance.data(self.image_id)).hexdigest())
        self.assertEqual(2, len(set(seen)))

    def test_pool_full(self):
        self.lxd.fail_operation('POST', '/1.0/instances',
                                'No space left on device')
        self.assertRaises(errors.OperationFailed, self.take)
        self.assert_clean()

    def test_lxd_full(self):
        self.lxd.fail_operation('POST', '/1.0/images',
                                'write /var/lib/lxd/images: no space left on '
                                'device')
        self.assertRaises(errors.OperationFailed, self.take)
        self.assert_clean()

    def test_lxd_lost_the_operation(self):
        self.lxd.fail_operation('POST', '/1.0/images', after=True)
        self.assertRaises(errors.LXDError, self.take)
        self.assert_clean()

    def test_packing_takes_too_long(self):
        self.session.options = _Options(
            self.session.options, image_timeout=1, snapshot_compression='zstd')
        snapshots = snapshot.SnapshotOps(
            self.session, self.guests, self.glance,
            quiesce.Quiescer(self.session.options, self.guests, volumes=None))
        hang = self.lxd.hang_operation('POST', '/1.0/images')
        self.addCleanup(hang.release)
        self.assertRaises(errors.DeadlineExceeded, snapshots.take, None,
                          self.server, self.image_id, lambda **kwargs: None)
        self.assertNotIn(COPY, self.lxd.instances)

    def test_compression_that_lxd_lacks(self):
        self.lxd.fail_next(
            'POST', '/1.0/images', 400,
            'exec: "zstd": executable file not found in $PATH',
            where={'compression_algorithm': 'zstd'})
        self.take()
        self.assertEqual(b'\x1f\x8b', self.glance.data(self.image_id)[:2])
        self.assert_clean()

    def test_no_compression_at_all(self):
        self.lxd.fail_next('POST', '/1.0/images', 400, 'executable file not '
                           'found', times=2)
        self.assertRaises(errors.InvalidRequest, self.take)
        self.assert_clean()

    def test_deleted_while_packing(self):
        def delete(_request):
            for name in ('instance-00000001', COPY):
                self.guests.by_name(name).delete()
        self.lxd.before('POST', '/1.0/images', delete)
        self.assertRaises(exception.InstanceNotFound, self.take)
        self.assertEqual([], list(self.lxd.instances))

    def test_deleting_before_the_upload(self):
        def refuse(task_state, expected_state=None):
            if task_state == task_states.IMAGE_UPLOADING:
                raise exception.UnexpectedDeletingTaskStateError(
                    instance_uuid=UUID, expected={}, actual={})
        self.assertRaises(exception.UnexpectedDeletingTaskStateError,
                          self.take, refuse)
        self.assert_clean()

    def test_lxd_breaks_off_the_download(self):
        self.session._outage = retry.Outage(0.2)
        self.lxd.drop_connection('GET', '/1.0/images/*/export', times=None)
        self.assertRaises(errors.LXDError, self.take)
        self.assert_clean()

    def test_leftovers_that_cannot_go_yet(self):
        """A snapshot is a success even if LXD keeps its image for now."""
        self.lxd.fail_next('DELETE', '/1.0/images/*', 500, 'busy')
        self.take()
        self.assertEqual(2, len(self.session.get('images')))
        self.snapshots.recover()
        self.assert_clean()

    def leave_image(self):
        self.session.post('images', 'aliases', body={
            'name': f'snapshot-{UUID}',
            'target': self.session.get('images', 'aliases', 'tiny')['target']})

    def test_deletion_before_the_leftovers_are_known(self):
        self.leave_image()
        self.lxd.fail_next('GET', '/1.0/images/aliases')
        self.snapshots.recover()
        self.snapshots.delete_image_of(self.server, [])
        self.assertEqual([], self.session.get('images'))

    def test_deletion_after_leftovers_that_could_not_go(self):
        self.snapshots.recover()
        self.lxd.fail_next('DELETE', '/1.0/images/*', 500, 'busy')
        self.take()
        self.snapshots.delete_image_of(self.server, [])
        self.assert_clean()

    def test_deletion_of_a_server_with_a_copy(self):
        self.snapshots.recover()
        self.leave_image()
        self.create(COPY, **{lxd_guest.KEY_UUID: UUID,
                             lxd_guest.KEY_ROLE: roles.SNAPSHOT})
        self.snapshots.delete_image_of(self.server,
                                       [self.guests.by_name(COPY)])
        self.assertEqual([], self.session.get('images'))

    def test_deletion_of_a_server_without_images(self):
        self.snapshots.recover()
        self.take()
        with self.lxd.recording() as requests:
            self.snapshots.delete_image_of(self.server, [])
        self.assertEqual([], requests)

    def test_start_survives_an_lxd_in_trouble(self):
        self.lxd.fail_next('GET', '/1.0/instances', times=None)
        self.snapshots.recover()

    def test_no_copy_of_volumes(self):
        guest = self.guests.get(self.server)
        self.session.post('storage-pools', 'default', 'volumes', 'custom',
                          body={'name': 'v', 'type': 'custom', 'config': {}})
        guest.update(devices={'ephemeral0': {
            'type': 'disk', 'pool': 'default', 'source': 'v',
            'path': '/mnt'}})
        devices = {}
        self.lxd.before('POST', '/1.0/images', lambda _request: devices.update(
            self.guests.by_name(COPY).devices))
        self.take()
        self.assertEqual(['root'], [
            name for name, device in devices.items()
            if device['type'] != 'none'])

    def test_frozen_only_where_the_image_wants_it(self):
        own = '/1.0/instances/instance-00000001/state'
        self.lxd.clear_requests()
        self.take()
        self.assertEqual(0, self.lxd.count('PUT', own))
        self.server.system_metadata = {'image_os_require_quiesce': 'yes'}
        self.take()
        self.assertEqual(2, self.lxd.count('PUT', own))
        self.assertEqual(power_state.RUNNING,
                         self.guests.get(self.server).power_state)

    def test_thawed_although_the_copy_failed(self):
        self.server.system_metadata = {'image_os_require_quiesce': 'yes'}
        self.lxd.fail_operation('POST', '/1.0/instances', 'nothing doing')
        self.assertRaises(errors.OperationFailed, self.take)
        self.assert_runs_on()

    def assert_runs_on(self):
        guest = self.guests.get(self.server)
        self.assertEqual(power_state.RUNNING, guest.power_state)
        self.assertNotIn(lxd_guest.KEY_QUIESCED, guest.config)


class _Options:
    """Options, some of them below the limits that operators have."""

    def __init__(self, options, **values):
        self._options = options
        self.__dict__.update(values)

    def __getattr__(self, name):
        return getattr(self._options, name)
