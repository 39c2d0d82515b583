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

"""Limits and flags of flavors in a real container."""

from __future__ import annotations

import base64
import json
import time
from typing import Any
import unittest

from nova import exception
from nova import objects

from tests.fixtures import driver_host
from tests.fixtures import lxd_daemon
from tests.fixtures import variants

NO_LXD = lxd_daemon.missing()

MIB = 1 << 20


class FlavorTest(unittest.TestCase):
    """A test with instances of a flavor, inspected from inside."""

    driver_type = 'btrfs'
    options: dict[str, Any] = {}

    def setUp(self) -> None:
        super().setUp()
        self.host = driver_host.DriverHost(
            lxd_daemon.shared(self.driver_type), **self.options)
        self.host.setUp()
        self.addCleanup(self.host.cleanUp)
        self.image = self.host.image()

    def server(self, extra_specs: dict[str, str] | None = None,
               injected_files: Any = (), admin_password: str | None = None,
               **fields: Any) -> objects.Instance:
        return self.host.spawn(
            self.host.instance(self.image, extra_specs, **fields),
            self.image, injected_files=injected_files,
            admin_password=admin_password)

    def run_in(self, server: objects.Instance, script: str) -> str:
        return self.host.run(server, 'sh', '-c', script)

    def assert_fails_in(self, server: objects.Instance, script: str) -> str:
        with self.assertRaises(AssertionError) as caught:
            self.run_in(server, script)
        return str(caught.exception)


@unittest.skipIf(NO_LXD, NO_LXD or '')
class LimitTest(FlavorTest):

    def test_memory(self) -> None:
        server = self.server(memory_mb=64)
        # dd fills its whole buffer.
        self.run_in(server, 'dd if=/dev/zero of=/dev/null bs=20M count=1')
        self.assert_fails_in(
            server, 'dd if=/dev/zero of=/dev/null bs=100M count=1')
        self.run_in(server, 'true')

    def test_vcpus(self) -> None:
        self.assert_cpus(1, self.server(vcpus=1))

    def assert_cpus(self, number: int, server: objects.Instance) -> None:
        # LXD applies a CPU set a moment after the start.
        deadline = time.monotonic() + 60
        while (found := self.run_in(server, 'nproc')) != f'{number}\n':
            self.assertLess(time.monotonic(), deadline, found)
            time.sleep(0.05)

    def test_more_vcpus_than_the_host_has(self) -> None:
        """Placement does not allow such flavors; LXD gives all CPUs."""
        self.assert_cpus(
            self.host.driver.get_available_resource('x')['vcpus'],
            self.server(vcpus=1000))

    def test_cpu_quota(self) -> None:
        server = self.server({'quota:cpu_quota': '10000',
                              'quota:cpu_period': '50000'}, vcpus=1)
        before, began = self.cpu_time(server), time.monotonic()
        self.run_in(server, 'while :; do :; done & sleep 2; kill $!')
        used = self.cpu_time(server) - before
        self.assertLess(used / (time.monotonic() - began), 0.35)

    def cpu_time(self, server: objects.Instance) -> float:
        state = self.host.lxd.api.must(
            'GET', f'/1.0/instances/{server.name}/state',
            params={'project': self.host.project})
        return state['cpu']['usage'] / 1e9

    def test_processes(self) -> None:
        server = self.server({'lxd:max_processes': '30'})
        many = ('i=0; while [ $i -lt %d ]; do sleep 1000 </dev/null '
                '>/dev/null 2>&1 & i=$((i+1)); done')
        self.run_in(server, many % 10)
        self.assertIn('fork', self.assert_fails_in(server, many % 60))

    def test_root_disk(self) -> None:
        server = self.server(root_gb=1)
        # Incus keeps the output of commands on the same disk.
        self.assert_fails_in(
            server, 'dd if=/dev/zero of=/big bs=1M count=1100 2>/dev/error')
        self.run_in(server, 'rm /big; grep -i quota /dev/error')

    def test_read_limit(self) -> None:
        server = self.server({'quota:disk_read_bytes_sec': str(4 * MIB)})
        self.run_in(server, 'dd if=/dev/zero of=/file bs=1M count=12; sync')
        began = time.monotonic()
        self.run_in(server, 'dd if=/file of=/dev/null bs=1M iflag=direct')
        self.assertGreater(time.monotonic() - began, 2)

    def test_write_limit(self) -> None:
        server = self.server({'quota:disk_write_iops_sec': '10'})
        began = time.monotonic()
        self.run_in(server, 'dd if=/dev/zero of=/file bs=4k count=30 '
                            'oflag=direct')
        self.assertGreater(time.monotonic() - began, 2)

    def test_every_limit_at_once(self) -> None:
        server = self.server({
            'lxd:max_processes': '200', 'quota:cpu_shares': '512',
            'quota:disk_total_bytes_sec': str(50 * MIB)}, swap=64, vcpus=2)
        config = self.host.lxd_instances()[server.name]
        self.assertEqual('50%', config['config']['limits.cpu.allowance'])
        self.assertEqual(f'{50 * MIB}B',
                         config['devices']['root']['limits.max'])
        self.run_in(server, 'true')

    def test_bad_extra_spec(self) -> None:
        with self.assertRaises(exception.InvalidInput) as caught:
            self.server({'lxd:nestd_allowed': 'true'})
        self.assertIn('lxd:nestd_allowed', str(caught.exception))
        self.assertEqual([], self.host.driver.list_instances())


