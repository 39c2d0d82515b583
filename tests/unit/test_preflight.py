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

"""Checks at start-up of nova-compute, and their messages."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time

import fixtures
from nova import exception
from oslo_config import fixture as config_fixture
from oslotest import base

from nova_lxd_py import conf
from nova_lxd_py.virt.lxd import session
from nova_lxd_py.virt import preflight
from tests.fixtures import fake_lxd
from tests.fixtures.fake_lxd import state


class PreflightTestCase(base.BaseTestCase):

    server = 'lxd'

    def setUp(self) -> None:
        super().setUp()
        self.lxd = self.useFixture(fake_lxd.FakeLXD(server=self.server))
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = directory.name
        self.cfg = self.useFixture(config_fixture.Config(conf.CONF))
        self.cfg.config(host='host-1',
                        instances_path=os.path.join(self.directory, 'a', 'b'))
        self.cfg.config(group='lxd', endpoint=self.lxd.endpoint,
                        project='nova', startup_timeout=0)
        self.log = self.useFixture(fixtures.FakeLogger(level=logging.INFO))
        # Independent of the files of the machine that runs the tests.
        self.uid_ranges(100)

    def uid_ranges(self, ranges: int) -> None:
        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.host.subordinate_ids.capacity',
            lambda endpoint: ranges))

    def check(self) -> session.Session:
        opened = session.Session(conf.CONF.lxd)
        preflight.check(opened, conf.CONF)
        return opened

    def assert_stops(self, *words: str) -> None:
        error = self.assertRaises(exception.InvalidConfiguration, self.check)
        for word in words:
            self.assertIn(word, str(error))
        # One sentence.
        self.assertNotIn('\n', str(error))

    @property
    def projects(self) -> dict[str, state.Project]:
        return self.lxd.daemon.store.projects


class CpuTestCase(PreflightTestCase):

    def divide(self, shared: str | None, dedicated: str | None = None
               ) -> None:
        self.cfg.config(group='compute', cpu_shared_set=shared,
                        cpu_dedicated_set=dedicated)

    def test_good(self) -> None:
        for sets in (('0-1', '2-3'), ('0', None), (None, '3')):
            self.divide(*sets)
            self.check()

    def test_cpus_that_are_not_there(self) -> None:
        self.divide('0-5')
        self.assert_stops('cpu_shared_set', 'CPU 4-5', 'host has 0-3')
        self.divide('0', '1,9')
        self.assert_stops('cpu_dedicated_set', 'CPU 9')

    def test_offline(self) -> None:
        cores = self.lxd.daemon.resources['cpu']['sockets'][0]['cores']
        cores[2]['threads'][0]['online'] = False
        self.divide('0', '2')
        self.assert_stops('cpu_dedicated_set', 'CPU 2', 'offline')

    def test_unknown(self) -> None:
        self.lxd.daemon.resources['cpu'] = {'sockets': None, 'total': 4}
        self.divide('0')
        self.assert_stops('none that LXD reports')

    def test_in_both(self) -> None:
        self.divide('0-2', '2-3')
        self.assert_stops('CPU 2 is both')

    def test_not_a_set(self) -> None:
        for text in ('x', '3-1', '^0'):
            self.divide(text)
            self.assert_stops('cpu_shared_set')

    def test_reserved_cpus(self) -> None:
        self.cfg.config(reserved_host_cpus=1)
        self.check()
        self.divide('0')
        self.assert_stops('reserved_host_cpus')

    def test_old_option(self) -> None:
        self.cfg.config(vcpu_pin_set='0-1')
        self.assert_stops('vcpu_pin_set', 'cpu_shared_set')


class DeviceTestCase(PreflightTestCase):

    def test_bad(self) -> None:
        self.cfg.config(group='lxd', passthrough_devices=['gpu:x'])
        self.assert_stops('[lxd] passthrough_devices', '"gpu:x"')

    def test_missing(self) -> None:
        self.cfg.config(group='lxd', passthrough_devices=['gpu:10de:1db4'])
        self.check()
        self.assertIn('not have the gpu device 10de:1db4', self.log.output)
        self.lxd.daemon.resources['gpu']['cards'] = [
            {'vendor_id': '10de', 'product_id': '1db4'}]
        before = len(self.log.output)
        self.check()
        self.assertNotIn('no gpu', self.log.output[before:])


class ConnectionTestCase(PreflightTestCase):

    def test_all_is_well(self) -> None:
        self.assertTrue(self.check().server)
        self.assertTrue(os.path.isdir(conf.CONF.instances_path))

    def test_no_socket(self) -> None:
        self.cfg.config(group='lxd', endpoint='/nonexistent/unix.socket')
        self.assert_stops('/nonexistent/unix.socket', '[lxd] endpoint')

    def test_nobody_listens(self) -> None:
        self.lxd.stop()
        self.assert_stops(self.lxd.endpoint)

    def test_no_permission(self) -> None:
        # Root may open any socket, so the kernel's error is simulated.
        self.useFixture(fixtures.MonkeyPatch(
            'socket.socket.connect', _refuse))
        self.assert_stops('group that owns the socket')

    def distrust(self) -> None:
        # Unix sockets are always trusted, certificates not always.
        self.useFixture(fixtures.MonkeyPatch(
            'tests.fixtures.fake_lxd.transport.UnixServer.is_trusted',
            lambda server, connection: False))

    def test_not_trusted(self) -> None:
        self.distrust()
        self.assert_stops('does not trust')

    def test_unset_certificates(self) -> None:
        self.cfg.config(group='lxd', endpoint='https://127.0.0.1:1')
        self.assert_stops('client_certificate')

    def test_certificate_that_is_not_there(self) -> None:
        self.cfg.config(group='lxd', endpoint='https://127.0.0.1:1',
                        client_certificate='/nonexistent/crt')
        self.assert_stops('/nonexistent/crt', 'client_certificate')

    def test_waits_for_a_late_start(self) -> None:
        self.cfg.config(group='lxd', startup_timeout=30)
        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.preflight.RETRY_DELAY', 0.01))
        self.lxd.stop()
        timer = threading.Timer(0.2, self.lxd.start)
        timer.start()
        self.addCleanup(timer.join)
        self.check()
        self.assertEqual(
            1, self.log.output.count('waiting for up to 30 seconds'))

    def test_waits_for_a_slow_answer(self) -> None:
        """LXD listens, but closes connections or answers late."""
        self.cfg.config(group='lxd', startup_timeout=30)
        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.preflight.RETRY_DELAY', 0.01))
        for path in ('/1.0', '/1.0/projects/*', '/1.0/storage-pools/*'):
            self.lxd.drop_connection('GET', path)
            self.check()
        self.assertEqual(3, self.log.output.count('LXD does not answer yet'))

    def test_does_not_wait_for_ever(self) -> None:
        self.cfg.config(group='lxd', startup_timeout=1)
        self.lxd.stop()
        began = time.monotonic()
        self.assert_stops('startup_timeout')
        self.assertLess(time.monotonic() - began, 5)

    def test_does_not_wait_for_permission(self) -> None:
        self.cfg.config(group='lxd', startup_timeout=30)
        self.distrust()
        began = time.monotonic()
        self.assert_stops('does not trust')
        self.assertLess(time.monotonic() - began, 5)

    def test_breaks_off_in_the_middle(self) -> None:
        self.lxd.drop_connection('GET', '/1.0/projects/*')
        self.assert_stops('cannot be used')

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

    def test_instances_path(self) -> None:
        path = os.path.join(self.directory, 'file')
        with open(path, 'w'):
            pass
        self.cfg.config(instances_path=os.path.join(path, 'x'))
        self.assert_stops('instances_path', path)

    def test_serial_console_command(self) -> None:
        self.cfg.config(group='lxd', serial_console_command='')
        self.assert_stops('serial_console_command', 'login')
        self.cfg.config(group='lxd', serial_console_command='login "x')
        self.assert_stops('serial_console_command', 'quot')
        self.cfg.config(group='lxd',
                        serial_console_command='sh -c "exec login"')
        self.check()

    def test_config_drive_device(self) -> None:
        self.cfg.config(mkisofs_cmd='/no/such/mkisofs')
        self.check()
        self.cfg.config(group='lxd', config_drive_device=True)
        self.assert_stops('config_drive_device', 'genisoimage')
        self.cfg.config(mkisofs_cmd='true')
        self.check()


def _refuse(*args: object) -> None:
    raise PermissionError(13, 'Permission denied')


class ProjectTestCase(PreflightTestCase):

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


class PoolTestCase(PreflightTestCase):

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


class IncusTestCase(PreflightTestCase):
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


class UidRangeTestCase(PreflightTestCase):

    def test_enough(self) -> None:
        self.check()
        self.assertIn('100 ranges of host uids', self.log.output)

    def test_too_few(self) -> None:
        self.uid_ranges(0)
        self.check()
        self.assertIn('/etc/subuid', self.log.output)

    def test_off(self) -> None:
        self.cfg.config(group='lxd', idmap_isolation='off')
        self.uid_ranges(0)
        self.check()
        self.assertNotIn('/etc/subuid', self.log.output)


class NameTestCase(base.BaseTestCase):

    def test_good(self) -> None:
        for template in ('instance-%08x', 'nova-%(uuid)s', 'i%d', 'a-%(id)x',
                         'p-%(project_id)s-%(id)d', 'Vm%s'):
            preflight.check_name_template(template)

    def refusal(self, template: str) -> str:
        return str(self.assertRaises(
            exception.InvalidConfiguration, preflight.check_name_template,
            template))

    def test_tenants_choice(self) -> None:
        for field in ('display_name', 'hostname', 'key_name', 'metadata'):
            self.assertIn(f'not {field}',
                          self.refusal(f'i-%(id)x-%({field})s'))

    def test_names_lxd_does_not_take(self) -> None:
        for template in ('%(uuid)s', '%d', '-%d', 'instance_%x', 'i.%d',
                         'instance-%08x-', 'i %d', 'ü%d', '%(project_id)s',
                         'i' * 50 + '-%08x', 'a-%(user_id)s-%(id)d'):
            self.assertIn('which produces names such as',
                          self.refusal(template))

    def test_room_for_the_rescue_instance(self) -> None:
        # With "-snapshot" that makes 63 characters.
        preflight.check_name_template('i' * 45 + '-%08x')
        self.refusal('i' * 46 + '-%08x')

    def test_same_name_for_several(self) -> None:
        for template in ('instance', 'p%(project_id)s'):
            self.assertIn('the same name', self.refusal(template))

    def test_not_a_template(self) -> None:
        for template in ('i%', 'i%(id)', '%(id)y', '%z'):
            self.refusal(template)
