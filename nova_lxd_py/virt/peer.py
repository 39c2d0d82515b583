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

"""Calls between the drivers of two compute hosts, on Nova's message bus.

Nova has no channel from the source of a migration to its destination before
the disks must have moved. So each driver serves a few calls of its own, next
to those of nova-compute: on the same transport, with a topic of their own, and
the name of the compute host as the server. A client that may send to this
topic may send to nova-compute as well.

All calls may be repeated, and may come late: they name the migration that they
belong to.
"""

from __future__ import annotations

from collections.abc import Mapping
import threading
from typing import Any, Protocol

from nova import conf as nova_conf
from nova import context as nova_context
from nova import exception
from nova import objects
from nova.objects import base as objects_base
from nova import rpc
from oslo_log import log as logging
import oslo_messaging as messaging

CONF = nova_conf.CONF
LOG = logging.getLogger(__name__)

#: Topic of the calls.
TOPIC = 'nova-lxd'

#: Seconds that the end of nova-compute waits for calls under way. A source
#: whose call is lost keeps the server.
_STOP_TIMEOUT = 10

#: Version of the calls. A peer serves what is of the same major version, and
#: of its own or an older minor version.
#:
#: * 1.0: ``can_take``, ``pull_instance``, ``pull_volume``, ``complete``,
#:   ``discard``.
VERSION = '1.0'


class Receiver(Protocol):
    """What a host does for another one that sends it an instance."""

    def can_take(self, context: nova_context.RequestContext,
                 instance: objects.Instance, flavor: objects.Flavor,
                 migration_id: int, offer: Mapping[str, Any]
                 ) -> dict[str, Any]:
        """Check whether an instance can come to this host."""

    def pull_instance(self, context: nova_context.RequestContext,
                      instance: objects.Instance, flavor: objects.Flavor,
                      migration_id: int, wanted: Mapping[str, Any]) -> None:
        """Pull the root disk, or create the placeholder instance."""

    def pull_volume(self, context: nova_context.RequestContext,
                    instance: objects.Instance, migration_id: int,
                    wanted: Mapping[str, Any]) -> None:
        """Pull an ephemeral disk or the config drive."""

    def complete(self, context: nova_context.RequestContext,
                 instance: objects.Instance, migration_id: int,
                 volumes: list[str]) -> None:
        """Mark the instance as complete."""

    def discard(self, context: nova_context.RequestContext,
                instance: objects.Instance, migration_id: int) -> None:
        """Delete what has been transferred of an instance."""


class _Endpoint:
    """What other hosts can call."""

    target = messaging.Target(version=VERSION)

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver

    def can_take(self, context, instance, flavor, migration_id, offer):
        return self._receiver.can_take(context, instance, flavor,
                                       migration_id, offer)

    def pull_instance(self, context, instance, flavor, migration_id, wanted):
        self._receiver.pull_instance(context, instance, flavor, migration_id,
                                     wanted)

    def pull_volume(self, context, instance, migration_id, wanted):
        self._receiver.pull_volume(context, instance, migration_id, wanted)

    def complete(self, context, instance, migration_id, volumes):
        self._receiver.complete(context, instance, migration_id, volumes)

    def discard(self, context, instance, migration_id):
        self._receiver.discard(context, instance, migration_id)


class PeerServer:
    """Serves the calls of other hosts.

    :param receiver: does what they ask for.
    """

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver
        self._server: Any = None

    def start(self, host: str) -> None:
        """Begin to serve.

        :param host: name of this compute host.
        """
        self._server = rpc.get_server(
            messaging.Target(topic=TOPIC, server=host),
            [_Endpoint(self._receiver)],
            objects_base.NovaObjectSerializer())
        self._server.start()
        LOG.info('Accepting instances from other hosts (topic %(topic)s, '
                 'version %(version)s)', {'topic': TOPIC, 'version': VERSION})

    def stop(self) -> None:
        """Serve no new calls, and wait a moment for those under way, which
        may last for long. Idempotent."""
        server, self._server = self._server, None
        if server is not None:
            server.stop()
            waiting = threading.Thread(target=server.wait, daemon=True)
            waiting.start()
            waiting.join(_STOP_TIMEOUT)


