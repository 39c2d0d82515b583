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

"""Servers on their way to another host, through two drivers as Nova calls
them."""

from __future__ import annotations

from typing import Any

import fixtures
from nova.compute import power_state
from nova.compute import vm_states
from nova import exception

from nova_lxd_py.virt.privileged import rootfs
from tests.fixtures import disks
from tests.fixtures import driver_host
from tests.fixtures import two_hosts
from tests.fixtures import two_hosts_case

GIB = 1 << 30
CONF = driver_host.CONF


class MigrateTest(two_hosts_case.TwoHostsTestCase):

    def test_there(self) -> None:
        server = self.make()
        self.write(server, b'precious')
        move = self.move(server)
        self.record_pulls(server)
        move.send()
        self.assertEqual([(False, 'Stopped')], self.pulls())
        # Neither counts before Nova has decided.
        for host in (self.host, self.other):
            self.assertEqual([], host.driver.list_instance_uuids())
            self.assertEqual(0, host.driver.get_num_instances())
            self.assertFalse(host.driver.instance_exists(server))
        move.finish()
        self.assertEqual([server.uuid],
                         self.other.driver.list_instance_uuids())
        self.assertEqual(power_state.RUNNING, self.other.state(server))
        self.assertEqual((0, 1), (self.driver.get_num_instances(),
                                  self.other.driver.get_num_instances()))
        self.assertEqual(b'precious', self.read(self.other, server))
        config = self.there(server).config
        self.assertEqual('server', config['user.nova.role'])
        self.assertNotIn('user.nova.migration', config)
        self.assertNotIn('user.nova.complete', config)
        self.assertEqual('moved', self.config(server)['user.nova.role'])
        self.ports = ()
        log = self.useFixture(fixtures.FakeLogger(level='WARNING'))
        move.confirm()
        self.assertEqual('', log.output)
        self.assertEqual({}, self.host.own())
        self.assertEqual(power_state.RUNNING, self.other.state(server))

    def test_keys_are_as_after_a_build(self) -> None:
        server = self.make()
        before = dict(self.config(server))
        self.move(server).whole()
        after = self.there(server).config
        self.assertEqual(
            {key: value for key, value in before.items()
             if not key.startswith(('volatile.', 'image.'))},
            {key: value for key, value in after.items()
             if not key.startswith('volatile.')})

    def test_back(self) -> None:
        server = self.make()
        self.write(server, b'before')
        move = self.move(server)
        move.whole()
        move.revert()
        self.assert_here(server)
        self.assertEqual(b'before', self.read(self.host, server))
        self.assertNotIn('user.nova.migration', self.config(server))

    def test_there_and_back_and_there_again(self) -> None:
        server = self.make()
        self.move(server).whole()
        two_hosts.Move(self.bus, server, self.host, self.other).confirm()
        back = two_hosts.Move(self.bus, server, self.other, self.host,
                              ports=self.ports)
        back.whole()
        self.assertEqual([server.uuid], self.driver.list_instance_uuids())
        # Its confirmation has been lost.
        again = self.move(server)
        again.whole()
        self.assertEqual([server.uuid],
                         self.other.driver.list_instance_uuids())

    def test_stopped(self) -> None:
        server = self.make(power_on=False)
        server.vm_state = vm_states.STOPPED
        move = self.move(server)
        move.whole(power_on=False)
        self.assertEqual(power_state.SHUTDOWN, self.other.state(server))
        move.revert(power_on=False)
        self.assert_state(power_state.SHUTDOWN, server)
        self.driver.power_on(self.context, server, self.ports)
        self.assert_state(power_state.RUNNING, server)

    def test_resize(self) -> None:
        server = self.make()
        bigger = self.host.instance(memory_mb=256, root_gb=2).flavor
        move = self.move(server, flavor=bigger)
        move.whole()
        self.assertEqual('256MiB', self.there(server).config['limits.memory'])
        self.assertEqual('2GiB', self.there(server).devices['root']['size'])
        move.revert()
        self.assertEqual('128MiB', self.config(server)['limits.memory'])
        self.assertEqual('1GiB', self.devices(server)['root']['size'])

    def test_smaller_disk(self) -> None:
        server = self.make(root_gb=2)
        self.refused(server, 'cannot be made smaller',
                     flavor=self.host.instance(root_gb=1).flavor)
        self.assert_here(server)

    def test_local_disks(self) -> None:
        self.info = disks.described(ephemerals=[
            {'size': 1, 'device_name': '/dev/sdb', 'guest_format': None}])
        server = self.make(config_drive='True', ephemeral_gb=1)
        pool = self.host.project, 'default'
        drive = f'config-drive-{server.uuid}'
        files = self.lxd.daemon.store.volumes[(*pool, drive)].files
        self.assertTrue(files)
        move = self.move(server)
        move.whole()
        names = {drive, f'ephemeral-{server.uuid}-0'}
        self.assertEqual(names, set(self.other.lxd_volumes()))
        self.assertLess(names, {
            device.get('source')
            for device in self.there(server).devices.values()} | {''})
        moved = self.other_lxd.daemon.store.volumes[
            self.other.project, 'default', drive]
        self.assertEqual(files, moved.files)
        self.assertEqual('1GiB', self.other_lxd.daemon.store.volumes[
            self.other.project, 'default', f'ephemeral-{server.uuid}-0'
        ].config['size'])
        self.ports = ()
        move.confirm()
        self.assertEqual([], self.host.lxd_volumes())
        self.assertEqual(names, set(self.other.lxd_volumes()))

    def test_ports(self) -> None:
        server = self.make()
        move = self.move(server)
        move.send()
        self.assertEqual(set(), self.network.names())
        self.assertEqual({}, self.network.ports)
        move.finish()
        self.assertEqual(1, len(self.network.ports))

    def test_volumes(self) -> None:
        volume = self.storage.volume()
        self.info = disks.described(disks.Mapping(volume))
        server = self.make()
        device = f'volume-{volume.id}'
        self.assertIn(device, self.devices(server))
        move = self.move(server)
        move.send()
        self.assertEqual(set(), self.storage.left())
        # Nova makes new connections.
        move.info = self.info = disks.described(disks.Mapping(volume))
        move.finish()
        self.assertIn(device, self.there(server).devices)
        self.assertNotIn(device, self.devices(server))
        move.info = disks.described(disks.Mapping(volume))
        move.revert()
        self.assert_here(server)
        self.assertIn(device, self.devices(server))

    def test_progress(self) -> None:
        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.server.outgoing._POLL', 0.05))
        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.server.outgoing._REPORT_INTERVAL', 0))
        log = self.useFixture(fixtures.FakeLogger())
        server = self.make()
        self.host.fake(server).usage['disk'] = 3000000
        self.other_lxd.daemon.transfer_time = 1.0
        self.move(server).send()
        self.assertEqual(50, server.progress)
        self.assertIn('Sending the root disk to host otherhost: c1: 1.50MB',
                      log.output)

    def test_serial_port_stays(self) -> None:
        server = self.make()
        self.host.fake(server).config['user.nova.serial_port'] = '10000'
        self.move(server).whole()
        self.assertNotIn('user.nova.serial_port', self.there(server).config)

    def test_not_complete(self) -> None:
        server = self.make()
        move = self.move(server)
        move.send()
        del self.there(server).config['user.nova.complete']
        error = self.assertRaises(exception.MigrationError, move.finish)
        self.assertIn('completely', str(error))
        self.assertEqual('Stopped', self.there(server).status)

    def test_failed_start(self) -> None:
        """A hard reboot repairs it."""
        server = self.make()
        move = self.move(server)
        move.send()
        self.other_lxd.fail_operation(
            'PUT', '/1.0/instances/*/state', where={'action': 'start'})
        self.assertRaises(exception.NovaException, move.finish)
        server.vm_state, server.task_state = vm_states.ERROR, None
        self.other.driver.reboot(self.context, server, self.ports, 'HARD')
        self.assertEqual(power_state.RUNNING, self.other.state(server))

    def test_lost_on_the_way_to_the_destination(self) -> None:
        """Nova has given the server to the destination and no more."""
        server = self.make()
        self.move(server).send()
        self.other.driver.reboot(self.context, server, self.ports, 'HARD')
        self.assertEqual(power_state.RUNNING, self.other.state(server))
        self.assertEqual([server.uuid],
                         self.other.driver.list_instance_uuids())

    def test_lost_on_the_source(self) -> None:
        """Nova fails between the drivers."""
        server = self.make()
        self.move(server).send()
        self.driver.reboot(self.context, server, self.ports, 'HARD')
        self.assert_state(power_state.RUNNING, server)

    def test_incomplete_is_never_started(self) -> None:
        server = self.make()
        self.move(server).send()
        del self.there(server).config['user.nova.complete']
        self.assertRaises(
            exception.InstanceNotFound, self.other.driver.reboot,
            self.context, server, self.ports, 'HARD')
        self.assertEqual('Stopped', self.there(server).status)

    def test_restarted_before_anything_moved(self) -> None:
        server = self.make()
        move = self.move(server)
        self.host.restart_driver()
        self.driver.plug_vifs(server, self.ports)
        move.finish_revert()
        self.assert_here(server)

    def test_restarted_in_the_middle(self) -> None:
        """The process was killed before Nova had given the server away."""
        server = self.make()
        move = self.move(server)
        move.send()
        server.host = CONF.host
        self.host.restart_driver()
        move.finish_revert()
        self.assert_here(server)

    def test_deleted_while_resized(self) -> None:
        self.info = disks.described(ephemerals=[
            {'size': 1, 'device_name': '/dev/sdb', 'guest_format': None}])
        server = self.make(ephemeral_gb=1, config_drive='True')
        move = self.move(server)
        move.whole()
        self.driver.confirm_migration(self.context, move.record, server,
                                      self.ports)
        self.other.driver.destroy(self.context, server, self.ports, self.info)
        self.assert_nothing_left()
        self.assertEqual({}, self.other.own())
        self.assertEqual([], self.other.lxd_volumes())


