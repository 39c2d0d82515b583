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

"""Addresses at which LXD lets other LXD servers pull, and transfers."""

from __future__ import annotations

from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import migration
from tests.fixtures import session_case


class AddressTestCase(session_case.SessionTestCase):

    def setUp(self):
        super().setUp()
        self.session.connect()

    def present(self, address):
        self.lxd.daemon.config['core.https_address'] = address

    def test_format(self):
        for address, expected in (
                ('192.0.2.1', '192.0.2.1:8443'),
                ('192.0.2.1:9', '192.0.2.1:9'),
                ('host1', 'host1:8443'),
                ('2001:db8::1', '[2001:db8::1]:8443'),
                ('[2001:db8::1]', '[2001:db8::1]:8443'),
                ('[2001:db8::1]:9', '[2001:db8::1]:9')):
            self.assertEqual(expected, migration.server_address(address))

    def test_no_address(self):
        for address in ('', ':8443', 'host:port', 'host/path', 'me@host',
                        'host?x', '[2001:db8::1'):
            self.assertRaises(ValueError, migration.server_address, address)

    def test_is_set(self):
        self.assertTrue(migration.listen(self.session, '192.0.2.1'))
        self.assertEqual('192.0.2.1:8443',
                         self.lxd.daemon.config['core.https_address'])

    def test_what_includes_it_is_kept(self):
        for present in ('192.0.2.1:8443', ':8443', '[::]:8443', '[::]',
                        '0.0.0.0:8443', '192.0.2.1'):
            self.present(present)
            self.assertTrue(migration.listen(self.session, '192.0.2.1'),
                            present)
            self.assertEqual(present,
                             self.lxd.daemon.config['core.https_address'])

    def test_anything_else_is_not_changed(self):
        for present in ('192.0.2.2:8443', ':8444', '127.0.0.1', '[::'):
            self.present(present)
            self.assertFalse(migration.listen(self.session, '192.0.2.1'),
                             present)
            self.assertEqual(present,
                             self.lxd.daemon.config['core.https_address'])

    def test_incremental(self):
        self.assertTrue(migration.is_incremental('dir', 'dir'))
        self.assertTrue(migration.is_incremental('btrfs', 'dir'))
        self.assertTrue(migration.is_incremental('lvm', 'lvm'))
        self.assertFalse(migration.is_incremental('btrfs', 'btrfs'))
        self.assertFalse(migration.is_incremental('zfs', 'zfs'))

    def test_sent(self):
        self.create()
        operation = migration.offer_instance(self.session, 'c1',
                                             '192.0.2.1').operation
        for text, expected in (
                ('c1: 182.26MB (182.10MB/s)', 182260000),
                ('c1: 999B (1B/s)', 999), ('c1: 1.5kB (1B/s)', 1500),
                ('c1: 2.00GB (182.10MB/s)', 2000000000), ('', 0),
                ('nothing known', 0)):
            operation.metadata = {'metadata': {'fs_progress': text}}
            self.assertEqual((expected, text), migration.sent(operation))
        operation.metadata = {'metadata': None}
        self.assertEqual((0, ''), migration.sent(operation))

    def test_no_certificate(self):
        self.create()
        self.lxd.daemon.certificate = ''
        self.session.connect()
        self.assertRaises(errors.OperationFailed, migration.offer_instance,
                          self.session, 'c1', '192.0.2.1')
