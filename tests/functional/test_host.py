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

"""Inventory and start-up checks of the host with a real LXD."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import unittest

from nova.compute import provider_tree
from nova import exception
from nova import objects

from nova_lxd_py import conf
from nova_lxd_py.virt.host import host as lxd_host
from nova_lxd_py.virt.lxd import session
from nova_lxd_py.virt import preflight
from nova_lxd_py.virt.preflight import lxd_checks
from tests.fixtures import driver_case
from tests.fixtures import driver_host
from tests.fixtures import lxd_daemon

NO_LXD = lxd_daemon.missing()
CONF = conf.CONF

NODE_UUID = '5f6e1b3a-0000-4000-8000-000000000001'


@unittest.skipIf(NO_LXD, NO_LXD or '')
class HostTest(driver_case.DriverCase, unittest.TestCase):

    def setUp(self) -> None:
        super().setUp()
        [self.node] = self.driver.get_available_nodes()

    # -- resources ----------------------------------------------------------

    def test_resources(self) -> None:
        found = self.driver.get_available_resource(self.node)
        self.assertEqual(os.cpu_count(), found['vcpus'])
        self.assertIn(found['local_gb'], (7, 8))
        self.assertGreater(found['local_gb'], found['disk_available_least'])
        self.assertGreater(found['hypervisor_version'], 5000000)
        self.assertEqual('lxd', found['supported_instances'][0][1])
        info = json.loads(found['cpu_info'])
        self.assertEqual(os.cpu_count(), info['topology']['sockets'] *
                         info['topology']['cores'] *
                         info['topology']['threads'])
        node = objects.ComputeNode()
        node.update_from_virt_driver(found)

    def test_dir_pool(self) -> None:
        host = driver_host.DriverHost(lxd_daemon.shared('dir'))
        self.addCleanup(host.cleanUp)
        host.setUp()
        # The size of its filesystem.
        size = os.statvfs(host.lxd.directory)
        self.assertEqual(
            size.f_blocks * size.f_frsize >> 30,
            host.driver.get_available_resource(self.node)['local_gb'])
        self.assertIn('CUSTOM_LXD_POOL_DIR', self.traits(host))

    def test_uptime(self) -> None:
        self.assertIn('load average', self.driver.get_host_uptime())

    # -- Placement ----------------------------------------------------------

    def tree(self) -> provider_tree.ProviderTree:
        tree = provider_tree.ProviderTree()
        tree.new_root(self.node, NODE_UUID)
        return tree

    def traits(self, host: driver_host.DriverHost) -> set[str]:
        tree = self.tree()
        host.driver.update_provider_tree(tree, self.node)
        return tree.data(self.node).traits

    def test_inventory(self) -> None:
        tree = self.tree()
        self.driver.update_provider_tree(tree, self.node)
        found = tree.data(self.node)
        self.assertEqual({'VCPU', 'MEMORY_MB', 'DISK_GB'},
                         set(found.inventory))
        for record in found.inventory.values():
            self.assertGreater(record['total'], 0)
            self.assertEqual(record['total'], record['max_unit'])
        self.assertIn('CUSTOM_LXD_POOL_BTRFS', found.traits)
        self.assertTrue([trait for trait in found.traits
                         if trait.startswith('CUSTOM_LXD_SERVER_')])
        # A second update changes nothing.
        self.driver.update_provider_tree(tree, self.node)
        self.assertEqual(found.inventory, tree.data(self.node).inventory)
        self.assertEqual(found.traits, tree.data(self.node).traits)

    def test_cost_does_not_grow_with_servers(self) -> None:
        def cost() -> int:
            with self.host.requests() as sent:
                self.driver.get_available_resource(self.node)
                self.driver.update_provider_tree(self.tree(), self.node)
            return len(sent)
        cost()
        empty = cost()
        image = self.host.image()
        for _ in range(3):
            self.host.spawn(self.host.instance(image), image)
        self.assertEqual(empty, cost())
        self.assertLessEqual(empty, 3)


@unittest.skipIf(NO_LXD, NO_LXD or '')
class StartUpTest(driver_case.DriverCase, unittest.TestCase):
    """Invalid options stop the service with one sentence."""

    def set(self, **settings: object) -> None:
        for name, value in settings.items():
            group = None if name in CONF else 'lxd'
            before = CONF[group][name] if group else CONF[name]
            CONF.set_override(name, value, group)
            self.addCleanup(CONF.set_override, name, before, group)

    def assert_stops(self, *words: str) -> None:
        with self.assertRaises(exception.InvalidConfiguration) as caught:
            preflight.check(session.Session(CONF.lxd), CONF)
        for word in words:
            self.assertIn(word, str(caught.exception))

    def test_project(self) -> None:
        config = self.host.lxd.api.must(
            'GET', f'/1.0/projects/{self.host.project}')['config']
        self.assertEqual(CONF.host, config['user.nova.host'])
        self.assertEqual('true', config['features.images'])

    def test_project_of_another_host(self) -> None:
        self.set(host='host-2')
        self.assert_stops('testhost', 'host-2')

    def test_project_made_by_hand(self) -> None:
        api, path = self.host.lxd.api, f'/1.0/projects/{self.host.project}'
        project = api.must('GET', path)
        del project['config']['user.nova.host']
        api.must('PUT', path, {'description': 'by hand',
                               'config': project['config']})
        preflight.check(session.Session(CONF.lxd), CONF)
        project = api.must('GET', path)
        self.assertEqual(CONF.host, project['config']['user.nova.host'])
        self.assertEqual('by hand', project['description'])

    def test_project_that_shares_images(self) -> None:
        api = self.host.lxd.api
        name = self.host.project + '-s'
        api.must('POST', '/1.0/projects', {'name': name, 'config': {
            'features.images': 'false', 'features.profiles': 'true'}})
        self.addCleanup(api.must, 'DELETE', f'/1.0/projects/{name}')
        self.set(project=name)
        self.assert_stops(name, 'features.images=true')

    def test_missing_project(self) -> None:
        self.set(project=self.host.project + '-x', create_project=False)
        self.assert_stops(self.host.project + '-x', 'create_project')

    def test_missing_pool(self) -> None:
        self.set(storage_pool='nope')
        self.assert_stops('nope', self.host.lxd.pool)

    def test_missing_socket(self) -> None:
        self.set(endpoint='/nonexistent', startup_timeout=0)
        self.assert_stops('/nonexistent')

    def test_no_permission(self) -> None:
        answer, question = os.pipe()
        child = os.fork()
        if child == 0:
            # As a user who is not in the group of the socket.
            try:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
                opened = session.Session(CONF.lxd)
                preflight.wait_for_lxd(opened, 0, opened.connect)
            except exception.NovaException as exc:
                os.write(question, str(exc).encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        os.close(question)
        with open(answer) as stream:
            self.assertIn('group that owns the socket', stream.read())

    def test_missing_certificate(self) -> None:
        self.set(endpoint='https://127.0.0.1:9')
        self.assert_stops('client_certificate')

    def test_name_template(self) -> None:
        self.set(instance_name_template='%(uuid)s')
        self.assert_stops('instance_name_template')

    def test_lxd_has_every_required_extension(self) -> None:
        opened = session.Session(CONF.lxd)
        opened.connect()
        self.set(cloud_init_keys=True)
        lxd_checks.check_extensions(opened, CONF.lxd)


@unittest.skipIf(NO_LXD, NO_LXD or '')
class RemoteTest(unittest.TestCase):
    """LXD over TLS, as on another machine."""

    def setUp(self) -> None:
        super().setUp()
        lxd = lxd_daemon.RealLXD('dir')
        self.api = lxd.__enter__().api
        self.addCleanup(lxd.close)
        address = self.listen()
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.path = directory.name
        self.make_certificate('client')
        self.make_certificate('other')
        with open(f'{self.path}/server.crt', 'w') as stream:
            stream.write(self.api.must('GET', '/1.0')['environment'][
                'certificate'])
        for name, value in (
                ('endpoint', f'https://{address}'), ('project', 'nova'),
                ('storage_pool', lxd.pool), ('startup_timeout', 0),
                ('client_certificate', f'{self.path}/client.crt'),
                ('client_key', f'{self.path}/client.key'),
                ('server_certificate', f'{self.path}/server.crt')):
            self.set(name, value)
        for name, value in (('host', 'testhost'),
                            ('instances_path', self.path)):
            CONF.set_override(name, value)
            self.addCleanup(CONF.clear_override, name)

    def listen(self) -> str:
        """Have LXD listen on a free port.

        :returns: its address.
        """
        for _attempt in range(20):
            with socket.socket() as free:
                free.bind(('127.0.0.1', 0))
                address = '127.0.0.1:%d' % free.getsockname()[1]
            # Another process may take the port first.
            answer = self.api.call('PUT', '/1.0', {
                'config': {'core.https_address': address}})
            if not answer.error:
                return address
        raise AssertionError(answer.error)

    def set(self, name: str, value: object) -> None:
        CONF.set_override(name, value, 'lxd')
        self.addCleanup(CONF.clear_override, name, 'lxd')

    def make_certificate(self, name: str) -> None:
        subprocess.run(
            ['openssl', 'req', '-x509', '-newkey', 'ec', '-pkeyopt',
             'ec_paramgen_curve:secp384r1', '-nodes', '-days', '2', '-subj',
             f'/CN={name}', '-keyout', f'{self.path}/{name}.key', '-out',
             f'{self.path}/{name}.crt'], check=True, capture_output=True)

    def trust(self) -> None:
        with open(f'{self.path}/client.crt') as stream:
            lines = stream.read().splitlines()
        self.api.must('POST', '/1.0/certificates', {
            'type': 'client', 'name': 'nova',
            'certificate': ''.join(lines[1:-1])})

    def refusal(self) -> str:
        with self.assertRaises(exception.InvalidConfiguration) as caught:
            preflight.check(session.Session(CONF.lxd), CONF)
        return str(caught.exception)

    def test_trusted(self) -> None:
        self.trust()
        opened = session.Session(CONF.lxd)
        preflight.check(opened, CONF)
        found = lxd_host.Host(opened)
        self.assertGreater(found.available_resource('x')['memory_mb'], 0)
        # The uptime of another machine.
        self.assertRaises(NotImplementedError, found.uptime)

    def test_not_trusted(self) -> None:
        self.assertIn('does not trust', self.refusal())

    def test_another_server(self) -> None:
        self.trust()
        self.set('server_certificate', f'{self.path}/other.crt')
        self.assertIn('does not present the certificate', self.refusal())

    def test_nobody_there(self) -> None:
        self.set('endpoint', 'https://127.0.0.1:9')
        self.assertIn('127.0.0.1:9', self.refusal())
