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


"""Images on the way from Glance to LXD."""

from __future__ import annotations

import gzip
import random
import threading
from typing import Any
from unittest import mock

from cryptography import exceptions as crypto_exceptions
import ddt
from nova import context as nova_context
from nova import exception
from nova.image import glance
from nova import objects
import zstandard

from nova_lxd_py.virt.image import transfer as image_transfer
from nova_lxd_py.virt.lxd import errors
from tests.fixtures import glance_server
from tests.fixtures import image_case
from tests.fixtures import image_samples

ROOTFS = image_samples.ROOTFS
tar = image_samples.tar


class ProgressTestCase(image_case.ImageTestCase):

    def test_long_transfers_are_reported(self) -> None:
        image_id = self.glance.add(image_case.rootfs(1 << 20))
        with mock.patch.object(image_transfer, 'REPORT_INTERVAL', 0.0), \
                self.assertLogs('nova_lxd_py.virt.image.transfer') as logs:
            self.ensure(image_id)
        self.assertRegex('\n'.join(logs.output),
                         r'transferred.*: \d+ %, \d+\.\d MiB, \d+\.\d MiB/s')


@ddt.ddt
class RefusalTestCase(image_case.ImageTestCase):

    @ddt.data(
        (b'QFI\xfb' + bytes(70000), 'qcow2 disk image'),
        (b'just words', 'text file'),
        (image_case.rootfs(90000)[:50000], 'breaks off'),
        (image_samples.squashfs()[:300], 'breaks off'),
        (image_samples.unified(b'architecture: aarch64\n'),
         'for aarch64, this host runs x86_64 and i686'),
        (tar({**ROOTFS, 'usr/bin/x': image_samples.elf(183)}),
         'programs are for aarch64.*hw_architecture'))
    @ddt.unpack
    def test_content(self, data: bytes, reason: str) -> None:
        self.assertRefused(reason, self.glance.add(data))

    def test_large_content(self) -> None:
        """The end comes long after LXD has got the beginning."""
        data = gzip.compress(tar({**ROOTFS, 'usr/a': random.randbytes(
            6 << 20)}), 1)
        self.assertRefused('breaks off', self.glance.add(data[:-5]))
        self.assertRefused('something else follows',
                           self.glance.add(data + b'x' * 100))

    def test_bomb(self) -> None:
        self.cfg.config(group='lxd', image_max_unpacked_gb=1)
        self.store = self.new_store()
        # Of all compressions this one costs the least time.
        compress = zstandard.ZstdCompressor(level=1).compress
        head = tar(ROOTFS)[:512]
        image_id = self.glance.add(
            compress(head + image_samples.tarfile_header(
                'usr/zeros', 2 << 30)) + compress(bytes(64 << 20)) * 20)
        self.assertRefused('more than 1 GiB', image_id)

    def test_property_says_another_architecture(self) -> None:
        self.assertRefused('it is for aarch64', self.glance.add(
            image_case.rootfs(), hw_architecture='aarch64'))

    def test_property_says_a_second_architecture(self) -> None:
        image_id = self.glance.add(image_case.rootfs(), hw_architecture='i686')
        fingerprint = self.ensure(image_id)
        self.assertEqual('i686', self.lxd_images[fingerprint]['architecture'])

    def test_programs_of_the_second_architecture(self) -> None:
        self.ensure(self.glance.add(
            tar({**ROOTFS, 'usr/bin/x': image_samples.elf(3)})))

    def test_damaged_on_the_way(self) -> None:
        """All is well with it except for the checksum."""
        other = image_case.rootfs(2 << 20)
        image_id = self.glance.add(image_case.rootfs(2 << 20))
        self.glance.damage = lambda data: (other + bytes(9))[:len(data)]
        if len(other) > len(self.glance.data(image_id)):
            self.glance.damage = lambda data: other[:len(data)]
        self.assertRaises(exception.ImageUnacceptable, self.ensure, image_id)
        self.assertNothingLeft()

    def test_wrong_checksum_only(self) -> None:
        data = tar({**ROOTFS, 'usr/a': b'a' * (3 << 20)})
        image_id = self.glance.add(data)
        self.glance.damage = lambda data: data.replace(b'aaaaa', b'aabaa', 1)
        self.assertRefused('does not fit the checksum', image_id)

    def test_wrong_signature(self) -> None:
        image_id = self.glance.add(image_case.rootfs())
        download = self.glance.download

        def forged(context: Any, image_id: str, data: Any,
                   trusted_certs: Any) -> None:
            download(context, image_id, data=data)
            data.truncate(0)
            raise crypto_exceptions.InvalidSignature()

        self.glance.download = forged
        self.assertRefused('signature', image_id)

    def test_glance_has_no_checksum_and_stops_early(self) -> None:
        image_id = self.glance.add(tar({**ROOTFS, 'usr/a': b'x'}) +
                                   bytes(4096))
        self.glance.damage = lambda data: data[:-2048]
        self.glance._check = lambda *args: None
        self.assertRefused('delivered .* bytes of', image_id)

    @ddt.data(exception.ImageNotFound(image_id='x'),
              exception.ImageNotAuthorized(image_id='x'),
              exception.CertificateValidationFailed(cert_uuid='c',
                                                    reason='r'))
    def test_glance_refuses(self, error: Exception) -> None:
        image_id = self.glance.add(image_case.rootfs())
        self.glance.download = mock.Mock(side_effect=error)
        self.assertRaises(type(error), self.ensure, image_id)
        self.assertNothingLeft()

    def test_glance_breaks_off(self) -> None:
        image_id = self.glance.add(image_case.rootfs(2 << 20))

        def broken(context: Any, image_id: str, data: Any,
                   trusted_certs: Any) -> None:
            data.write(self.glance.data(image_id)[:1 << 20])
            raise ConnectionResetError('Connection reset by peer')

        self.glance.download = broken
        self.assertRaisesRegex(
            exception.GlanceConnectionFailed, 'Connection reset by peer',
            self.ensure, image_id)
        self.assertNothingLeft()

    def test_glance_falls_silent(self) -> None:
        image_id = self.glance.add(image_case.rootfs(2 << 20))
        awake = threading.Event()
        self.addCleanup(awake.set)

        def silent(context: Any, image_id: str, data: Any,
                   trusted_certs: Any) -> None:
            data.write(self.glance.data(image_id)[:1 << 20])
            awake.wait(30)

        self.glance.download = silent
        with mock.patch.object(image_transfer, 'PATIENCE', 0.05):
            transfer = image_transfer.Transfer(
                self.session, self.glance, self.glance.meta(image_id),
                1 << 30, 0.3, self.instance())
            self.assertRaises(errors.DeadlineExceeded, transfer.run,
                              self.context, None, {})
        awake.set()
        self.assertNothingLeft()


