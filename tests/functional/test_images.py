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

"""Images from Glance in a real LXD: what boots, and what is refused."""

from __future__ import annotations

import gzip
import lzma
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import subprocess
import tarfile
import tempfile
import threading
import time
import tracemalloc
from typing import Any
import unittest

from nova.compute import power_state
from nova import exception
from nova import objects
import zstandard

from nova_lxd_py import conf
from nova_lxd_py.virt.image import cache as image_cache
from nova_lxd_py.virt.image import transfer as image_transfer
from nova_lxd_py.virt.lxd import session
from tests.fixtures import busybox_image
from tests.fixtures import driver_host
from tests.fixtures import lxd_daemon

CONF = conf.CONF
NO_LXD = lxd_daemon.missing()


class StreamingGlance:
    """A Glance that generates an image while it is downloaded.

    :param pieces: the parts of the image.
    """

    def __init__(self, pieces: Any) -> None:
        self._pieces = pieces

    def download(self, context: Any, image_id: str, data: Any = None,
                 dest_path: Any = None, trusted_certs: Any = None) -> None:
        for piece in self._pieces:
            data.write(piece)


def squashfs(compression: str) -> bytes:
    """Make a squashfs of the busybox root filesystem."""
    with tempfile.TemporaryDirectory() as directory:
        tree = os.path.join(directory, 'tree')
        archive = os.path.join(directory, 'rootfs.tar')
        pathlib.Path(archive).write_bytes(busybox_image.rootfs(mode='w'))
        os.mkdir(tree)
        subprocess.run(['tar', '-C', tree, '-xf', archive], check=True)
        made = os.path.join(directory, 'image')
        subprocess.run(['mksquashfs', tree, made, '-comp', compression,
                        '-all-root', '-no-progress', '-quiet'], check=True,
                       capture_output=True)
        return pathlib.Path(made).read_bytes()


