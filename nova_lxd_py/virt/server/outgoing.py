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

"""Sending the disks of a server to another host, from the source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
import contextlib
import dataclasses
import functools
import threading
import time
from typing import Any

from nova import context as nova_context
from nova import exception
from nova import objects
from oslo_log import log as logging

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import migration
from nova_lxd_py.virt.lxd import operations
from nova_lxd_py.virt.lxd import session as lxd
from nova_lxd_py.virt import peer
from nova_lxd_py.virt.server import local_disks
from nova_lxd_py.virt.storage import root_disk

LOG = logging.getLogger(__name__)

#: Seconds within which a failed transfer is begun once more: LXD waits only
#: ten for the other side, which may be busy.
_QUICK_FAILURE = 60.0

#: Seconds between looks at a transfer, and between log lines about it.
_POLL, _REPORT_INTERVAL = 5.0, 30.0

#: Seconds between questions whether a busy destination has a slot.
_TURN_POLL = 5.0

#: Keys of a custom volume that any pool driver has.
_COMMON_KEYS = ('size', 'user.')


class _Stalled(exception.MigrationError):
    """A transfer makes no progress."""


@dataclasses.dataclass(frozen=True)
class Shipment:
    """An instance that goes to another host.

    :ivar host: name of the destination compute host.
    :ivar flavor: the flavor that the instance is to have there.
    :ivar migration_id: ID of Nova's record of the migration.
    :ivar architecture: LXD's name of the architecture of its LXD instance.
    :ivar volumes: LXD's descriptions of its custom volumes.
    :ivar size: bytes of its disks, as far as the storage pool counts them.
    """

    context: nova_context.RequestContext
    instance: objects.Instance
    guest: lxd_guest.Guest
    host: str
    flavor: objects.Flavor
    migration_id: int
    architecture: str
    volumes: list[Mapping[str, Any]]
    size: int


class OutgoingOps:
    """Has other hosts pull servers from here.

    :param session: the LXD session.
    :param peers: calls the drivers of other hosts.
    """

    def __init__(self, session: lxd.Session, peers: peer.PeerClient) -> None:
        self._session = session
        self._options = session.options
        self._peers = peers
        self._slots = threading.BoundedSemaphore(
            self._options.max_concurrent_migrations)

    def prepare(self, context: nova_context.RequestContext,
                instance: objects.Instance, guest: lxd_guest.Guest,
                record: objects.Migration, flavor: objects.Flavor) -> Shipment:
        """Describe what goes to another host.

        :param guest: its LXD instance, freshly read.
        :param record: Nova's record of the migration.
        :param flavor: the new flavor.
        :raises nova.exception.MigrationError: if this host sends nothing.
        :raises errors.LXDError: if a request fails.
        """
        if not self._options.migration_address:
            raise exception.MigrationError(reason=(
                'servers cannot leave this host, since [lxd] '
                'migration_address is not set on it'))
        volumes = [volume for volume in self._session.get(
            'storage-pools', self._options.storage_pool, 'volumes', 'custom',
            params={'recursion': 1}) if local_disks.is_of(volume, instance)]
        return Shipment(
            context, instance, guest, record.dest_compute, flavor, record.id,
            self._session.get('instances', guest.name)['architecture'],
            volumes, self._size(guest, volumes))

    @contextlib.contextmanager
    def turn(self, shipment: Shipment) -> Iterator[bool]:
        """Ask the destination whether the instance can come, and wait until
        both hosts have a slot for it, which it has during a block.

        :returns: whether a second copy sends only what has changed.
        :raises nova.exception.MigrationError: with the reason, if it cannot.
        :raises errors.LXDError: if a request fails.
        """
        # A refusal must not wait.
        self._ask(shipment, begin=False)
        if not self._slots.acquire(blocking=False):
            LOG.info('Waiting to go to host %s: this host sends as many '
                     'servers as it may ([lxd] max_concurrent_migrations)',
                     shipment.host, instance=shipment.instance)
            self._slots.acquire()
        try:
            waiting = False
            while (answer := self._ask(shipment, begin=True)).get('busy'):
                if not waiting:
                    LOG.info('Waiting to go to host %s: it takes in as many '
                             'servers as it may ([lxd] '
                             'max_concurrent_migrations)', shipment.host,
                             instance=shipment.instance)
                waiting = True
                time.sleep(_TURN_POLL)
            yield self._is_incremental(shipment, answer)
        finally:
            self._slots.release()

    def _ask(self, shipment: Shipment, begin: bool) -> dict[str, Any]:
        environment = self._session.server['environment']
        return self._peers.can_take(
            shipment.context, shipment.host, shipment.instance,
            shipment.flavor, shipment.migration_id, {
                'server': environment['server'],
                'architecture': shipment.architecture,
                'size': shipment.size, 'begin': begin})

    def _is_incremental(self, shipment: Shipment, answer: Mapping[str, Any]
                        ) -> bool:
        driver = self._session.storage_pool(
            shipment.guest.devices[root_disk.DEVICE]['pool'])['driver']
        return migration.is_incremental(driver, answer['pool_driver'])

    def copy(self, shipment: Shipment, refresh: bool) -> None:
        """Have the destination pull everything.

        :param refresh: whether it has a copy that only has to be brought up
            to date.
        :raises nova.exception.MigrationError: if that fails.
        :raises errors.LXDError: if a request to LXD on this host fails.
        """
        self._repeated(shipment, functools.partial(
            self._copy_root, shipment, refresh))
        for volume in shipment.volumes:
            self._repeated(shipment, functools.partial(
                self._copy_volume, shipment, volume, refresh))

    def complete(self, shipment: Shipment) -> None:
        """Tell the destination that it has everything.

        :raises nova.exception.MigrationError: if it has not.
        """
        self._peers.complete(
            shipment.context, shipment.host, shipment.instance,
            shipment.migration_id,
            [volume['name'] for volume in shipment.volumes])

    def discard(self, context: nova_context.RequestContext,
                instance: objects.Instance, host: str, migration_id: int
                ) -> None:
        """Have a host delete what has come there, without waiting."""
        if self._options.migration_address:
            self._peers.discard(context, host, instance, migration_id)

    # -- steps --------------------------------------------------------------

    @staticmethod
    def _repeated(shipment: Shipment, step: Callable[[], None]) -> None:
        began = time.monotonic()
        try:
            step()
        except _Stalled:
            # The destination may still be at it.
            raise
        except exception.MigrationError as exc:
            if time.monotonic() - began > _QUICK_FAILURE:
                raise
            LOG.info('Repeating a transfer that has failed: %s',
                     exc.format_message(), instance=shipment.instance)
            step()

    def _copy_root(self, shipment: Shipment, refresh: bool) -> None:
        guest = shipment.guest
        volume = lxd_guest.root_volume(guest)
        wanted = {
            'source': None, 'refresh': refresh, 'root_volume': volume,
            'architecture': shipment.architecture,
            'root_size': guest.devices[root_disk.DEVICE].get('size', '')}
        if volume is not None:
            if not refresh:
                self._pull_instance(shipment, wanted)
            return
        offer = migration.offer_instance(
            self._session, guest.name, self._options.migration_address)
        self._watch(shipment, 'the root disk', offer.operation,
                    functools.partial(
                        self._pull_instance, shipment,
                        {**wanted, 'source': offer.source}))

    def _pull_instance(self, shipment: Shipment, wanted: Mapping[str, Any]
                       ) -> None:
        self._peers.pull_instance(
            shipment.context, shipment.host, shipment.instance,
            shipment.flavor, shipment.migration_id, wanted, self._timeout())

    def _copy_volume(self, shipment: Shipment, volume: Mapping[str, Any],
                     refresh: bool) -> None:
        offer = migration.offer_volume(
            self._session, self._options.storage_pool, volume['name'],
            self._options.migration_address)
        self._watch(shipment, volume['name'], offer.operation,
                    functools.partial(
                        self._peers.pull_volume, shipment.context,
                        shipment.host, shipment.instance,
                        shipment.migration_id, {
                            'name': volume['name'], 'source': offer.source,
                            'refresh': refresh,
                            'config': {key: value for key, value
                                       in volume['config'].items()
                                       if key.startswith(_COMMON_KEYS)}},
                        self._timeout()))

    def _watch(self, shipment: Shipment, what: str,
               operation: operations.Operation, pull: Callable[[], None]
               ) -> None:
        """Wait for a call that makes the destination pull something.

        :param what: what it pulls, for the log.
        :param operation: the operation on this host.
        :raises nova.exception.MigrationError: if it fails or stalls, or LXD
            on this host ends meanwhile. If it stalls the call goes on, since
            LXD cannot cancel it.
        """
        outcome: futures.Future[None] = futures.Future()
        process = self._lxd_process()

        def run() -> None:
            try:
                pull()
                outcome.set_result(None)
            except BaseException as exc:
                outcome.set_exception(exc)

        threading.Thread(
            target=run, daemon=True,
            name=f'lxd-migration-{shipment.instance.uuid}').start()
        progress = _Progress(shipment, what, operation,
                             self._options.migration_progress_timeout)
        while not futures.wait([outcome], _POLL).done:
            progress.check()
        outcome.result()
        # The destination's LXD takes a stream that ends early for the whole.
        if self._lxd_process() != process:
            raise exception.MigrationError(
                reason=f'LXD restarted during the transfer of {what}')

    def _lxd_process(self) -> Any:
        return self._session.get().get('environment', {}).get('server_pid')

    def _timeout(self) -> int:
        # The peer gives up first, and says why.
        return self._options.migration_timeout + 60

    def _size(self, guest: lxd_guest.Guest,
              volumes: list[Mapping[str, Any]]) -> int:
        """Return how many bytes there are to copy, as far as the pool counts.
        """
        total = 0
        if not lxd_guest.root_volume(guest):
            disks = guest.state().get('disk') or {}
            total += (disks.get(root_disk.DEVICE) or {}).get('usage', 0)
        for volume in volumes:
            # A dir pool does not count.
            with contextlib.suppress(errors.OperationFailed):
                state = self._session.get(
                    'storage-pools', self._options.storage_pool, 'volumes',
                    'custom', volume['name'], 'state')
                total += (state.get('usage') or {}).get('used', 0)
        return total


class _Progress:
    """Shows how far a transfer is, in the API and in the log, and notices one
    that makes no progress.

    :param what: what is sent, for the log.
    :param operation: the operation of the source.
    :param timeout: seconds without progress after which to give up.
    """

    def __init__(self, shipment: Shipment, what: str,
                 operation: operations.Operation, timeout: float) -> None:
        self._shipment = shipment
        self._what = what
        self._operation = operation
        self._timeout = timeout
        self._reported = self._since = time.monotonic()
        self._text = ''

    def check(self) -> None:
        """Look at the transfer.

        :raises nova.exception.MigrationError: if it has stalled.
        """
        try:
            running = self._operation.is_running()
        except errors.LXDError as exc:
            LOG.debug('No progress from LXD: %s', exc,
                      instance=self._shipment.instance)
            running, count, text = True, 0, self._text
        else:
            count, text = migration.sent(self._operation)
        # When all has been sent, the destination still has to finish.
        if not running or text != self._text:
            self._text, self._since = text, time.monotonic()
            self._report(count)
        elif time.monotonic() - self._since >= self._timeout:
            raise _Stalled(reason=(
                f'the transfer of {self._what} made no progress for '
                f'{self._timeout:.0f} seconds'))

    def _report(self, count: int) -> None:
        instance = self._shipment.instance
        if self._shipment.size:
            try:
                instance.progress = min(99, 100 * count // self._shipment.size)
                instance.save()
            except Exception as exc:
                # Nothing depends on the number in Nova's database.
                LOG.debug('Could not save the progress: %s', exc,
                          instance=instance)
        if self._text and (time.monotonic() - self._reported >=
                           _REPORT_INTERVAL):
            self._reported = time.monotonic()
            LOG.info('Sending %(what)s to host %(host)s: %(progress)s',
                     {'what': self._what, 'host': self._shipment.host,
                      'progress': self._text}, instance=instance)
