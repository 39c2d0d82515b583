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

"""The console of a server."""

from __future__ import annotations

from nova import objects

from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import session as lxd

#: Most bytes of console output that are handed out; what came last counts.
LOG_BYTES = 100 * 1024


class ConsoleLog:
    """Reads consoles.

    :param session: the way to LXD.
    :param guests: the driver's LXD instances.
    """

    def __init__(self, session: lxd.Session, guests: registry.GuestRegistry
                 ) -> None:
        self._session = session
        self._guests = guests

    def output(self, instance: objects.Instance) -> bytes:
        """Read what the guest last wrote to its console.

        LXD keeps what a running guest wrote since it started, and of a
        stopped one also what it wrote before.

        :param instance: the server.
        :returns: at most LOG_BYTES, beginning with a whole line.
        :raises errors.NotFound: LXD does not have the server.
        """
        guest = self._guests.active(instance)
        tail = bytearray()
        try:
            with self._session.download('instances', guest.name, 'console'
                                        ) as (_headers, chunks):
                for chunk in chunks:
                    tail += chunk
                    del tail[:-2 * LOG_BYTES]
        except errors.OperationFailed as exc:
            # So LXD says that there is nothing yet.
            if 'no such file or directory' not in exc.message:
                raise
        if len(tail) <= LOG_BYTES:
            return bytes(tail)
        last = bytes(tail[-LOG_BYTES:])
        return last[last.find(b'\n') + 1:]
