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

"""What servers demand of the signatures of their images.

Nova checks a signature while an image is downloaded. An image that LXD has
already was perhaps downloaded for a server that demanded less, so the driver
notes on it what it has been checked for.
"""

from __future__ import annotations

import hashlib
from typing import Any

from nova import conf as nova_conf

CONF = nova_conf.CONF

#: How many checks are remembered of an image, the latest ones.
_MOST = 16


def required_signature(image_id: str, trusted_certs: Any) -> str:
    """Name what has to be checked of an image for a server.

    :param image_id: Glance's id of the image.
    :param trusted_certs: the server's :class:`nova.objects.TrustedCerts`, or
        None.
    :returns: a word for it, '' if nothing has to be checked.
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

    :param demanded: what is demanded of it.
    :param checked: what is noted on it.
    """
    return not demanded or demanded in (checked or '').split()


def noted(demanded: str, checked: str | None) -> str:
    """Add a check to what is noted on an image.

    :param demanded: what it has been checked for, '' for nothing.
    :param checked: what is noted on it.
    :returns: what to note.
    """
    words = [word for word in (checked or '').split() if word != demanded]
    return ' '.join([*words, demanded][-_MOST:]).strip()
