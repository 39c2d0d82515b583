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

"""Transfers of instances and custom volumes between two LXD servers.

The source opens an operation with secrets that are valid once; the target
pulls the content from it over TLS. The servers need not trust each other: the
target pins the source's certificate and proves itself by the secrets. LXD
copies the content only; configuration and devices of the new object are those
of the request to the target.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import re
from typing import Any
from urllib import parse

from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import operations
from nova_lxd_py.virt.lxd import session as lxd
from nova_lxd_py.virt.lxd import tls

#: Pool drivers whose transfers LXD does not make incremental: it sends a
#: whole volume with the tools of the driver, if both pools have it.
_WHOLE_VOLUMES = frozenset({'btrfs', 'zfs', 'ceph'})


@dataclasses.dataclass(frozen=True)
class Offer:
    """An open operation of the source.

    :ivar source: the ``source`` for the target's request, without ``refresh``.
    :ivar operation: the operation.
    """

    source: dict[str, Any]
    operation: operations.Operation


def server_address(address: str) -> str:
    """Format an address as LXD does.

    :param address: IP address or host name, with or without a port; an IPv6
        address with a port has brackets.
    :returns: ``host:port``, an IPv6 host in brackets.
    :raises ValueError: if it is not an address.
    """
    if address.count(':') > 1 and not address.startswith('['):
        address = f'[{address}]'
    url = parse.urlsplit(f'//{address}')
    # The property raises ValueError for a port that is not a number.
    port = url.port or tls.DEFAULT_PORT
    if not url.hostname or url.path or url.query or '@' in address:
        raise ValueError(f'"{address}" is not an address')
    host = f'[{url.hostname}]' if ':' in url.hostname else url.hostname
    return f'{host}:{port}'


def listen(session: lxd.Session, address: str) -> bool:
    """Ensure that LXD listens where other LXD servers can pull from it.

    An address that an operator has configured is kept if it includes this
    one.

    :param session: the connected LXD session.
    :param address: see :func:`server_address`.
    :returns: whether LXD listens there.
    :raises ValueError: if it is not an address.
    :raises errors.LXDError: if LXD cannot listen there.
    """
    wanted = server_address(address)
    server, etag = session.get_with_etag()
    present = server['config'].get('core.https_address', '')
    if present:
        return _includes(present, wanted)
    session.patch(body={'config': {'core.https_address': wanted}}, etag=etag)
    # Its certificate may be new, too.
    session.connect()
    return True


def _includes(present: str, wanted: str) -> bool:
    try:
        host, _, port = server_address(
            f'[::]{present}' if present.startswith(':') else present
        ).rpartition(':')
    except ValueError:
        return False
    return (port == wanted.rpartition(':')[2] and
            host in ('[::]', '0.0.0.0', wanted.rpartition(':')[0]))


def is_incremental(source_driver: str, target_driver: str) -> bool:
    """Return whether a second transfer sends only what has changed.

    :param source_driver: driver of the source's storage pool.
    :param target_driver: driver of the target's.
    """
    return (source_driver != target_driver or
            source_driver not in _WHOLE_VOLUMES)


def offer_instance(session: lxd.Session, name: str, address: str) -> Offer:
    """Open the operation from which another LXD pulls an instance with its
    snapshots. It ends by itself if nobody connects within ten seconds.

    :param session: the LXD session.
    :param name: name of the LXD instance.
    :param address: where LXD listens.
    :raises errors.LXDError: if LXD refuses.
    """
    return _offer(session, address, session.submit(
        'post', 'instances', name,
        body={'name': name, 'migration': True, 'live': False,
              'instance_only': False}))


def offer_volume(session: lxd.Session, pool: str, name: str, address: str
                 ) -> Offer:
    """Open the operation from which another LXD pulls a custom volume. See
    :func:`offer_instance`.

    :param session: the LXD session.
    :param pool: storage pool of the volume.
    :param name: name of the volume.
    :param address: where LXD listens.
    """
    return _offer(session, address, session.submit(
        'post', 'storage-pools', pool, 'volumes', 'custom', name,
        body={'name': name, 'pool': pool, 'migration': True,
              'volume_only': True}))


def _offer(session: lxd.Session, address: str,
           operation: operations.Operation) -> Offer:
    certificate = session.server['environment']['certificate']
    if not certificate:
        operation.cancel()
        raise errors.OperationFailed('LXD does not report its certificate')
    return Offer({
        'type': 'migration', 'mode': 'pull', 'live': False,
        'operation': f'https://{server_address(address)}/1.0/operations/'
                     f'{operation.id}',
        'certificate': certificate,
        'secrets': dict(operation.metadata['metadata']),
    }, operation)


def refresh_instance(session: lxd.Session, info: Mapping[str, Any],
                     source: Mapping[str, Any], timeout: float) -> None:
    """Pull what has changed in an instance since it was pulled.

    :param session: the LXD session of the target.
    :param info: the target's description of the instance.
    :param source: see :class:`Offer`.
    :param timeout: seconds that it may take.
    :raises errors.LXDError: if it fails; the instance may have changed.
    """
    session.post('instances', timeout=timeout, body={
        **{key: info[key] for key in ('name', 'architecture', 'profiles',
                                      'config', 'devices')},
        'type': 'container', 'source': {**source, 'refresh': True}})


def pull_volume(session: lxd.Session, pool: str, name: str,
                config: Mapping[str, str], source: Mapping[str, Any],
                refresh: bool, timeout: float) -> None:
    """Pull a custom volume.

    :param session: the LXD session of the target.
    :param pool: the target's storage pool.
    :param name: name of the volume.
    :param config: its configuration.
    :param source: see :class:`Offer`.
    :param refresh: whether it exists already.
    :param timeout: seconds that it may take.
    :raises errors.LXDError: if it fails.
    """
    session.post('storage-pools', pool, 'volumes', 'custom', timeout=timeout,
                 body={'name': name, 'type': 'custom',
                       'content_type': 'filesystem', 'config': dict(config),
                       'source': {**source, 'volume_only': True,
                                  'refresh': refresh}})


def sent(operation: operations.Operation) -> tuple[int, str]:
    """Return the progress of a transfer that the source has reported.

    :param operation: the source's operation, freshly read.
    :returns: bytes sent, and LXD's text; 0 and '' before it has begun.
    """
    text = (operation.metadata.get('metadata') or {}).get('fs_progress', '')
    found = re.search(r'([\d.]+)([kMGTP]?)B \(', text)
    if found is None:
        return 0, text
    return int(float(found[1]) *
               1000 ** ' kMGTP'.index(found[2] or ' ')), text
