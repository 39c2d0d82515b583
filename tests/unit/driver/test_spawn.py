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

"""Making servers, through the driver as Nova calls it."""

from __future__ import annotations

from typing import Any

from nova.compute import power_state
from nova import exception
from nova import objects
from os_brick import exception as brick_exception

from nova_lxd_py.virt.guest import disk_view
from tests.fixtures import disks
from tests.fixtures import fake_driver_host

NAME = 'instance-00000001'


class SpawnTest(fake_driver_host.FakeDriverTestCase):

    def everything(self, **fields: Any) -> dict[str, Any]:
        """Arguments for a server that has all that there is."""
        image = self.host.image()
        volume = self.storage.volume()
        return {
            'instance': self.host.instance(
                image, config_drive='True', ephemeral_gb=1, **fields),
            'image': image, 'network_info': self.host.ports(2, active=False),
            'injected_files': [('/etc/motd', b'hello\n')],
            'admin_password': 'secret',
            'block_device_info': disks.described(
                volume.mapping(), ephemerals=[
                    {'size': 1, 'device_name': '/dev/sdb',
                     'guest_format': None}])}

    # -- what there is then -------------------------------------------------

    def test_flavor_becomes_limits(self) -> None:
        server = self.host.spawn(self.host.instance(
            self.host.image(), memory_mb=96, root_gb=2, vcpus=2))
        self.assert_state(power_state.RUNNING, server)
        config = self.config(server)
        self.assertEqual('96MiB', config['limits.memory'])
        self.assertEqual('false', config['security.privileged'])
        self.assertEqual('2GiB', self.devices(server)['root']['size'])
        self.assertEqual([server.name], self.driver.list_instances())
        self.assertEqual([server.uuid], self.driver.list_instance_uuids())
        self.assertEqual(1, self.driver.get_num_instances())
        self.assertTrue(self.driver.instance_exists(server))

    def test_everything(self) -> None:
        server = self.host.spawn(**self.everything())
        devices = {name: device for name, device in
                   self.devices(server).items()
                   if not disk_view.is_part(name)}
        self.assertEqual(
            {'nic': 2, 'disk': 3, 'unix-block': 1},
            {kind: sum(device['type'] == kind for device in devices.values())
             for kind in ('nic', 'disk', 'unix-block')})
        self.assertEqual(2, len(self.host.lxd_volumes()))
        self.assertEqual(
            b'hello\n', self.host.fake(server).files.get('/etc/motd').content)
        self.assertEqual([(server.name, ['chpasswd'])],
                         self.lxd.daemon.exec_log)
        # The password goes to the guest, and not into keys.
        self.assertNotIn('secret', str(self.config(server)))

    def test_without_power(self) -> None:
        server = self.host.spawn(power_on=False, admin_password='secret')
        self.assert_state(power_state.SHUTDOWN, server)
        self.assertEqual([], self.lxd.daemon.exec_log)

    def test_image_properties_are_no_configuration(self) -> None:
        image = self.host.image(**{
            'lxd:privileged_allowed': 'true', 'raw.lxc': 'x',
            'security.privileged': 'true'})
        config = self.config(self.host.spawn(
            self.host.instance(image), image))
        self.assertEqual('false', config['security.privileged'])
        self.assertNotIn('raw.lxc', config)

    def test_one_import_for_many(self) -> None:
        image = self.host.image()
        for _number in range(3):
            self.host.spawn(self.host.instance(image), image)
        self.assertEqual([image.id], self.host.glance.downloads)

    def test_a_guest_without_chpasswd_runs(self) -> None:
        def handler(*args: Any) -> Any:
            raise FileNotFoundError('chpasswd')
        self.lxd.daemon.exec_handler = handler
        server = self.host.spawn(admin_password='secret')
        self.assert_state(power_state.RUNNING, server)

    # -- ports --------------------------------------------------------------

    def test_neutron_is_waited_for(self) -> None:
        active, pending = self.host.ports(2)
        active['active'], pending['active'] = True, False
        server = self.host.spawn(network_info=[active, pending])
        self.assertEqual([[('network-vif-plugged', pending['id'])]],
                         self.host.virtapi.waits)
        names = [device['name'] for device in self.devices(server).values()
                 if device['type'] == 'nic']
        self.assertEqual(['eth0', 'eth1'], names)

    def test_neutron_never_reports(self) -> None:
        self.host.virtapi.times_out = True
        arguments = self.everything()
        self.assertRaises(exception.VirtualInterfaceCreateException,
                          self.host.spawn, **arguments)
        self.assert_nothing_left()
        # It never ran.
        self.assertNotIn('start', [
            request.body.get('action') for request in self.lxd.requests
            if request.path.endswith('/state')])

    def test_neutron_never_reports_and_need_not(self) -> None:
        self.host._set('vif_plugging_is_fatal', False)
        self.host.virtapi.times_out = True
        server = self.host.spawn(network_info=self.host.ports(active=False))
        self.assert_state(power_state.RUNNING, server)

    def test_neutron_reports_a_failure(self) -> None:
        self.host.virtapi.reports_failure = True
        self.assertRaises(exception.VirtualInterfaceCreateException,
                          self.host.spawn,
                          network_info=self.host.ports(active=False))
        self.assert_nothing_left()

    def test_port_of_no_host(self) -> None:
        ports = self.host.ports(2)
        ports[1]['type'] = 'binding_failed'
        self.assertRaises(exception.VirtualInterfacePlugException,
                          self.host.spawn, network_info=ports)
        self.assert_nothing_left()

    def test_open_vswitch_fails(self) -> None:
        self.network.os_vif_plug_error = OSError('ovsdb is gone')
        error = self.assertRaises(exception.VirtualInterfacePlugException,
                                  self.host.spawn,
                                  network_info=self.host.ports())
        self.assertNotIn('ovsdb', str(error))
        self.assert_nothing_left()

    # -- failures -----------------------------------------------------------

    def test_lxd_refuses_a_step(self) -> None:
        """Whatever LXD refuses, nothing is left of the server."""
        for method, path, where in (
                ('POST', '/1.0/storage-pools/default/volumes/custom', {}),
                ('POST', f'/1.0/instances/{NAME}/files', {}),
                ('PUT', f'/1.0/instances/{NAME}/state', {'action': 'start'}),
                ('POST', '/1.0/instances', {'name': NAME})):
            with self.subTest(path=path):
                arguments = self.everything(id=1)
                self.lxd.fail_next(method, path, times=None, where=where)
                error = self.assertRaises(
                    exception.NovaException, self.host.spawn, **arguments)
                self.assertNotIn('Internal error', str(error))
                self.lxd.daemon.faults.clear()
                self.assert_nothing_left()
                # The next attempt is not in its way.
                server = self.host.spawn(**arguments)
                self.assert_state(power_state.RUNNING, server)
                self.driver.destroy(self.context, server,
                                    arguments['network_info'],
                                    arguments['block_device_info'])

    def test_an_operation_fails(self) -> None:
        for method, path in (
                ('POST', '/1.0/instances'),
                ('PUT', f'/1.0/instances/{NAME}/state')):
            for after in (False, True):
                with self.subTest(path=path, after=after):
                    arguments = self.everything(id=1)
                    where = ({'name': NAME} if path == '/1.0/instances'
                             else {'action': 'start'})
                    fault = self.lxd.fail_operation(
                        method, path, after=after, where=where)
                    if after and method == 'POST' and self.server == 'lxd':
                        # The clone that LXD has made nevertheless is deleted,
                        # and the server made from its image. This Incus has
                        # no template to clone.
                        self.driver.destroy(
                            self.context, self.host.spawn(**arguments),
                            arguments['network_info'],
                            arguments['block_device_info'])
                    else:
                        self.assertRaises(exception.NovaException,
                                          self.host.spawn, **arguments)
                    self.assertEqual(1, fault.hits)
                    self.assert_nothing_left()

    def test_lxd_is_gone(self) -> None:
        arguments = self.everything()
        with self.host.lxd_down():
            self.assertRaises(exception.HypervisorUnavailable, self.host.spawn,
                              **arguments)
            self.assertEqual(set(), self.network.names())
            self.assertEqual(set(), self.storage.left())
        self.assert_nothing_left()

    def test_an_answer_of_lxd_is_lost(self) -> None:
        """The instance may be there all the same; it does not stay."""
        arguments = self.everything(id=1)
        self.lxd.drop_connection('POST', '/1.0/instances', after=True,
                                 where={'name': NAME})
        self.assertRaises(exception.NovaException, self.host.spawn,
                          **arguments)
        self.assert_nothing_left()

    def test_volume_cannot_be_connected(self) -> None:
        self.storage.fail('brick.connect', brick_exception.BrickException(
            'no route to 10.0.0.1'))
        error = self.assertRaises(exception.VolumeAttachFailed,
                                  self.host.spawn, **self.everything())
        self.assertNotIn('10.0.0.1', str(error))
        self.assert_nothing_left()

    def test_ephemeral_disks_are_undone(self) -> None:
        """Of several disks the first ones exist when the last one fails."""
        image = self.host.image()
        self.lxd.fail_next('POST', '/1.0/storage-pools/default/volumes/custom',
                           where={'description':
                                  'Ephemeral disk 1 of a server'})
        wanted = [{'size': 1, 'device_name': f'/dev/sd{letter}',
                   'guest_format': None} for letter in 'bc']
        self.assertRaises(
            exception.NovaException, self.host.spawn,
            self.host.instance(image), image,
            block_device_info=disks.described(ephemerals=wanted))
        self.assert_nothing_left()

    def test_encrypted_ephemeral_disk(self) -> None:
        self.assertRaises(
            exception.InvalidInput, self.host.spawn,
            block_device_info=disks.described(ephemerals=[
                {'size': 1, 'encrypted': True, 'guest_format': None}]))
        self.assert_nothing_left()

    def test_image_is_gone(self) -> None:
        image = self.host.image()
        self.host.glance.delete(None, image.id)
        self.assertRaises(exception.ImageNotFound, self.host.spawn,
                          self.host.instance(image), image)
        self.assert_nothing_left()

    def test_image_is_damaged_on_the_way(self) -> None:
        self.host.glance.damage = lambda data: data[:-100] + b'x' * 100
        self.assertRaises(exception.NovaException, self.host.spawn)
        self.assert_nothing_left()
        self.assertEqual([], list(self.lxd.daemon.store.images))

    def test_bad_flavor(self) -> None:
        image = self.host.image()
        self.assertRaises(
            exception.InvalidInput, self.host.spawn,
            self.host.instance(image, {'lxd:nested_allowed': 'maybe'}), image)
        self.assert_nothing_left()

    def test_bad_files(self) -> None:
        for path in ('/etc/../../x', 'etc/', '/\0'):
            with self.subTest(path=path):
                self.assertRaises(
                    exception.InvalidInput, self.host.spawn,
                    injected_files=[(path, b'')])
                self.assert_nothing_left()

    # -- names --------------------------------------------------------------

    def test_again_after_a_crash(self) -> None:
        arguments = self.everything()
        server = self.host.spawn(**arguments)
        before = self.config(server)['volatile.uuid']
        self.host.restart_driver()
        self.host.spawn(**arguments)
        self.assertNotEqual(before, self.config(server)['volatile.uuid'])
        self.assertEqual(1, len(self.host.own()))

    def _stranger(self, instance: objects.Instance, **config: str) -> None:
        self.lxd.api.must('POST', '/1.0/instances', {
            'name': instance.name, 'source': {'type': 'none'},
            'profiles': [], 'config': config, 'devices': {'root': {
                'type': 'disk', 'path': '/', 'pool': 'default'}}},
            params={'project': self.host.project})

    def test_lxd_stumbles_over_its_own_record(self) -> None:
        """Its database has reported a transaction as failed that was not."""
        for specs in ({}, {'lxd:isolated': 'true'}):
            image = self.host.image()
            server = self.host.instance(image, extra_specs=specs)
            self.lxd.fail_operation(
                'POST', '/1.0/instances', 'Failed creating instance record: '
                'Add instance info to the database: This "instances" entry '
                'already exists', after=True, where={'name': server.name})
            self.host.spawn(server, image)
            self.assert_state(power_state.RUNNING, server)
            self.assertEqual(2, sum(
                entry.method == 'POST' and entry.path == '/1.0/instances' and
                entry.body.get('name') == server.name
                for entry in self.lxd.requests))

    def test_stranger_of_the_same_name(self) -> None:
        image = self.host.image()
        for config in ({}, {'user.nova.uuid': 'another',
                            'user.nova.role': 'server'}):
            with self.subTest(config=config):
                server = self.host.instance(image)
                self._stranger(server, **config)
                self.assertRaises(exception.InstanceExists, self.host.spawn,
                                  server, image)
                self.driver.destroy(self.context, server, [])
                self.assertIn(server.name, self.lxd.instances)
                self.assertFalse(self.driver.instance_exists(server))
                self.assertRaises(exception.InstanceNotFound,
                                  self.driver.get_info, server)


class IncusSpawnTest(SpawnTest):

    server = 'incus'
