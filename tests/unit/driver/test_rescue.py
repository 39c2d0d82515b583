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

"""Rescue and back, through the driver as Nova calls it."""

from __future__ import annotations

import json

from nova.compute import power_state
from nova.compute import task_states
from nova.compute import vm_states
from nova import exception
from nova.network import model
from nova import objects

from nova_lxd_py.virt.vif import veth
from tests.fixtures import disks
from tests.fixtures import fake_driver_host
from tests.fixtures.fake_lxd import fixture


class RescueTest(fake_driver_host.FakeDriverTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.ports = self.host.ports()
        # The fake LXD mounts nothing, so the image has what would be there.
        self.rescue_image = self.host.image(fixture.unified_image(
            {'mnt': None, 'mnt/rescue': None, 'mnt/rescue/etc': None}))

    def make(self, **kwargs: object) -> objects.Instance:
        image = self.host.image()
        server = self.host.spawn(
            self.host.instance(image, config_drive='True'), image, self.ports,
            **kwargs)
        server.info_cache = objects.InstanceInfoCache(
            instance_uuid=server.uuid,
            network_info=model.NetworkInfo(self.ports))
        return server

    def rescue(self, server: objects.Instance) -> None:
        self.driver.rescue(self.context, server, self.ports,
                           self.rescue_image, 'secret', None, None)
        server.vm_state = vm_states.RESCUED

    def unrescue(self, server: objects.Instance) -> None:
        self.driver.unrescue(self.context, server)
        server.vm_state = vm_states.ACTIVE

    def status(self) -> dict[str, str]:
        return {name: entry['status']
                for name, entry in self.host.own().items()}

    def make_leftover(self, server: objects.Instance) -> None:
        """Have a rescue instance of which the server's own knows nothing."""
        self.lxd.api.must('POST', '/1.0/instances', {
            'name': f'{server.name}-rescue', 'profiles': [],
            'source': {'type': 'none'},
            'config': {'user.nova.uuid': server.uuid,
                       'user.nova.role': 'rescue'},
            'devices': {'root': {'type': 'disk', 'path': '/',
                                 'pool': 'default'}}},
            params={'project': self.host.project})

    def assert_own_in_charge(self, server: objects.Instance) -> None:
        self.assertEqual([server.name], list(self.host.own()))
        self.assertNotIn('user.nova.rescued', self.config(server))

    def test_there_and_back(self) -> None:
        server = self.make()
        own, other = server.name, f'{server.name}-rescue'
        before = dict(self.devices(server))
        self.rescue(server)
        self.assertEqual({own: 'Stopped', other: 'Running'}, self.status())
        self.assert_state(power_state.RUNNING, server)
        # It is one server for Nova.
        self.assertEqual([server.uuid], self.driver.list_instance_uuids())
        self.assertEqual(1, self.driver.get_num_instances())
        devices = self.lxd.instance(other).devices
        self.assertEqual('/mnt/rescue', devices['rescue']['path'])
        self.assertEqual({name for name in before if name != 'root'},
                         set(devices) - {'root', 'rescue'})
        self.unrescue(server)
        self.assertEqual({own: 'Running'}, self.status())
        self.assertEqual(before, self.devices(server))
        self.assert_own_in_charge(server)

    def test_files_keep_their_owners(self) -> None:
        """The rescue instance has the ids that the files have on the disk."""
        server = self.make()
        on_disk = self.config(server)['volatile.last_state.idmap']
        self.rescue(server)
        other = self.lxd.instance(f'{server.name}-rescue')
        self.assertEqual(json.loads(on_disk), json.loads(
            other.config['volatile.idmap.next']))

    def test_other_ids_than_the_files_have(self) -> None:
        """LXD gave the instance a range of its own: no rescue then."""
        server = self.make()
        self.driver.power_off(server)
        config = self.config(server)
        shifted = json.loads(config['volatile.last_state.idmap'])
        for entry in shifted:
            entry['Hostid'] += 65536 * 7
        config['volatile.last_state.idmap'] = json.dumps(shifted)
        config.pop('security.idmap.isolated', None)
        config.pop('security.idmap.base', None)
        self.assertRaises(exception.InstanceNotRescuable, self.rescue, server)
        self.assert_own_in_charge(server)

    def test_power_is_that_of_the_rescue_instance(self) -> None:
        server = self.make()
        self.rescue(server)
        self.driver.power_off(server)
        self.assert_state(power_state.SHUTDOWN, server)
        self.driver.power_on(self.context, server, self.ports)
        self.assert_state(power_state.RUNNING, server)
        self.driver.reboot(self.context, server, self.ports, 'HARD')
        self.assertEqual('Stopped', self.status()[server.name])
        self.assertEqual('Running', self.status()[f'{server.name}-rescue'])
        self.driver.destroy(self.context, server, self.ports)
        self.assert_nothing_left()

    def test_ports_that_an_unknown_guest_holds(self) -> None:
        """LXD has lost a guest of which the network devices are left."""
        server = self.make()
        inner = veth.VethPair(self.ports[0]).inner
        for act in (self.rescue, self.unrescue):
            with self.subTest(act=act.__name__):
                self.driver.power_off(server)
                lost = self.network.hand_over(inner)
                act(server)
                self.assert_state(power_state.RUNNING, server)
                self.assertNotIn(lost, self.network.devices.values())

    def test_volumes_wait(self) -> None:
        volume = self.storage.volume()
        info = disks.described(volume.mapping())
        server = self.make(block_device_info=info)
        self.rescue(server)
        other = self.lxd.instance(f'{server.name}-rescue')
        self.assertNotIn(f'volume-{volume.id}', other.devices)
        self.assertIn(f'volume-{volume.id}', self.devices(server))

    def test_image_for_virtual_machines(self) -> None:
        server = self.make()
        self.rescue_image = self.host.image(hw_rescue_device='disk')
        self.assertRaises(exception.InstanceNotRescuable, self.rescue, server)
        self.assert_state(power_state.RUNNING, server)

    def test_disk_is_not_to_be_seen(self) -> None:
        server = self.make()
        self.rescue_image = self.host.image()
        self.assertRaises(exception.InstanceNotRescuable, self.rescue, server)
        self.assert_own_in_charge(server)

    def test_lxd_refuses_a_step(self) -> None:
        server = self.make()
        other = f'{server.name}-rescue'
        for method, path, where in (
                ('POST', '/1.0/instances', {'name': other}),
                ('PUT', f'/1.0/instances/{other}/state', {'action': 'start'}),
                ('PUT', f'/1.0/instances/{server.name}', {})):
            with self.subTest(path=path):
                self.lxd.fail_next(method, path, where=where)
                self.assertRaises(exception.NovaException, self.rescue,
                                  server)
                self.assert_own_in_charge(server)
                self.driver.power_on(self.context, server, self.ports)
                self.assert_state(power_state.RUNNING, server)

    def test_unrescue_fails(self) -> None:
        server = self.make()
        other = f'{server.name}-rescue'
        for method, path in (
                ('DELETE', f'/1.0/instances/{other}'),
                ('PUT', f'/1.0/instances/{server.name}'),
                ('PUT', f'/1.0/instances/{server.name}/state')):
            with self.subTest(path=path):
                self.rescue(server)
                self.lxd.fail_next(method, path)
                self.assertRaises(exception.NovaException, self.unrescue,
                                  server)
                self.unrescue(server)
                self.assert_own_in_charge(server)
                self.assert_state(power_state.RUNNING, server)

    def test_unknown_server(self) -> None:
        server = self.host.instance(self.host.image())
        self.assertRaises(exception.InstanceNotFound, self.rescue, server)
        self.assertRaises(exception.InstanceNotFound, self.unrescue, server)

    def test_lxd_is_gone(self) -> None:
        server = self.make()
        with self.host.lxd_down():
            self.assertRaises(exception.HypervisorUnavailable, self.rescue,
                              server)

    def test_interrupted_rescue_ends_with_a_hard_reboot(self) -> None:
        server = self.make()
        self.rescue(server)
        server.vm_state = vm_states.ACTIVE
        server.task_state = None
        self.driver.reboot(self.context, server, self.ports, 'HARD')
        self.assert_own_in_charge(server)
        self.assert_state(power_state.RUNNING, server)

    def test_rescue_interrupted_early_ends_with_a_hard_reboot(self) -> None:
        server = self.make()
        self.make_leftover(server)
        self.driver.reboot(self.context, server, self.ports, 'HARD')
        self.assert_own_in_charge(server)
        self.assert_state(power_state.RUNNING, server)

    def test_reboot_while_rescuing_keeps_it(self) -> None:
        server = self.make()
        self.rescue(server)
        server.vm_state = vm_states.ACTIVE
        server.task_state = task_states.UNRESCUING
        self.driver.reboot(self.context, server, self.ports, 'HARD')
        self.assertIn(f'{server.name}-rescue', self.host.own())

    def test_restart_of_nova_compute(self) -> None:
        """A rescue in use stays; what never got so far goes."""
        server, second = self.make(), self.host.spawn()
        self.rescue(server)
        self.make_leftover(second)
        self.host.restart_driver()
        self.assertEqual({server.name, f'{server.name}-rescue', second.name},
                         set(self.host.own()))
        self.assert_state(power_state.RUNNING, server)
