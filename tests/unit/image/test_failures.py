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

"""What is wrong with an image, from LXD's errors."""

from __future__ import annotations

import contextlib
from typing import Any

import ddt
from oslotest import base

from nova_lxd_py.virt.image import failures
from nova_lxd_py.virt.lxd import errors


@ddt.ddt
class CreateTestCase(base.BaseTestCase):

    @ddt.data(
        ("Architecture isn't supported: s390x", 'processors'),
        ('Unsupported compression', 'gzip or xz'),
        ('exec: "unsquashfs": executable file not found', 'squashfs-tools'),
        ('Unpack failed: Failed to run: tar: exit status 2', 'damaged'))
    @ddt.unpack
    def test_image(self, said: str, reason: str) -> None:
        self.assertIn(reason, failures.create_reason(
            errors.OperationFailed(said)) or '')

    def test_something_else(self) -> None:
        self.assertIsNone(failures.create_reason(
            errors.OperationFailed('the pool is offline')))

    def test_full(self) -> None:
        for said, is_full in (('write: Disk quota exceeded', True),
                              ('No space left on device', True),
                              ('Unsupported compression', False)):
            self.assertEqual(is_full, failures.is_disk_full(
                errors.OperationFailed(said)))


class _Session:
    """Answers with the log of a start."""

    def __init__(self, log: str) -> None:
        self._log = log

    @contextlib.contextmanager
    def download(self, *path: str) -> Any:
        assert path == ('instances', 'c1', 'logs', 'lxc.log')
        yield {}, iter([self._log.encode()])


@ddt.ddt
class StartTestCase(base.BaseTestCase):

    #: As liblxc 5.0 writes it.
    LOG = ('lxc p_c1 20261129 WARN  cgfsng - ../src/lxc/cgfsng.c:f:1619 - No '
           'such file or directory - Failed to fchownat(34)\n'
           'lxc p_c1 20261129 ERROR start - ../src/lxc/start.c:start:2197 - '
           '%s - Failed to exec "/sbin/init"\n')

    @ddt.data(('No such file or directory', 'no /sbin/init in it'),
              ('Permission denied', 'not executable'),
              ('Exec format error', 'processors'),
              ('Text file busy', r'cannot be run \(Text file busy\)'))
    @ddt.unpack
    def test_init(self, said: str, reason: str) -> None:
        session: Any = _Session(self.LOG % said)
        self.assertRegex(failures.start_reason(session, 'c1') or '', reason)

    def test_something_else(self) -> None:
        session: Any = _Session(self.LOG.splitlines()[0])
        self.assertIsNone(failures.start_reason(session, 'c1'))
