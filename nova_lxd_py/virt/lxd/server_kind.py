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

"""Differences between LXD and Incus, which share one API.

Other modules ask the session for the :class:`ServerKind`, and, for features
that newer servers of either kind have, for an API extension.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from requests import structures


@dataclasses.dataclass(frozen=True)
class ServerKind:
    """Names that differ between the two.

    :ivar product: its name in messages.
    :ivar client: command of its client program, for advice to operators.
    :ivar guest_api_key: configuration key of an instance that enables the
        API for guests (``/dev/lxd``, ``/dev/incus``).
    :ivar metrics_prefix: beginning of the names of its metrics.
    :ivar header_prefix: beginning of the names of its HTTP headers, of which
        it ignores others.
    """

    product: str
    client: str
    guest_api_key: str
    metrics_prefix: str
    header_prefix: str

    def own_headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        """Return HTTP headers as the server knows them.

        :param headers: headers, by the names that LXD gives them.
        """
        return {_renamed(name, LXD.header_prefix, self.header_prefix): value
                for name, value in headers.items()}

    def lxd_headers(self, headers: Mapping[str, str]
                    ) -> structures.CaseInsensitiveDict[str]:
        """Return the server's HTTP headers by the names of LXD.

        :param headers: headers of an answer.
        """
        return structures.CaseInsensitiveDict(
            (_renamed(name, self.header_prefix, LXD.header_prefix), value)
            for name, value in headers.items())


def _renamed(name: str, before: str, after: str) -> str:
    if name.lower().startswith(before.lower()):
        return after + name[len(before):]
    return name


LXD = ServerKind('LXD', 'lxc', 'security.devlxd', 'lxd_', 'X-LXD-')
INCUS = ServerKind('Incus', 'incus', 'security.guestapi', 'incus_',
                   'X-Incus-')

#: The configuration keys of all kinds that enable the API for guests.
GUEST_API_KEYS = frozenset(kind.guest_api_key for kind in (LXD, INCUS))

#: Sockets to try if no endpoint is configured.
WELL_KNOWN_SOCKETS = (
    '/var/snap/lxd/common/lxd/unix.socket',
    '/var/lib/lxd/unix.socket',
    '/var/lib/incus/unix.socket',
)


def identify(server: Mapping[str, Any]) -> ServerKind:
    """Return the kind of a server.

    :param server: the server's answer to ``GET /1.0``; it describes its
        environment only to clients that it trusts.
    """
    name = server.get('environment', {}).get('server')
    return INCUS if name == 'incus' else LXD


def version(server: Mapping[str, Any]) -> str:
    """Return the product and version of a server for messages.

    :param server: the server's answer to ``GET /1.0``.
    """
    number = server.get('environment', {}).get(
        'server_version', 'of an unknown version')
    return f'{identify(server).product} {number}'
