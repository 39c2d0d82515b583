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
"""Unit tests of ephemeral disks: names, sizes and failures."""

from __future__ import annotations

from unittest import mock

import fixtures
from nova import exception
from nova import objects

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.privileged import mounts
from nova_lxd_py.virt.storage import ephemeral_disks
from tests.fixtures import session_case

objects.register_all()

UUID = '0c1e9f0a-1111-4222-8333-444455556666'
VOLUMES = '/1.0/storage-pools/default/volumes/custom'


def described(*sizes, **fields):
    return {'ephemerals': [{'size': size, 'guest_format': None, **fields}
                           for size in sizes]}


class DiskTestCase(session_case.SessionTestCase):

    def setUp(self):
        super().setUp()
        self.disks = ephemeral_disks.EphemeralDiskManager(self.session)
        self.server = self.make_server(UUID)

    def make_server(self, uuid, **extra_specs):
        return objects.Instance(
            id=1, uuid=uuid, project_id='project',
            flavor=objects.Flavor(name='f', swap=64, extra_specs=extra_specs))

    def volumes(self):
        return {volume['name']: volume['config'] for volume in
                self.session.get('storage-pools', 'default', 'volumes',
                                 'custom', params={'recursion': 1})}

    def test_none_requested(self):
        for info in (None, {}, described()):
            self.assertEqual({}, self.disks.create(self.server, info))
            self.assertEqual({}, self.disks.ensure(self.server, info))
        self.disks.delete(self.server)
        self.assertEqual({}, self.volumes())

    def test_devices(self):
        self.server.flavor.extra_specs = {'quota:disk_read_iops_sec': '10'}
        devices = self.disks.create(self.server, described(1, 2))
        self.assertEqual({
            'ephemeral0': {
                'type': 'disk', 'pool': 'default', 'path': '/mnt',
                'source': f'ephemeral-{UUID}-0', 'limits.read': '10iops'},
            'ephemeral1': {
                'type': 'disk', 'pool': 'default', 'path': '/mnt/ephemeral1',
                'source': f'ephemeral-{UUID}-1', 'limits.read': '10iops'},
        }, devices)
        self.assertEqual(devices, self.disks.ensure(self.server, None))
        volumes = self.volumes()
        self.assertEqual('2GiB', volumes[f'ephemeral-{UUID}-1']['size'])
        self.assertEqual(UUID, volumes[f'ephemeral-{UUID}-1'][
            lxd_guest.KEY_UUID])

    def test_eleven(self):
        self.disks.create(self.server, described(*([1] * 11)))
        self.assertEqual(list(range(11)), self.disks.find(self.server))
        self.disks.delete(self.server)
        self.assertEqual({}, self.volumes())

    def test_deleted_by_hand(self):
        """The others are found if their number is known."""
        for count, found in ((0, [0]), (3, [0, 2])):
            self.disks.create(self.server, described(1, 1, 1))
            self.session.delete('storage-pools', 'default', 'volumes',
                                'custom', f'ephemeral-{UUID}-1')
            self.assertEqual(found, self.disks.find(self.server, count))
        self.disks.create(self.server, described(1, 1, 1))
        self.assertEqual([0, 1, 2], self.disks.find(self.server))

    def test_interrupted_deletion(self):
        """The next one finds the rest."""
        self.disks.create(self.server, described(1, 1, 1))
        self.lxd.fail_next('DELETE', f'{VOLUMES}/ephemeral-{UUID}-1')
        self.assertRaises(errors.LXDError, self.disks.delete, self.server)
        self.disks.delete(self.server)
        self.assertEqual({}, self.volumes())

    def test_count_of_names(self):
        for names, count in (([], 0), (['root', 'ephemeralx'], 0),
                             (['ephemeral0'], 1),
                             (['ephemeral10', 'root', 'ephemeral2'], 11)):
            self.assertEqual(count, ephemeral_disks.count_of(
                names, ephemeral_disks.DEVICE_PREFIX))

    def test_others_are_not_touched(self):
        other = self.make_server('0c1e9f0a-1111-4222-8333-000000000000')
        self.disks.create(other, described(1))
        for name in (f'ephemeral-{UUID}', f'ephemeral-{UUID}-x',
                     f'config-drive-{UUID}'):
            self.session.post('storage-pools', 'default', 'volumes', 'custom',
                              body={'name': name, 'type': 'custom',
                                    'config': {}})
        self.disks.create(self.server, described(1))
        self.disks.delete(self.server)
        self.assertEqual(4, len(self.volumes()))

    def test_second_fails(self):
        self.lxd.fail_next('POST', VOLUMES, 500, 'no space left on device',
                           where={'name': f'ephemeral-{UUID}-1'})
        self.assertRaises(errors.LXDError, self.disks.create, self.server,
                          described(1, 1))
        self.disks.delete(self.server)
        self.assertEqual({}, self.volumes())

    def test_deleted_by_somebody_else_meanwhile(self):
        self.disks.create(self.server, described(1, 1))
        self.lxd.before(
            'DELETE', f'{VOLUMES}/ephemeral-{UUID}-1',
            lambda _request: self.session.delete(
                'storage-pools', 'default', 'volumes', 'custom',
                f'ephemeral-{UUID}-1'))
        self.disks.delete(self.server)
        self.assertEqual({}, self.volumes())

    def test_growth_only(self):
        self.disks.create(self.server, described(2))
        for asked, found in ((1, '2GiB'), (2, '2GiB'), (3, '3GiB')):
            self.disks.ensure(self.server, described(asked))
            self.assertEqual(found, self.volumes()[
                f'ephemeral-{UUID}-0']['size'])

    def shrink(self):
        """Try to shrink a disk.

        :returns: how often LXD was asked for its usage.
        """
        self.disks.create(self.server, described(2))
        self.disks.resize(self.server, 2, 1)
        return self.lxd.count('GET', f'{VOLUMES}/ephemeral-{UUID}-0/state')

    def test_shrinking_writes_cached_data_first(self):
        """That of the disk, which LXD does not count as usage before."""
        synced = []
        for name in ('sync_pool', 'sync_host'):
            self.useFixture(fixtures.MockPatchObject(
                mounts, name, lambda *args: synced.append(args)))
        self.cfg.config(group='lxd', directory='/srv/lxd')
        self.assertEqual(1, self.shrink())
        self.assertEqual([(f'/srv/lxd/storage-pools/default/custom/'
                           f'nova_ephemeral-{UUID}-0', 240)], synced)

    def test_shrinking_where_the_pool_is_out_of_sight(self):
        synced = []
        self.useFixture(fixtures.MockPatchObject(
            mounts, 'sync_pool', mock.Mock(side_effect=FileNotFoundError)))
        self.useFixture(fixtures.MockPatchObject(
            mounts, 'sync_host', synced.append))
        self.assertEqual(1, self.shrink())
        self.assertEqual([240], synced)

    def test_unwritten_data_keeps_the_size(self):
        self.useFixture(fixtures.MockPatchObject(
            mounts, 'sync_pool', mock.Mock(side_effect=TimeoutError)))
        self.assertEqual(0, self.shrink())
        self.assertEqual('2GiB', self.volumes()[f'ephemeral-{UUID}-0'][
            'size'])

    def test_missing_disk_is_recreated(self):
        self.disks.ensure(self.server, described(1))
        self.assertEqual([0], self.disks.find(self.server))

    def test_encrypted(self):
        self.assertRaises(exception.InvalidInput, self.disks.create,
                          self.server, described(1, encrypted=True))
        self.assertEqual({}, self.volumes())

    def test_swap(self):
        flavor = self.server.flavor
        self.assertEqual(64, ephemeral_disks.swap_mb(flavor, None))
        self.assertEqual(64, ephemeral_disks.swap_mb(flavor, {'swap': None}))
        self.assertEqual(32, ephemeral_disks.swap_mb(flavor, {'swap': {
            'device_name': '/dev/sdb', 'swap_size': 32}}))
