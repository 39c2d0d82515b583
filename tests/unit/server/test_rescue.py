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
"""Rescue: where the root disk is, and what LXD's refusals mean."""

from __future__ import annotations

import json

from nova import exception
from nova import objects

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import password
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.guest import roles
from nova_lxd_py.virt.host import host as lxd_host
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.metadata import config_drive
from nova_lxd_py.virt.server import guest_config
from nova_lxd_py.virt.server import rescue
from nova_lxd_py.virt import services
from nova_lxd_py.virt.vif import manager as vif_manager
from tests.fixtures.fake_lxd import fixture
from tests.fixtures import session_case

objects.register_all()

UUID = '0c1e9f0a-1111-4222-8333-444455556666'
OWN = 'instance-00000001'
OTHER = 'instance-00000001-rescue'


class _Images:
    """Has images already, by their aliases."""

    def __init__(self, session):
        self._session = session

    def ensure(self, context, image_meta, instance):
        return self._session.get('images', 'aliases',
                                 image_meta.id)['target']

    @staticmethod
    def explain_create_failure(error, instance, image_meta):
        return error


class RescueTestCase(session_case.SessionTestCase):

    def setUp(self):
        super().setUp()
        self.cfg.config(group='lxd', directory='/srv/lxd',
                        inject_password=False)
        self.guests = registry.GuestRegistry(self.session)
        vifs = vif_manager.VIFManager()
        self.rescues = rescue.RescueOps(
            self.session, self.guests,
            guest_config.GuestConfigBuilder(
                self.session, lxd_host.Host(self.session), vifs),
            vifs, _Images(self.session),
            config_drive.ConfigDriveManager(self.session),
            password.AdminPassword(self.session, self.guests),
            services.build(None, lambda event: None).volumes)
        self.server = objects.Instance(
            id=1, uuid=UUID, project_id='p', user_id='u', display_name='s',
            image_ref='', config_drive='', system_metadata={}, task_state=None,
            vm_state='active', info_cache=objects.InstanceInfoCache(
                network_info=None),
            flavor=objects.Flavor(name='f', vcpus=1, memory_mb=64, root_gb=1,
                                  swap=0, extra_specs={}),
            numa_topology=None)
        # The fake LXD mounts nothing, so the image has what would be there.
        self.lxd.add_image(fixture.unified_image(
            {'mnt': None, 'mnt/rescue': None, 'mnt/rescue/etc': None}),
            project='nova', alias='rescue')
        self.image = objects.ImageMeta.from_dict(
            {'id': 'rescue', 'properties': {}})

    def make_server(self, **config):
        self.create(OWN, start=True, **{
            lxd_guest.KEY_UUID: UUID,
            lxd_guest.KEY_ROLE: roles.SERVER, **config})

    def go(self):
        return self.rescues.rescue(None, self.server, [], self.image, 'x')

    def assert_own_in_charge(self):
        self.assertEqual([OWN], sorted(self.lxd.instances))
        self.assertNotIn(lxd_guest.KEY_RESCUED,
                         self.guests.get(self.server).config)

    def test_device(self):
        self.make_server()
        device = self.go().devices['rescue']
        self.assertEqual('/mnt/rescue', device['path'])
        self.assertEqual('/srv/lxd/storage-pools/default/containers/'
                         f'nova_{OWN}/rootfs', device['source'])
        self.assertNotIn('shift', device)

    def test_root_disk_that_is_not_there(self):
        self.make_server()
        self.image.id = 'tiny'
        error = self.assertRaises(exception.InstanceNotRescuable, self.go)
        self.assertIn('btrfs', str(error))
        self.assert_own_in_charge()

    def test_same_uid_range(self):
        self.make_server(**{'security.idmap.isolated': 'true'})
        own, other = self.guests.get(self.server), self.go()
        mapped = json.loads(own.reload().config['volatile.last_state.idmap'])
        self.assertEqual(str(mapped[0]['Hostid']),
                         other.config['security.idmap.base'])

    def test_start_fails(self):
        self.make_server()
        self.lxd.fail_operation('PUT', f'/1.0/instances/{OTHER}/state',
                                'Failed to run: forkstart',
                                where={'action': 'start'})
        self.assertRaises(errors.OperationFailed, self.go)
        self.assert_own_in_charge()

    def test_root_disk_of_an_unusual_pool(self):
        self.make_server()
        self.lxd.fail_next(
            'POST', '/1.0/instances', 400,
            'Failed add validation for device "rescue": Missing source path '
            '"/x" for disk "rescue"')
        error = self.assertRaises(exception.InstanceNotRescuable, self.go)
        self.assertIn('btrfs', str(error))
        self.assertNotIn('/x', str(error))
        self.assert_own_in_charge()

    def test_server_that_never_ran(self):
        self.make_server()
        self.lxd.fail_operation(
            'PUT', f'/1.0/instances/{OTHER}/state',
            'Required idmapping abilities not available',
            where={'action': 'start'})
        self.assertRaises(exception.InstanceNotRescuable, self.go)
        self.assert_own_in_charge()

    def test_nobody_tells_the_directory(self):
        self.make_server()
        self.cfg.config(group='lxd', directory='',
                        endpoint='https://lxd.example:8443')
        self.assertRaises(exception.InstanceNotRescuable, self.go)
        self.assert_own_in_charge()

    def test_left_over_rescue_instance_is_replaced(self):
        self.make_server()
        self.create(OTHER, **{lxd_guest.KEY_UUID: UUID,
                              lxd_guest.KEY_ROLE: 'rescue',
                              'user.old': 'yes'})
        self.assertNotIn('user.old', self.go().config)

    def test_recovery_keeps_what_is_in_use(self):
        self.make_server()
        self.go()
        self.rescues.recover()
        self.assertIn(OTHER, self.lxd.instances)

    def test_recovery_survives_an_lxd_in_trouble(self):
        self.lxd.fail_next('GET', '/1.0/instances')
        self.rescues.recover()
