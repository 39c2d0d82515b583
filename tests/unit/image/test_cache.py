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

"""The store of Glance images in LXD."""

from __future__ import annotations

import contextlib
import gzip
import io
import tarfile
import threading
import time
from typing import Any
from unittest import mock

from nova.compute import utils as compute_utils
from nova import exception
from nova import objects

from nova_lxd_py.virt.image import signatures
from nova_lxd_py.virt.image import transfer as image_transfer
from nova_lxd_py.virt.lxd import errors
from tests.fixtures import concurrent_calls
from tests.fixtures import image_case
from tests.fixtures import image_samples

objects.register_all()

ROOTFS = image_samples.ROOTFS
tar = image_samples.tar
DAY = 86400


class EnsureTestCase(image_case.ImageTestCase):

    def test_rootfs(self) -> None:
        data = image_case.rootfs()
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
        data = image_samples.unified(
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
        data = image_case.rootfs(3 << 20)
        fingerprint = self.ensure(self.glance.add(data))
        parts = self.lxd.daemon.store.images['nova', fingerprint].parts
        self.assertEqual(['metadata', 'rootfs'], [part[0] for part in parts])
        self.assertEqual(data, parts[1][2])

    def test_squashfs(self) -> None:
        fingerprint = self.ensure(self.glance.add(
            image_samples.squashfs()))
        self.assertEqual('204803', self.lxd_images[fingerprint][
            'properties']['nova.unpacked_bytes'])

    def test_once(self) -> None:
        image_id = self.glance.add(image_case.rootfs())
        fingerprint = self.ensure(image_id)
        with self.lxd.recording() as requests:
            self.assertEqual(fingerprint, self.ensure(image_id))
        self.assertEqual(['GET', 'GET'],
                         [entry.method for entry in requests])
        self.store = self.new_store()
        self.assertEqual(fingerprint, self.ensure(image_id))
        self.assertEqual([image_id], self.glance.downloads)

    def test_same_content_twice(self) -> None:
        data = image_case.rootfs()
        first, second = self.glance.add(data), self.glance.add(data)
        fingerprint = self.ensure(first)
        self.assertEqual(fingerprint, self.ensure(second))
        self.assertEqual([fingerprint], list(self.lxd_images))
        self.assertEqual({f'glance-{first}', f'glance-{second}'},
                         set(self.aliases))

    def test_left_by_a_crash(self) -> None:
        """An import that was interrupted before its alias was set."""
        image_id = self.glance.add(image_case.rootfs())
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
        self.ensure(self.glance.add(image_case.rootfs()),
                    trusted_certs=certificates)
        self.assertEqual([(self.context, certificates)], seen)

    def test_checked_again_for_who_demands_more(self) -> None:
        image_id = self.glance.add(image_case.rootfs())
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
        image_id = self.glance.add(image_case.rootfs())
        fingerprint = self.ensure(image_id)
        self.glance._store(image_id, image_case.rootfs(1 << 20))
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
        image_id = self.glance.add(image_case.rootfs())
        self.assertTrue(self.store.cache_image(self.context, image_id))
        self.assertFalse(self.store.cache_image(self.context, image_id))
        self.assertRaises(exception.ImageNotFound, self.store.cache_image,
                          self.context, 'nope')


class ConcurrencyTestCase(image_case.ImageTestCase):

    def test_many_servers_one_transfer(self) -> None:
        image_id = self.glance.add(image_case.rootfs(1 << 20))
        results = concurrent_calls.run_all([lambda: self.ensure(image_id)] * 8)
        self.assertEqual([self.aliases[f'glance-{image_id}']] * 8, results)
        self.assertEqual([image_id], self.glance.downloads)
        self.assertEqual(1, self.lxd.count('POST', '/1.0/images'))

    def test_many_servers_one_bad_image(self) -> None:
        image_id = self.glance.add(b'hello')
        results = concurrent_calls.run_all([lambda: self.ensure(image_id)] * 4)
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
        ids = [self.glance.add(image_case.rootfs()) for _number in range(6)]
        results = concurrent_calls.run_all(
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
            self.ensure(self.glance.add(image_case.rootfs()))
        self.assertEqual([True], entered)

    def test_same_content_at_once(self) -> None:
        data = image_case.rootfs(1 << 20)
        ids = [self.glance.add(data) for _number in range(4)]
        results = concurrent_calls.run_all(
            [lambda one=one: self.ensure(one) for one in ids])
        self.assertEqual(1, len(set(results)), results)
        self.assertEqual({f'glance-{one}' for one in ids}, set(self.aliases))


class FlavorTestCase(image_case.ImageTestCase):

    def test_too_large(self) -> None:
        image_id = self.glance.add(image_case.rootfs())
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
        image_id = self.glance.add(image_case.rootfs(), min_disk=3)
        self.assertRaises(exception.FlavorDiskSmallerThanMinDisk,
                          self.ensure, image_id, 2)
        self.assertEqual([], self.glance.downloads)
        self.ensure(image_id, 3)
        self.ensure(image_id, 0)


class ExplainTestCase(image_case.ImageTestCase):

    def explain(self, text: str, root_gb: int = 1) -> Exception:
        self.error = errors.OperationFailed(text)
        return self.store.explain_create_failure(
            self.error, self.instance(root_gb),
            self.glance.meta(self.image_id))

    def setUp(self) -> None:
        super().setUp()
        self.image_id = self.glance.add(image_case.rootfs())
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

    def test_start(self) -> None:
        self.session.post('instances', body={
            'name': 'c1', 'source': {'type': 'image', 'fingerprint':
                                     self.ensure(self.image_id)},
            'devices': {'root': {'type': 'disk', 'path': '/',
                                 'pool': 'default'}}})
        error = errors.OperationFailed('Failed to run: forkstart')
        for meta, kind in (
                (self.glance.meta(self.image_id),
                 exception.ImageUnacceptable),
                # It boots from a volume.
                (objects.ImageMeta.from_dict({}),
                 exception.BuildAbortException)):
            logs = self.lxd.instance('c1').logs
            logs['lxc.log'] = b''
            self.assertIs(error, self.store.explain_start_failure(
                error, self.instance(1), meta, 'c1'))
            logs['lxc.log'] = (b'lxc c1 2026 ERROR start - start.c:start:1 - '
                               b'Permission denied - Failed to exec '
                               b'"/sbin/init"\n')
            found = self.store.explain_start_failure(
                error, self.instance(1), meta, 'c1')
            self.assertIs(kind, type(found))
            self.assertIn('not executable', str(found))

    def test_forget(self) -> None:
        self.store.forget(self.image_id)
        self.assertNothingLeft()
        self.store.forget(self.image_id)
        self.ensure(self.image_id)
