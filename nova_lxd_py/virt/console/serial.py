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

"""TCP ports on which nova-serialproxy reaches the serial consoles.

An instance gets a TCP port on ``[serial_console] proxyclient_address`` when
its console is first requested. Anyone who can connect to that port gets a
login prompt of the guest, so it is bound to that address only. What happens on
a connection is described in :mod:`nova_lxd_py.virt.console.serial_session`.

An instance keeps its port as long as it is on this host, also when
nova-compute restarts: console tokens name the port, and it must not lead to
another instance while they are valid.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import errno
import shlex
import socket
import threading

from nova.compute import power_state
from nova import conf as nova_conf
from nova.console import serial as nova_serial
from nova.console import type as console_type
from nova import exception
from nova import objects
from oslo_concurrency import lockutils
from oslo_log import log as logging

from nova_lxd_py.virt.console import serial_session
from nova_lxd_py.virt.guest import events
from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import session as lxd

CONF = nova_conf.CONF
LOG = logging.getLogger(__name__)

TYPE = 'serial'

#: Backlog of each listening socket.
BACKLOG = 4
#: Maximum number of connections to one instance. Each runs a process in the
#: guest.
MAX_SESSIONS = 8
#: Ports to try before giving up.
PORT_ATTEMPTS = 5
#: Seconds to wait after accept() has failed.
ACCEPT_RETRY_DELAY = 1.0


class SerialConsoleManager:
    """Opens the serial consoles of instances and keeps track of their ports.

    :param session: LXD session.
    :param guests: registry of the driver's LXD instances.
    :param watcher: knows the power state of each instance.
    """

    def __init__(self, session: lxd.Session,
                 guests: registry.GuestRegistry,
                 watcher: events.EventWatcher) -> None:
        self._session = session
        self._options = session.options
        self._guests = guests
        self._watcher = watcher
        self._lock = threading.Lock()
        #: Ports by instance uuid.
        self._ports: dict[str, int] = {}
        self._listeners: dict[str, _Listener] = {}

    def recover(self) -> None:
        """Reserve the ports that were assigned before nova-compute started.

        A failure is logged and does not keep nova-compute from starting.
        """
        if not CONF.serial_console.enabled:
            return
        try:
            for guest in self._guests.servers():
                port = _port_of(guest)
                if port is not None:
                    self._reserve(guest.uuid, port)
        except errors.LXDError as exc:
            LOG.warning('Could not read the ports of serial consoles from '
                        'LXD: %s', exc)

    def connect(self, instance: objects.Instance
                ) -> console_type.ConsoleSerial:
        """Open the serial console of an instance and return its address.

        See :meth:`nova.virt.driver.ComputeDriver.get_serial_console`. Nova
        calls it again for every connection, to check the console token.

        :param instance: the instance.
        :returns: address and port; they stay the same as long as the instance
            is on this host.
        :raises nova.exception.ConsoleTypeUnavailable: if serial consoles are
            disabled, or the instance is not running.
        :raises nova.exception.SocketPortRangeExhaustedException: if no port
            of ``[serial_console] port_range`` is free.
        :raises errors.NotFound: if LXD does not have the instance.
        """
        if not CONF.serial_console.enabled:
            raise exception.ConsoleTypeUnavailable(console_type=TYPE)
        if self._watcher.power_state(instance) == power_state.SHUTDOWN:
            LOG.debug('Serial console is not available: the instance is not '
                      'running', instance=instance)
            raise exception.ConsoleTypeUnavailable(console_type=TYPE)
        # Not the instance lock, which a snapshot may hold for minutes.
        with lockutils.lock(f'lxd-serial-{instance.uuid}',
                            lock_file_prefix=None):
            listener = self._listeners.get(instance.uuid)
            if listener is None or not listener.is_alive():
                listener = self._open(instance)
                with self._lock:
                    self._listeners[instance.uuid] = listener
        return console_type.ConsoleSerial(host=listener.host,
                                          port=listener.port)

    def remove(self, instance: objects.Instance) -> None:
        """Close the serial console of a deleted instance and free its port.

        :param instance: the instance; it need not have a console.
        """
        with lockutils.lock(f'lxd-serial-{instance.uuid}',
                            lock_file_prefix=None):
            with self._lock:
                listener = self._listeners.pop(instance.uuid, None)
            if listener is not None:
                listener.close('The server has been deleted.')
            self._release(instance.uuid)

    def stop(self) -> None:
        """Close all connections; instances keep their ports. Idempotent."""
        with self._lock:
            listeners, self._listeners = self._listeners, {}
        for listener in listeners.values():
            listener.close('The compute service is stopping.')

    # -- ports ---------------------------------------------------------------

    def _open(self, instance: objects.Instance) -> _Listener:
        guest = self._guests.get(instance)
        known = _port_of(guest)
        if known is not None and self._reserve(instance.uuid, known):
            try:
                return self._listen(instance, known)
            except OSError as exc:
                LOG.warning('Port %(port)d of the serial console is in use, '
                            'allocating another one: %(error)s',
                            {'port': known, 'error': exc}, instance=instance)
                self._release(instance.uuid)
        listener = self._open_new(instance)
        try:
            guest.update(config={
                lxd_guest.KEY_SERIAL_PORT: str(listener.port)})
        except errors.LXDError as exc:
            LOG.warning('Could not store the port of the serial console in '
                        'LXD, it will change when nova-compute restarts: %s',
                        exc, instance=instance)
        return listener

    def _open_new(self, instance: objects.Instance) -> _Listener:
        host = CONF.serial_console.proxyclient_address
        failed = []
        try:
            for _attempt in range(PORT_ATTEMPTS):
                port = nova_serial.acquire_port(host)
                try:
                    listener = self._listen(instance, port)
                except OSError as exc:
                    # Another process took it after Nova had probed it.
                    failed.append(port)
                    LOG.debug('Cannot listen on port %d: %s', port, exc,
                              instance=instance)
                    continue
                with self._lock:
                    self._ports[instance.uuid] = port
                return listener
            raise exception.SocketPortRangeExhaustedException(host=host)
        finally:
            for port in failed:
                nova_serial.release_port(host, port)

    def _listen(self, instance: objects.Instance, port: int) -> _Listener:
        ref = serial_session.InstanceRef(instance.uuid, instance.name)
        command = shlex.split(self._options.serial_console_command)
        return _Listener(
            CONF.serial_console.proxyclient_address, port, ref,
            lambda client: serial_session.SerialSession(
                client, ref, command, self._session, self._guests,
                self._watcher))

    def _reserve(self, uuid: str, port: int) -> bool:
        """Keep Nova from allocating a port to another instance.

        :returns: False if another instance has the port.
        """
        host = CONF.serial_console.proxyclient_address
        with self._lock:
            if self._ports.get(uuid) == port:
                return True
            if port in self._ports.values():
                return False
            self._ports[uuid] = port
        with lockutils.lock(nova_serial.SERIAL_LOCK, 'nova-'):
            nova_serial.ALLOCATED_PORTS.add((host, port))
        return True

    def _release(self, uuid: str) -> None:
        with self._lock:
            port = self._ports.pop(uuid, None)
        if port is not None:
            nova_serial.release_port(
                CONF.serial_console.proxyclient_address, port)


class _Listener:
    """Listens on the TCP port of one instance.

    :param host: address to listen on.
    :param port: TCP port.
    :param instance: the instance whose console it is.
    :param new_session: called with each accepted socket, returns the
        :class:`.serial_session.SerialSession` for it.
    :raises OSError: if the port is in use, or the address is not one of this
        host.
    """

    def __init__(self, host: str, port: int,
                 instance: serial_session.InstanceRef,
                 new_session: Callable[[socket.socket],
                                       serial_session.SerialSession]) -> None:
        self.host = host
        self.port = port
        self._instance = instance
        self._new_session = new_session
        self._closing = threading.Event()
        self._sessions: list[serial_session.SerialSession] = []
        self._socket = _listening_socket(host, port)
        self._thread = threading.Thread(target=self._accept, daemon=True,
                                        name=f'serial-{instance.name}')
        self._thread.start()

    def is_alive(self) -> bool:
        """Return whether the listener accepts connections."""
        return self._thread.is_alive() and not self._closing.is_set()

    def close(self, reason: str) -> None:
        """Stop listening and close all connections.

        :param reason: message to print on the connected terminals.
        """
        self._closing.set()
        with contextlib.suppress(OSError):
            # close() alone would not interrupt accept() in another thread.
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(serial_session.END_TIMEOUT)
        self._socket.close()
        for session in self._sessions:
            session.end(reason)
        for session in self._sessions:
            session.join()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                client, peer = self._socket.accept()
            except (OSError, EOFError) as exc:
                if (self._closing.is_set() or isinstance(exc, EOFError) or
                        exc.errno in (errno.EBADF, errno.EINVAL)):
                    break
                LOG.warning('Serial console could not accept a connection: '
                            '%s', exc, instance=self._instance)
                self._closing.wait(ACCEPT_RETRY_DELAY)
                continue
            LOG.info('Serial console opened from %s', peer[0],
                     instance=self._instance)
            self._enforce_session_limit()
            session = self._new_session(client)
            session.start()
            self._sessions.append(session)

    def _enforce_session_limit(self) -> None:
        """Close the oldest sessions if there are too many for a new one."""
        self._sessions = [session for session in self._sessions
                          if session.is_alive()]
        while len(self._sessions) >= MAX_SESSIONS:
            # The oldest, since it may be one that hangs.
            oldest = self._sessions.pop(0)
            oldest.end('There are too many connections to this console.')
            oldest.join()


def _listening_socket(host: str, port: int) -> socket.socket:
    family, kind, protocol, _name, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listening = socket.socket(family, kind, protocol)
    try:
        # Connections in TIME_WAIT must not keep the port from being reused.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError:
        listening.close()
        raise
    return listening


def _port_of(guest: lxd_guest.Guest) -> int | None:
    text = guest.config.get(lxd_guest.KEY_SERIAL_PORT, '')
    if text.isdecimal() and 0 < int(text) < 65536:
        return int(text)
    return None
