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

"""Diagnostics of instances on a real LXD."""

from __future__ import annotations

import contextlib
import time
from typing import Any
import unittest
import uuid

from nova import exception
from nova.network import model

from tests.fixtures import driver_case
from tests.fixtures import lxd_daemon

NO_LXD = lxd_daemon.missing()

MAC = 'fa:16:3e:00:02:01'


@unittest.skipIf(NO_LXD, NO_LXD or '')
class DiagnosticsTest(driver_case.NetworkCase, unittest.TestCase):

    def setUp(self) -> None:
        super().setUp()
        image = self.host.image()
        port = str(uuid.uuid4())
        vif = model.VIF(
            id=port, address=MAC, type=model.VIF_TYPE_TAP, details={},
            devname=f'tap{port}'[:14], active=True, network=model.Network(
                id=str(uuid.uuid4()), label='net', subnets=[], mtu=1442))
        self.ports = [vif]
        self.server = self.host.instance(image, vcpus=2, config_drive='True')
        self.addCleanup(self.host.driver.unplug_vifs, self.server, self.ports)
        self.host.spawn(self.server, image, self.ports)

    def read(self) -> Any:
        return self.host.driver.get_instance_diagnostics(self.server)

    def read_plain(self) -> dict[str, Any]:
        return self.host.driver.get_diagnostics(self.server)

    def test_identity(self) -> None:
        found = self.read()
        self.assertEqual(('running', 'libvirt', 'lxd', 'linux', True),
                         (found.state, found.driver, found.hypervisor,
                          found.hypervisor_os, found.config_drive))
        self.assertEqual((2, 1, 2), (found.num_cpus, found.num_nics,
                                     found.num_disks))

    def test_cpu_time(self) -> None:
        before = self.read().cpu_details[0].time
        self.host.run(self.server, 'sh', '-c',
                      'i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done')
        used = self.read().cpu_details[0].time - before
        # Nanoseconds.
        self.assertGreater(used, 10 ** 7)
        self.assertLess(used, 60 * 10 ** 9)

    def test_memory(self) -> None:
        memory = self.read().memory_details
        self.assertEqual(128, memory.maximum)
        self.host.run(self.server, 'sh', '-c',
                      'mount -t tmpfs none /mnt; '
                      'head -c 20000000 /dev/zero > /mnt/x')
        self.assertGreaterEqual(self.read().memory_details.used,
                                memory.used + 15)
        plain = self.read_plain()
        self.assertEqual(128 * 1024, plain['memory'])
        self.assertGreater(plain['memory-used'], 15 * 1024)

    def test_traffic(self) -> None:
        self.host.run(self.server, 'sh', '-c',
                      'ip link set eth0 up; ip address add 10.9.1.1/24 '
                      'dev eth0; ping -c 2 -W 1 10.9.1.2 || true')
        [nic] = self.read().nic_details
        self.assertEqual(MAC, nic.mac_address)
        self.assertGreater(nic.tx_packets, 0)
        self.assertGreater(nic.tx_octets, nic.tx_packets * 20)
        for value in (nic.tx_errors, nic.rx_errors, nic.tx_drop, nic.rx_drop,
                      nic.rx_packets, nic.rx_octets):
            self.assertGreaterEqual(value, 0)
        plain = self.read_plain()
        self.assertGreaterEqual(plain['eth0_tx'], nic.tx_octets)
        self.assertGreaterEqual(plain['eth0_tx_packets'], nic.tx_packets)

    def test_interface_that_the_guest_has_renamed(self) -> None:
        self.host.run(self.server, 'sh', '-c',
                      'ip link set eth0 down; ip link set eth0 name wan; '
                      'ip link set wan up')
        [nic] = self.read().nic_details
        self.assertEqual(MAC, nic.mac_address)
        self.assertIsNotNone(nic.tx_packets)
        self.assertIn('wan_rx', self.read_plain())

    def test_uptime(self) -> None:
        time.sleep(3)
        self.assertGreaterEqual(self.read().uptime, 3)
        began = time.monotonic()
        self.host.driver.reboot(self.host.context, self.server, self.ports,
                                'HARD')
        uptime = self.read().uptime
        self.assertLessEqual(uptime, time.monotonic() - began)
        time.sleep(3)
        self.assertGreaterEqual(self.read().uptime, uptime + 3)
        asked = time.monotonic()
        # The guest may end before this command has returned.
        with contextlib.suppress(AssertionError):
            self.host.run(self.server, 'sh', '-c', '(busybox sleep 1; reboot) '
                          '>/dev/null 2>&1 </dev/null &')
        while True:
            now = time.monotonic()
            uptime = self.read().uptime
            if uptime is not None and uptime <= now - asked:
                break
            self.assertLess(now - asked, 120)
            time.sleep(0.2)

    def test_paused(self) -> None:
        self.host.driver.pause(self.server)
        found = self.read()
        self.assertEqual('paused', found.state)
        self.assertGreater(found.memory_details.used, 0)
        self.assertIsNotNone(found.uptime)
        self.assertIsNotNone(found.nic_details[0].rx_packets)
        self.host.driver.unpause(self.server)

    def test_stopped(self) -> None:
        self.host.driver.power_off(self.server)
        found = self.read()
        self.assertEqual('shutdown', found.state)
        self.assertIsNone(found.uptime)
        [nic] = found.nic_details
        self.assertEqual(MAC, nic.mac_address)
        self.assertIsNone(nic.rx_packets)
        self.assertNotIn('eth0_rx', self.read_plain())

    def test_gone(self) -> None:
        self.host.driver.destroy(self.host.context, self.server, self.ports)
        with self.assertRaises(exception.InstanceNotFound):
            self.read()
        with self.assertRaises(exception.InstanceNotFound):
            self.read_plain()

    def test_few_requests(self) -> None:
        with self.host.requests() as sent:
            self.read()
        self.assertLessEqual(len(sent), 2)
