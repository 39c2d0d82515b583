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

"""Paused and suspended servers on a real LXD answer no packets.

The ports are those of routed networks, so that the host itself can ping them;
``test_vif.py`` has the same on Open vSwitch.
"""

from __future__ import annotations

import subprocess
import time
import unittest
import uuid

from nova.compute import power_state
from nova.network import model
from nova import objects

from nova_lxd_py.virt.vif import veth
from tests.fixtures import driver_case
from tests.fixtures import lxd_daemon

NO_LXD = lxd_daemon.missing()

#: Of no other test.
MAC = 'fa:16:3e:00:04:01'
HOST, GUEST = '10.209.4.1', '10.209.4.2'
HOST6, GUEST6 = 'fd2a:9e04::1', 'fd2a:9e04::2'

_NETWORK = f"""\
ip link set eth0 up
ip address add {GUEST}/30 dev eth0
ip route add default via {HOST}
ip -6 address add {GUEST6}/126 dev eth0
ip -6 route add default via {HOST6}
"""

# What the loss of the carrier may change, and the kernel's counter of these,
# when the kernel has checked the new IPv6 addresses.
_VIEW = """\
while ip address | grep -q tentative; do sleep 0.1; done
ip link show eth0; ip address show eth0; ip route; ip -6 route
cat /sys/class/net/eth0/carrier_changes /sys/class/net/eth0/operstate
"""


def _vif(mac: str) -> model.VIF:
    port = str(uuid.uuid4())
    return model.VIF(
        id=port, address=mac, type=model.VIF_TYPE_TAP, details={},
        devname=f'tap{port}'[:14], active=True, network=model.Network(
            id=str(uuid.uuid4()), label='net', subnets=[], mtu=1442))


@unittest.skipIf(NO_LXD, NO_LXD or '')
class PausedTest(driver_case.NetworkCase, unittest.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.vif = _vif(MAC)
        self.ports = [self.vif]
        self.server = self.host.spawn(network_info=self.ports)
        self.addCleanup(lambda: self.host.driver.destroy(
            self.host.context, self.server, self.ports))
        for address in (f'{HOST}/30', f'{HOST6}/126'):
            subprocess.run(['ip', 'address', 'add', address, 'dev',
                            self.vif['devname']], check=True)
        self.set_up_guest()

    def set_up_guest(self) -> None:
        self.host.run(self.server, 'sh', '-c', _NETWORK)
        self.assert_answers()

    def answers(self, address: str = GUEST) -> bool:
        return not subprocess.run(
            ['ping', '-c', '1', '-W', '1', address],
            stdout=subprocess.DEVNULL, check=False).returncode

    def assert_answers(self) -> None:
        for address in (GUEST, GUEST6):
            deadline = time.monotonic() + 30
            while not self.answers(address):
                self.assertLess(time.monotonic(), deadline, address)

    def assert_silent(self) -> None:
        for address in (GUEST, GUEST6):
            for _time in range(2):
                self.assertFalse(self.answers(address), address)

    def view(self) -> str:
        return self.host.run(self.server, 'sh', '-c', _VIEW)

    def pause(self) -> None:
        self.host.driver.pause(self.server)

    def unpause(self) -> None:
        self.host.driver.unpause(self.server)

    def suspend(self) -> None:
        self.host.driver.suspend(self.host.context, self.server)

    def resume(self) -> None:
        self.host.driver.resume(self.host.context, self.server, self.ports)

    def test_frozen(self) -> None:
        before = self.view()
        self.assertIn(f'default via {HOST} ', before)
        self.assertIn(f'default via {HOST6} ', before)
        for freeze, thaw in ((self.pause, self.unpause),
                             (self.suspend, self.resume)):
            freeze()
            self.assert_silent()
            self.assertEqual('1', veth.attribute(self.vif['devname'],
                                                 'carrier'))
            thaw()
            self.assertEqual(before, self.view())
            self.assert_answers()

    def test_connection_outlives_it(self) -> None:
        port = 4004
        self.host.run(self.server, 'sh', '-c',
                      f'busybox nc -l -p {port} -e /bin/cat >/dev/null 2>&1 &')
        sender = self.connect(port)
        self.pause()
        sender.stdin.write('meanwhile\n')
        sender.stdin.flush()
        self.assert_silent()
        self.unpause()
        self.assertEqual('meanwhile\n', sender.stdout.readline())

    def connect(self, port: int) -> subprocess.Popen[str]:
        sender = subprocess.Popen(
            ['busybox', 'nc', GUEST, str(port)], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.addCleanup(sender.wait)
        self.addCleanup(sender.kill)
        self.addCleanup(sender.stdin.close)
        self.addCleanup(sender.stdout.close)
        sender.stdin.write('before\n')
        sender.stdin.flush()
        self.assertEqual('before\n', sender.stdout.readline())
        return sender

    def test_nova_compute_restarts(self) -> None:
        before = self.view()
        self.pause()
        self.host.restart_driver()
        self.host.driver.plug_vifs(self.server, self.ports)
        self.assert_silent()
        self.unpause()
        self.assertEqual(before, self.view())
        self.assert_answers()

    def test_started_again(self) -> None:
        driver, context = self.host.driver, self.host.context
        for freeze in (self.pause, self.suspend):
            freeze()
            driver.reboot(context, self.server, self.ports, 'HARD')
            self.set_up_guest()
            freeze()
            driver.power_off(self.server)
            driver.power_on(context, self.server, self.ports)
            self.set_up_guest()

    def test_ports_change_meanwhile(self) -> None:
        added = _vif('fa:16:3e:00:04:02')
        self.pause()
        self.host.driver.attach_interface(
            self.host.context, self.server, objects.ImageMeta(), added)
        self.ports.append(added)
        self.assert_silent()
        self.unpause()
        self.assertIn(added['address'], self.host.run(
            self.server, 'cat', '/sys/class/net/eth1/address'))
        self.assert_answers()
        self.pause()
        self.host.driver.detach_interface(self.host.context, self.server,
                                          added)
        self.ports.remove(added)
        self.assert_silent()
        self.unpause()
        self.assert_answers()
        self.assertEqual(power_state.RUNNING, self.host.state(self.server))
