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

"""Identification of the content of block devices."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import unittest

from oslotest import base

from nova_lxd_py.virt.privileged import blkid

SIZE = 1 << 20
LUKS = b'LUKS\xba\xbe\0\1'
#: The partition is of type Linux and begins at sector 1.
DOS = (bytes(446) + bytes((0, 0, 2, 0, 0x83, 0, 0, 0)) + b'\1\0\0\0' +
       b'\xff\0\0\0' + bytes(48) + b'\x55\xaa')


def program(name: str) -> str:
    """Return the path of a program of the host.

    :raises unittest.SkipTest: it is not installed.
    """
    path = shutil.which(name, path='/sbin:/usr/sbin')
    if path is None:
        raise unittest.SkipTest(f'{name} is not installed')
    return path


class ProbeTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.file = tempfile.NamedTemporaryFile()
        self.addCleanup(self.file.close)
        self.file.truncate(SIZE)

    def probe(self, content: bytes = b'') -> dict[str, str] | None:
        os.pwrite(self.file.fileno(), content, 0)
        return blkid.probe(self.file.fileno())

    def test_nothing(self) -> None:
        self.assertIsNone(self.probe())
        self.assertIsNone(self.probe(b'text'))

    def test_something(self) -> None:
        self.assertEqual({'TYPE': 'crypto_LUKS', 'USAGE': 'crypto'},
                         self.probe(LUKS))

    def test_partitions(self) -> None:
        self.assertEqual({'PTTYPE': 'dos'}, self.probe(DOS))

    def test_contradiction(self) -> None:
        self.make('mkfs.xfs', '-q')
        beginning = os.pread(self.file.fileno(), 4096, 0)
        self.make('mkfs.btrfs', '-q')
        self.assertEqual({}, self.probe(beginning))

    def test_unreadable(self) -> None:
        with open(self.file.name, 'wb') as stream:
            stream.truncate(SIZE)
            self.assertRaises(OSError, blkid.probe, stream.fileno())
        self.assertRaises(OSError, blkid.probe, -1)

    def test_as_the_program_says(self) -> None:
        for command in (('mkfs.ext4', '-q'), ('mkfs.vfat',), ('mkswap',),
                        ('mkfs.btrfs', '-q'), ('mkfs.xfs', '-q')):
            self.make(*command)
            said = subprocess.run(
                [program('blkid'), '--probe', '--output', 'export',
                 self.file.name],
                check=True, capture_output=True, text=True).stdout
            told = dict(line.split('=', 1) for line in said.splitlines())
            self.assertEqual(
                {key: told[key] for key in ('TYPE', 'USAGE', 'PTTYPE')
                 if key in told}, self.probe(), command)

    def make(self, name: str, *options: str) -> None:
        """Create a filesystem."""
        self.file.truncate(0)
        self.file.truncate(320 * SIZE)
        subprocess.run([program(name), *options, self.file.name], check=True,
                       capture_output=True)
