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

"""Attacks of root in a guest on its host, on a real LXD."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import unittest

from tests.fixtures import busybox_image
from tests.fixtures import driver_host
from tests.fixtures import lxd_daemon

NO_LXD = lxd_daemon.missing()


def with_libraries(program: str) -> dict[str, bytes]:
    """Return a program of this host with its libraries, for an image.

    :returns: content by path in the guest.
    """
    path = shutil.which(program, path=f'{os.environ["PATH"]}:/usr/sbin')
    assert path
    libraries = [word for word in subprocess.run(
        ['ldd', path], check=True, capture_output=True, text=True
        ).stdout.split() if word.startswith('/')]
    found = {}
    for file in (path, *libraries):
        base = os.path.basename(file)
        name = 'ld.so' if base.startswith('ld-') else base
        # Not executable without a shebang; the guest makes ld.so executable.
        found[f'root/{name}'] = pathlib.Path(file).read_bytes()
    return found


@unittest.skipIf(NO_LXD, NO_LXD or '')
class SubvolumeTest(unittest.TestCase):
    """btrfs subvolumes, which the quota of a root disk does not include."""

    def setUp(self) -> None:
        super().setUp()
        self.host = driver_host.DriverHost()
        self.host.setUp()
        self.addCleanup(self.host.cleanUp)
        self.image = self.host.image(busybox_image.unified(
            with_libraries('btrfs')))
        self.server = self.host.spawn(image=self.image)

    def btrfs(self, *arguments: str) -> str:
        try:
            return self.host.run(
                self.server, 'sh', '-c',
                'chmod +x /root/ld.so; exec /root/ld.so --library-path /root '
                f'/root/btrfs {" ".join(arguments)} 2>&1')
        except AssertionError as exc:
            return str(exc)

    def subvolumes(self) -> list[str]:
        """List the subvolumes in root disks of the project."""
        pool = pathlib.Path(self.host.lxd.directory, 'storage-pools',
                            self.host.lxd.pool)
        return [line for line in self.on_pool(
            'btrfs', 'subvolume', 'list', str(pool)).splitlines()
            if self.host.project in line and '/rootfs/' in line]

    def on_pool(self, *command: str) -> str:
        """Run a command in LXD's mount namespace."""
        return subprocess.run(
            ['nsenter', '--target', str(self.host.lxd._process.pid),
             '--mount', *command],
            check=True, capture_output=True, text=True).stdout

    @property
    def root(self) -> pathlib.Path:
        """Return the guest's root directory in LXD's mount namespace."""
        return pathlib.Path(
            self.host.lxd.directory, 'storage-pools', self.host.lxd.pool,
            'containers', f'{self.host.project}_{self.server.name}', 'rootfs')

    def test_guest_cannot_create_subvolumes(self) -> None:
        # A subvolume for snapshots, which an earlier version allowed.
        self.on_pool('btrfs', 'subvolume', 'create', f'{self.root}/mnt/old')
        before = self.subvolumes()
        for arguments in (('create', '/root/mine'),
                          ('create', '-i', '0/5', '/root/mine'),
                          ('snapshot', '/mnt/old', '/root/mine')):
            self.assertIn('Inappropriate ioctl',
                          self.btrfs('subvolume', *arguments))
            self.assertEqual(before, self.subvolumes())

    def test_earlier_subvolumes_are_deleted(self) -> None:
        """Guests that an earlier version started may have some."""
        for path in ('root/mine', 'root/mine/deep'):
            self.on_pool('btrfs', 'subvolume', 'create', f'{self.root}/{path}')
        self.on_pool('btrfs', 'subvolume', 'snapshot', '-r',
                     f'{self.root}/root/mine', f'{self.root}/mnt/snapshot')
        self.assertEqual(3, len(self.subvolumes()))
        self.host.driver.destroy(self.host.context, self.server, [])
        self.assertEqual([], self.subvolumes())
