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

"""Self-signed certificates, as LXD and its clients make them."""

from __future__ import annotations

import datetime
import os

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization
from cryptography import x509
from cryptography.x509 import oid


def make(folder: str, name: str) -> tuple[str, str]:
    """Make a key and a certificate.

    :param folder: where to write them.
    :param name: of the files, and in the certificate.
    :returns: paths of certificate and key, both PEM.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([
        x509.NameAttribute(oid.NameOID.ORGANIZATION_NAME,
                           'linuxcontainers.org'),
        x509.NameAttribute(oid.NameOID.COMMON_NAME, f'root@{name}')])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder().subject_name(subject).issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA384()))
    paths = (os.path.join(folder, f'{name}.crt'),
             os.path.join(folder, f'{name}.key'))
    with open(paths[0], 'wb') as out:
        out.write(certificate.public_bytes(serialization.Encoding.PEM))
    with open(paths[1], 'wb') as out:
        out.write(key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption()))
    return paths
