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

"""Signed images, and a key manager that holds the certificates for them."""

from __future__ import annotations

import base64
import datetime
import uuid

from castellan.common import exception
from castellan.common.objects import x_509
from castellan.key_manager import not_implemented_key_manager
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization
from cryptography import x509

BACKEND = f'{__name__}.CertificateStore'

_certificates: dict[str, bytes] = {}


class CertificateStore(
        not_implemented_key_manager.NotImplementedKeyManager):
    """What ``[key_manager] backend`` names: it holds what was made here."""

    def get(self, context, managed_object_id, metadata_only=False):
        try:
            return x_509.X509(_certificates[managed_object_id])
        except KeyError:
            raise exception.ManagedObjectNotFoundError(
                uuid=managed_object_id) from None


class Certificate:
    """A certificate and its key.

    :param name: whose it is.
    :param issuer: who signs it; itself by default, as an authority.
    :param days: for how long it is valid; negative if it no longer is.

    :ivar id: the key manager's name of it.
    """

    def __init__(self, name: str, issuer: Certificate | None = None,
                 days: int = 1) -> None:
        self.id = str(uuid.uuid4())
        self._key = ec.generate_private_key(ec.SECP384R1())
        self._subject = x509.Name([x509.NameAttribute(
            x509.NameOID.COMMON_NAME, name)])
        signer = issuer or self
        now = datetime.datetime.now(datetime.timezone.utc)
        made = (
            x509.CertificateBuilder().subject_name(self._subject)
            .issuer_name(signer._subject).public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=9))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(
                ca=issuer is None, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(
                digital_signature=True, key_cert_sign=issuer is None,
                content_commitment=False, key_encipherment=False,
                data_encipherment=False, key_agreement=False, crl_sign=False,
                encipher_only=False, decipher_only=False), critical=True)
            .sign(signer._key, hashes.SHA256()))
        _certificates[self.id] = made.public_bytes(
            serialization.Encoding.DER)

    def sign(self, data: bytes) -> dict[str, str]:
        """Sign an image.

        :param data: its content.
        :returns: the properties that it needs in Glance.
        """
        signature = self._key.sign(data, ec.ECDSA(hashes.SHA256()))
        return {'img_signature': base64.b64encode(signature).decode(),
                'img_signature_hash_method': 'SHA-256',
                'img_signature_key_type': 'ECC_SECP384R1',
                'img_signature_certificate_uuid': self.id}
