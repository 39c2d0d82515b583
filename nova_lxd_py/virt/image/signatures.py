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

"""Signature checks that servers demand of their images.

Nova checks a signature while an image is downloaded. An image that LXD has
already may have been downloaded for a server that demanded less, so the driver
records on it which checks it has passed.
"""

from __future__ import annotations

import hashlib
from typing import Any

from nova import conf as nova_conf

CONF = nova_conf.CONF

#: How many checks are remembered of an image, the latest ones.
_MOST = 16


def required_signature(image_id: str, trusted_certs: Any) -> str:
    """Return an identifier of the check that a server demands of an image.

    :param image_id: Glance's id of the image.
    :param trusted_certs: the server's :class:`nova.objects.TrustedCerts`, or
        None.
    :returns: a hash of the image and the certificates, '' if nothing has to
        be checked.
    """
    options = CONF.glance
    ids = list(trusted_certs.ids) if trusted_certs else []
    if not ids and options.enable_certificate_validation:
        ids = list(options.default_trusted_certificate_ids or ())
    if not ids and not options.verify_glance_signatures:
        return ''
    text = '\n'.join([image_id, *sorted(set(ids))])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_verified(demanded: str, checked: str | None) -> bool:
    """Return whether an image needs no further check.

    :param demanded: identifier of the check that is demanded, '' for none.
    :param checked: the checks recorded on the image.
    """
    return not demanded or demanded in (checked or '').split()


def noted(demanded: str, checked: str | None) -> str:
    """Add a check to those recorded on an image.

    :param demanded: identifier of the check, '' for none.
    :param checked: the checks recorded so far.
    :returns: the checks to record.
    """
    words = [word for word in (checked or '').split() if word != demanded]
    return ' '.join([*words, demanded][-_MOST:]).strip()
