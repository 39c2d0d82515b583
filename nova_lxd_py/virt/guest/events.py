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

"""A cache of the power states of all servers, kept current by LXD's events.

One websocket brings the events; one request fills the cache after each
(re)connect. Nova's periodic queries are answered from memory, so the load on
LXD at rest does not depend on the number of servers.

An event never sets a state, it only marks the cached one as outdated: the next
query reads the instance once. So a late event does no harm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import json
import threading
from typing import Any
from urllib import parse

from nova.compute import power_state
from nova.virt import event as virt_event
from oslo_log import log as logging
import websocket

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.guest import roles
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import session as lxd
from nova_lxd_py.virt.lxd import websockets

LOG = logging.getLogger(__name__)

#: Seconds of silence after which a ping is sent.
QUIET = 30
#: Seconds between attempts to reach LXD again: first and longest.
RECONNECT_FIRST, RECONNECT_LONGEST = 0.5, 15.0

#: LXD's lifecycle events by Nova's transitions.
TRANSITIONS = {
    'instance-started': virt_event.EVENT_LIFECYCLE_STARTED,
    'instance-restarted': virt_event.EVENT_LIFECYCLE_STARTED,
    'instance-stopped': virt_event.EVENT_LIFECYCLE_STOPPED,
    'instance-shutdown': virt_event.EVENT_LIFECYCLE_STOPPED,
    'instance-paused': virt_event.EVENT_LIFECYCLE_PAUSED,
    'instance-resumed': virt_event.EVENT_LIFECYCLE_RESUMED,
}

_BY_STATE = {
    power_state.RUNNING: virt_event.EVENT_LIFECYCLE_STARTED,
    power_state.SHUTDOWN: virt_event.EVENT_LIFECYCLE_STOPPED,
    power_state.PAUSED: virt_event.EVENT_LIFECYCLE_PAUSED,
}

Emit = Callable[[virt_event.LifecycleEvent], None]


@dataclasses.dataclass
class _Known:
    """Cached state of one LXD instance."""

    uuid: str
    role: str
    state: int
    rescued: bool
    fresh: bool = True


class EventWatcher:
    """Follows LXD's lifecycle events and caches power states.

    :param session: the LXD session.
    :param guests: the driver's instances.
    :param emit: called with Nova lifecycle events of servers.
    :param shutdown_delay: seconds for which a server must stay down before
        its stop is reported, since a guest that reboots stops for a moment.
    """

    def __init__(self, session: lxd.Session, guests: registry.GuestRegistry,
                 emit: Emit, shutdown_delay: float) -> None:
        self._session = session
        self._guests = guests
        self._emit = emit
        self._shutdown_delay = shutdown_delay
        self._lock = threading.Lock()
        self._known: dict[str, _Known] = {}
        #: Changes per name, to notice one that comes while LXD is asked; of
        #: instances that are not known only as long as that takes.
        self._changes: dict[str, int] = {}
        self._questions = 0
        self._connected = False
        self._stopping = threading.Event()
        self._channel: websocket.WebSocket | None = None
        self._thread: threading.Thread | None = None
        self._delayed: dict[str, threading.Timer] = {}
        #: Guests that LXD is about to start again.
        self._rebooting: set[str] = set()
        guests.on_change(self.forget)
        #: Called in a thread of its own when LXD has been reached again, after
        #: a lost connection or a failed attempt.
        self.on_reconnect: Callable[[], None] | None = None
        #: Called with the UUID of a server whose guest has begun to reboot
        #: and was not started; returns whether it runs now.
        self.on_failed_reboot: Callable[[str], bool] | None = None
        #: Called in a thread of its own with name and UUID of an instance that
        #: LXD has restarted, also at the request of its guest.
        self.on_restart: Callable[[str, str], None] | None = None

    # -- life of the listener -----------------------------------------------

    def start(self) -> None:
        """Start to listen, in a daemon thread of its own."""
        self._stopping.clear()
        self._thread = threading.Thread(
            target=self._listen, name='lxd-events', daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop listening; may be called again."""
        self._stopping.set()
        with self._lock:
            timers, self._delayed = list(self._delayed.values()), {}
        for timer in timers:
            timer.cancel()
        channel = self._channel
        if channel is not None:
            websockets.shutdown(channel)
        if self._thread is not None:
            self._thread.join(timeout=5)
            self._thread = None

    def _listen(self) -> None:
        pause = RECONNECT_FIRST
        was_interrupted = False
        while not self._stopping.is_set():
            try:
                self._channel = self._connect()
                try:
                    self._wait_for_listener(self._channel)
                    # Events from here on are queued, so nothing is missed.
                    self._seed()
                    if was_interrupted and self.on_reconnect is not None:
                        threading.Thread(target=self.on_reconnect,
                                         name='lxd-reconnect',
                                         daemon=True).start()
                    pause = RECONNECT_FIRST
                    self._read(self._channel)
                finally:
                    websockets.shutdown(self._channel)
                    # No other thread reads it.
                    self._channel.shutdown()
            except (errors.LXDError, websocket.WebSocketException,
                    OSError, ValueError) as exc:
                if self._connected and not self._stopping.is_set():
                    LOG.warning('Lost the event stream of LXD, reconnecting: '
                                '%s', exc)
            except Exception:
                LOG.exception('Unexpected error in the event stream of LXD, '
                              'connecting again')
            finally:
                self._connected = False
                was_interrupted = True
            self._stopping.wait(pause)
            pause = min(pause * 2, RECONNECT_LONGEST)

    def _connect(self) -> websocket.WebSocket:
        try:
            # Only LXD's log tells a reboot by a guest from a shutdown.
            return self._session.websocket(
                'events', params={'type': 'lifecycle,logging'}, timeout=QUIET)
        except errors.PermissionDenied:
            LOG.debug('LXD does not show its log to nova-compute')
            return self._session.websocket(
                'events', params={'type': 'lifecycle'}, timeout=QUIET)

    def _wait_for_listener(self, channel: websocket.WebSocket) -> None:
        """Wait until LXD sends events: it adds the listener after it has
        accepted the connection, and answers a ping after that.

        Events that come before the answer are in the states read afterwards.
        """
        channel.ping()
        # stop() shuts down only a channel that it has seen.
        while not self._stopping.is_set():
            opcode, _data = channel.recv_data(control_frame=True)
            if opcode == websocket.ABNF.OPCODE_PONG:
                return
            if opcode == websocket.ABNF.OPCODE_CLOSE:
                raise websocket.WebSocketConnectionClosedException(
                    'LXD closed the event stream')

    def _read(self, channel: websocket.WebSocket) -> None:
        asked = False
        while not self._stopping.is_set():
            try:
                # Pings and pongs count: they show that LXD is there.
                opcode, data = channel.recv_data(control_frame=True)
            except websocket.WebSocketTimeoutException:
                if asked:
                    raise
                channel.ping()
                asked = True
                continue
            asked = False
            if opcode == websocket.ABNF.OPCODE_CLOSE:
                raise websocket.WebSocketConnectionClosedException(
                    'LXD closed the event stream')
            # LXD logs much that is of no interest here.
            if opcode == websocket.ABNF.OPCODE_TEXT and (
                    b'"lifecycle"' in data or b'"action"' in data):
                self._handle(json.loads(data))

    def _seed(self) -> None:
        """Read all states, and report changes since the last connection."""
        guests = self._guests.all()
        with self._lock:
            before = self._known
            self._known = {
                guest.name: _Known(guest.uuid, guest.role, guest.power_state,
                                   guest.is_rescued) for guest in guests}
            self._connected = True
            now = dict(self._known)
        LOG.debug('Following the events of %d LXD instances', len(now))
        for name, known in now.items():
            old = before.get(name)
            # An outdated state is not what Nova knows: that of a server
            # that nobody has asked for is still the one at its creation.
            if (old is not None and known.state in _BY_STATE and
                    (old.state != known.state or not old.fresh)):
                self._report(name, known, _BY_STATE[known.state])

    # -- events -------------------------------------------------------------

    def _handle(self, event: dict[str, Any]) -> None:
        metadata = event.get('metadata') or {}
        if event.get('type') == 'logging':
            self._note_reboot(metadata.get('context') or {})
            return
        action = metadata.get('action', '')
        name = _instance_name(metadata.get('source', ''))
        if name is None or not action.startswith('instance-'):
            return
        with self._asking():
            self._handle_change(action, name)

    def _note_reboot(self, logged: dict[str, Any]) -> None:
        """Note from LXD's log why a guest stops."""
        if logged.get('project') != self._session.project:
            return
        name, action = logged.get('instance', ''), logged.get('action')
        if action == 'reboot':
            self._rebooting.add(name)
        elif action == 'stop':
            self._rebooting.discard(name)

    def _handle_change(self, action: str, name: str) -> None:
        with self._lock:
            known = self._known.get(name)
            self._outdate(name)
            if action == 'instance-deleted':
                self._known.pop(name, None)
                self._rebooting.discard(name)
                timer = self._delayed.pop(name, None)
                if timer is not None:
                    timer.cancel()
                return
            changes = self._changes[name]
        if known is None:
            # Created or renamed just now: look up once whose it is. LXD sends
            # the event also for an instance that it then fails to create, and
            # none for its deletion: it counts only when it is requested.
            with contextlib.suppress(errors.NotFound):
                self._remember(self._new_guest(name), changes, fresh=False)
            return
        if action == 'instance-restarted' and self.on_restart is not None:
            threading.Thread(target=self.on_restart, args=(name, known.uuid),
                             name='lxd-restart', daemon=True).start()
        transition = TRANSITIONS.get(action)
        if transition is not None:
            self._report(name, known, transition)

    def _new_guest(self, name: str) -> lxd_guest.Guest:
        """Return an instance that was not known; LXD need not be asked for one
        that the driver itself is creating."""
        config = self._guests.pending.expect(name)
        if config is None:
            return self._guests.by_name(name)
        return lxd_guest.Guest(self._session, {
            'name': name, 'config': config, 'devices': {},
            'status': 'Stopped'})

    def _report(self, name: str, known: _Known, transition: int) -> None:
        if transition == virt_event.EVENT_LIFECYCLE_STARTED:
            self._rebooting.discard(name)
        if known.role not in (roles.SERVER, roles.RESCUE):
            return
        with self._lock:
            timer = self._delayed.pop(name, None)
            if timer is not None:
                timer.cancel()
            if transition == virt_event.EVENT_LIFECYCLE_STOPPED:
                timer = threading.Timer(self._shutdown_delay,
                                        self._report_stop, (name, known))
                timer.daemon = True
                self._delayed[name] = timer
                timer.start()
                return
        self._emit(virt_event.LifecycleEvent(known.uuid, transition))

    def _report_stop(self, name: str, known: _Known) -> None:
        with self._lock:
            self._delayed.pop(name, None)
        if self._stopping.is_set():
            return
        try:
            info = self._session.get('instances', name)
        except errors.LXDError as exc:
            LOG.debug('Not reporting the stop of %s: %s', name, exc,
                      instance_uuid=known.uuid)
            return
        if info['status'] != 'Stopped':
            return
        reboots = name in self._rebooting
        self._rebooting.discard(name)
        if not (reboots and self.on_failed_reboot is not None and
                self.on_failed_reboot(known.uuid)):
            self._emit(virt_event.LifecycleEvent(
                known.uuid, virt_event.EVENT_LIFECYCLE_STOPPED))

    # -- queries ------------------------------------------------------------

    def power_state(self, instance: Any, use_cache: bool = True) -> int:
        """Return the power state of an instance.

        :param instance: the :class:`nova.objects.Instance`.
        :param use_cache: whether the cache may be used; otherwise, and if the
            cached state is outdated, LXD is asked.
        :returns: a constant of :mod:`nova.compute.power_state`.
        :raises errors.InstanceNotFound: if LXD does not have it.
        :raises errors.Unreachable: if LXD does not answer.
        """
        if use_cache:
            with self._lock:
                known = self._current(instance)
            if known is not None:
                return known.state
        own = self._ask(instance, roles.SERVER)
        if own.is_rescued:
            with contextlib.suppress(errors.NotFound):
                return self._ask(instance, roles.RESCUE).power_state
        return own.power_state

    def _current(self, instance: Any) -> _Known | None:
        """Return the cached state if it is current; the lock is held."""
        if not self._connected:
            return None
        known = self._known.get(roles.lxd_name(instance))
        if known is not None and known.fresh and known.rescued:
            known = self._known.get(roles.lxd_name(instance, roles.RESCUE))
        if known is None or not known.fresh or known.uuid != instance.uuid:
            return None
        return known

    def _ask(self, instance: Any, role: str) -> lxd_guest.Guest:
        name = roles.lxd_name(instance, role)
        with self._asking():
            with self._lock:
                changes = self._changes.get(name, 0)
            try:
                guest = self._guests.get(instance, role)
            except errors.NotFound:
                with self._lock:
                    self._known.pop(name, None)
                raise
            self._remember(guest, changes)
        return guest

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """Count changes while LXD is asked, also those of new instances."""
        with self._lock:
            self._questions += 1
        try:
            yield
        finally:
            with self._lock:
                self._questions -= 1
                if not self._questions:
                    for name in self._changes.keys() - self._known.keys():
                        del self._changes[name]

    def _outdate(self, name: str) -> None:
        """Note a change of an instance; the lock is held."""
        if name in self._known:
            self._known[name].fresh = False
        elif not self._questions:
            return
        self._changes[name] = self._changes.get(name, 0) + 1

    def _remember(self, guest: lxd_guest.Guest, changes: int,
                  fresh: bool = True) -> None:
        """Cache LXD's answer, unless an event came after the request."""
        if not guest.is_ours:
            return
        with self._lock:
            if self._changes.get(guest.name, 0) == changes:
                self._known[guest.name] = _Known(
                    guest.uuid, guest.role, guest.power_state,
                    guest.is_rescued, fresh)

    def forget(self, instance: Any) -> None:
        """Drop the cached power state of an instance, after changing it.

        :param instance: the :class:`nova.objects.Instance`.
        """
        with self._lock:
            for role in (roles.SERVER, roles.RESCUE):
                self._outdate(roles.lxd_name(instance, role))

    def server_count(self) -> int:
        """Count the servers, from the cache if all of it is current.

        :raises errors.LXDError: if LXD has to be asked and does not answer.
        """
        with self._lock:
            if self._connected and all(known.fresh for known
                                       in self._known.values()):
                return sum(known.role == roles.SERVER
                           for known in self._known.values())
        with self._asking():
            with self._lock:
                changes = dict(self._changes)
            guests = self._guests.all()
            for guest in guests:
                self._remember(guest, changes.get(guest.name, 0))
            present = {guest.name for guest in guests}
            with self._lock:
                for name in set(self._known) - present:
                    if self._changes.get(name, 0) == changes.get(name, 0):
                        del self._known[name]
        return sum(guest.role == roles.SERVER for guest in guests)


def _instance_name(source: str) -> str | None:
    """Parse the instance's name from an event's source.

    :param source: such as ``/1.0/instances/NAME?project=nova``.
    :returns: the name, or None where the event is about something else.
    """
    parts = parse.urlparse(source).path.strip('/').split('/')
    if len(parts) == 3 and parts[1] in ('instances', 'containers'):
        return parse.unquote(parts[2])
    return None