@unittest.skipIf(NO_LXD, NO_LXD or '')
class FlagTest(FlavorTest):

    def uids(self, server: objects.Instance) -> tuple[int, int]:
        words = self.run_in(server, 'cat /proc/self/uid_map').split()
        return int(words[1]), int(words[2])

    def test_nesting(self) -> None:
        for word, there in (('true', True), ('false', False)):
            server = self.server({'lxd:nested_allowed': word})
            # LXD mounts a full /proc here for nested containers.
            found = 'yes' in self.run_in(
                server, 'test -d /dev/.lxc/proc && echo yes; true')
            self.assertEqual(there, found)

    def test_privileged(self) -> None:
        server = self.server({'lxd:privileged_allowed': 'true'})
        self.assertEqual(0, self.uids(server)[0])
        plain = self.server({'lxd:privileged_allowed': 'false'})
        self.assertNotEqual(0, self.uids(plain)[0])

    def test_own_uid_range(self) -> None:
        first = self.server({'lxd:isolated': 'true'})
        second = self.server({'lxd:isolated': 'true'})
        ranges = sorted([self.uids(first), self.uids(second)])
        self.assertEqual([65536, 65536], [size for _base, size in ranges])
        self.assertGreaterEqual(ranges[1][0], ranges[0][0] + 65536)

    def test_common_uid_range(self) -> None:
        first = self.server({'lxd:isolated': 'false'})
        second = self.server({'lxd:isolated': 'false'})
        self.assertEqual(self.uids(first), self.uids(second))

    def test_guest_knows_that_it_is_on_openstack(self) -> None:
        """cloud-init's ds-identify reads it."""
        server = self.server()
        self.assertIn('product_name=OpenStack Nova',
                      self.run_in(server, 'cat /proc/1/environ'))

    def test_guest_learns_nothing_of_lxd(self) -> None:
        self.run_in(self.server(), f'test ! -e {lxd_daemon.GUEST_API}')


@unittest.skipIf(NO_LXD, NO_LXD or '')
class CloudInitKeysTest(FlavorTest):

    options = {'cloud_init_keys': True}

    def test_keys(self) -> None:
        server = self.server(
            user_data=base64.b64encode(b'#!/bin/sh\n').decode(),
            key_data='ssh-ed25519 AAAA me')
        self.run_in(server, f'test -S {lxd_daemon.GUEST_API}/sock')
        config = self.host.lxd_instances()[server.name]['config']
        self.assertEqual('#!/bin/sh\n', config['cloud-init.user-data'])
        self.assertIn('ssh-ed25519 AAAA me',
                      config['cloud-init.vendor-data'])


