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
"""Rescue on a real LXD, through the driver as Nova calls it."""

from __future__ import annotations

import types
import unittest

from nova.compute import power_state
from nova.compute import vm_states
from nova import exception
from nova.network import model as network_model
from nova import objects

from tests.fixtures import busybox_image
from tests.fixtures import driver_case
from tests.fixtures import lxd_daemon
from tests.fixtures import variants

NO_LXD = lxd_daemon.missing()

#: Busybox of distributions lacks chpasswd; this one records its input.
CHPASSWD = b'#!/bin/sh\ncat > /root/chpasswd-input\n'


class _Named(types.SimpleNamespace):
    """The fields of an instance that DriverHost.run uses."""


class RescueCases(driver_case.DriverCase):
    """Tests for every kind of storage pool."""

    def setUp(self) -> None:
        super().setUp()
        self.rescue_image = self.host.image(busybox_image.unified(
            {'etc/rescue-image': b'yes', 'bin/chpasswd': CHPASSWD}))

    def make_server(self):
        server = self.host.spawn()
        server.info_cache = objects.InstanceInfoCache(
            instance_uuid=server.uuid,
            network_info=network_model.NetworkInfo())
        self.host.run(server, 'sh', '-c', 'echo original > /root/mine; '
                      'chown 7:8 /root/mine; chmod 640 /root/mine')
        return server

    def rescue(self, server, image=None) -> None:
        self.host.driver.power_off(server)
        self.host.driver.rescue(
            self.host.context, server, [], image or self.rescue_image,
            'secret', {}, [])
        server.vm_state = vm_states.RESCUED

    def unrescue(self, server) -> None:
        self.host.driver.unrescue(self.host.context, server)
        server.vm_state = vm_states.ACTIVE

    def in_rescue(self, server, *command: str) -> str:
        return self.host.run(_Named(name=server.name + '-rescue'), *command)

    def of(self, server) -> list[str]:
        """List the names of all LXD instances of a server."""
        return [name for name, entry in self.host.lxd_instances().items()
                if entry['config'].get('user.nova.uuid') == server.uuid]

    def own_config(self, server) -> dict:
        return self.host.lxd_instances()[server.name]['config']

    def test_there_and_back_twice(self) -> None:
        server = self.make_server()
        for turn in ('first', 'second'):
            self.rescue(server)
            self.assertEqual(power_state.RUNNING, self.host.state(server))
            self.assertEqual('yes', self.in_rescue(
                server, 'cat', '/etc/rescue-image'))
            self.assertEqual('7 8 640 root', self.in_rescue(
                server, 'sh', '-c', "stat -c '%u %g %a' /mnt/rescue/root/mine"
                "; stat -c %U /mnt/rescue/root").replace('\n', ' ').strip())
            self.in_rescue(server, 'sh', '-c',
                           f'echo {turn} > /mnt/rescue/root/{turn}')
            self.assertEqual('root:secret', self.in_rescue(
                server, 'cat', '/root/chpasswd-input').strip())
            self.assertEqual([server.name], self.driver.list_instances())
            self.assertEqual([server.uuid], self.driver.list_instance_uuids())
            self.unrescue(server)
            self.assertEqual(power_state.RUNNING, self.host.state(server))
            self.assertEqual([server.name], self.of(server))
            self.assertEqual(turn, self.host.run(
                server, 'cat', f'/root/{turn}').strip())
            self.assertEqual('0 0', self.host.run(
                server, 'stat', '-c', '%u %g', f'/root/{turn}').strip())
            self.assertNotIn('user.nova.rescued', self.own_config(server))
        self.assertRaises(AssertionError, self.host.run, server, 'cat',
                          '/etc/rescue-image')

    def test_power_acts_on_the_rescue_instance(self) -> None:
        server = self.make_server()
        self.rescue(server)
        self.driver.power_off(server)
        self.assertEqual(power_state.SHUTDOWN, self.host.state(server))
        self.driver.power_on(self.host.context, server, [], {})
        self.assertEqual(power_state.RUNNING, self.host.state(server))
        for kind in ('HARD', 'SOFT', 'HARD'):
            self.driver.reboot(self.host.context, server, [], kind, {})
            self.assertEqual(power_state.RUNNING, self.host.state(server))
            self.assertEqual('original', self.in_rescue(
                server, 'cat', '/mnt/rescue/root/mine').strip())
        instances = self.host.lxd_instances()
        self.assertEqual('Stopped', instances[server.name]['status'])
        self.assertEqual(
            'rescue', instances[f'{server.name}-rescue']['config'][
                'user.nova.role'])
        self.driver.pause(server)
        self.assertEqual(power_state.PAUSED, self.host.state(server))
        self.driver.unpause(server)
        self.assertIn('booted', self.driver.get_console_output(
            self.host.context, server))
        self.unrescue(server)

    def test_state_from_memory(self) -> None:
        server = self.make_server()
        self.rescue(server)
        self.assertEqual(power_state.RUNNING,
                         self.driver.get_info(server).state)
        self.driver.power_off(server)
        self.assertEqual(power_state.SHUTDOWN,
                         self.driver.get_info(server).state)
        self.unrescue(server)
        self.assertEqual(power_state.RUNNING,
                         self.driver.get_info(server).state)

    def test_delete_while_rescued_leaves_nothing(self) -> None:
        server = self.make_server()
        self.rescue(server)
        self.driver.destroy(self.host.context, server, [], {})
        self.assertEqual([], self.of(server))
        self.assertEqual([], self.host.lxd_volumes())
        self.driver.destroy(self.host.context, server, [], {})

    def test_restart_of_nova_compute_while_rescued(self) -> None:
        server = self.make_server()
        self.rescue(server)
        self.host.restart_driver()
        self.assertEqual(power_state.RUNNING, self.host.state(server))
        self.unrescue(server)
        self.assertEqual([server.name], self.of(server))

    def test_failure_leaves_the_server_in_charge(self) -> None:
        server = self.make_server()
        self.driver.power_off(server)
        broken = self.host.image(b'not an image at all')
        self.assertRaises(exception.NovaException, self.driver.rescue,
                          self.host.context, server, [], broken, 'x', {}, [])
        self.assertEqual([server.name], self.of(server))
        self.assertNotIn('user.nova.rescued', self.own_config(server))
        self.driver.reboot(self.host.context, server, [], 'HARD', {})
        self.assertEqual('original', self.host.run(
            server, 'cat', '/root/mine').strip())

    def test_image_for_virtual_machines_is_refused(self) -> None:
        server = self.make_server()
        image = self.host.image(hw_rescue_device='cdrom')
        self.assertRaises(exception.InstanceNotRescuable, self.rescue, server,
                          image)

    def test_interrupted_before_the_rescue_instance_ran(self) -> None:
        server = self.make_server()
        self.rescue(server)
        api, params = self.host.lxd.api, {'project': self.host.project}
        # As after a crash before the server was marked as rescued.
        api.must('PUT', f'/1.0/instances/{server.name}-rescue/state',
                 {'action': 'stop', 'force': True}, params=params)
        api.must('PATCH', f'/1.0/instances/{server.name}',
                 {'config': {'user.nova.rescued': ''}}, params=params)
        server.vm_state = vm_states.ACTIVE
        self.host.restart_driver()
        self.assertEqual([server.name], self.of(server))
        self.host.driver.reboot(self.host.context, server, [], 'HARD', {})
        self.assertEqual('original', self.host.run(
            server, 'cat', '/root/mine').strip())

    def test_interrupted_before_nova_knew(self) -> None:
        server = self.make_server()
        self.rescue(server)
        server.vm_state = vm_states.ACTIVE
        self.driver.reboot(self.host.context, server, [], 'HARD', {})
        self.assertEqual([server.name], self.of(server))
        self.assertEqual('original', self.host.run(
            server, 'cat', '/root/mine').strip())

    def test_unrescue_of_a_server_whose_rescue_instance_is_gone(self) -> None:
        server = self.make_server()
        self.rescue(server)
        api, params = self.host.lxd.api, {'project': self.host.project}
        name = f'{server.name}-rescue'
        api.must('PUT', f'/1.0/instances/{name}/state',
                 {'action': 'stop', 'force': True}, params=params)
        api.must('DELETE', f'/1.0/instances/{name}', params=params)
        self.unrescue(server)
        self.assertEqual(power_state.RUNNING, self.host.state(server))

    def test_rescue_of_what_is_not_there(self) -> None:
        server = self.host.instance()
        self.assertRaises(exception.InstanceNotFound, self.driver.rescue,
                          self.host.context, server, [], self.rescue_image,
                          'x', {}, [])
        self.assertRaises(exception.InstanceNotFound, self.driver.unrescue,
                          self.host.context, server)

    def test_unknown_directory(self) -> None:
        server = self.make_server()
        self.host._set('directory', '/nonexistent', 'lxd')
        self.assertRaises(exception.InstanceNotRescuable, self.rescue, server)
        self.assertEqual([server.name], self.of(server))


@unittest.skipIf(NO_LXD, NO_LXD or '')
class BtrfsRescueTest(RescueCases, unittest.TestCase):
    pool_driver = 'btrfs'


@unittest.skipIf(NO_LXD, NO_LXD or '')
@variants.keep(
    'test_there_and_back_twice', 'test_delete_while_rescued_leaves_nothing',
    'test_restart_of_nova_compute_while_rescued')
class DirectoryRescueTest(RescueCases, unittest.TestCase):
    pool_driver = 'dir'


@unittest.skipIf(NO_LXD, NO_LXD or '')
@variants.keep(
    'test_there_and_back_twice', 'test_delete_while_rescued_leaves_nothing',
    'test_restart_of_nova_compute_while_rescued')
class IsolatedRescueTest(RescueCases, unittest.TestCase):
    pool_driver = 'btrfs'
    options = {'idmap_isolation': 'server'}
