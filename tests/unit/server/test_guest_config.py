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

"""Configuration of LXD instances, and instances that are repinned."""

from __future__ import annotations

from typing import Any

from nova import exception
from nova import objects
from nova.virt import hardware

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.guest import roles
from nova_lxd_py.virt.host import host as lxd_host
from nova_lxd_py.virt.server import guest_config
from nova_lxd_py.virt.server import repin
from nova_lxd_py.virt.vif import manager as vif_manager
from tests.fixtures import session_case

objects.register_all()

UUIDS = ['0f2a3b4c-0000-4000-8000-00000000000%d' % number
         for number in range(3)]


class DefinitionTestCase(session_case.SessionTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.guests = registry.GuestRegistry(self.session)
        self.host = lxd_host.Host(self.session)
        self.definitions = guest_config.GuestConfigBuilder(
            self.session, self.host, vif_manager.VIFManager())

    def divide(self, shared: str | None, dedicated: str | None) -> None:
        self.cfg.config(group='compute', cpu_shared_set=shared,
                        cpu_dedicated_set=dedicated)

    @staticmethod
    def flavor(swap: int = 0, **specs: str) -> objects.Flavor:
        return objects.Flavor(
            name='f', vcpus=1, memory_mb=64, root_gb=1, swap=swap,
            extra_specs={key.replace('_', ':', 1): value
                         for key, value in specs.items()})

    def server(self, number: int = 0, **specs: str) -> objects.Instance:
        flavor = self.flavor(**specs)
        wanted = hardware.numa_get_constraints(
            flavor, objects.ImageMeta(properties=objects.ImageMetaProps()))
        topology = wanted and hardware.numa_fit_instance_to_host(
            objects.NUMATopology.obj_from_db_obj(
                self.host.available_resource('x')['numa_topology']),
            wanted, None)
        return objects.Instance(
            id=number + 1, uuid=UUIDS[number], project_id='p', user_id='u',
            display_name='s', image_ref='', flavor=flavor, deleted=False,
            numa_topology=topology)

    def define(self, server: objects.Instance) -> guest_config.GuestConfig:
        return self.definitions.define(server, [])


class DefineTestCase(DefinitionTestCase):

    def test_swap(self) -> None:
        flavor = self.flavor(swap=64)
        self.assertEqual('true', self.definitions.config(flavor, None)[
            'limits.memory.swap'])
        self.lxd.daemon.extensions.append('instance_memory_swap_bytes')
        self.session.connect()
        self.assertEqual('64MiB', self.definitions.config(flavor, None)[
            'limits.memory.swap'])
        self.assertEqual('32MiB', self.definitions.config(
            flavor, None, swap_mb=32)['limits.memory.swap'])

    def test_devices(self) -> None:
        server = self.server(lxd_gpu='10de:1db4')
        self.assertRaises(exception.ComputeResourcesUnavailable, self.define,
                          server)
        self.cfg.config(group='lxd', passthrough_devices=['gpu:10de:1db4'])
        self.assertEqual('gpu', self.define(server).devices[
            'passthrough-gpu-10de-1db4']['type'])

    def test_device_of_a_former_flavor_goes(self) -> None:
        self.create('c1')
        guest = self.guests.by_name('c1')
        guest.update(devices={'passthrough-usb-0403-6001': {
            'type': 'usb', 'vendorid': '0403', 'productid': '6001'}})
        _config, devices = guest_config.config_changes(
            guest, self.define(self.server()))
        self.assertIsNone(devices['passthrough-usb-0403-6001'])

    def test_own_cpus(self) -> None:
        self.divide('0', '2')
        self.assertEqual('2-2', self.define(self.server(
            hw_cpu_policy='dedicated')).config['limits.cpu'])


class MoveTestCase(DefinitionTestCase):

    def follow(self, *servers: objects.Instance) -> None:
        repin.RepinOps(self.guests, self.definitions).repin(servers)

    def make(self, server: objects.Instance) -> str:
        config = dict(self.define(server).config)
        name = f'c{server.id}'
        self.create(name, **config)
        return name

    def limits(self, name: str) -> tuple[Any, Any]:
        config = self.guests.by_name(name).config
        return config['limits.cpu'], config.get('limits.cpu.allowance')

    def test_there_and_back(self) -> None:
        server = self.server()
        name = self.make(server)
        self.assertEqual(('1', None), self.limits(name))
        self.divide('0,2', '1')
        self.follow(server)
        self.assertEqual(('0,2', '100ms/100ms'), self.limits(name))
        self.divide(None, None)
        self.follow(server)
        self.assertEqual(('1', None), self.limits(name))

    def test_nothing_to_do(self) -> None:
        servers = [self.server(number) for number in range(3)]
        for server in servers:
            self.make(server)
        with self.lxd.recording() as requests:
            self.follow(*servers)
        self.assertEqual(1, len(requests))

    def test_pinned_stays(self) -> None:
        self.divide('0', '2')
        server = self.server(hw_cpu_policy='dedicated')
        name = self.make(server)
        self.divide('0-1', '2-3')
        self.follow(server)
        self.assertEqual(('2-2', None), self.limits(name))

    def test_rescue_instance_moves_too(self) -> None:
        server = self.server()
        self.make(server)
        self.create('r1', **{lxd_guest.KEY_UUID: server.uuid,
                             lxd_guest.KEY_ROLE: roles.RESCUE,
                             'limits.cpu': '1'})
        self.divide('0,2', None)
        self.follow(server)
        self.assertEqual(('0,2', '100ms/100ms'), self.limits('r1'))

    def assert_stops(self, server: objects.Instance, *words: str) -> None:
        error = self.assertRaises(exception.InvalidConfiguration, self.follow,
                                  server)
        for word in (server.uuid, *words):
            self.assertIn(word, str(error))

    def test_no_shared_cpus_left(self) -> None:
        server = self.server()
        self.make(server)
        self.divide(None, '0')
        self.assert_stops(server, 'cpu_shared_set')

    def test_own_cpus_taken_away(self) -> None:
        self.divide('0', '2')
        server = self.server(hw_cpu_policy='dedicated')
        self.make(server)
        self.divide('0', '1')
        self.assert_stops(server, 'CPU 2', 'cpu_dedicated_set')
        self.divide(None, None)
        self.assert_stops(server, 'CPU 2')

    def test_servers_that_lxd_does_not_have(self) -> None:
        server = self.server()
        self.divide(None, '0')
        self.follow(server)

    def test_flavor_that_is_refused_by_now(self) -> None:
        server = self.server()
        name = self.make(server)
        server.flavor.extra_specs = {'lxd:bogus': '1'}
        self.divide('0', None)
        self.follow(server)
        self.assertEqual(('1', None), self.limits(name))

    def test_lxd_refuses(self) -> None:
        server = self.server()
        name = self.make(server)
        self.divide('0,2', None)
        self.lxd.fail_next('PUT', f'/1.0/instances/{name}', 500, 'no')
        self.follow(server)
        self.assertEqual(('1', None), self.limits(name))
