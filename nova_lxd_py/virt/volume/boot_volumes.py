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

"""Servers that boot from volumes, through all of their lives.

See :mod:`.root_volumes` for how LXD runs them, and :mod:`.provisioning` for
how a volume gets its root filesystem.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nova import context as nova_context
from nova import exception
from nova import objects
from oslo_log import log as logging

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.image import placeholder
from nova_lxd_py.virt.lxd import session as lxd
from nova_lxd_py.virt.volume import manager
from nova_lxd_py.virt.volume import provisioning
from nova_lxd_py.virt.volume import root_volumes as roots

LOG = logging.getLogger(__name__)

_BlockDeviceInfo = Mapping[str, Any] | None


class BootVolumes:
    """Lets servers boot from volumes. Their locks must be held.

    :param session: the way to LXD.
    :param guests: the driver's LXD instances.
    :param root_volumes: connects and mounts the volumes.
    :param first_boots: makes the root filesystems on them.
    """

    def __init__(self, session: lxd.Session, guests: registry.GuestRegistry,
                 root_volumes: roots.RootVolumes,
                 first_boots: provisioning.VolumeProvisioner) -> None:
        self._session = session
        self._guests = guests
        self._roots = root_volumes
        self._first_boots = first_boots

    # -- the life of a server -----------------------------------------------

    def connect(self, instance: objects.Instance,
                guest: lxd_guest.Guest | None,
                block_device_info: _BlockDeviceInfo) -> dict[str, str]:
        """Connect the host to the volume that a server boots from, if any.

        :param instance: the server, which does not run.
        :param guest: its LXD instance, None for a server that is to be made.
        :param block_device_info: Nova's description of its disks.
        :returns: LXD configuration keys for the server; :meth:`mount` has to
            follow before it starts.
        :raises nova.exception.VolumeAttachFailed: it cannot be connected.
        :raises nova.exception.BuildAbortException: this host may not.
        """
        volume = roots.find(block_device_info)
        if volume is not None:
            return self._roots.connect(instance, volume)
        expected = lxd_guest.root_volume(guest)
        if expected:
            raise exception.VolumeAttachFailed(
                volume_id=expected,
                reason='the server boots from it, but Nova does not say how '
                       'it is connected')
        return {}

    def prepare(self, context: nova_context.RequestContext,
                instance: objects.Instance,
                block_device_info: _BlockDeviceInfo) -> None:
        """See that a new server can boot from its volume. See
        :meth:`.firstboot.VolumeProvisioner.prepare`.

        :param context: for asking Cinder and Glance.
        :param instance: the server.
        :param block_device_info: Nova's description of its disks, which
            :meth:`connect` has seen.
        """
        volume = roots.find(block_device_info)
        if volume is not None:
            self._first_boots.prepare(context, instance,
                                      volume['connection_info'])

    def source(self) -> dict[str, str]:
        """Tell what the LXD instance of a server is made from.

        :returns: the ``source`` for LXD's ``POST /1.0/instances``.
        :raises errors.LXDError: LXD does not take the image for it.
        """
        return {'type': 'image',
                'fingerprint': placeholder.ensure(self._session)}

    def mount(self, instance: objects.Instance, guest: lxd_guest.Guest,
              block_device_info: _BlockDeviceInfo) -> None:
        """Mount the volume that a server boots from, if any.

        :param instance: the server.
        :param guest: its LXD instance, which is about to start.
        :param block_device_info: Nova's description of its disks, which
            :meth:`connect` has seen.
        :raises nova.exception.VolumeAttachFailed: it cannot be mounted.
        """
        volume = roots.find(block_device_info)
        if volume is not None:
            self._roots.mount(instance, guest.reload(), volume)

    def disconnect(self, instance: objects.Instance,
                   expected: str | None,
                   block_device_info: _BlockDeviceInfo, *, force: bool
                   ) -> None:
        """Disconnect the host from the volume of a server that does not run.

        :param instance: the server; its guests may be gone.
        :param expected: the volume that its LXD instance named, if any.
        :param block_device_info: Nova's description of its disks.
        :param force: the server is being deleted: nothing is raised.
        :raises nova.exception.VolumeDetachFailed: something of it is left.
        """
        volume = roots.find(block_device_info)
        if volume is None or not volume.get('connection_info'):
            if expected:
                self._first_boots.drop_pool(expected)
                self._roots.clear(instance, expected)
            return
        connection_info = volume['connection_info']
        self._first_boots.drop_pool(manager.volume_id(connection_info))
        self._roots.disconnect(instance, connection_info, force=force)

    def release(self, instance: objects.Instance, guest: lxd_guest.Guest,
                block_device_info: _BlockDeviceInfo) -> None:
        """Take its root from a stopped server, since Nova makes the
        connection anew.

        :param instance: the server.
        :param guest: its LXD instance.
        :param block_device_info: Nova's description of its disks, with the
            present connections.
        :raises nova.exception.VolumeDetachFailed: something of it is left.
        """
        volume = roots.find(block_device_info)
        if volume is not None and volume.get('connection_info'):
            self._roots.release(instance, guest.reload(),
                                volume['connection_info'])

    # -- the volume ---------------------------------------------------------

    def detach(self, instance: objects.Instance,
               connection_info: dict[str, Any]) -> bool:
        """Take the volume from a server that it has booted from.

        Nova does so with stopped servers that it is about to make anew.

        :param instance: the server; its guest may be gone.
        :param connection_info: Cinder's description of the connection.
        :returns: False if it is another kind of volume.
        :raises nova.exception.DeviceDetachFailed: the server runs.
        :raises nova.exception.VolumeDetachFailed: something of it is left.
        """
        if not roots.is_root(connection_info):
            return False
        with self._guests.changing(instance):
            guest = self._guests.find(instance)
            identifier = manager.volume_id(connection_info)
            if guest and lxd_guest.root_volume(guest) == identifier:
                self._roots.release(instance, guest, connection_info)
            else:
                self._roots.disconnect(instance, connection_info, force=False)
        LOG.info('Detached its root volume %s', identifier, instance=instance)
        return True

    def extend(self, instance: objects.Instance,
               connection_info: dict[str, Any], size: int) -> bool:
        """Have the root of a server fill its volume, which has grown.

        :param instance: the server.
        :param connection_info: Cinder's description of the connection.
        :param size: bytes that the volume has by now.
        :returns: False if it is another kind of volume.
        :raises nova.exception.VolumeExtendFailed: the host does not see it.
        """
        if not roots.is_root(connection_info):
            return False
        with self._guests.changing(instance):
            self._roots.extend(instance, connection_info, size)
        return True

    def recover(self) -> None:
        """Remove what was interrupted by nova-compute's end."""
        self._first_boots.recover()
