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

"""Serial consoles of servers, for nova-serialproxy.

Each server that somebody has asked a console of gets a TCP port of its own on
``[serial_console] proxyclient_address``. Whoever can reach that port can log
in to the guest, which is why it is bound to that address only. What happens on
a connection is told in :mod:`nova_lxd_py.virt.console.serial_session`.

A server keeps its port as long as it lives on this host, also when
nova-compute restarts: tokens that Nova has given out name it, and a port must
not lead to another server while they are valid.
"""

from __future__ import annotations

import contextlib
import errno
import shlex
import socket
import threading
from typing import Any

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

#: Connections that may wait to be accepted.
BACKLOG = 4
#: Connections to one server at a time: each is a program in the guest.
SESSIONS = 8
#: Ports to try before giving up.
ATTEMPTS = 5
#: Seconds to wait after an error that may pass.
PAUSE = 1.0


class SerialConsoles:
    """Keeps the ports of serial consoles.

    :param session: the way to LXD.
    :param guests: the driver's LXD instances.
    :param watcher: what is known of their power states.
    """

    def __init__(self, session: lxd.Session,
                 guests: registry.GuestRegistry,
                 watcher: events.EventWatcher) -> None:
        self._session = session
        self._options = session.options
        self._guests = guests
        self._watcher = watcher
        self._lock = threading.Lock()
        #: Ports by the uuid of their server.
        self._ports: dict[str, int] = {}
        self._listeners: dict[str, _Listener] = {}

    def recover(self) -> None:
        """Reserve the ports that servers have from earlier.

        Nothing of it keeps nova-compute from starting.
        """
        if not CONF.serial_console.enabled:
            return
        try:
            for guest in self._guests.servers():
                port = _port_of(guest)
                if port is not None:
                    self._reserve(guest.uuid, port)
        except errors.LXDError as exc:
            LOG.warning('The ports of serial consoles are not known: %s', exc)

    def connect(self, instance: objects.Instance
                ) -> console_type.ConsoleSerial:
        """Tell where the console of a server is, and serve it there.

        See :meth:`nova.virt.driver.ComputeDriver.get_serial_console`. Nova
        asks again for every connection to check its token.

        :param instance: the server.
        :returns: address and port, the same as long as the server is here.
        :raises nova.exception.ConsoleTypeUnavailable: serial consoles are
            switched off, or the server is.
        :raises nova.exception.SocketPortRangeExhaustedException: there are
            more servers than ports.
        :raises errors.NotFound: LXD does not have the server.
        """
        if not CONF.serial_console.enabled:
            raise exception.ConsoleTypeUnavailable(console_type=TYPE)
        if self._watcher.power_state(instance) == power_state.SHUTDOWN:
            LOG.debug('There is no console while the server is off',
                      instance=instance)
            raise exception.ConsoleTypeUnavailable(console_type=TYPE)
        # Not the server's lock, which a snapshot may hold for long.
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
        """End what goes on at the console of a server that is deleted, and
        free its port.

        :param instance: the server; one without console is a success.
        """
        with lockutils.lock(f'lxd-serial-{instance.uuid}',
                            lock_file_prefix=None):
            with self._lock:
                listener = self._listeners.pop(instance.uuid, None)
            if listener is not None:
                listener.close('The server is gone.')
            self._release(instance.uuid)

    def stop(self) -> None:
        """End all connections; servers keep their ports. May be called
        again."""
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
                LOG.warning('The port %(port)d of the serial console is in '
                            'use, so it gets another one: %(error)s',
                            {'port': known, 'error': exc}, instance=instance)
                self._release(instance.uuid)
        listener = self._open_new(instance)
        try:
            guest.update(config={
                lxd_guest.KEY_SERIAL_PORT: str(listener.port)})
        except errors.LXDError as exc:
            LOG.warning('The serial console will get another port when '
                        'nova-compute restarts, since LXD does not keep this '
                        'one: %s', exc, instance=instance)
        return listener

    def _open_new(self, instance: objects.Instance) -> _Listener:
        host = CONF.serial_console.proxyclient_address
        failed = []
        try:
            for _attempt in range(ATTEMPTS):
                port = nova_serial.acquire_port(host)
                try:
                    listener = self._listen(instance, port)
                except OSError as exc:
                    # Somebody took it after Nova had found it to be free.
                    failed.append(port)
                    LOG.debug('Port %d is not free after all: %s', port, exc)
                    continue
                with self._lock:
                    self._ports[instance.uuid] = port
                return listener
            raise exception.SocketPortRangeExhaustedException(host=host)
        finally:
            for port in failed:
                nova_serial.release_port(host, port)

    def _listen(self, instance: objects.Instance, port: int) -> _Listener:
        server = serial_session.Server(instance.uuid, instance.name)
        command = shlex.split(self._options.serial_console_command)
        return _Listener(
            CONF.serial_console.proxyclient_address, port, server,
            lambda client: serial_session.Session(
                client, server, command, self._session, self._guests,
                self._watcher))

    def _reserve(self, uuid: str, port: int) -> bool:
        """Keep Nova from giving a port to another server.

        :returns: whether the port is this server's.
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
    """Listens on the port of one server.

    :param host: address to listen on.
    :param port: TCP port.
    :param server: whose console it is.
    :param serve: makes a session of an accepted connection.
    :raises OSError: the port is taken, or the address is not this host's.
    """

    def __init__(self, host: str, port: int, server: serial_session.Server,
                 serve: Any) -> None:
        self.host = host
        self.port = port
        self._server = server
        self._serve = serve
        self._closing = threading.Event()
        self._sessions: list[serial_session.Session] = []
        self._socket = _listening_socket(host, port)
        self._thread = threading.Thread(target=self._accept, daemon=True,
                                        name=f'serial-{server.name}')
        self._thread.start()

    def is_alive(self) -> bool:
        """Whether it still accepts connections."""
        return self._thread.is_alive() and not self._closing.is_set()

    def close(self, reason: str) -> None:
        """Stop listening and end the connections that there are.

        :param reason: what to tell the persons at their terminals.
        """
        self._closing.set()
        with contextlib.suppress(OSError):
            # Closing alone would not wake up who waits in accept().
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
                LOG.warning('Serial console of %(server)s cannot accept a '
                            'connection: %(error)s',
                            {'server': self._server.name, 'error': exc})
                self._closing.wait(PAUSE)
                continue
            LOG.info('Serial console of %(name)s (%(uuid)s) opened from '
                     '%(peer)s', {'name': self._server.name,
                                  'uuid': self._server.uuid,
                                  'peer': peer[0]})
            self._make_room()
            session = self._serve(client)
            session.start()
            self._sessions.append(session)

    def _make_room(self) -> None:
        self._sessions = [session for session in self._sessions
                          if session.is_alive()]
        while len(self._sessions) >= SESSIONS:
            # Who comes last needs it most, and an earlier one may hang.
            oldest = self._sessions.pop(0)
            oldest.end('There are too many connections to this console.')
            oldest.join()


def _listening_socket(host: str, port: int) -> socket.socket:
    family, kind, protocol, _name, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listening = socket.socket(family, kind, protocol)
    try:
        # The remains of earlier connections do not matter.
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
