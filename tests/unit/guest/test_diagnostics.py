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

"""Diagnostics of servers of which LXD does not know everything."""

from __future__ import annotations

from nova import objects

from nova_lxd_py.virt.guest import diagnostics
from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from tests.fixtures import session_case

objects.register_all()

UUID = '0c1e9f0a-1111-4222-8333-444455556666'
NAME = 'instance-00000001'
MAC = 'fa:16:3e:00:00:01'


class DiagnosticsTestCase(session_case.SessionTestCase):

    def setUp(self):
        super().setUp()
        self.create(NAME, **{lxd_guest.KEY_UUID: UUID,
                             lxd_guest.KEY_ROLE: 'server'})
        self.server = objects.Instance(
            uuid=UUID, id=1, config_drive='', flavor=objects.Flavor(
                vcpus=2, memory_mb=128))
        self.server.system_metadata = {}
        self.server.image_ref = ''
        self.diagnostics = diagnostics.Diagnostics(
            registry.GuestRegistry(self.session))

    @property
    def guest(self):
        return self.lxd.instance(NAME)

    def start(self):
        self.session.put('instances', NAME, 'state', body={'action': 'start'})

    def test_what_the_kernel_does_not_tell(self):
        self.start()
        self.guest.usage.update(cpu=-1, memory=-1)
        found = self.diagnostics.read(self.server)
        self.assertIsNone(found.cpu_details[0].time)
        self.assertIsNone(found.memory_details.used)
        plain = self.diagnostics.read_plain(self.server)
        self.assertNotIn('cpu0_time', plain)
        self.assertNotIn('memory-used', plain)
        self.assertEqual(128 * 1024, plain['memory'])

    def test_units(self):
        self.start()
        self.guest.usage.update(cpu=7, memory=(5 << 20) + 1023, disk=9 << 30)
        found = self.diagnostics.read(self.server)
        self.assertEqual((7, 5, 128), (
            found.cpu_details[0].time, found.memory_details.used,
            found.memory_details.maximum))
        self.assertLessEqual(0, found.uptime)
        # The root disk; no ports.
        self.assertEqual((1, 0), (len(found.disk_details),
                                  len(found.nic_details)))
        plain = self.diagnostics.read_plain(self.server)
        self.assertEqual((7, 5 << 10, 5 << 10, 0, 9 << 30), (
            plain['cpu0_time'], plain['memory-used'], plain['memory-peak'],
            plain['memory-swap'], plain['root_usage']))

    def test_never_started(self):
        found = self.diagnostics.read(self.server)
        self.assertEqual(('shutdown', None, 2), (
            found.state, found.uptime, found.num_cpus))
        self.assertNotIn('uptime', self.diagnostics.read_plain(self.server))

    def test_start_of_unknown_form(self):
        self.start()
        for text in ('', 'yesterday', '0001-01-01T00:00:00Z'):
            self.guest.last_used_at = text
            self.assertIsNone(self.diagnostics.read(self.server).uptime)

    def test_interfaces_on_top_of_a_port(self):
        info = self.session.get('instances', NAME)
        self.session.put('instances', NAME, body={**info, 'devices': {
            **info['devices'], 'nic-1': {
                'type': 'nic', 'nictype': 'p2p', 'name': 'eth0',
                'hwaddr': MAC}}})
        self.start()
        counters = {'bytes_received': 7, 'bytes_sent': 8}
        self.guest.usage['network'] = {
            'a.vlan': {'hwaddr': MAC, 'counters': {'bytes_received': 1}},
            'eth0': {'counters': counters}}
        found = self.diagnostics.read_plain(self.server)
        self.assertEqual((7, 8), (found['eth0_rx'], found['eth0_tx']))
        self.assertNotIn('a.vlan_rx', found)
