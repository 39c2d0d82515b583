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

"""Devices of the host that are passed through to instances."""

from __future__ import annotations

from nova import exception
from nova import objects
from oslotest import base

from nova_lxd_py.virt.host import passthrough
from tests.fixtures.fake_lxd import server

ALLOWED = ['gpu:10de:1db4', ' USB:0403:6001']


def flavor(**specs: str) -> objects.Flavor:
    return objects.Flavor(name='f', extra_specs={
        f'lxd:{key}': value for key, value in specs.items()})


class PassthroughTestCase(base.BaseTestCase):

    def assert_refused(self, kind: type[Exception], *words: str,
                       **specs: str) -> None:
        error = self.assertRaises(kind, passthrough.devices, flavor(**specs),
                                  ALLOWED)
        for word in words:
            self.assertIn(word, str(error))

    def test_none(self) -> None:
        self.assertEqual({}, passthrough.devices(flavor(), ALLOWED))
        self.assertEqual({}, passthrough.devices(flavor(), []))

    def test_devices(self) -> None:
        self.assertEqual({
            'passthrough-gpu-10de-1db4': {
                'type': 'gpu', 'vendorid': '10de', 'productid': '1db4'},
            'passthrough-usb-0403-6001': {
                'type': 'usb', 'vendorid': '0403', 'productid': '6001',
                'required': 'true'}},
            passthrough.devices(flavor(gpu='10DE:1db4', usb='0403:6001'),
                                ALLOWED))

    def test_several(self) -> None:
        found = passthrough.devices(
            flavor(gpu='10de:1db4, 1002:73bf'), [*ALLOWED, 'gpu:1002:73bf'])
        self.assertEqual(2, len(found))

    def test_not_allowed_here(self) -> None:
        """Another host may allow it."""
        self.assert_refused(exception.ComputeResourcesUnavailable,
                            'lxd:gpu', 'gpu:10de:0000',
                            'passthrough_devices', gpu='10de:0000')
        # An allowed GPU does not allow a USB device.
        self.assert_refused(exception.ComputeResourcesUnavailable,
                            usb='10de:1db4')

    def test_bad_flavor(self) -> None:
        for value in ('', 'all', '10de', '10de:', '10de:1db4,', '10de:1db4:x',
                      '0000:3b:00.0', '10de:1db4\nx', '../10de:1db4'):
            self.assert_refused(exception.InvalidInput, 'lxd:gpu', gpu=value)
            self.assertRaises(exception.InvalidInput, passthrough.check,
                              flavor(usb=value))

    def test_bad_option(self) -> None:
        for text in ('', '10de:1db4', 'pci:10de:1db4', 'gpu:1:2', 'gpu'):
            error = self.assertRaises(exception.InvalidInput,
                                      passthrough.parse, [text])
            self.assertIn(f'"{text}"', str(error))

    def test_present(self) -> None:
        resources = server.resources()
        self.assertEqual([], passthrough.present(resources, ALLOWED))
        resources['gpu']['cards'] = [
            {'vendor_id': '10de', 'product_id': '1DB4'},
            {'vendor_id': '1002', 'product_id': '73bf'}]
        resources['usb']['devices'] = [
            {'vendor_id': '0403', 'product_id': '6001'}]
        self.assertEqual([('gpu', '10de:1db4'), ('usb', '0403:6001')],
                         passthrough.present(resources, ALLOWED))
        self.assertEqual([], passthrough.present(
            {'gpu': None, 'usb': {'devices': None}}, ALLOWED))
