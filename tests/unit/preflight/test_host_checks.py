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

"""Checks of the host when nova-compute starts."""

from __future__ import annotations

import os
import shutil
import unittest

import fixtures

from nova_lxd_py import conf
from nova_lxd_py.virt.lxd import session
from nova_lxd_py.virt.preflight import host_checks
from tests.fixtures import preflight_case


class CpuTestCase(preflight_case.PreflightTestCase):

    def divide(self, shared: str | None, dedicated: str | None = None
               ) -> None:
        self.cfg.config(group='compute', cpu_shared_set=shared,
                        cpu_dedicated_set=dedicated)

    def test_good(self) -> None:
        for sets in (('0-1', '2-3'), ('0', None), (None, '3')):
            self.divide(*sets)
            self.check()

    def test_cpus_that_are_not_there(self) -> None:
        self.divide('0-5')
        self.assert_stops('cpu_shared_set', 'CPU 4-5', 'host has 0-3')
        self.divide('0', '1,9')
        self.assert_stops('cpu_dedicated_set', 'CPU 9')

    def test_offline(self) -> None:
        cores = self.lxd.daemon.resources['cpu']['sockets'][0]['cores']
        cores[2]['threads'][0]['online'] = False
        self.divide('0', '2')
        self.assert_stops('cpu_dedicated_set', 'CPU 2', 'offline')

    def test_unknown(self) -> None:
        self.lxd.daemon.resources['cpu'] = {'sockets': None, 'total': 4}
        self.divide('0')
        self.assert_stops('none that LXD reports')

    def test_in_both(self) -> None:
        self.divide('0-2', '2-3')
        self.assert_stops('CPU 2 is both')

    def test_not_a_set(self) -> None:
        for text in ('x', '3-1', '^0'):
            self.divide(text)
            self.assert_stops('cpu_shared_set')

    def test_reserved_cpus(self) -> None:
        self.cfg.config(reserved_host_cpus=1)
        self.check()
        self.divide('0')
        self.assert_stops('reserved_host_cpus')

    def test_old_option(self) -> None:
        self.cfg.config(vcpu_pin_set='0-1')
        self.assert_stops('vcpu_pin_set', 'cpu_shared_set')


class DeviceTestCase(preflight_case.PreflightTestCase):

    def test_bad(self) -> None:
        self.cfg.config(group='lxd', passthrough_devices=['gpu:x'])
        self.assert_stops('[lxd] passthrough_devices', '"gpu:x"')

    def test_missing(self) -> None:
        self.cfg.config(group='lxd', passthrough_devices=['gpu:10de:1db4'])
        self.check()
        self.assertIn('not have the gpu device 10de:1db4', self.log.output)
        self.lxd.daemon.resources['gpu']['cards'] = [
            {'vendor_id': '10de', 'product_id': '1db4'}]
        before = len(self.log.output)
        self.check()
        self.assertNotIn('no gpu', self.log.output[before:])


class ProgramTestCase(preflight_case.PreflightTestCase):

    def test_instances_path(self) -> None:
        path = os.path.join(self.directory, 'file')
        with open(path, 'w'):
            pass
        self.cfg.config(instances_path=os.path.join(path, 'x'))
        self.assert_stops('instances_path', path)

    def test_serial_console_command(self) -> None:
        self.cfg.config(group='lxd', serial_console_command='')
        self.assert_stops('serial_console_command', 'login')
        self.cfg.config(group='lxd', serial_console_command='login "x')
        self.assert_stops('serial_console_command', 'quot')
        self.cfg.config(group='lxd',
                        serial_console_command='sh -c "exec login"')
        self.check()

    def test_config_drive_device(self) -> None:
        self.cfg.config(mkisofs_cmd='/no/such/mkisofs')
        self.check()
        self.cfg.config(group='lxd', config_drive_device=True)
        self.assert_stops('config_drive_device', 'genisoimage')
        self.cfg.config(mkisofs_cmd='true')
        self.check()


class UidRangeTestCase(preflight_case.PreflightTestCase):

    def test_enough(self) -> None:
        self.check()
        self.assertIn('100 ranges of host uids', self.log.output)

    def test_too_few(self) -> None:
        self.set_uid_ranges(0)
        self.check()
        self.assertIn('/etc/subuid', self.log.output)

    def test_off(self) -> None:
        self.cfg.config(group='lxd', idmap_isolation='off')
        self.set_uid_ranges(0)
        self.check()
        self.assertNotIn('/etc/subuid', self.log.output)


class ServerTestCase(preflight_case.PreflightTestCase):
    """Programs that the host of LXD lacks."""

    server = 'incus'

    def test_nothing(self) -> None:
        self.packages('incus-base', '6.0.4-2+deb13u12')
        self.check()
        self.assertNotIn('Package', self.log.output)

    def test_programs(self) -> None:
        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.host.server_host._DIRECTORIES', ('nothing',)))
        self.check()
        self.assertIn('lacks the package zstd: Incus cannot unpack',
                      self.log.output)

    @unittest.skipIf(shutil.which('dpkg') is None, 'dpkg is not installed')
    def test_outdated_package(self) -> None:
        self.packages('incus-base', '6.0.4-2+deb13u9')
        self.check()
        self.assertIn('Package incus-base 6.0.4-2+deb13u9 lacks security '
                      'fixes; install 6.0.4-2+deb13u12', self.log.output)

    def test_package_of_another_server(self) -> None:
        self.packages('lxd', '5.0.2-1')
        self.check()
        self.assertNotIn('Package', self.log.output)

    def test_snap(self) -> None:
        """It has programs and versions of its own."""
        self.packages('incus-base', '6.0.4-2+deb13u9')
        opened = session.Session(conf.CONF.lxd)
        opened.connect()
        self.cfg.config(group='lxd', endpoint='/var/snap/lxd/unix.socket')
        host_checks.report_server(opened)
        self.assertNotIn('Package', self.log.output)

    def packages(self, name: str, version: str) -> None:
        """Have dpkg take a package for the only one that is installed."""
        database = self.useFixture(fixtures.TempDir()).path
        with open(os.path.join(database, 'status'), 'w') as status:
            status.write(f'Package: {name}\nStatus: install ok installed\n'
                         f'Architecture: amd64\nVersion: {version}\n'
                         f'Maintainer: x <x@example.org>\nDescription: x\n')
        for directory in ('updates', 'info'):
            os.mkdir(os.path.join(database, directory))
        self.useFixture(fixtures.EnvironmentVariable('DPKG_ADMINDIR',
                                                     database))
