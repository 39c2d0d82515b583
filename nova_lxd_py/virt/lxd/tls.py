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

"""TLS to a remote LXD: client certificate and pinned server certificate."""

from __future__ import annotations

import os
import socket
import ssl
from urllib import parse

from oslo_config import cfg

from nova_lxd_py.virt.lxd import errors

DEFAULT_PORT = 8443


def check_files(conf: cfg.ConfigOpts.GroupAttr) -> None:
    """Check that the certificates for an https endpoint are usable.

    :param conf: the ``[lxd]`` option group.
    :raises errors.PermissionDenied: if an option is unset, or nova-compute
        cannot read or use its file; the message names the option.
    """
    for option in ('client_certificate', 'client_key', 'server_certificate'):
        path = conf[option]
        if not path:
            raise errors.PermissionDenied(
                f'[lxd] endpoint is {conf.endpoint}, which requires [lxd] '
                f'{option} to be set')
        if not os.access(path, os.R_OK):
            raise errors.PermissionDenied(
                f'[lxd] {option} is {path}, which nova-compute cannot read')
    try:
        _context(conf)
    except (OSError, ValueError) as exc:
        raise errors.PermissionDenied(
            f'[lxd] client_certificate {conf.client_certificate} and '
            f'client_key {conf.client_key} are not a certificate and its key '
            f'in PEM format') from exc
    try:
        _pinned(conf)
    except (OSError, ValueError) as exc:
        raise errors.PermissionDenied(
            f'[lxd] server_certificate {conf.server_certificate} is not a '
            f'certificate in PEM format') from exc


def _context(conf: cfg.ConfigOpts.GroupAttr) -> ssl.SSLContext:
    # LXD's certificates are self-signed and contain no host name, so that the
    # only check is the comparison with the pinned certificate.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.load_cert_chain(conf.client_certificate, conf.client_key)
    return context


def _pinned(conf: cfg.ConfigOpts.GroupAttr) -> bytes:
    with open(conf.server_certificate) as source:
        return ssl.PEM_cert_to_DER_cert(source.read().strip())


def connect(endpoint: str, conf: cfg.ConfigOpts.GroupAttr, timeout: float
            ) -> ssl.SSLSocket:
    """Open a TLS connection to the server with the pinned certificate.

    :param endpoint: ``https://host[:port]``.
    :param conf: the ``[lxd]`` option group.
    :param timeout: seconds for the connection and the handshake.
    :returns: the connected socket.
    :raises errors.PermissionDenied: if the server presents another
        certificate, or the files of nova-compute are unusable.
    :raises OSError: if the server does not answer.
    """
    check_files(conf)
    url = parse.urlparse(endpoint)
    context = _context(conf)
    expected = _pinned(conf)
    plain = socket.create_connection(
        (url.hostname or '', url.port or DEFAULT_PORT), timeout=timeout)
    try:
        secured = context.wrap_socket(plain, server_hostname=url.hostname)
    except OSError:
        plain.close()
        raise
    if secured.getpeercert(binary_form=True) != expected:
        secured.close()
        raise errors.PermissionDenied(
            f'The server at {endpoint} does not present the certificate in '
            f'{conf.server_certificate}')
    return secured
