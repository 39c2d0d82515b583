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

"""Administrator passwords of guests.

``chpasswd`` in the guest sets them by the guest's own rules. It reads them
from its standard input: they are in no argument, configuration key or log.
"""

from __future__ import annotations

import re

from nova.compute import power_state
from nova import exception
from nova import objects
from oslo_log import log as logging

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import exec as lxd_exec
from nova_lxd_py.virt.lxd import session as lxd

LOG = logging.getLogger(__name__)

#: Seconds for the guest to set a password.
TIMEOUT = 30

#: The administrator if the image has no ``os_admin_user``.
DEFAULT_USER = 'root'

_USER = re.compile(r'[A-Za-z_][A-Za-z0-9_.-]{0,31}\$?')


class AdminPassword:
    """Sets the passwords of servers' administrators.

    :param session: the LXD session.
    :param guests: the driver's LXD instances.
    """

    def __init__(self, session: lxd.Session,
                 guests: registry.GuestRegistry) -> None:
        self._session = session
        self._options = session.options
        self._guests = guests

    def change(self, instance: objects.Instance, password: str) -> None:
        """Set the administrator's password of a running instance.

        See :meth:`nova.virt.driver.ComputeDriver.set_admin_password`.

        :param instance: the instance; its image property ``os_admin_user`` is
            the administrator's name, root by default.
        :param password: the new password.
        :raises nova.exception.SetAdminPasswdNotSupported: if the image has no
            ``chpasswd``.
        :raises nova.exception.InstanceAgentNotEnabled: if the instance does
            not run.
        :raises nova.exception.InstancePasswordSetFailed: if the guest
            refuses.
        """
        # Without the lock of the instance: a snapshot may hold it for long,
        # and LXD runs commands at any time.
        guest = self._guests.active(instance)
        if guest.power_state != power_state.RUNNING:
            raise exception.InstanceAgentNotEnabled()
        result = self._chpasswd(instance, guest, password)
        if (result.code not in (0, lxd_exec.NOT_FOUND) and
                guest.extend_full_root()):
            result = self._chpasswd(instance, guest, password)
        if result.code == lxd_exec.NOT_FOUND:
            LOG.warning('Password not set: the image has no chpasswd',
                        instance=instance)
            raise exception.SetAdminPasswdNotSupported()
        if result.code:
            raise exception.InstancePasswordSetFailed(
                instance=instance.uuid,
                reason=f'chpasswd in the guest returned {result.code}')

    def give(self, instance: objects.Instance, guest: lxd_guest.Guest,
             password: str | None) -> None:
        """Set the password that Nova chose for an instance that has just been
        started, if ``[lxd] inject_password`` is enabled.

        If the guest cannot set it, a warning is logged only.

        :param instance: the instance.
        :param guest: its LXD instance, or its rescue instance.
        :param password: the password, None to set none.
        """
        if not password or not self._options.inject_password:
            return
        try:
            code = self._chpasswd(instance, guest, password).code
        except (errors.LXDError, exception.NovaException) as exc:
            LOG.warning('Password chosen by Nova could not be set: %s', exc,
                        instance=instance)
            return
        if code:
            LOG.warning('Password chosen by Nova could not be set: %s',
                        'the image has no chpasswd'
                        if code == lxd_exec.NOT_FOUND else
                        f'chpasswd in the guest returned {code}',
                        instance=instance)

    def _chpasswd(self, instance: objects.Instance,
                  guest: lxd_guest.Guest, password: str
                  ) -> lxd_exec.Result:
        user = (instance.image_meta.properties.get('os_admin_user') or
                DEFAULT_USER)
        # Another line would set another user's password.
        if (_USER.fullmatch(user) is None or
                any(character in password for character in '\r\n\0')):
            raise exception.InstancePasswordSetFailed(
                instance=instance.uuid,
                reason='the user name (image property os_admin_user) or the '
                       'password has a character that is not allowed')
        return lxd_exec.run(self._session, guest.name, ['chpasswd'],
                            f'{user}:{password}\n'.encode(errors='replace'),
                            timeout=TIMEOUT)