def with_zeros(mebibytes: int) -> bytes:
    """Add a large file, which compresses well, to the root filesystem.

    :param mebibytes: its size, a multiple of 64.
    """
    plain = busybox_image.rootfs(mode='w').rstrip(b'\0')
    plain += bytes(-len(plain) % 512)
    member = tarfile.TarInfo('usr/zeros')
    member.size = mebibytes << 20
    return (gzip.compress(plain + member.tobuf()) +
            gzip.compress(bytes(64 << 20), 1) * (mebibytes // 64) +
            gzip.compress(bytes(1024)))


class ImageTestCase(unittest.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.host = driver_host.DriverHost()
        self.host.setUp()
        self.addCleanup(self.host.cleanUp)
        self.session = session.Session(CONF.lxd)
        self.session.connect()

    def images(self) -> list[dict[str, Any]]:
        return self.session.get('images', params={'recursion': 1})

    def files(self) -> set[str]:
        """List LXD's image directory, including unfinished uploads."""
        assert self.host.lxd.directory is not None
        return set(os.listdir(self.host.lxd.directory / 'images'))

    def assert_nothing_new(self, files: set[str]) -> None:
        self.assertEqual([], self.images())
        self.assertEqual([], self.session.get('images', 'aliases'))
        # LXD may also remove what an earlier test has left.
        deadline = time.monotonic() + 60
        while self.files() - files and time.monotonic() < deadline:
            time.sleep(0.05)
        self.assertEqual(set(), self.files() - files)


@unittest.skipIf(NO_LXD, NO_LXD or '')
class FormatTest(ImageTestCase):

    def check(self, content: bytes) -> None:
        image = self.host.image(content)
        server = self.host.spawn(self.host.instance(image), image)
        self.assertEqual(power_state.RUNNING, self.host.state(server))
        self.assertIn('root:x:0', self.host.run(server, 'cat',
                                                '/etc/passwd'))
        self.assertEqual('0', self.host.run(server, 'id', '-u').strip())
        # The second time from the image in LXD.
        again = self.host.spawn(self.host.instance(image), image)
        self.assertEqual(power_state.RUNNING, self.host.state(again))
        self.assertEqual([image.id], self.host.glance.downloads)

    def test_unified(self) -> None:
        self.check(busybox_image.unified())

    def test_unified_zstd(self) -> None:
        plain = gzip.decompress(busybox_image.unified())
        self.check(zstandard.ZstdCompressor().compress(plain))

    def test_rootfs(self) -> None:
        for mode in ('w', 'w:gz', 'w:bz2', 'w:xz'):
            with self.subTest(mode):
                self.host.glance.downloads.clear()
                self.check(busybox_image.rootfs(mode=mode))

    def test_rootfs_lzma(self) -> None:
        self.check(lzma.compress(busybox_image.rootfs(mode='w'),
                                 format=lzma.FORMAT_ALONE))

    @unittest.skipUnless(shutil.which('zstd'), 'zstd is not installed')
    def test_rootfs_zstd(self) -> None:
        self.check(zstandard.ZstdCompressor().compress(
            busybox_image.rootfs(mode='w')))

    def test_rootfs_made_by_tar(self) -> None:
        """The names in archives of GNU tar begin with ./."""
        with tempfile.TemporaryDirectory() as directory:
            tree = os.path.join(directory, 'tree')
            os.mkdir(tree)
            subprocess.run(['tar', '-C', tree, '-x'], check=True,
                           input=busybox_image.rootfs(mode='w'))
            made = subprocess.run(['tar', '-C', tree, '-cz', '.'],
                                  check=True, capture_output=True).stdout
        self.check(made)

    @unittest.skipUnless(shutil.which('mksquashfs'),
                         'mksquashfs is not installed')
    def test_squashfs(self) -> None:
        for compression in ('gzip', 'xz', 'zstd'):
            with self.subTest(compression):
                self.host.glance.downloads.clear()
                self.check(squashfs(compression))


@unittest.skipIf(NO_LXD, NO_LXD or '')
class RefusalTest(ImageTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.before = self.files()

    def check(self, reason: str, content: bytes, **properties: str) -> None:
        image = self.host.image(content, **properties)
        server = self.host.instance(image)
        with self.assertRaisesRegex(exception.ImageUnacceptable, reason):
            self.host.spawn(server, image)
        self.assertEqual([], self.host.driver.list_instances())
        self.assert_nothing_new(self.before)

    def test_truncated(self) -> None:
        for mode in ('w', 'w:gz', 'w:xz'):
            data = busybox_image.rootfs({'ballast': random.randbytes(
                1 << 20)}, mode=mode)
            self.check('breaks off', data[:-11000])
            self.check('breaks off', data[:len(data) // 2])

    def test_damaged(self) -> None:
        data = bytearray(busybox_image.unified({'ballast': random.randbytes(
            5 << 20)}))
        data[-4:] = b'oops'
        self.check('damaged', bytes(data))

    def test_wrong_checksum(self) -> None:
        data = busybox_image.rootfs({'text': b'a' * (2 << 20)}, mode='w')
        self.host.glance.damage = lambda data: data.replace(b'aaa', b'aba', 1)
        self.check('checksum', data)

    def test_no_container_image(self) -> None:
        self.check('qcow2', b'QFI\xfb\0\0\0\x03' + bytes(1 << 20))
        self.check('ISO image', bytes(0x8001) + b'CD001' + bytes(1 << 20))
        self.check('text file', b'404 not found\n')
        self.check('ext4', bytes(0x438) + b'\x53\xef' + bytes(1 << 20))

    def test_wrong_architecture(self) -> None:
        other = 's390x' if os.uname().machine != 's390x' else 'x86_64'
        self.check(f'for {other}, this host runs',
                   busybox_image.unified(architecture=other))
        self.check(f'for {other}, this host runs', busybox_image.rootfs(),
                   hw_architecture=other)

    def test_bomb(self) -> None:
        CONF.set_override('image_max_unpacked_gb', 1, 'lxd')
        self.addCleanup(CONF.clear_override, 'image_max_unpacked_gb', 'lxd')
        data = with_zeros(3 << 10)
        self.assertLess(len(data), 20 << 20)
        self.check('more than 1 GiB', data)

    def test_too_large_for_the_flavor(self) -> None:
        image = self.host.image(with_zeros(1088))
        with self.assertRaises(exception.FlavorDiskSmallerThanImage):
            self.host.spawn(self.host.instance(image, root_gb=1), image)
        self.assertEqual([], self.host.driver.list_instances())

    def test_damage_that_only_lxd_notices(self) -> None:
        """A squashfs has no checksums of its content; the image is not kept
        for the next server."""
        if not shutil.which('mksquashfs'):
            self.skipTest('mksquashfs is not installed')
        data = bytearray(squashfs('gzip'))
        data[200:20000] = random.randbytes(19800)
        self.check('upload it again', bytes(data))

    def test_init_that_cannot_be_run(self) -> None:
        """An error of liblxc at the start fails the build with a reason."""
        for reason, init in (
                ('no /sbin/init in it', '/bin/missing'),
                ('not executable', '/etc/passwd')):
            self.check_start(reason, busybox_image.rootfs(
                {'sbin/init': init}))

    def check_start(self, reason: str, content: bytes) -> None:
        image = self.host.image(content)
        with self.assertRaisesRegex(exception.ImageUnacceptable, reason):
            self.host.spawn(self.host.instance(image), image)
        self.assertEqual([], self.host.driver.list_instances())


@unittest.skipIf(NO_LXD, NO_LXD or '')
class TransferTest(ImageTestCase):

    def store(self, glance: Any = None) -> image_cache.ImageStore:
        return image_cache.ImageStore(self.session,
                                      glance or self.host.glance)

    def test_many_servers_one_transfer(self) -> None:
        image = self.host.image(busybox_image.rootfs({
            'ballast': random.randbytes(3 << 20)}))
        store, found = self.store(), []
        server = self.host.instance(image)

        def ensure() -> None:
            found.append(store.ensure(self.host.context, image, server))

        threads = [threading.Thread(target=ensure) for _number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(8, len(found))
        self.assertEqual(1, len(set(found)))
        self.assertEqual([image.id], self.host.glance.downloads)
        self.assertEqual(1, len(self.images()))

    def test_same_content_under_two_ids(self) -> None:
        data = busybox_image.rootfs()
        first, second = self.host.image(data), self.host.image(data)
        store = self.store()
        fingerprints = {store.ensure(self.host.context, image,
                                     self.host.instance(image))
                        for image in (first, second)}
        self.assertEqual(1, len(fingerprints))
        image, = self.images()
        self.assertEqual({f'glance-{first.id}', f'glance-{second.id}'},
                         {alias['name'] for alias in image['aliases']})

    def test_large_image_takes_little_memory(self) -> None:
        size = 160 << 20
        member = tarfile.TarInfo('usr/large')
        member.size = size
        start = busybox_image.rootfs(mode='w')[:512] + member.tobuf()

        def pieces() -> Any:
            yield start
            for _number in range(size >> 16):
                yield bytes(1 << 16)
            yield bytes(1024)

        meta = objects.ImageMeta.from_dict({
            'id': 'large', 'name': 'large',
            'size': len(start) + size + 1024, 'properties': {}})
        # Not the resident size, which includes the peak of earlier tests.
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        image_transfer.Transfer(
            self.session, StreamingGlance(pieces()), meta, 1 << 40, 600,
            self.host.instance()).run(self.host.context, None, {})
        _size, peak = tracemalloc.get_traced_memory()
        self.assertLess(peak, 64 << 20)
        self.assertGreater(self.images()[0]['size'], size)

    def test_killed_in_the_middle(self) -> None:
        """LXD discards an incomplete upload."""
        files = self.files()
        data = busybox_image.rootfs({'ballast': random.randbytes(20 << 20)})

        def pieces() -> Any:
            yield data[:len(data) // 2]
            # Until it is killed.
            time.sleep(600)

        meta = objects.ImageMeta.from_dict({
            'id': 'victim', 'name': 'victim', 'size': len(data),
            'properties': {}})
        transfer = image_transfer.Transfer(
            session.Session(CONF.lxd), StreamingGlance(pieces()), meta,
            1 << 40, 600, None)
        process = multiprocessing.get_context('fork').Process(
            target=transfer.run, args=(None, None, {}))
        process.start()
        deadline = time.monotonic() + 60
        while not self.files() - files and time.monotonic() < deadline:
            time.sleep(0.05)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        self.assertLess(time.monotonic(), deadline, 'LXD gets nothing')
        self.assert_nothing_new(files)

    def test_prune(self) -> None:
        CONF.set_override('remove_unused_original_minimum_age_seconds', 0,
                          'image_cache')
        self.addCleanup(
            CONF.clear_override,
            'remove_unused_original_minimum_age_seconds', 'image_cache')
        kept, gone = self.host.image(), self.host.image(
            busybox_image.rootfs({'x': os.urandom(9)}))
        foreign = self.session.upload(
            'images', chunks=[busybox_image.unified({'y': os.urandom(9)})],
            headers={'Content-Type': 'application/octet-stream'})
        server = self.host.spawn(self.host.instance(kept), kept)
        for image in (kept, gone):
            self.host.driver.cache_image(self.host.context, image.id)
        self.assertEqual(3, len(self.images()))
        self.host.driver.manage_image_cache(self.host.context, [server])
        left = {image['fingerprint']: image for image in self.images()}
        self.assertEqual(2, len(left))
        self.assertIn(foreign['fingerprint'], left)
        self.assertEqual(power_state.RUNNING, self.host.state(server))
        # A server keeps running after its image is deleted.
        self.host.driver.manage_image_cache(self.host.context, [])
        self.assertEqual([foreign['fingerprint']],
                         [image['fingerprint'] for image in self.images()])
        self.host.driver.reboot(self.host.context, server, [], 'HARD')
        self.assertEqual(power_state.RUNNING, self.host.state(server))