class LXDFailureTestCase(image_case.ImageTestCase):

    def check(self, expected: type[Exception] = errors.LXDError) -> None:
        image_id = self.glance.add(image_case.rootfs(3 << 20))
        self.assertRaises(expected, self.ensure, image_id)
        self.assertNothingLeft()
        # Nothing stays locked or broken.
        self.ensure(image_id)

    def test_upload_refused(self) -> None:
        self.lxd.fail_next('POST', '/1.0/images', 500, 'no space')
        self.check()

    def test_upload_fails(self) -> None:
        self.lxd.fail_operation('POST', '/1.0/images', 'no space left')
        self.check()

    def test_image_says_more_than_lxd(self) -> None:
        """LXD cannot unpack what the driver finds damaged as well."""
        data = image_samples.tar({**image_samples.ROOTFS,
                                  'usr/a': random.randbytes(3 << 20)})
        self.lxd.fail_operation('POST', '/1.0/images', 'exit status 2')
        exc = self.assertRaises(exception.ImageUnacceptable, self.ensure,
                                self.glance.add(data[:2 << 20]))
        self.assertIn('breaks off', str(exc))
        self.assertNothingLeft()

    def test_upload_breaks_off(self) -> None:
        self.lxd.drop_connection('POST', '/1.0/images')
        self.check()

    def test_properties_refused(self) -> None:
        self.lxd.fail_next('PATCH', '/1.0/images/*')
        self.check()

    def test_alias_refused(self) -> None:
        self.lxd.fail_next('POST', '/1.0/images/aliases')
        self.check()

    def test_something_else_arrived(self) -> None:
        upload = self.session.upload

        def other(*args: Any, **kwargs: Any) -> dict[str, str]:
            return {**upload(*args, **kwargs), 'fingerprint': '0' * 64}

        image_id = self.glance.add(image_case.rootfs())
        with mock.patch.object(self.session, 'upload', other):
            self.assertRaisesRegex(errors.OperationFailed, 'something else',
                                   self.ensure, image_id)


class NovaClientTestCase(image_case.ImageTestCase):
    """With Nova's own client of Glance, over HTTP."""

    def setUp(self) -> None:
        super().setUp()
        self.server = self.useFixture(glance_server.GlanceServer())
        self.cfg.config(group='glance', api_servers=[self.server.url],
                        num_retries=0)
        self.context = nova_context.RequestContext(
            'user', 'project', auth_token='token', is_admin=False)
        self.glance = glance.API()
        self.glance.meta = lambda image_id: objects.ImageMeta.from_image_ref(
            self.context, self.glance, image_id)
        self.store = self.new_store()

    def test_good(self) -> None:
        data = image_case.rootfs(5 << 20)
        image_id = self.server.add(data)
        fingerprint = self.ensure(image_id)
        parts = self.lxd.daemon.store.images['nova', fingerprint].parts
        self.assertEqual(data, parts[1][2])
        self.assertFalse(self.store.cache_image(self.context, image_id))
        self.assertEqual([image_id], self.server.downloads)

    def flip(self, data: bytes) -> bytes:
        return data.replace(b'aaaaa', b'aabaa', 1)

    def test_damaged(self) -> None:
        self.server.damage = self.flip
        for attributes in ({}, {'os_hash_algo': None, 'os_hash_value': None}):
            image_id = self.server.add(
                tar({**ROOTFS, 'usr/a': b'a' * (3 << 20)}), **attributes)
            self.assertRefused('does not fit the checksum', image_id)

    def test_breaks_off(self) -> None:
        image_id = self.server.add(image_case.rootfs(3 << 20))
        self.server.damage = lambda data: data[:1 << 20]
        self.assertRaises(exception.GlanceConnectionFailed, self.ensure,
                          image_id)
        self.assertNothingLeft()

    def test_refused_early(self) -> None:
        """The rest of an unfit image is not even downloaded."""
        image_id = self.server.add(b'QFI\xfb' + bytes(40 << 20))
        self.assertRefused('qcow2', image_id)

    def test_missing(self) -> None:
        self.assertRaises(exception.ImageNotFound, self.ensure, 'nope')
