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

"""Images between Glance and LXD."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import random
import tarfile
import threading
import time
from typing import Any
from unittest import mock

from cryptography import exceptions as crypto_exceptions
import ddt
import fixtures
from nova.compute import utils as compute_utils
from nova import context as nova_context
from nova import exception
from nova.image import glance
from nova import objects
from oslo_config import fixture as config_fixture
from oslotest import base

from nova_lxd_py import conf
from nova_lxd_py.virt.image import cache as image_cache
from nova_lxd_py.virt.image import signatures
from nova_lxd_py.virt.image import transfer as image_transfer
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import session
from tests.fixtures import fake_lxd
from tests.fixtures import glance_server
from tests.fixtures import memory_glance
from tests.unit.image import test_format_inspector

objects.register_all()

ROOTFS = test_format_inspector.ROOTFS
tar = test_format_inspector.tar
DAY = 86400


def rootfs(extra: int = 0) -> bytes:
    """A small root filesystem that no other test has."""
    return gzip.compress(tar({**ROOTFS, 'usr/unique': os.urandom(16),
                              'usr/ballast': random.randbytes(extra)}))


class ImageTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.lxd = self.useFixture(fake_lxd.FakeLXD(project='nova'))
        self.cfg = self.useFixture(config_fixture.Config(conf.CONF))
        self.cfg.config(group='lxd', endpoint=self.lxd.endpoint)
        self.cfg.config(
            group='image_cache', remove_unused_base_images=True,
            remove_unused_original_minimum_age_seconds=DAY)
        self.context = nova_context.get_admin_context()
        self.glance: Any = memory_glance.MemoryGlance()
        self.store = self.new_store()

    def new_store(self) -> image_cache.ImageStore:
        self.session = session.Session(conf.CONF.lxd)
        self.session.connect()
        return image_cache.ImageStore(self.session, self.glance)

    def instance(self, root_gb: int = 1, **fields: Any) -> objects.Instance:
        values = {'uuid': '5f6e1b3a-0000-4000-8000-000000000001',
                  'trusted_certs': None, 'image_ref': '',
                  'system_metadata': {}, **fields}
        return objects.Instance(
            flavor=objects.Flavor(root_gb=root_gb, extra_specs={}), **values)

    def ensure(self, image_id: str, root_gb: int = 1, **fields: Any) -> str:
        return self.store.ensure(self.context, self.glance.meta(image_id),
                                 self.instance(root_gb, **fields))

    @property
    def lxd_images(self) -> dict[str, Any]:
        return {image['fingerprint']: image for image in self.session.get(
            'images', params={'recursion': 1})}

    @property
    def aliases(self) -> dict[str, str]:
        return {alias['name']: alias['target'] for alias in self.session.get(
            'images', 'aliases', params={'recursion': 1})}

    def assertNothingLeft(self) -> None:
        self.assertEqual({}, self.lxd_images)
        self.assertEqual({}, self.aliases)
        self.lxd.wait_for(lambda: not [
            thread for thread in threading.enumerate()
            if thread.name.startswith('lxd-image-')])

    def assertRefused(self, reason: str, image_id: str) -> None:
        exc = self.assertRaises(exception.ImageUnacceptable, self.ensure,
                                image_id)
        self.assertRegex(str(exc), f'Image {image_id} is unacceptable: .*'
                                   f'{reason}')
        self.assertNothingLeft()


class EnsureTestCase(ImageTestCase):

    def test_rootfs(self) -> None:
        data = rootfs()
        image_id = self.glance.add(data, name='tiny')
        fingerprint = self.ensure(image_id)
        self.assertEqual({f'glance-{image_id}': fingerprint}, self.aliases)
        image = self.lxd_images[fingerprint]
        self.assertEqual('x86_64', image['architecture'])
        self.assertEqual(
            {'architecture': 'x86_64', 'description': 'Glance image tiny',
             'nova.image_id': image_id,
             'nova.unpacked_bytes': str(len(gzip.decompress(data)))},
            image['properties'])
        self.assertFalse(image['public'])
        # LXD can make instances from it.
        self.session.post('instances', body={
            'name': 'c1', 'source': {'type': 'image',
                                     'fingerprint': fingerprint},
            'devices': {'root': {'type': 'disk', 'path': '/',
                                 'pool': 'default'}}})

    def test_unified_is_split(self) -> None:
        """LXD gets the driver's metadata and the tenant's root filesystem."""
        data = test_format_inspector.unified(
            b'architecture: x86_64\ncreation_date: 7\nexpiry_date: 8\n'
            b'properties: {nova.checked: x}\n'
            b'templates: {/etc/hostname: {when: [create], template: x}}\n')
        fingerprint = self.ensure(self.glance.add(gzip.compress(data)))
        image = self.lxd.daemon.store.images['nova', fingerprint]
        metadata, root = image.parts
        self.assertEqual(image_transfer.metadata_archive('x86_64'),
                         metadata[2])
        with tarfile.open(fileobj=io.BytesIO(root[2])) as archive:
            self.assertEqual(['.', *ROOTFS], archive.getnames())
        self.assertEqual(len(root[2]), int(self.lxd_images[fingerprint][
            'properties']['nova.unpacked_bytes']))

    def test_rootfs_is_passed_on_as_it_is(self) -> None:
        data = rootfs(3 << 20)
        fingerprint = self.ensure(self.glance.add(data))
        parts = self.lxd.daemon.store.images['nova', fingerprint].parts
        self.assertEqual(['metadata', 'rootfs'], [part[0] for part in parts])
        self.assertEqual(data, parts[1][2])

    def test_squashfs(self) -> None:
        fingerprint = self.ensure(self.glance.add(
            test_format_inspector.squashfs()))
        self.assertEqual('204803', self.lxd_images[fingerprint][
            'properties']['nova.unpacked_bytes'])

    def test_once(self) -> None:
        image_id = self.glance.add(rootfs())
        fingerprint = self.ensure(image_id)
        with self.lxd.recording() as requests:
            self.assertEqual(fingerprint, self.ensure(image_id))
        self.assertEqual(['GET', 'GET'],
                         [entry.method for entry in requests])
        self.store = self.new_store()
        self.assertEqual(fingerprint, self.ensure(image_id))
        self.assertEqual([image_id], self.glance.downloads)

    def test_same_content_twice(self) -> None:
        data = rootfs()
        first, second = self.glance.add(data), self.glance.add(data)
        fingerprint = self.ensure(first)
        self.assertEqual(fingerprint, self.ensure(second))
        self.assertEqual([fingerprint], list(self.lxd_images))
        self.assertEqual({f'glance-{first}', f'glance-{second}'},
                         set(self.aliases))

    def test_left_by_a_crash(self) -> None:
        """An import that was interrupted before its alias was set."""
        image_id = self.glance.add(rootfs())
        fault = self.lxd.drop_connection('POST', '/1.0/images/aliases',
                                         times=None)
        gone = self.lxd.fail_next('DELETE', '/1.0/images/*', times=None)
        self.assertRaises(errors.LXDError, self.ensure, image_id)
        fault.release()
        gone.release()
        self.assertEqual(1, len(self.lxd_images))
        self.assertEqual({}, self.aliases)
        fingerprint = self.ensure(image_id)
        self.assertEqual([fingerprint], list(self.lxd_images))
        self.assertEqual({f'glance-{image_id}': fingerprint}, self.aliases)

    def test_context_and_certificates_reach_glance(self) -> None:
        seen: list[Any] = []
        download = self.glance.download

        def watch(context: Any, image_id: str, **kwargs: Any) -> None:
            seen.append((context, kwargs['trusted_certs']))
            download(context, image_id, **kwargs)

        self.glance.download = watch
        certificates = objects.TrustedCerts(ids=['one'])
        self.ensure(self.glance.add(rootfs()), trusted_certs=certificates)
        self.assertEqual([(self.context, certificates)], seen)

    def test_checked_again_for_who_demands_more(self) -> None:
        image_id = self.glance.add(rootfs())
        certificates = objects.TrustedCerts(ids=['one', 'two'])
        self.ensure(image_id)
        for _ in range(2):
            self.ensure(image_id, trusted_certs=certificates)
        self.ensure(image_id, trusted_certs=objects.TrustedCerts(
            ids=['two', 'one']))
        self.ensure(image_id)
        self.assertEqual(2, len(self.glance.downloads))
        self.ensure(image_id, trusted_certs=objects.TrustedCerts(ids=['one']))
        self.assertEqual(3, len(self.glance.downloads))
        self.assertEqual(1, len(self.lxd_images))

    def test_checked_again_and_found_different(self) -> None:
        image_id = self.glance.add(rootfs())
        fingerprint = self.ensure(image_id)
        self.glance._store(image_id, rootfs(1 << 20))
        error = self.assertRaises(
            exception.ImageUnacceptable, self.ensure, image_id,
            trusted_certs=objects.TrustedCerts(ids=['one']))
        self.assertIn('from before', str(error))
        self.assertEqual([fingerprint], list(self.lxd_images))

    def test_checks_that_are_remembered_are_bounded(self) -> None:
        checked = ''
        for number in range(40):
            checked = signatures.noted(f'c{number}', checked)
        self.assertEqual(16, len(checked.split()))
        self.assertTrue(signatures.is_verified('c39', checked))
        self.assertFalse(signatures.is_verified('c0', checked))
        self.assertFalse(signatures.is_verified('c1', None))
        self.assertTrue(signatures.is_verified('', None))

    def test_cache_image(self) -> None:
        image_id = self.glance.add(rootfs())
        self.assertTrue(self.store.cache_image(self.context, image_id))
        self.assertFalse(self.store.cache_image(self.context, image_id))
        self.assertRaises(exception.ImageNotFound, self.store.cache_image,
                          self.context, 'nope')

    def test_long_transfers_are_reported(self) -> None:
        image_id = self.glance.add(rootfs(1 << 20))
        with mock.patch.object(image_transfer, 'REPORT_INTERVAL', 0.0), \
                self.assertLogs('nova_lxd_py.virt.image.transfer') as logs:
            self.ensure(image_id)
        self.assertRegex('\n'.join(logs.output),
                         r'transferred.*: \d+ %, \d+\.\d MiB, \d+\.\d MiB/s')


class ConcurrencyTestCase(ImageTestCase):

    def run_all(self, actions: list[Any]) -> list[Any]:
        results: list[Any] = [None] * len(actions)

        def run(number: int) -> None:
            try:
                results[number] = actions[number]()
            except Exception as exc:
                results[number] = exc

        threads = [threading.Thread(target=run, args=(number,))
                   for number in range(len(actions))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return results

    def test_many_servers_one_transfer(self) -> None:
        image_id = self.glance.add(rootfs(1 << 20))
        results = self.run_all([lambda: self.ensure(image_id)] * 8)
        self.assertEqual([self.aliases[f'glance-{image_id}']] * 8, results)
        self.assertEqual([image_id], self.glance.downloads)
        self.assertEqual(1, self.lxd.count('POST', '/1.0/images'))

    def test_many_servers_one_bad_image(self) -> None:
        image_id = self.glance.add(b'hello')
        results = self.run_all([lambda: self.ensure(image_id)] * 4)
        for result in results:
            self.assertIsInstance(result, exception.ImageUnacceptable)
        self.assertNothingLeft()

    def test_different_images_have_a_limit(self) -> None:
        self.cfg.config(group='lxd', image_parallel_imports=2)
        self.store = self.new_store()
        running, most = [0], [0]
        changed = threading.Condition()
        download = self.glance.download

        def slowly(context: Any, image_id: str, **kwargs: Any) -> None:
            with changed:
                running[0] += 1
                most[0] = max(most[0], running[0])
                changed.notify_all()
                changed.wait_for(lambda: most[0] > 1, 10)
            # Time for one too many.
            time.sleep(0.1)
            with changed:
                running[0] -= 1
            download(context, image_id, **kwargs)

        self.glance.download = slowly
        ids = [self.glance.add(rootfs()) for _number in range(6)]
        results = self.run_all(
            [lambda one=one: self.ensure(one) for one in ids])
        self.assertEqual(6, len(set(results)))
        self.assertEqual(2, most[0])

    def test_novas_limit_for_disk_work(self) -> None:
        """Its object is replaced when the service starts."""
        entered: list[bool] = []

        @contextlib.contextmanager
        def semaphore() -> Any:
            entered.append(True)
            yield

        with mock.patch.object(compute_utils, 'disk_ops_semaphore',
                               semaphore()):
            self.ensure(self.glance.add(rootfs()))
        self.assertEqual([True], entered)

    def test_same_content_at_once(self) -> None:
        data = rootfs(1 << 20)
        ids = [self.glance.add(data) for _number in range(4)]
        results = self.run_all(
            [lambda one=one: self.ensure(one) for one in ids])
        self.assertEqual(1, len(set(results)), results)
        self.assertEqual({f'glance-{one}' for one in ids}, set(self.aliases))


@ddt.ddt
class RefusalTestCase(ImageTestCase):

    @ddt.data(
        (b'QFI\xfb' + bytes(70000), 'qcow2 disk image'),
        (b'just words', 'text file'),
        (rootfs(90000)[:50000], 'breaks off'),
        (test_format_inspector.squashfs()[:300], 'breaks off'),
        (test_format_inspector.unified(b'architecture: aarch64\n'),
         'for aarch64, this host runs x86_64 and i686'),
        (tar({**ROOTFS, 'usr/bin/x': test_format_inspector.elf(183)}),
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
        zeros = gzip.compress(bytes(64 << 20), 1)
        head = tar(ROOTFS)[:512]
        image_id = self.glance.add(
            gzip.compress(head + test_format_inspector.tarfile_header(
                'usr/zeros', 2 << 30)) + zeros * 20)
        self.assertRefused('more than 1 GiB', image_id)

    def test_property_says_another_architecture(self) -> None:
        self.assertRefused('it is for aarch64', self.glance.add(
            rootfs(), hw_architecture='aarch64'))

    def test_property_says_a_second_architecture(self) -> None:
        image_id = self.glance.add(rootfs(), hw_architecture='i686')
        fingerprint = self.ensure(image_id)
        self.assertEqual('i686', self.lxd_images[fingerprint]['architecture'])

    def test_programs_of_the_second_architecture(self) -> None:
        self.ensure(self.glance.add(
            tar({**ROOTFS, 'usr/bin/x': test_format_inspector.elf(3)})))

    def test_damaged_on_the_way(self) -> None:
        """All is well with it except for the checksum."""
        other = rootfs(2 << 20)
        image_id = self.glance.add(rootfs(2 << 20))
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
        image_id = self.glance.add(rootfs())
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
        image_id = self.glance.add(rootfs())
        self.glance.download = mock.Mock(side_effect=error)
        self.assertRaises(type(error), self.ensure, image_id)
        self.assertNothingLeft()

    def test_glance_breaks_off(self) -> None:
        image_id = self.glance.add(rootfs(2 << 20))

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
        image_id = self.glance.add(rootfs(2 << 20))
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


class FlavorTestCase(ImageTestCase):

    def test_too_large(self) -> None:
        image_id = self.glance.add(rootfs())
        fingerprint = self.ensure(image_id)
        self.session.patch('images', fingerprint, body={'properties': {
            'nova.unpacked_bytes': str((2 << 30) + 1)}})
        exc = self.assertRaises(exception.FlavorDiskSmallerThanImage,
                                self.ensure, image_id, 2)
        self.assertIn('Flavor disk is 2147483648 bytes, image is 2147483649 '
                      'bytes', str(exc))
        # The image itself is fine, for other flavors.
        self.ensure(image_id, 3)
        self.ensure(image_id, 0)

    def test_image_demands_more(self) -> None:
        image_id = self.glance.add(rootfs(), min_disk=3)
        self.assertRaises(exception.FlavorDiskSmallerThanMinDisk,
                          self.ensure, image_id, 2)
        self.assertEqual([], self.glance.downloads)
        self.ensure(image_id, 3)
        self.ensure(image_id, 0)


class LXDFailureTestCase(ImageTestCase):

    def check(self, expected: type[Exception] = errors.LXDError) -> None:
        image_id = self.glance.add(rootfs(3 << 20))
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

        image_id = self.glance.add(rootfs())
        with mock.patch.object(self.session, 'upload', other):
            self.assertRaisesRegex(errors.OperationFailed, 'something else',
                                   self.ensure, image_id)


class ExplainTestCase(ImageTestCase):

    def explain(self, text: str, root_gb: int = 1) -> Exception:
        self.error = errors.OperationFailed(text)
        return self.store.explain_create_failure(
            self.error, self.instance(root_gb),
            self.glance.meta(self.image_id))

    def setUp(self) -> None:
        super().setUp()
        self.image_id = self.glance.add(rootfs())
        self.ensure(self.image_id)

    def test_damaged(self) -> None:
        found = self.explain('Create instance from image: Unpack failed: '
                             'Failed to run: tar: exit status 2')
        self.assertIsInstance(found, exception.ImageUnacceptable)
        self.assertIn('upload it again', str(found))
        self.assertNothingLeft()

    def test_other_reasons(self) -> None:
        for text, reason in (
                ('Unsupported compression', 'gzip or xz'),
                ("Requested architecture isn't supported by this host",
                 'processors'),
                ('exec: "unsquashfs": executable file not found in $PATH',
                 'squashfs-tools')):
            self.ensure(self.image_id)
            found = self.explain(text)
            self.assertIsInstance(found, exception.ImageUnacceptable)
            self.assertIn(reason, str(found))

    def test_nothing_to_do_with_the_image(self) -> None:
        self.assertIs(self.explain('Storage pool unavailable'), self.error)
        self.assertEqual(1, len(self.lxd_images))

    def test_disk_full(self) -> None:
        text = 'Failed to run: tar: Disk quota exceeded'
        self.assertIs(self.explain(text), self.error)
        self.session.patch(
            'images', self.aliases[f'glance-{self.image_id}'],
            body={'properties': {'nova.unpacked_bytes': str(900 << 20)}})
        self.assertIsInstance(self.explain(text),
                              exception.FlavorDiskSmallerThanImage)
        self.assertIs(self.explain(text, 10), self.error)
        self.assertEqual(1, len(self.lxd_images))

    def test_forget(self) -> None:
        self.store.forget(self.image_id)
        self.assertNothingLeft()
        self.store.forget(self.image_id)
        self.ensure(self.image_id)


class PruneTestCase(ImageTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.now = time.time()
        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.image.cache.time.time', lambda: self.now))
        self.image_id = self.glance.add(rootfs())
        self.fingerprint = self.ensure(self.image_id)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    def prune(self, *used: str) -> list[str]:
        return self.store.prune(set(used))

    def test_used(self) -> None:
        for _round in range(3):
            self.assertEqual([], self.prune(self.image_id))
            self.pass_time(2 * DAY)
        self.assertIn(self.fingerprint, self.lxd_images)

    def test_nothing_changes_while_used(self) -> None:
        with self.lxd.recording() as requests:
            self.prune(self.image_id)
        self.assertEqual(['GET'], [entry.method for entry in requests])

    def test_unused(self) -> None:
        self.assertEqual([], self.prune())
        self.pass_time(DAY - 10)
        self.assertEqual([], self.prune())
        self.pass_time(20)
        self.assertEqual([self.fingerprint], self.prune())
        self.assertNothingLeft()

    def test_driver_restart_does_not_begin_anew(self) -> None:
        self.prune()
        self.pass_time(DAY + 1)
        self.store = self.new_store()
        self.assertEqual([self.fingerprint], self.prune())

    def test_used_again(self) -> None:
        self.prune()
        self.pass_time(DAY + 1)
        self.ensure(self.image_id)
        self.assertEqual([], self.prune())
        self.pass_time(DAY + 1)
        self.prune(self.image_id)
        self.assertEqual([], self.prune())

    def test_asked_for_meanwhile(self) -> None:
        """A server comes after the list of images was read."""
        self.prune()
        self.pass_time(DAY + 1)
        listed = self.session.get('images', params={'recursion': 1})
        self.ensure(self.image_id)
        get = self.session.get

        def stale(*path: str, **kwargs: Any) -> Any:
            return listed if path == ('images',) else get(*path, **kwargs)

        with mock.patch.object(self.session, 'get', stale):
            self.assertEqual([], self.prune())
        self.assertIn(self.fingerprint, self.lxd_images)

    def test_switched_off(self) -> None:
        self.cfg.config(group='image_cache', remove_unused_base_images=False)
        self.prune()
        self.pass_time(9 * DAY)
        self.assertEqual([], self.prune())

    def test_clock_set_back(self) -> None:
        self.prune()
        self.pass_time(-30 * DAY)
        self.assertEqual([], self.prune())
        self.pass_time(DAY + 1)
        self.assertEqual([self.fingerprint], self.prune())

    def test_two_names(self) -> None:
        other = self.glance.add(self.glance.data(self.image_id))
        self.ensure(other)
        self.prune(other)
        self.pass_time(DAY + 1)
        self.assertEqual([], self.prune(other))
        self.prune()
        self.pass_time(DAY + 1)
        self.assertEqual([self.fingerprint], self.prune())
        self.assertNothingLeft()

    def test_foreign_images(self) -> None:
        foreign = self.lxd.add_image(project='nova', alias='mine')
        bare = self.lxd.add_image(fake_lxd_image(), project='nova')
        self.prune()
        self.pass_time(9 * DAY)
        self.assertEqual([self.fingerprint], self.prune())
        self.assertEqual({foreign, bare}, set(self.lxd_images))

    def test_operators_name_for_our_image(self) -> None:
        self.session.post('images', 'aliases', body={
            'name': 'mine', 'target': self.fingerprint})
        self.prune()
        self.pass_time(DAY + 1)
        self.prune()
        self.assertEqual({'mine': self.fingerprint}, self.aliases)

    def test_operators_image_with_our_name(self) -> None:
        """The operator has brought the same content before."""
        image_id = self.glance.add(rootfs())
        image_transfer.Transfer(
            self.session, self.glance, self.glance.meta(image_id), 1 << 30,
            60, None).run(self.context, None, {})
        fingerprint = self.ensure(image_id)
        self.prune()
        self.pass_time(DAY + 1)
        self.prune()
        self.assertEqual({}, self.aliases)
        self.assertEqual([fingerprint], list(self.lxd_images))

    def test_left_by_a_crash(self) -> None:
        self.session.delete('images', 'aliases', f'glance-{self.image_id}')
        self.assertEqual([], self.prune())
        self.pass_time(DAY + 1)
        self.assertEqual([self.fingerprint], self.prune())

    def test_one_failure_does_not_stop_the_others(self) -> None:
        second = self.ensure(self.glance.add(rootfs()))
        self.prune()
        self.pass_time(DAY + 1)
        self.lxd.fail_next('DELETE', '/1.0/images/*')
        removed = self.prune()
        self.assertEqual(1, len(removed))
        self.assertEqual(1, len(self.lxd_images))
        self.prune()
        self.assertNothingLeft()
        self.assertNotEqual(second, self.fingerprint)

    def test_what_servers_use(self) -> None:
        self.assertEqual({'a', 'b', 'c'}, image_cache.used_images([
            self.instance(image_ref='a'),
            self.instance(image_ref='b', system_metadata={
                'image_base_image_ref': 'c'}),
            self.instance(image_ref=''), objects.Instance(image_ref='a')]))

    def test_manage_cache(self) -> None:
        self.store.manage_cache([self.instance(image_ref=self.image_id)])
        self.pass_time(DAY + 1)
        self.store.manage_cache([])
        self.assertIn(self.fingerprint, self.lxd_images)
        self.pass_time(DAY + 1)
        self.store.manage_cache([])
        self.assertNothingLeft()


class NovaClientTestCase(ImageTestCase):
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
        data = rootfs(5 << 20)
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
        image_id = self.server.add(rootfs(3 << 20))
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


def fake_lxd_image() -> bytes:
    return test_format_inspector.unified(
        b'architecture: x86_64\ncreation_date: 5\n')
