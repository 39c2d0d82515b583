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

"""The console log of an instance (``openstack console log show``)."""

from __future__ import annotations

from nova import objects
from oslo_utils import units

from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import session as lxd

#: Maximum number of bytes to return, counted from the end of the log.
#: The libvirt driver has the same limit (``MAX_CONSOLE_BYTES``).
MAX_CONSOLE_BYTES = 100 * units.Ki


class ConsoleLog:
    """Reads the console log of instances.

    :param session: LXD session.
    :param guests: registry of the driver's LXD instances.
    """

    def __init__(self, session: lxd.Session, guests: registry.GuestRegistry
                 ) -> None:
        self._session = session
        self._guests = guests

    def output(self, instance: objects.Instance) -> bytes:
        """Read the end of the guest's console output.

        LXD keeps the output of a running guest since its last start, and that
        of a stopped guest from its earlier starts as well.

        :param instance: the instance.
        :returns: at most MAX_CONSOLE_BYTES, starting at the beginning of a
            line.
        :raises errors.NotFound: if LXD does not have the instance.
        """
        guest = self._guests.active(instance)
        tail = bytearray()
        try:
            with self._session.download('instances', guest.name, 'console'
                                        ) as (_headers, chunks):
                for chunk in chunks:
                    tail += chunk
                    del tail[:-2 * MAX_CONSOLE_BYTES]
        except errors.OperationFailed as exc:
            # LXD answers this as long as the guest has written nothing.
            if 'no such file or directory' not in exc.message:
                raise
        if len(tail) <= MAX_CONSOLE_BYTES:
            return bytes(tail)
        last = bytes(tail[-MAX_CONSOLE_BYTES:])
        return last[last.find(b'\n') + 1:]
