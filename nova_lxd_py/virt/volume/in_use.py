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

"""Check for processes of a guest that use a volume, before it is detached."""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import errno
import os

from nova.compute import power_state
from nova import exception
from nova import objects
from oslo_log import log as logging

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.privileged import fuser
from nova_lxd_py.virt.volume import device_identity

LOG = logging.getLogger(__name__)


class VolumeUse:
    """The use of a volume by the processes of a guest.

    :param guest: the guest, just read.
    :param identifier: Cinder's ID of the volume.
    :param device: the LXD device of the volume.
    :param mountpoint: device name of the volume.
    """

    def __init__(self, guest: lxd_guest.Guest, identifier: str,
                 device: Mapping[str, str], mountpoint: str) -> None:
        self.identifier = identifier
        self.device = device
        self.mountpoint = mountpoint
        self._guest = guest
        # It is not found by the volume after the device has been removed.
        self._init = self._find_init()

    def _find_init(self) -> int:
        """Find the first process of the guest.

        :returns: its process ID on the host; 0 if nothing runs there.
        """
        if self._guest.power_state == power_state.SHUTDOWN:
            return 0
        with contextlib.suppress(OSError):
            found = fuser.find_init(
                self._guest.container, self.identifier,
                os.stat(self.device['source']).st_dev
                if self.device['type'] == 'disk' else 0)
            if found:
                return found
        try:
            return max(self._guest.state()['pid'], 0)
        except errors.NotFound:
            return 0

    def check(self) -> None:
        """Check that no process of the guest uses the volume.

        :raises nova.exception.DeviceDetachFailed: if one does, or if the
            mounted filesystem has shut itself down.
        """
        if not self._init:
            return
        number = filesystem = 0
        try:
            if self.device['type'] == 'disk':
                filesystem = os.stat(self.device['source']).st_dev
            else:
                number = device_identity.device_number(self.device['source'])
        except (device_identity.WrongDevice, OSError) as error:
            if self.device['type'] == 'disk' and getattr(
                    error, 'errno', None) == errno.EIO:
                # LXD could neither unmount it in the guest nor mount it again.
                raise self._refusal(
                    'its filesystem has shut itself down after an error of '
                    'the storage; stop or hard reboot the server '
                    'first') from error
            # What does not exist cannot be in use.
            return
        try:
            using = fuser.find_users(self._init, number, filesystem)
        except OSError as error:
            LOG.warning('Processes of %(guest)s that use %(device)s cannot be '
                        'determined: %(error)s', {
                            'device': self.mountpoint,
                            'guest': self._guest.name, 'error': error},
                        instance_uuid=self._guest.uuid)
            raise self._refusal(
                'its processes have too many open files to check whether '
                'they use the volume') from error
        if using:
            LOG.info('%(device)s of %(guest)s is open in processes %(pids)s '
                     'of the host', {'device': self.mountpoint,
                                     'guest': self._guest.name,
                                     'pids': using},
                     instance_uuid=self._guest.uuid)
            raise self._refusal(f'{len(using)} processes of the server use '
                                f'it; end them first')

    def _refusal(self, reason: str) -> exception.DeviceDetachFailed:
        return exception.DeviceDetachFailed(device=self.mountpoint,
                                            reason=reason)


def check_root(instance: objects.Instance, guest: lxd_guest.Guest) -> None:
    """Check that a guest does not run from its root volume.

    :param instance: the instance.
    :param guest: its LXD instance, just read.
    :raises nova.exception.DeviceDetachFailed: if it runs.
    """
    if guest.power_state != power_state.SHUTDOWN:
        raise exception.DeviceDetachFailed(
            device=instance.root_device_name or 'root',
            reason='the server runs from it; stop it first')
