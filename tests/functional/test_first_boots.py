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


"""First boots of volumes with images, with a real LXD."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any
import unittest

import fixtures
from nova.compute import power_state
from nova import exception
from oslo_utils import units

from nova_lxd_py.virt.lxd import errors
from tests.fixtures import boot_volume_host
from tests.fixtures import busybox_image
from tests.fixtures import faulty_proxy
from tests.fixtures import lxd_daemon

NO_LXD = lxd_daemon.missing()


class _Crash(BaseException):
    """nova-compute is killed at this point."""


def _crash(*_args: Any) -> None:
    raise _Crash()


@unittest.skipIf(NO_LXD, NO_LXD or '')
class FirstBootTest(boot_volume_host.BootVolumeHost, unittest.TestCase):
    """The root filesystem is made of the image on the volume."""

    def test_every_kind_of_image(self) -> None:
        for content in (busybox_image.rootfs(), busybox_image.rootfs(mode='w'),
                        busybox_image.rootfs(mode='w:xz')):
            volume = self.volume_from_image(self.host.image(content))
            server = self.boot(volume)
            self.host.run(server, 'true')
            self.destroy(server, self.described(volume))
        self.assert_clean()

    def test_image_is_gone(self) -> None:
        """Deleted in Glance, and not in LXD either."""
        image = self.host.image(busybox_image.rootfs({'etc/motd': b'gone\n'}))
        volume = self.volume_from_image(image)
        second = self.clone(volume)
        self.host.glance.delete(self.host.context, image.id)
        server = self.boot(volume)
        self.assertEqual('gone\n', self.host.run(server, 'cat', '/etc/motd'))
        self.destroy(server)
        # After an interruption, LXD has what was on the volume.
        with open(volume.file, 'r+b') as stream:
            stream.write(bytes(2 * units.Mi))
        server = self.boot(volume)
        self.assertEqual('gone\n', self.host.run(server, 'cat', '/etc/motd'))
        self.destroy(server)
        # No copy exists of what was on another one.
        with open(second.file, 'r+b') as stream:
            stream.write(bytes(2 * units.Mi))
        self.about[second.id] = {**self.about[volume.id],
                                 'image_id': volume.id}
        self.assertRaisesRegex(exception.BuildAbortException, 'not in Glance',
                               self.boot, second)
        self.assert_clean()

    # -- interruptions ------------------------------------------------------

    def test_interrupted_first_boot(self) -> None:
        for left in ((), ('nova-unpack/containers/x',)):
            volume = self.volume_from_image()
            with self.new_filesystem(volume) as directory:
                for path in left:
                    (directory / path).mkdir(parents=True)
            server = self.boot(volume)
            self.assertEqual('from the image\n',
                             self.host.run(server, 'cat', '/etc/motd'))
            self.destroy(server, self.described(volume))
        # Blank, as it is between the image and the filesystem.
        volume = self.volume_from_image()
        with open(volume.file, 'r+b') as stream:
            stream.write(bytes(2 * units.Mi))
        self.destroy(self.boot(volume))
        self.assert_clean()

    def test_crash_while_unpacking(self) -> None:
        """nova-compute is killed while LXD unpacks the image."""
        volume = self.volume_from_image()
        server = self.host.instance(root_gb=0)
        with fixtures.MonkeyPatch(
                'nova_lxd_py.virt.privileged.rootfs.complete', _crash), \
            fixtures.MonkeyPatch(
                'nova_lxd_py.virt.server.rollback.Rollback.step',
                lambda *args: None), \
            fixtures.MonkeyPatch(
                'nova_lxd_py.virt.lxd.session.Session.delete',
                lambda *args, **kwargs: None), \
            fixtures.MonkeyPatch(
                'nova_lxd_py.virt.privileged.rootfs.close_staging',
                lambda *args: None):
            self.assertRaises(_Crash, self.boot, volume, server)
        self.assertEqual(1, len(self.pools()))
        self.host.restart_driver()
        self.assertEqual([], self.pools())
        self.boot(volume, server)
        self.assertEqual('from the image\n',
                         self.host.run(server, 'cat', '/etc/motd'))
        self.destroy(server)
        self.assert_clean()

    def test_lxd_fails(self) -> None:
        """A failure of any request leaves nothing behind, and the next
        attempt succeeds."""
        self.destroy(self.boot(self.volume_from_image()))
        ways = itertools.cycle(faulty_proxy.Spoil)
        for number in itertools.count():
            if not self._boot_with_failure(number, next(ways)):
                break
        self.assertGreater(number, 5)

    def _boot_with_failure(self, number: int, how: faulty_proxy.Spoil
                           ) -> bool:
        """Boot a server while one request to LXD fails.

        :returns: whether there was a request of this number.
        """
        volume = self.volume_from_image()
        server = self.host.instance(root_gb=0)
        self.proxy.spoil(number, how)
        with contextlib.suppress(exception.NovaException, errors.LXDError):
            self.boot(volume, server)
        spoilt = self.proxy.spoilt
        self.proxy.behave()
        self.destroy(server, self.described(volume))
        self.host.driver._services.volume_reconciler.run()
        self.assert_clean()
        self.destroy(self.boot(volume, server))
        self.storage.delete(volume)
        return spoilt is not None

    # -- refusals -----------------------------------------------------------

    def test_refusals(self) -> None:
        cases = []
        volume = self.storage.volume()
        cases.append((volume, 'it is empty'))
        for offset, content in ((0, b'\x7fELF'), (510, b'\x55\xaa'),
                                (4096, b'something')):
            volume = self.volume_from_image()
            with open(volume.file, 'r+b') as stream:
                stream.seek(offset)
                stream.write(content)
            cases.append((volume, 'it holds'))
        volume = self.volume_from_image()
        self.about[volume.id]['checksum'] = None
        cases.append((volume, 'it holds'))
        for made in ({}, {'some': 'thing'}):
            volume = self.storage.volume()
            with self.new_filesystem(volume) as directory:
                for name, target in made.items():
                    (directory / name).symlink_to(target)
            cases.append((volume, 'no root' if made else 'empty'))
        for volume, reason in cases:
            before = volume.checksum(1 << 20)
            self.assertRaisesRegex(exception.BuildAbortException, reason,
                                   self.boot, volume)
            if 'filesystem' not in reason:
                self.assertEqual(before, volume.checksum(1 << 20), reason)
            self.assertEqual({}, self.host.lxd_instances())
            self.assert_clean()

    def test_links_lead_nowhere(self) -> None:
        """Symbolic links on a volume must not expose files of the host."""
        for links in ({'rootfs': '/'}, {'rootfs': '/', 'etc': '/etc',
                                        'sbin': '/sbin'},
                      {'nova-unpack': '/root'}):
            volume = self.storage.volume()
            with self.new_filesystem(volume) as directory:
                for name, target in links.items():
                    (directory / name).symlink_to(target)
            self.about[volume.id] = {}
            try:
                server = self.boot(volume)
            except exception.NovaException:
                self.assert_clean()
                continue
            self.assertEqual(power_state.SHUTDOWN, self.host.state(server))

    def test_too_small(self) -> None:
        # Not blank blocks, which need no space. Compressed, the image fits.
        big = self.host.image(busybox_image.unified(
            {'big': b'not blank ' * (8 * units.Mi)}))
        volume = self.storage.volume(64 * units.Mi)
        self.copy_image(volume, big)
        self.assertRaisesRegex(exception.BuildAbortException,
                               'does not fit', self.boot, volume)
        self.assert_clean()
