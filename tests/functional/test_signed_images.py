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

"""Trusted image certificates: signed images, from Glance into a real LXD.

Nova's own client of Glance checks the signatures, with certificates of a key
manager.
"""

from __future__ import annotations

from typing import Any
import unittest

from cursive import exception as cursive_exception
from nova.compute import power_state
from nova import exception
from nova.image import glance
from nova import objects
from oslo_config import cfg

from tests.fixtures import busybox_image
from tests.fixtures import certificate_store
from tests.fixtures import driver_host
from tests.fixtures import glance_server
from tests.fixtures import lxd_daemon

NO_LXD = lxd_daemon.missing()
CONF = driver_host.CONF


@unittest.skipIf(NO_LXD, NO_LXD or '')
class SignedImageTest(unittest.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.glance = glance_server.GlanceServer()
        self.glance.setUp()
        self.addCleanup(self.glance.cleanUp)
        self.set('api_servers', [self.glance.url], 'glance')
        self.set('backend', certificate_store.BACKEND, 'key_manager')
        self.api = glance.API()
        self.host = driver_host.DriverHost(glance=self.api)
        self.host.setUp()
        self.addCleanup(self.host.cleanUp)
        self.host.context.auth_token = 'token'
        self.content = busybox_image.unified()
        self.authority = certificate_store.Certificate('authority')
        self.signer = certificate_store.Certificate('signer', self.authority)
        self.stranger = certificate_store.Certificate('stranger')

    def set(self, name: str, value: Any, group: str) -> None:
        CONF.set_override(name, value, group)
        self.addCleanup(CONF.clear_override, name, group)

    def signed(self, signer: certificate_store.Certificate | None = None,
               **properties: str) -> str:
        """Upload a signed image."""
        return self.glance.add(self.content, **{
            **(signer or self.signer).sign(self.content), **properties})

    def server(self, image_id: str, *trusted: certificate_store.Certificate
               ) -> objects.Instance:
        image = objects.ImageMeta.from_image_ref(self.host.context, self.api,
                                                 image_id)
        server = self.host.instance(image)
        if trusted:
            server.trusted_certs = objects.TrustedCerts(
                ids=[each.id for each in trusted])
        return self.host.spawn(server, image)

    def images(self) -> list[str]:
        return self.host.lxd.api.must('GET', '/1.0/images', params={
            'project': self.host.project})

    def assert_refused(self, kind: type[Exception], image_id: str,
                       *trusted: certificate_store.Certificate) -> str:
        before = self.host.lxd_instances().keys()
        images = self.images()
        with self.assertRaises(kind) as caught:
            self.server(image_id, *trusted)
        self.assertEqual(before, self.host.lxd_instances().keys())
        self.assertEqual(images, self.images())
        return str(caught.exception)

    def test_good(self) -> None:
        server = self.server(self.signed(), self.authority)
        self.assertEqual(power_state.RUNNING, self.host.state(server))

    def test_trusted_among_others(self) -> None:
        self.server(self.signed(), self.stranger, self.authority)

    def test_bad_signature(self) -> None:
        other = self.signer.sign(b'something else')
        self.assertIn('signature', self.assert_refused(
            exception.ImageUnacceptable,
            self.signed(img_signature=other['img_signature']),
            self.authority))

    def test_content_that_was_changed(self) -> None:
        """By an attacker who could also change Glance's checksums."""
        properties = self.signer.sign(self.content)
        image_id = self.glance.add(
            busybox_image.unified({'etc/evil': b'x'}), **properties)
        self.assert_refused(exception.ImageUnacceptable, image_id,
                            self.authority)

    def test_certificate_that_is_not_trusted(self) -> None:
        self.assert_refused(exception.CertificateValidationFailed,
                            self.signed(), self.stranger)

    def test_certificate_that_is_unknown(self) -> None:
        self.assert_refused(
            cursive_exception.SignatureVerificationError,
            self.signed(img_signature_certificate_uuid=(
                '0f2a3b4c-0000-4000-8000-000000000000')), self.authority)

    def test_certificate_that_has_expired(self) -> None:
        expired = certificate_store.Certificate('old', self.authority, -1)
        self.assert_refused(exception.CertificateValidationFailed,
                            self.signed(expired), self.authority)

    def test_not_signed(self) -> None:
        self.assert_refused(cursive_exception.SignatureVerificationError,
                            self.glance.add(self.content), self.authority)

    def test_image_that_is_cached_already(self) -> None:
        """A server without trusted certificates has imported it before."""
        image_id = self.signed()
        self.server(image_id)
        self.assert_refused(exception.CertificateValidationFailed, image_id,
                            self.stranger)
        self.assertEqual([image_id], self.glance.downloads)
        self.server(image_id, self.authority)
        self.assertEqual(2, len(self.glance.downloads))
        # From now on it is recorded as verified by this certificate.
        self.server(image_id, self.authority)
        self.host.restart_driver()
        self.server(image_id, self.authority)
        self.server(image_id)
        self.assertEqual(2, len(self.glance.downloads))
        self.assert_refused(exception.CertificateValidationFailed, image_id,
                            self.stranger)
        self.assertEqual(1, len(self.images()))

    def test_cached_image_that_is_not_signed(self) -> None:
        image_id = self.glance.add(self.content)
        self.server(image_id)
        self.assert_refused(cursive_exception.SignatureVerificationError,
                            image_id, self.authority)
        # It stays for servers without trusted certificates.
        self.server(image_id)
        self.assertEqual(1, len(self.glance.downloads))

    def test_same_content_as_a_checked_image(self) -> None:
        self.server(self.signed(), self.authority)
        self.assert_refused(exception.CertificateValidationFailed,
                            self.signed(self.stranger), self.authority)
        self.assert_refused(cursive_exception.SignatureVerificationError,
                            self.glance.add(self.content), self.authority)

    def test_every_signature_is_checked(self) -> None:
        """[glance] verify_glance_signatures, set when an image is here."""
        unsigned, signed = self.glance.add(self.content), self.signed()
        self.server(unsigned)
        self.set('verify_glance_signatures', True, 'glance')
        self.assert_refused(cursive_exception.SignatureVerificationError,
                            unsigned)
        for _ in range(2):
            self.server(signed)

    def test_default_certificates(self) -> None:
        self.set('enable_certificate_validation', True, 'glance')
        self.set('default_trusted_certificate_ids', [self.authority.id],
                 'glance')
        self.server(self.signed())
        self.assert_refused(exception.CertificateValidationFailed,
                            self.signed(self.stranger))

    def test_nova_has_the_options(self) -> None:
        for name in ('verify_glance_signatures',
                     'enable_certificate_validation',
                     'default_trusted_certificate_ids'):
            self.assertIn(name, cfg.CONF.glance)