class ConfigDriveTests(FlavorTest):
    """Config drives in a guest, on one kind of pool."""

    LATEST = '/config-drive/openstack/latest'

    def drive(self, server: objects.Instance) -> dict[str, Any]:
        return json.loads(self.run_in(
            server, f'cat {self.LATEST}/meta_data.json'))

    def test_content(self) -> None:
        server = self.server(
            config_drive='True', admin_password='s3cret',
            injected_files=[('/etc/motd', b'hello')],
            user_data=base64.b64encode(b'#!/bin/sh\n').decode())
        found = self.drive(server)
        self.assertEqual(server.uuid, found['uuid'])
        self.assertEqual('s3cret', found['admin_pass'])
        content = found['files'][0]['content_path']
        self.assertEqual('hello', self.run_in(
            server, f'cat /config-drive/openstack{content}'))
        self.assertEqual('#!/bin/sh\n', self.run_in(
            server, f'cat {self.LATEST}/user_data'))

    def test_whatever_the_uid_range(self) -> None:
        for specs in ({'lxd:isolated': 'true'}, {'lxd:isolated': 'false'},
                      {'lxd:privileged_allowed': 'true'}, {}):
            server = self.server(specs, config_drive='True')
            self.assertEqual(server.uuid, self.drive(server)['uuid'])
            self.assertEqual(
                '0:0 400\n', self.run_in(server, 'stat -c "%u:%g %a" '
                                         f'{self.LATEST}/meta_data.json'))
            self.assertEqual(
                '0:0 700\n', self.run_in(server, 'stat -c "%u:%g %a" '
                                         '/config-drive/openstack'))

    def test_read_only(self) -> None:
        server = self.server(config_drive='True')
        self.assertIn('Read-only', self.assert_fails_in(
            server, 'touch /config-drive/x'))

    def test_not_in_the_root_disk(self) -> None:
        """Copies of the root disk do not contain the password."""
        server = self.server(config_drive='True', admin_password='s3cret')
        self.host.driver.power_off(server)
        api, params = self.host.lxd.api, {'project': self.host.project}
        path = f'/1.0/instances/{server.name}/files'
        listing = api.request('GET', path, params={
            **params, 'path': '/config-drive'})
        self.assertEqual([], listing.metadata or [])

    def test_kept_over_reboots(self) -> None:
        server = self.server(config_drive='True', admin_password='s3cret')
        for kind in ('SOFT', 'HARD'):
            self.host.driver.reboot(self.host.context, server, [], kind)
            self.assertEqual('s3cret', self.drive(server)['admin_pass'])

    def test_recreated_if_lost(self) -> None:
        server = self.server(config_drive='True', admin_password='s3cret')
        self.host.driver.power_off(server)
        api, params = self.host.lxd.api, {'project': self.host.project}
        url = f'/1.0/instances/{server.name}'
        entry = api.must('GET', url, params=params)
        del entry['devices']['config-drive']
        api.must('PUT', url, entry, params=params)
        [volume] = self.host.lxd_volumes()
        api.must('DELETE', f'/1.0/storage-pools/{self.host.lxd.pool}/volumes/'
                 f'custom/{volume}', params=params)
        self.host.driver.power_on(self.host.context, server, [])
        self.assertEqual(server.uuid, self.drive(server)['uuid'])

    def test_deleted_with_the_server(self) -> None:
        server = self.server(config_drive='True')
        self.assertEqual([f'config-drive-{server.uuid}'],
                         self.host.lxd_volumes())
        self.host.driver.destroy(self.host.context, server, [])
        self.assertEqual([], self.host.lxd_volumes())


@unittest.skipIf(NO_LXD, NO_LXD or '')
class BtrfsConfigDriveTest(ConfigDriveTests):
    pass


@unittest.skipIf(NO_LXD, NO_LXD or '')
@variants.keep(
    'test_content', 'test_not_in_the_root_disk', 'test_kept_over_reboots',
    'test_deleted_with_the_server')
class DirConfigDriveTest(ConfigDriveTests):
    driver_type = 'dir'


# A base class, not to be run itself.
del ConfigDriveTests
