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

"""Passthrough devices with a real LXD, without the hardware.

LXD accepts the devices as the driver describes them, and instances whose
device is missing do not start.
"""

from __future__ import annotations

from typing import Any
import unittest

from nova import exception

from tests.fixtures import driver_host
from tests.fixtures import lxd_daemon
from tests.fixtures import resize_case

NO_LXD = lxd_daemon.missing()

#: A vendor ID that is not assigned, so that no host has the device.
GPU = {'lxd:gpu': 'ffff:0001'}
USB = {'lxd:usb': 'ffff:0002'}


@unittest.skipIf(NO_LXD, NO_LXD or '')
class PassthroughTest(resize_case.ResizeTestCase):

    def allow(self, *devices: str) -> None:
        conf = driver_host.CONF
        conf.set_override('passthrough_devices', list(devices), 'lxd')
        self.addCleanup(conf.clear_override, 'passthrough_devices', 'lxd')

    def assert_fails(self, specs: dict[str, str], kind: type[Exception]
                     ) -> str:
        image = self.host.image()
        server = self.host.instance(image, specs)
        with self.assertLogs('nova_lxd_py') as logs:
            with self.assertRaises(kind) as caught:
                self.host.spawn(server, image)
        self.assertEqual([], self.driver.list_instances())
        return f'{caught.exception} {logs.output}'

    def test_not_allowed(self) -> None:
        for specs in (GPU, USB):
            self.assertIn('passthrough_devices', self.assert_fails(
                specs, exception.ComputeResourcesUnavailable))

    def test_missing(self) -> None:
        self.allow('gpu:ffff:0001', 'usb:ffff:0002')
        for specs, word in ((GPU, 'gpu'), (USB, 'usb')):
            self.assertIn(word, self.assert_fails(
                specs, exception.NovaException).lower())

    def test_resize_to_one_that_is_missing(self) -> None:
        self.allow('usb:ffff:0002')
        server = self.server()
        before = self.shown(server)
        with self.running_on(server):
            for _ in range(2):
                with self.assertRaises(exception.InstanceFaultRollback):
                    self.prepare(server, self.flavor(
                        server, memory_mb=256, extra_specs=USB))
            after: Any = self.shown(server)
        self.assertEqual(before['devices'], after['devices'])
        self.assertEqual(before['config']['limits.memory'],
                         after['config']['limits.memory'])

    def test_resize_to_one_that_is_not_allowed(self) -> None:
        server = self.server()
        with self.running_on(server):
            with self.assertRaises(exception.InstanceFaultRollback) as caught:
                self.prepare(server, self.flavor(server, extra_specs=GPU))
        self.assertIn('lxd:gpu', str(caught.exception))
