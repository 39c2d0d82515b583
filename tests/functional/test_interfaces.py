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

"""Ports attached to and detached from instances on a real LXD.

Root in the guest renames and deletes the network devices, as tenants may.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import time
from typing import Any
import unittest
from unittest import mock
import uuid

from nova.compute import power_state
from nova.network import model
from nova import objects
from nova.virt import event as virt_event

from nova_lxd_py.virt.vif import manager
from tests.fixtures import driver_case
from tests.fixtures import lxd_daemon

NO_LXD = lxd_daemon.missing()

#: Of no other test.
MAC_PREFIX = 'fa:16:3e:00:03:'

RENAME = 'ip link set eth1 down && ip link set eth1 name evil0'
DELETE = 'ip link delete eth1'


@unittest.skipIf(NO_LXD, NO_LXD or '')
class InterfaceTest(driver_case.NetworkCase, unittest.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.made: list[model.VIF] = []
        self.addCleanup(lambda: self.assertEqual([], self.left_on_host()))
        self.ports = [self.port(1)]
        self.server = self.host.spawn(network_info=self.ports)
        self.addCleanup(lambda: self.host.driver.destroy(
            self.host.context, self.server, self.ports))

    def port(self, number: int) -> model.VIF:
        port = str(uuid.uuid4())
        network = model.Network(id=str(uuid.uuid4()), label='net', subnets=[],
                                mtu=1442)
        vif = model.VIF(id=port, address=f'{MAC_PREFIX}{number:02x}',
                        network=network, type=model.VIF_TYPE_TAP,
                        devname=f'tap{port}'[:14], active=True, details={})
        self.made.append(vif)
        return vif

    def left_on_host(self) -> list[str]:
        """Name the host's network devices with a port's ID or address."""
        found = []
        for name in os.listdir('/sys/class/net'):
            # Other tests create and delete devices meanwhile.
            with contextlib.suppress(OSError):
                address = pathlib.Path(
                    f'/sys/class/net/{name}/address').read_text()
                if address.startswith(MAC_PREFIX) or any(
                        vif['id'][:11] in name for vif in self.made):
                    found.append(name)
        return found

    def attach(self, number: int) -> model.VIF:
        vif = self.port(number)
        self.host.driver.attach_interface(
            self.host.context, self.server, objects.ImageMeta(), vif)
        self.ports.append(vif)
        return vif

    def detach(self, vif: model.VIF) -> None:
        self.host.driver.detach_interface(self.host.context, self.server, vif)
        self.ports.remove(vif)

    def addresses(self) -> dict[str, str]:
        """Return the MAC addresses of the guest's network devices."""
        return dict(line.split() for line in self.host.run(
            self.server, 'sh', '-c', 'cd /sys/class/net && for name in *; do '
            'echo $name $(cat $name/address); done').splitlines())

    def assert_attached(self) -> None:
        found = self.addresses()
        for number, vif in enumerate(self.ports):
            self.assertEqual(vif['address'], found.get(f'eth{number}'))

    def lxd_devices(self) -> set[str]:
        return {name for name in self.host.lxd_instances()[
            self.server.name]['devices'] if name.startswith('nic-')}

    def test_attach_and_detach(self) -> None:
        added = [self.attach(2), self.attach(3)]
        self.assert_attached()
        for vif in added:
            self.detach(vif)
        self.assert_attached()
        self.assertEqual({'lo', 'eth0'}, set(self.addresses()))

    def test_deleted_without_the_ports(self) -> None:
        """Nova has released them after a deletion that failed."""
        self.attach(2)
        self.host.driver.destroy(self.host.context, self.server, [])
        self.assertEqual([], self.left_on_host())
        self.assertEqual([], self.host.driver.list_instances())

    def test_starts_after_rename_or_deletion(self) -> None:
        driver, context = self.host.driver, self.host.context
        self.attach(2)
        for command in (RENAME, DELETE):
            for reboot_type in ('SOFT', 'HARD'):
                self.host.run(self.server, 'sh', '-c', command)
                driver.reboot(context, self.server, self.ports, reboot_type)
                self.assert_attached()
            self.host.run(self.server, 'sh', '-c', command)
            driver.power_off(self.server)
            driver.power_on(context, self.server, self.ports)
            self.assert_attached()

    def test_guest_reboots_after_rename_or_deletion(self) -> None:
        def look_up(*args: Any, **kwargs: Any) -> objects.Instance:
            self.server.info_cache = objects.InstanceInfoCache(
                network_info=model.NetworkInfo(self.ports))
            return self.server

        patch = mock.patch('nova.objects.Instance.get_by_uuid', look_up)
        patch.start()
        self.addCleanup(patch.stop)
        for command in (RENAME, DELETE):
            vif = self.attach(2)
            self.host.run(self.server, 'sh', '-c', command)
            self.host.wait_for_init(self.server)
            before = self.started()
            # The command may be killed before it returns.
            with contextlib.suppress(AssertionError):
                self.host.run(self.server, 'reboot')
            deadline = time.monotonic() + 120
            while self.started() in (before, None):
                self.assertLess(time.monotonic(), deadline)
                time.sleep(0.2)
            self.assert_attached()
            self.detach(vif)

    def test_guest_stops_after_rename(self) -> None:
        self.attach(2)
        self.host.run(self.server, 'sh', '-c', RENAME)
        self.host.wait_for_init(self.server)
        del self.host.events[:]
        with contextlib.suppress(AssertionError):
            self.host.run(self.server, 'poweroff')
        deadline = time.monotonic() + 120
        while not [event for event in self.host.events if event.transition ==
                   virt_event.EVENT_LIFECYCLE_STOPPED]:
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.2)
        self.assertEqual(power_state.SHUTDOWN, self.host.state(self.server))

    def started(self) -> int | None:
        """Return the process ID of the guest's init, if it runs."""
        state = self.host.lxd.api.must(
            'GET', f'/1.0/instances/{self.server.name}/state',
            params={'project': self.host.project})
        return state['pid'] if state['status'] == 'Running' else None

    def test_detach_after_rename_or_deletion(self) -> None:
        for command in (RENAME, DELETE):
            vif = self.attach(2)
            self.host.run(self.server, 'sh', '-c', command)
            self.detach(vif)
            self.assertEqual({'lo', 'eth0'}, set(self.addresses()))
            self.assertEqual({manager.device_name(self.ports[0])},
                             self.lxd_devices())
            self.assertEqual(power_state.RUNNING,
                             self.host.state(self.server))

    def test_names_swapped_in_the_guest(self) -> None:
        vif = self.attach(2)
        self.host.run(self.server, 'sh', '-c',
                      'for name in eth0 eth1; do ip link set $name down; done;'
                      'ip link set eth0 name x && ip link set eth1 name eth0 '
                      '&& ip link set x name eth1')
        self.detach(vif)
        self.assertNotIn(vif['address'], self.addresses().values())
        self.host.driver.reboot(self.host.context, self.server, self.ports,
                                'HARD')
        self.assert_attached()
        self.assertEqual({'lo', 'eth0'}, set(self.addresses()))

    def test_attach_when_the_guest_has_the_name(self) -> None:
        self.host.run(self.server, 'sh', '-c',
                      'ip link set eth0 down && ip link set eth0 name eth1')
        vif = self.attach(2)
        self.assertIn(vif['address'], self.addresses().values())
