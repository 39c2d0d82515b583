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
import pathlib
import re
import shutil
import unittest

import fixtures

from nova_lxd_py import conf
from nova_lxd_py.virt.host import kernel_limits
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


class KernelLimitsTestCase(preflight_case.PreflightTestCase):

    #: Values of the kernel and of Debian 12 with 8 GiB of memory.
    DEFAULTS = {
        'fs.inotify.max_user_instances': 128,
        'fs.inotify.max_user_watches': 65536,
        'fs.inotify.max_queued_events': 16384,
        'kernel.keys.maxkeys': 200,
        'kernel.keys.maxbytes': 20000,
        'kernel.pty.max': 4096,
        'kernel.pty.reserve': 1024,
        'net.ipv4.neigh.default.gc_thresh3': 1024,
        'net.ipv6.neigh.default.gc_thresh3': 1024,
        'fs.file-max': 2 ** 63 - 1,
        'fs.aio-max-nr': 65536,
        'vm.max_map_count': 65530,
    }
    NOFILE = 'LimitNOFILE'

    def set_limits(self, **changes: int) -> None:
        for name, value in {**self.DEFAULTS, **changes}.items():
            self.set_sysctl(name, value)

    def set_recommended(self) -> None:
        self.set_limits(**{limit.name: limit.recommended
                           for limit in kernel_limits.LIMITS})

    def set_daemon(self, name: str, open_files: int | str) -> None:
        pid = self.check().server['environment']['server_pid']
        self.write_proc(f'{pid}/comm', name)
        self.write_proc(
            f'{pid}/limits',
            'Limit                     Soft Limit   Hard Limit   Units\n'
            'Max processes             1024         1024         processes\n'
            f'Max open files            1024         {open_files}   files')

    def warnings(self) -> dict[str, str]:
        """Check, and return the text about each limit."""
        before = len(self.log.output)
        self.check()
        return dict(re.findall(r'Kernel limit (\S+) is (.*)',
                               self.log.output[before:]))

    def test_machine_as_installed(self) -> None:
        self.set_limits()
        warnings = self.warnings()
        for name, text in (
                ('fs.inotify.max_user_instances',
                 '128, which allows about 12 servers; it applies to all '
                 'servers together. Set it to 1048576.'),
                ('kernel.keys.maxkeys',
                 '200, which allows about 10 servers; it applies to servers '
                 'that share a range of host uids'),
                ('kernel.keys.maxbytes',
                 '20000, which allows about 57 servers'),
                ('fs.inotify.max_queued_events',
                 '16384, which allows any number of idle servers; it applies '
                 'to each inotify instance'),
                ('fs.aio-max-nr', '65536, which allows any number'),
                ('vm.max_map_count', '65530, which allows any number')):
            self.assertIn(text, warnings.pop(name))
        self.assertEqual({}, warnings)

    def test_recommended_values(self) -> None:
        self.set_recommended()
        self.set_daemon('lxd', kernel_limits.NOFILE.recommended)
        self.assertEqual({}, self.warnings())

    def test_each_limit(self) -> None:
        self.set_recommended()
        for limit in kernel_limits.LIMITS:
            value = kernel_limits.SERVERS * limit.per_server
            if limit.reserve:
                value += self.DEFAULTS[limit.reserve]
            self.set_sysctl(limit.name, value or limit.recommended)
            self.assertEqual({}, self.warnings(), limit.name)
            self.set_sysctl(limit.name, (value or limit.recommended) - 1)
            self.assertEqual([limit.name], list(self.warnings()))
            self.set_sysctl(limit.name, limit.recommended)

    def test_reserve_of_the_host(self) -> None:
        self.set_recommended()
        self.set_sysctl('kernel.pty.max', 1224)
        self.assertIn('1224, which allows about 100 servers',
                      self.warnings()['kernel.pty.max'])

    def test_own_ranges(self) -> None:
        """Each instance has limits of its own for keys."""
        self.cfg.config(group='lxd', idmap_isolation='server')
        self.set_limits()
        self.assertNotIn('kernel.keys', ' '.join(self.warnings()))

    def test_limits_that_are_not_shown(self) -> None:
        self.set_limits()
        for name in ('net/ipv4/neigh/default/gc_thresh3',
                     'fs/inotify/max_user_instances'):
            (self.proc / 'sys' / name).unlink()
        self.set_sysctl('fs.inotify.max_user_watches', 5)
        self.write_proc('sys/vm/max_map_count', '')
        self.assertEqual(
            ['fs.inotify.max_user_watches', 'fs.inotify.max_queued_events',
             'kernel.keys.maxkeys', 'kernel.keys.maxbytes', 'fs.aio-max-nr'],
            list(self.warnings()))

    def test_open_files(self) -> None:
        self.set_daemon('lxd', 1024)
        self.assertRegex(self.warnings()[self.NOFILE], '1024, which allows')
        self.set_daemon('lxd', 'unlimited')
        self.assertEqual({}, self.warnings())
        # The process id is that of another namespace.
        self.set_daemon('bash', 1024)
        self.assertEqual({}, self.warnings())

    def test_remote(self) -> None:
        self.set_limits()
        self.cfg.config(group='lxd', endpoint='https://192.0.2.1:8443')
        host_checks.report_kernel_limits(
            session.Session(conf.CONF.lxd), conf.CONF.lxd)
        self.assertNotIn('Kernel limit', self.log.output)

    def test_script_sets_them(self) -> None:
        """tools/kernel_limits.sh has the same values."""
        script = pathlib.Path(__file__).parents[3] / 'tools/kernel_limits.sh'
        values = dict(re.findall(r'^([a-z]+\.\S+) +(\d+)$',
                                 script.read_text(), re.MULTILINE))
        self.assertEqual(
            {limit.name: str(limit.recommended)
             for limit in kernel_limits.LIMITS},
            {name: value for name, value in values.items()
             if not name.endswith(('gc_thresh1', 'gc_thresh2'))})


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