class PeerClient:
    """Calls the drivers of other hosts."""

    def __init__(self) -> None:
        self._client: Any = None

    def can_take(self, context: nova_context.RequestContext, host: str,
                 instance: objects.Instance, flavor: objects.Flavor,
                 migration_id: int, offer: Mapping[str, Any]
                 ) -> dict[str, Any]:
        """Ask a host whether an instance can come there.

        :param host: name of the compute host.
        :param flavor: the flavor that the instance is to have.
        :param migration_id: ID of Nova's record of the migration.
        :param offer: see :meth:`.incoming.IncomingOps.can_take`.
        :returns: the host's answer, see the same method.
        :raises nova.exception.MigrationError: with the reason, if it cannot.
        """
        return self._call(context, host, 'can_take', None, instance=instance,
                          flavor=flavor, migration_id=migration_id,
                          offer=offer)

    def pull_instance(self, context: nova_context.RequestContext, host: str,
                      instance: objects.Instance, flavor: objects.Flavor,
                      migration_id: int, wanted: Mapping[str, Any],
                      timeout: int) -> None:
        """Have a host pull the root disk of an instance, or create the
        placeholder of one that boots from a volume.

        :param wanted: see :meth:`.incoming.IncomingOps.pull_instance`.
        :param timeout: seconds that it may take.
        :raises nova.exception.MigrationError: if it fails.
        """
        self._call(context, host, 'pull_instance', timeout, instance=instance,
                   flavor=flavor, migration_id=migration_id, wanted=wanted)

    def pull_volume(self, context: nova_context.RequestContext, host: str,
                    instance: objects.Instance, migration_id: int,
                    wanted: Mapping[str, Any], timeout: int) -> None:
        """Have a host pull an ephemeral disk or the config drive.

        :param wanted: see :meth:`.incoming.IncomingOps.pull_volume`.
        :param timeout: seconds that it may take.
        :raises nova.exception.MigrationError: if it fails.
        """
        self._call(context, host, 'pull_volume', timeout, instance=instance,
                   migration_id=migration_id, wanted=wanted)

    def complete(self, context: nova_context.RequestContext, host: str,
                 instance: objects.Instance, migration_id: int,
                 volumes: list[str]) -> None:
        """Report to a host that everything has been transferred.

        :param volumes: names of the custom volumes that it must have.
        :raises nova.exception.MigrationError: if something is missing.
        """
        self._call(context, host, 'complete', None, instance=instance,
                   migration_id=migration_id, volumes=volumes)

    def discard(self, context: nova_context.RequestContext, host: str,
                instance: objects.Instance, migration_id: int) -> None:
        """Have a host delete what it has of an instance, without waiting.

        If the call does not reach the host, it deletes the leftovers later.
        """
        try:
            self._prepared(host).cast(
                context, 'discard', instance=instance,
                migration_id=migration_id)
        except messaging.MessagingException as exc:
            LOG.warning('Could not tell host %(host)s to discard the '
                        'instance: %(error)s', {'host': host, 'error': exc},
                        instance=instance)

    def _prepared(self, host: str, timeout: int | None = None) -> Any:
        if self._client is None:
            self._client = rpc.get_client(
                messaging.Target(topic=TOPIC, version=VERSION),
                serializer=objects_base.NovaObjectSerializer())
        if timeout is None:
            return self._client.prepare(server=host)
        # The peer sends heartbeats meanwhile, so that a dead one is noticed
        # long before the timeout.
        return self._client.prepare(
            server=host, timeout=timeout,
            call_monitor_timeout=CONF.rpc_response_timeout)

    def _call(self, context: nova_context.RequestContext, host: str,
              method: str, timeout: int | None, **arguments: Any) -> Any:
        instance = arguments['instance']
        try:
            return self._prepared(host, timeout).call(context, method,
                                                      **arguments)
        except exception.MigrationError:
            raise
        except messaging.MessagingTimeout as exc:
            raise exception.MigrationError(reason=(
                f'the LXD driver on host {host} does not answer; [lxd] '
                f'migration_address has to be set there')) from exc
        except (messaging.MessagingException, exception.NovaException
                ) as exc:
            LOG.error('Call %(method)s failed on host %(host)s: %(error)s',
                      {'method': method, 'host': host, 'error': exc},
                      instance=instance)
            if _is_other_version(exc):
                reason = (f'the LXD driver on host {host} is of another '
                          f'version')
            else:
                reason = (f'it failed on host {host}; the log there has the '
                          f'reason')
            raise exception.MigrationError(reason=reason) from exc


def _is_other_version(exc: Exception) -> bool:
    return (isinstance(exc, (messaging.UnsupportedVersion,
                             messaging.NoSuchMethod,
                             messaging.RPCVersionCapError)) or
            getattr(exc, 'exc_type', '') in ('UnsupportedVersion',
                                             'NoSuchMethod'))
