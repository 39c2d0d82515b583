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

"""Checks of LXD when nova-compute starts."""

from __future__ import annotations

from tests.fixtures.fake_lxd import state
from tests.fixtures import preflight_case


class ClusterTestCase(preflight_case.PreflightTestCase):

    def test_member_of_a_cluster(self) -> None:
        self.lxd.daemon.environment['server_clustered'] = True
        self.assert_stops('LXD at', 'member of a cluster', 'without a')


class ExtensionTestCase(preflight_case.PreflightTestCase):

    def test_missing_extension(self) -> None:
        self.lxd.daemon.extensions = [
            name for name in self.lxd.daemon.extensions
            if name not in ('custom_volume_backup', 'event_lifecycle')]
        self.lxd.daemon.environment['server_version'] = '3.0.3'
        self.assert_stops('LXD 3.0.3', 'custom_volume_backup',
                          'event_lifecycle', 'LXD 5.0.2')

    def test_extension_that_only_an_option_needs(self) -> None:
        self.lxd.daemon.extensions = [
            name for name in self.lxd.daemon.extensions
            if name != 'cloud_init']
        self.check()
        self.cfg.config(group='lxd', cloud_init_keys=True)
        self.assert_stops('cloud_init')


class ProjectTestCase(preflight_case.PreflightTestCase):

    def test_created(self) -> None:
        self.check()
        self.assertEqual({
            'features.images': 'true', 'features.profiles': 'true',
            'features.storage.volumes': 'true', 'features.networks': 'false',
            'user.nova.host': 'host-1'}, self.projects['nova'].config)

    def test_found_again(self) -> None:
        self.check()
        with self.lxd.recording() as requests:
            self.check()
        self.assertEqual({'GET'}, {request.method for request in requests})

    def test_may_not_be_created(self) -> None:
        self.cfg.config(group='lxd', create_project=False)
        self.assert_stops('project nova does not exist', 'create_project')
        self.assertNotIn('nova', self.projects)

    def test_cannot_be_created(self) -> None:
        self.lxd.fail_next('POST', '/1.0/projects', 403, 'Forbidden')
        self.assert_stops('project nova', 'may not create it')

    def test_may_not_be_read(self) -> None:
        self.lxd.fail_next('GET', '/1.0/projects/nova', 403, 'Forbidden')
        self.assert_stops('denies nova-compute')

    def test_hidden(self) -> None:
        """LXD answers 404 if the certificate may not see the project."""
        self.lxd.add_project('nova')
        self.lxd.fail_next('GET', '/1.0/projects/nova', 404, 'Not found',
                           times=None)
        self.assert_stops('cannot see the LXD project nova')

    def test_made_by_hand(self) -> None:
        self.lxd.add_project('nova')
        self.projects['nova'].description = 'by hand'
        self.projects['nova'].config['limits.instances'] = '7'
        self.check()
        self.assertEqual('host-1',
                         self.projects['nova'].config['user.nova.host'])
        self.assertEqual('7', self.projects['nova'].config['limits.instances'])
        self.assertEqual('by hand', self.projects['nova'].description)

    def test_made_by_hand_and_may_not_be_marked(self) -> None:
        self.lxd.add_project('nova')
        self.lxd.fail_next('PUT', '/1.0/projects/nova', 403, 'Forbidden')
        self.check()
        self.assertIn('no other nova-compute', self.log.output)

    def test_of_another_host(self) -> None:
        self.lxd.add_project('nova', **{'user.nova.host': 'host-2'})
        self.assert_stops('belongs to the nova-compute service of host host-2',
                          'lxc project set nova user.nova.host=host-1')
        self.assertEqual('host-2',
                         self.projects['nova'].config['user.nova.host'])

    def test_claimed_by_two_at_once(self) -> None:
        self.lxd.add_project('nova')
        self.lxd.before('PUT', '/1.0/projects/nova', lambda request:
                        self.projects['nova'].config.update(
                            {'user.nova.host': 'host-2'}))
        self.assert_stops()
        self.assertEqual('host-2',
                         self.projects['nova'].config['user.nova.host'])

    def test_shares_images_or_volumes(self) -> None:
        for feature in ('features.images', 'features.storage.volumes'):
            self.lxd.add_project('nova', **{feature: 'false'})
            self.assert_stops(feature, 'project nova')

    def test_default(self) -> None:
        self.cfg.config(group='lxd', project='default')
        self.assert_stops('default')


class PoolTestCase(preflight_case.PreflightTestCase):

    def test_missing(self) -> None:
        self.lxd.daemon.store.pools['fast'] = state.Pool('fast')
        self.cfg.config(group='lxd', storage_pool='nope')
        self.assert_stops('no storage pool nope', 'default, fast')

    def test_none(self) -> None:
        self.lxd.daemon.store.pools.clear()
        self.assert_stops('no storage pool default', 'lxc storage create')

    def test_out_of_order(self) -> None:
        self.lxd.daemon.store.pools['default'].status = 'Unavailable'
        self.assert_stops('default', 'unavailable')

    def test_dir(self) -> None:
        self.lxd.daemon.store.pools['default'].driver = 'dir'
        self.check()
        self.assertIn('not enforced', self.log.output)


class IncusTestCase(preflight_case.PreflightTestCase):
    """Advice names what the operator has."""

    server = 'incus'

    def test_usable(self) -> None:
        self.check()

    def test_project_of_another_host(self) -> None:
        self.lxd.add_project('nova', **{'user.nova.host': 'host-2'})
        self.assert_stops('"incus project set nova user.nova.host=host-1"')

    def test_no_pool(self) -> None:
        self.lxd.daemon.store.pools.clear()
        self.assert_stops('incus storage create')

    def test_missing_extension(self) -> None:
        self.lxd.daemon.extensions.remove('resources')
        self.assert_stops('Incus 6.0.4 lacks', 'resources')


class MigrationTestCase(preflight_case.PreflightTestCase):

    def address(self, address: str | None) -> None:
        self.cfg.config(group='lxd', migration_address=address)

    def test_unset(self) -> None:
        self.check()
        self.assertEqual({}, self.lxd.daemon.config)

    def test_lxd_listens(self) -> None:
        self.address('192.0.2.1')
        opened = self.check()
        self.assertEqual('192.0.2.1:8443', opened.server['config'][
            'core.https_address'])
        self.check()

    def test_no_address(self) -> None:
        self.address('192.0.2.1:lxd')
        self.assert_stops('migration_address is "192.0.2.1:lxd"')

    def test_lxd_cannot_listen(self) -> None:
        self.address('192.0.2.1')
        self.lxd.fail_next('PATCH', '/1.0', 500, 'cannot assign requested '
                                                 'address')
        self.assert_stops('migration_address 192.0.2.1',
                          'cannot assign requested address')

    def test_lxd_listens_elsewhere(self) -> None:
        self.lxd.daemon.config['core.https_address'] = '127.0.0.1:8443'
        self.address('192.0.2.1')
        self.assert_stops('192.0.2.1', 'LXD listens at 127.0.0.1:8443',
                          'core.https_address')
