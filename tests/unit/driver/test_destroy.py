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

"""Deleting servers, through the driver as Nova calls it."""

from __future__ import annotations

from typing import Any

from nova.compute import power_state
from nova.compute import task_states
from nova import exception
from nova import objects

from tests.fixtures import disks
from tests.fixtures import fake_driver_host
from tests.fixtures.fake_lxd import fixture


class DestroyTest(fake_driver_host.FakeDriverTestCase):

    def make(self, **kwargs: Any) -> objects.Instance:
        """Make a server with all that there is."""
        image = self.host.image()
        self.ports = self.host.ports(2)
        self.volume = self.storage.volume()
        self.info = disks.described(
            self.volume.mapping(), ephemerals=[
                {'size': 1, 'device_name': '/dev/sdb', 'guest_format': None}])
        return self.host.spawn(
            self.host.instance(image, config_drive='True', ephemeral_gb=1),
            image, self.ports, block_device_info=self.info, **kwargs)

    def destroy(self, server: objects.Instance, **kwargs: Any) -> None:
        self.driver.destroy(self.context, server, self.ports, self.info,
                            **kwargs)

    def assert_gone(self, server: objects.Instance) -> None:
        self.assertFalse(self.driver.instance_exists(server))
        self.assertRaises(exception.InstanceNotFound, self.driver.get_info,
                          server)
        self.assertEqual([], self.driver.list_instances())
        self.assertEqual(0, self.driver.get_num_instances())
        self.assert_nothing_left()

    # -- all of it ----------------------------------------------------------

    def test_in_every_state(self) -> None:
        for prepare in (lambda server: None, self.stop, self.driver.pause):
            server = self.make()
            prepare(server)
            self.destroy(server)
            self.assert_gone(server)

    def stop(self, server: objects.Instance) -> None:
        self.driver.power_off(server)

    def test_again_and_unknown(self) -> None:
        server = self.make()
        for _time in range(2):
            self.destroy(server)
        self.driver.cleanup(self.context, server, self.ports, self.info)
        self.driver.destroy(self.context, server, None, None)
        self.assert_gone(server)

    def test_without_what_nova_knows(self) -> None:
        """After an aborted build Nova has neither ports nor connections."""
        server = self.make()
        self.driver.destroy(self.context, server, [],
                            disks.described())
        self.assertEqual({}, self.host.own())
        self.assertEqual([], self.host.lxd_volumes())
        self.assertEqual({}, self.storage.mounts)
        self.assert_no_ports()

    def assert_no_ports(self) -> None:
        self.assertEqual(set(), self.network.names())
        self.assertEqual({}, self.network.ports)

    def test_again_without_the_ports(self) -> None:
        """Nova releases ports after a deletion that LXD did not answer."""
        for ports in ([], None):
            server = self.make()
            with self.host.lxd_down():
                self.assertRaises(exception.HypervisorUnavailable,
                                  self.destroy, server)
            self.ports = ports
            self.destroy(server)
            self.assert_gone(server)

    def test_without_lxd_instance_and_ports(self) -> None:
        """LXD has deleted it, and Nova has released its ports."""
        other = self.host.spawn(network_info=self.host.ports(1))
        for changes in ({}, {'type': 'tap', 'details': {}}):
            server = self.host.spawn(
                network_info=self.host.ports(1, **changes))
            self.delete_by_hand(server)
            self.driver.destroy(self.context, server, [])
            # Other servers keep theirs.
            self.assertEqual(1, len(self.network.names()))
        self.driver.destroy(self.context, other, [])
        self.assert_no_ports()

    def test_ports_of_an_earlier_nova_compute(self) -> None:
        """LXD has deleted it, Nova has released its ports."""
        server = self.host.spawn(network_info=self.host.ports(2))
        self.host.restart_driver()
        self.delete_by_hand(server)
        self.driver.destroy(self.context, server, [])
        self.assert_no_ports()

    def test_ports_plugged_by_an_older_release(self) -> None:
        """Those have no label until they are plugged again, as Nova does
        when it starts; LXD's devices name them."""
        server = self.make()
        for device in self.network.devices.values():
            device.alias = ''
        self.driver.plug_vifs(server, self.ports[:1])
        self.ports = []
        self.destroy(server)
        self.assert_gone(server)

    def test_lxd_instance_is_gone(self) -> None:
        """Somebody has deleted it by hand; the rest goes nevertheless."""
        server = self.make()
        self.delete_by_hand(server)
        self.destroy(server)
        self.assert_gone(server)

    def delete_by_hand(self, server: objects.Instance) -> None:
        api, params = self.lxd.api, {'project': self.host.project}
        api.must('PUT', f'/1.0/instances/{server.name}/state',
                 {'action': 'stop', 'force': True}, params=params)
        api.must('DELETE', f'/1.0/instances/{server.name}', params=params)

    def test_in_rescue_with_leftovers_of_a_snapshot(self) -> None:
        server = self.in_rescue()
        self.leave_snapshot(server)
        self.destroy(server)
        self.assert_gone(server)
        self.assertEqual([], self.snapshots())

    def in_rescue(self) -> objects.Instance:
        server = self.make()
        self.rescue(server)
        self.assertEqual([server.name, f'{server.name}-rescue'],
                         sorted(self.host.own()))
        return server

    def rescue(self, server: objects.Instance) -> None:
        # The fake LXD mounts nothing, so the image has what would be there.
        image = self.host.image(fixture.unified_image(
            {'mnt': None, 'mnt/rescue': None, 'mnt/rescue/etc': None}))
        self.driver.rescue(self.context, server, self.ports, image, None,
                           None, None)

    def leave_snapshot(self, server: objects.Instance) -> None:
        """Leave the copy and the image that a snapshot has made."""
        faults = [self.lxd.fail_next('DELETE', f'/1.0/{path}', times=None)
                  for path in ('instances/*-snapshot', 'images/*')]
        self.driver.snapshot(
            self.context, server,
            self.host.glance.create(None, {'name': 'backup'})['id'],
            lambda **kwargs: None)
        for fault in faults:
            fault.release()
        self.assertIn(f'{server.name}-snapshot', self.host.own())
        self.assertEqual([f'snapshot-{server.uuid}'], self.snapshots())

    def snapshots(self) -> list[str]:
        return [alias for _project, alias in self.lxd.daemon.store.aliases
                if alias.startswith('snapshot-')]

    def test_auxiliary_instances_of_an_earlier_nova_compute(self) -> None:
        server = self.in_rescue()
        self.host.restart_driver()
        self.destroy(server)
        self.assert_gone(server)

    def test_auxiliary_instance_whose_creation_was_not_answered(self) -> None:
        server = self.make()
        name = f'{server.name}-rescue'
        # Its events would tell the driver.
        self.driver._services.watcher.stop()
        # Nor are the attempts to clean up.
        faults = [self.lxd.drop_connection('POST', '/1.0/instances',
                                           after=True, where={'name': name})]
        self.lxd.before(
            'POST', '/1.0/instances', lambda request: faults.append(
                self.lxd.fail_next('GET', f'/1.0/instances/{name}',
                                   times=None)), where={'name': name})
        self.assertRaises(exception.NovaException, self.rescue, server)
        for fault in faults:
            fault.release()
        self.assertEqual([server.name, name], sorted(self.host.own()))
        self.destroy(server)
        self.assert_gone(server)

    # -- some of it ---------------------------------------------------------

    def test_keeping_the_disks(self) -> None:
        server = self.make()
        self.destroy(server, destroy_disks=False)
        self.assert_state(power_state.SHUTDOWN, server)
        self.assertEqual(['root'], list(self.devices(server)))
        self.assertEqual(set(), self.network.names())
        self.assertEqual(set(), self.storage.left())
        self.assertEqual([f'ephemeral-{server.uuid}-0'],
                         self.host.lxd_volumes())
        self.destroy(server)
        self.assert_gone(server)

    def test_disks_without_devices(self) -> None:
        """A hard reboot that recreated them was interrupted."""
        server = self.make()
        devices = self.host.fake(server).devices
        for name in ('config-drive', 'ephemeral0'):
            del devices[name]
        self.destroy(server)
        self.assert_gone(server)

    def test_keeping_the_ports(self) -> None:
        server = self.make()
        self.driver.cleanup(self.context, server, self.ports, self.info,
                            destroy_vifs=False)
        self.assertEqual({}, self.host.own())
        self.assertEqual(4, len(self.network.names()))
        self.destroy(server)
        self.assert_gone(server)

    def test_revert_of_a_resize_keeps_it(self) -> None:
        server = self.make()
        self.lxd.api.must(
            'PATCH', f'/1.0/instances/{server.name}',
            {'config': {'user.nova.resize': '7'}},
            params={'project': self.host.project})
        server.task_state = task_states.RESIZE_REVERTING
        self.destroy(server)
        self.assert_state(power_state.SHUTDOWN, server)
        # Nova connects the volumes again, and the server may be deleted.
        self.assertEqual(set(), self.storage.left())
        server.deleted = True
        self.destroy(server)
        self.assert_gone(server)

    # -- failures -----------------------------------------------------------

    def test_cannot_be_stopped(self) -> None:
        server = self.make()
        self.lxd.fail_operation('PUT', f'/1.0/instances/{server.name}/state',
                                where={'action': 'stop'})
        error = self.assertRaises(exception.InstancePowerOffFailure,
                                  self.destroy, server)
        # LXD's text can have paths of the host.
        self.assertNotIn('Something failed', str(error))
        self.assert_state(power_state.RUNNING, server)
        self.destroy(server)
        self.assert_gone(server)

    def test_cannot_be_deleted(self) -> None:
        server = self.make()
        self.lxd.fail_operation('DELETE', f'/1.0/instances/{server.name}',
                                error='zfs destroy: dataset is busy')
        error = self.assertRaises(exception.NovaException, self.destroy,
                                  server)
        self.assertNotIn('zfs', str(error))
        self.assertTrue(self.driver.instance_exists(server))
        self.destroy(server)
        self.assert_gone(server)

    def test_lxd_refuses_a_step(self) -> None:
        for method, path in (
                ('GET', '/1.0/instances/*'),
                ('DELETE', '/1.0/instances/*'),
                ('GET', '/1.0/storage-pools/default/volumes/custom/eph*'),
                ('DELETE', '/1.0/storage-pools/default/volumes/custom/eph*')):
            with self.subTest(path=path):
                server = self.make()
                self.lxd.fail_next(method, path)
                self.assertRaises(exception.NovaException, self.destroy,
                                  server)
                self.destroy(server)
                self.assert_gone(server)

    def test_lxd_refuses_to_show_the_rescue_instance(self) -> None:
        server = self.in_rescue()
        self.lxd.fail_next('GET', '/1.0/instances/*-rescue')
        self.assertRaises(exception.NovaException, self.destroy, server)
        self.assertEqual(2, len(self.host.own()))
        self.destroy(server)
        self.assert_gone(server)

    def test_lxd_is_gone(self) -> None:
        server = self.make()
        with self.host.lxd_down():
            self.assertRaises(exception.HypervisorUnavailable, self.destroy,
                              server)
            # Nothing that the guest still uses is taken away.
            self.assertNotEqual(set(), self.storage.left())
            self.assertNotEqual(set(), self.network.names())
        self.destroy(server)
        self.assert_gone(server)

    def test_answer_is_lost(self) -> None:
        """LXD has deleted it and could not say so; the rest goes, too."""
        server = self.make()
        self.lxd.drop_connection('DELETE', f'/1.0/instances/{server.name}',
                                 after=True)
        self.destroy(server)
        self.assert_gone(server)

    def test_reboots_itself_meanwhile(self) -> None:
        """The guest runs again when LXD is asked to delete it."""
        server = self.make()
        self.lxd.fail_next('DELETE', f'/1.0/instances/{server.name}', 400,
                           'Instance is running')
        self.destroy(server)
        self.assert_gone(server)

    def test_storage_does_not_let_go(self) -> None:
        """A server that is deleted is deleted, whatever the storage says."""
        server = self.make()
        self.storage.fail('brick.disconnect', OSError('busy'))
        self.destroy(server)
        self.assertEqual({}, self.host.own())
        self.assertEqual(set(), self.network.names())

    def test_open_vswitch_does_not_let_go(self) -> None:
        server = self.make()
        self.network.os_vif_error = OSError('ovsdb is gone')
        self.destroy(server)
        self.assertEqual({}, self.host.own())
        self.assertEqual([], self.host.lxd_volumes())
        self.assertEqual(set(), self.storage.left())

    def test_copy_that_an_operator_has_made(self) -> None:
        server = self.make()
        own = self.host.lxd_instances()[server.name]
        self.lxd.api.must('POST', '/1.0/instances', {
            'name': 'backup', 'config': own['config'], 'profiles': [],
            'devices': {name: device for name, device
                        in own['devices'].items()
                        if device['type'] == 'disk'},
            'source': {'type': 'copy', 'source': server.name}},
            params={'project': self.host.project})
        self.assertEqual([server.name], self.driver.list_instances())
        self.assertEqual([server.uuid], self.driver.list_instance_uuids())
        self.assertEqual(1, self.driver.get_num_instances())
        self.destroy(server)
        self.assertEqual(['backup'], list(self.host.own()))
        self.assertEqual([], self.driver.list_instances())
        self.assertFalse(self.driver.instance_exists(server))
        # The copy uses them.
        self.assertEqual({f'config-drive-{server.uuid}',
                          f'ephemeral-{server.uuid}-0'},
                         set(self.host.lxd_volumes()))
