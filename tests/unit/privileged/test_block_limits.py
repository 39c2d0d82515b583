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

"""Limits of block devices; that they have effect is in tests/functional."""

from __future__ import annotations

import io
import os
from unittest import mock

import fixtures
from oslotest import base

from nova_lxd_py.virt import privileged
from nova_lxd_py.virt.privileged import block_limits
from nova_lxd_py.virt.privileged import validation

#: A device with the number 1:3.
DEVICE = '/dev/null'
ALL = 'rbps=1048576 wbps=2 riops=3 wiops=4'

FIRST = ('9:name=systemd:/lxc.payload.nova_i1\n'
         '7:cpu,blkio:{}\n0::/lxc.monitor.x\n')
SECOND = '0::{}\n'


class BlockLimitsTest(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        privileged.context.set_client_mode(False)
        self.addCleanup(privileged.context.set_client_mode, True)
        self.top = self.useFixture(fixtures.TempDir()).path
        self.useFixture(fixtures.MockPatchObject(block_limits, '_TOP',
                                                 self.top))
        self.useFixture(fixtures.MockPatchObject(
            validation, 'checked_device', lambda path: path))
        self.membership = FIRST.format('/lxc.payload.nova_i1')
        opened = mock.patch.object(block_limits, 'open', self.open,
                                   create=True)
        opened.start()
        self.addCleanup(opened.stop)

    def open(self, path: str, **kwargs: object) -> io.StringIO:
        self.assertEqual('/proc/4711/cgroup', path)
        return io.StringIO(self.membership)

    def make(self, directory: str, *files: str) -> str:
        """Create a control group."""
        path = self.top + directory
        os.makedirs(path)
        for file in files:
            with open(f'{path}/{file}', 'w', encoding='ascii'):
                pass
        return path

    def read(self, path: str) -> str:
        with open(path, encoding='ascii') as stream:
            return stream.read()

    def set_limits(self, limits: str = ALL, container: str = 'nova_i1'
                   ) -> None:
        block_limits.set_limits(container, 4711, DEVICE, limits)

    def test_first_version(self) -> None:
        files = {kind: f'blkio.throttle.{kind}_device' for kind in (
            'read_bps', 'write_bps', 'read_iops', 'write_iops')}
        for limits, expected in (
                (ALL, ['1:3 1048576', '1:3 2', '1:3 3', '1:3 4']),
                ('wbps=5', ['1:3 0', '1:3 5', '1:3 0', '1:3 0']),
                ('', ['1:3 0'] * 4)):
            group = f'/blkio/lxc.payload.nova_i1-{len(limits)}'
            path = self.make(group, *files.values())
            self.membership = FIRST.format(group.removeprefix('/blkio'))
            self.set_limits(limits)
            self.assertEqual(expected, [self.read(f'{path}/{file}')
                                        for file in files.values()])

    def test_second_version(self) -> None:
        for limits, expected in (
                (ALL, '1:3 rbps=1048576 wbps=2 riops=3 wiops=4'),
                ('wbps=5', '1:3 rbps=max wbps=5 riops=max wiops=max'),
                ('', '1:3 rbps=max wbps=max riops=max wiops=max')):
            group = f'/lxc.payload.nova_i1-{len(limits)}'
            path = self.make(group, 'io.max')
            self.membership = SECOND.format(group)
            self.set_limits(limits)
            self.assertEqual(expected, self.read(f'{path}/io.max'))

    def test_groups_of_the_guest(self) -> None:
        """Its init may be in a group below, with a name of its choice."""
        for above in ('', '/lxc.payload.outer/lxc'):
            path = self.make(f'{above}/lxc.payload.nova_i1', 'io.max')
            below = f'{above}/lxc.payload.nova_i1/lxc.payload.nova_i1'
            self.make(below, 'io.max')
            self.membership = SECOND.format(f'{below}/init.scope')
            self.set_limits('riops=7')
            self.assertIn('riops=7', self.read(f'{path}/io.max'))
            self.assertEqual('', self.read(f'{self.top}{below}/io.max'))

    def test_not_in_its_group(self) -> None:
        for group in ('/', '/lxc.payload.nova_i2', '/lxc.payload.nova_i1x',
                      '/lxc.monitor.nova_i1', '/x.lxc.payload.nova_i1'):
            self.membership = SECOND.format(group)
            error = self.assertRaises(FileNotFoundError, self.set_limits)
            self.assertIn('no control group', str(error))

    def test_no_controller(self) -> None:
        """Nothing is created there."""
        for membership, group in ((FIRST, '/blkio/lxc.payload.nova_i1'),
                                  (SECOND, '/lxc.payload.nova_i1')):
            path = self.make(group)
            self.membership = membership.format('/lxc.payload.nova_i1')
            self.assertRaises(FileNotFoundError, self.set_limits)
            self.assertEqual([], os.listdir(path))

    def test_refused(self) -> None:
        path = self.make('/blkio/lxc.payload.nova_i1', 'io.max')
        for container, init, limits in (
                ('', 4711, ''), ('../x', 4711, ''), ('a b', 4711, ''),
                (None, 4711, ''), ('nova_i1', 0, ''), ('nova_i1', -1, ''),
                ('nova_i1', '4711', ''), ('nova_i1', 4711, 'rbps=x'),
                ('nova_i1', 4711, 'rbps=0'), ('nova_i1', 4711, 'rbps'),
                ('nova_i1', 4711, 'dbps=1'), ('nova_i1', 4711, '8:0'),
                ('nova_i1', 4711, 'rbps=' + '9' * 20)):
            self.assertRaises(ValueError, block_limits.set_limits, container,
                              init, DEVICE, limits)
        self.assertEqual('', self.read(f'{path}/io.max'))


class DeviceTest(base.BaseTestCase):

    def test_no_block_device(self) -> None:
        privileged.context.set_client_mode(False)
        self.addCleanup(privileged.context.set_client_mode, True)
        self.assertRaises(ValueError, block_limits.set_limits, 'nova_i1',
                          os.getpid(), DEVICE, '')