class IncrementalTest(two_hosts_case.TwoHostsTestCase):
    pools = ('dir', 'dir')

    def test_copied_ahead(self) -> None:
        server = self.make()
        self.record_pulls(server)
        move = self.move(server)

        def changed(request: Any) -> None:
            self.write(server, b'late')

        self.lxd.before('PUT', '/1.0/instances/*/state', changed,
                        where={'action': 'stop'})
        move.whole()
        self.assertEqual([(False, 'Running'), (True, 'Stopped')],
                         self.pulls())
        self.assertEqual(b'late', self.read(self.other, server))

    def test_stopped_server_is_copied_once(self) -> None:
        server = self.make(power_on=False)
        self.record_pulls(server)
        self.move(server).whole(power_on=False)
        self.assertEqual([(False, 'Stopped')], self.pulls())

    def test_local_disks(self) -> None:
        server = self.make(config_drive='True')
        # What LXD says of a dir pool.
        self.lxd.fail_next('GET', '*/volumes/custom/*/state', 500,
                           'Not supported')
        self.move(server).whole()
        self.assertEqual([f'config-drive-{server.uuid}'],
                         self.other.lxd_volumes())


class OtherPoolTest(IncrementalTest):
    pools = ('btrfs', 'dir')


class BootFromVolumeTest(two_hosts_case.TwoHostsTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.volume = self.storage.volume(content='ext4')
        self.volume.disk.root = rootfs.READY
        self.info = self.described()

    def described(self) -> dict[str, Any]:
        return disks.described(disks.Mapping(
            self.volume, '/dev/sda', boot_index=0))

    def test_there_and_back(self) -> None:
        server = self.make()
        move = self.move(server)
        self.record_pulls(server)
        self.lxd.clear_requests()
        move.send()
        # No data goes from one LXD to the other.
        self.assertEqual([], [request for request in self.lxd.requests
                              if request.method == 'POST' and
                              (request.body or {}).get('migration')])
        self.assertEqual(set(), self.storage.left())
        move.info = self.described()
        move.finish()
        self.assertEqual(power_state.RUNNING, self.other.state(server))
        self.assertEqual(self.volume.id, self.there(server).config[
            'user.nova.root_volume'])
        self.assertNotIn('size', self.there(server).devices['root'])
        move.info = self.described()
        move.revert()
        self.assert_here(server)


class EvacuateTest(two_hosts_case.TwoHostsTestCase):
    """A host comes back after its servers have been built elsewhere."""

    def test_leftovers(self) -> None:
        self.info = disks.described(ephemerals=[
            {'size': 1, 'device_name': '/dev/sdb', 'guest_format': None}])
        server = self.make(config_drive='True', ephemeral_gb=1)
        bystander = self.make(config_drive='True')
        self.assertFalse(self.other.driver.instance_on_disk(server))
        self.assertFalse(self.other.driver.instance_exists(server))
        self.other.spawn(server, self.host.image(),
                         block_device_info=self.info)
        server.host = two_hosts.OTHER
        self.host.restart_driver()
        self.assertIn(server.uuid, self.driver.list_instance_uuids())
        self.driver.destroy(self.context, server, self.ports, self.info)
        self.assertEqual([bystander.name], list(self.host.own()))
        for host, kept in ((self.host, bystander), (self.other, server)):
            self.assertEqual({f'config-drive-{kept.uuid}',
                              f'ephemeral-{kept.uuid}-0'},
                             set(host.lxd_volumes()))
        self.assertEqual(power_state.RUNNING, self.other.state(server))

    def test_while_it_was_on_its_way(self) -> None:
        """The source has died after the copy, and before Nova knew."""
        server = self.make()
        self.move(server).send()
        self.other.spawn(server, self.host.image())
        self.assertEqual([server.uuid],
                         self.other.driver.list_instance_uuids())
        self.driver.destroy(self.context, server, self.ports, self.info)
        self.assertEqual({}, self.host.own())
