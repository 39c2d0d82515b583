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

"""Rescue: another system runs in a server's place and has its root disk.

The rescue instance is an LXD instance of its own, made from the rescue image.
It has the server's name with ``-rescue``, its ports, its config drive and its
uid range, and finds the server's root disk at ``/mnt/rescue``, with the right
owners and writable. The server's own instance stays stopped meanwhile and
carries a key for it; :meth:`.registry.GuestRegistry.active` returns the one of
the two that the rest of the driver works with.

Nothing is moved or renamed, so whatever is interrupted, the server's own
instance is as it was, and the rescue instance can be deleted.
"""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import json
import os
from typing import Any

from nova.compute import task_states
from nova.compute import vm_states
from nova import context as nova_context
from nova import exception
from nova import objects
from oslo_log import log as logging

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import password as lxd_password
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.guest import roles
from nova_lxd_py.virt.guest import root_check
from nova_lxd_py.virt.image import cache as image_cache
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import session as lxd
from nova_lxd_py.virt.metadata import config_drive
from nova_lxd_py.virt.server import guest_config
from nova_lxd_py.virt.vif import manager as vif_manager
from nova_lxd_py.virt.volume import server_volumes

LOG = logging.getLogger(__name__)

#: Where the rescue instance finds the server's root disk.
ROOT_PATH = '/mnt/rescue'

#: Pools on which the root disks of stopped instances are there to be seen.
ALWAYS_MOUNTED = frozenset({'btrfs', 'cephfs', 'dir'})

#: LXD's errors if it cannot give another instance's files to this one.
_NO_SHIFT = 'idmapping abilities'
_NO_SOURCE = 'missing source path'

_LAST_IDMAP = 'volatile.last_state.idmap'
_NEXT_IDMAP = 'volatile.idmap.next'


class RescueOps:
    """Rescues and unrescues servers.

    :param session: the LXD session.
    :param guests: the driver's LXD instances.
    :param guest_configs: what LXD instances have to look like.
    :param vifs: plugs ports.
    :param image_store: images in LXD.
    :param config_drives: config drives.
    :param passwords: sets administrators' passwords.
    :param volumes: Cinder volumes.
    """

    def __init__(self, session: lxd.Session,
                 guests: registry.GuestRegistry,
                 guest_configs: guest_config.GuestConfigBuilder,
                 vifs: vif_manager.VIFManager,
                 image_store: image_cache.ImageStore,
                 config_drives: config_drive.ConfigDriveManager,
                 passwords: lxd_password.AdminPassword,
                 volumes: server_volumes.ServerVolumes) -> None:
        self._session = session
        self._guests = guests
        self._guest_configs = guest_configs
        self._vifs = vifs
        self._images = image_store
        self._config_drives = config_drives
        self._passwords = passwords
        self._volumes = volumes

    # -- there and back -----------------------------------------------------

    def rescue(self, context: nova_context.RequestContext,
               instance: objects.Instance, network_info: Any,
               image_meta: objects.ImageMeta, password: str | None
               ) -> lxd_guest.Guest:
        """Start a rescue instance in place of an instance.

        A failure leaves the server's own LXD instance stopped and active.
        See :meth:`nova.virt.driver.ComputeDriver.rescue`.

        :param image_meta: the image to make the rescue instance from.
        :param password: the new password of its administrator.
        :returns: the rescue instance, running.
        :raises nova.exception.InstanceNotRescuable: if the root disk cannot
            be given to another LXD instance on this host.
        :raises errors.InstanceNotFound: if LXD does not have the instance.
        """
        _check_image(instance, image_meta)
        with self._guests.changing(instance), contextlib.ExitStack() as undo:
            own = self._guests.get(instance)
            own.stop()
            self._discard(instance)
            fingerprint = self._images.ensure(context, image_meta, instance)
            ports = list(network_info or ())
            self._vifs.plug(instance, ports, guest_stopped=True)
            undo.callback(self._discard, instance)
            guest = self._create(instance, image_meta, ports, own, fingerprint)
            undo.callback(own.update, {lxd_guest.KEY_RESCUED: None})
            own.update(config={lxd_guest.KEY_RESCUED: 'true'})
            self._start(instance, own, guest)
            undo.pop_all()
            self._passwords.give(instance, guest, password)
        LOG.info('Rescue instance %s runs, made from image %s; the root disk '
                 'of the server is at %s', guest.name, image_meta.id,
                 ROOT_PATH, instance=instance)
        return guest

    def unrescue(self, context: nova_context.RequestContext,
                 instance: objects.Instance) -> None:
        """Delete the rescue instance and start the instance again.

        See :meth:`nova.virt.driver.ComputeDriver.unrescue`.

        :raises errors.InstanceNotFound: if LXD does not have the instance.
        """
        with self._guests.changing(instance):
            own = self._guests.get(instance)
            self._leave(instance, own)
            # It has the devices of before; after a reboot of the host some of
            # them may be missing, or other devices have their names.
            ports = instance.get_network_info() or ()
            self._vifs.plug(instance, ports, guest_stopped=True)
            own.update(devices={
                **self._guest_configs.disk_view(own.name),
                **self._config_drives.ensure(instance, ports),
                **self._volumes.reconnect(context, instance, own)})
            own.start()

    def finish_interrupted(self, instance: objects.Instance) -> None:
        """End an interrupted rescue that Nova does not know of.

        A rescue instance is removed also if the interruption came before the
        server was marked as rescued: LXD may complete the request of a
        caller that is gone. The caller holds the lock of the instance.

        :param instance: the instance, which is about to be started.
        """
        if (instance.vm_state == vm_states.RESCUED or instance.task_state in
                (task_states.RESCUING, task_states.UNRESCUING)):
            return
        own = self._guests.get(instance)
        if own.is_rescued:
            LOG.warning('Ending a rescue that Nova does not know of',
                        instance=instance)
            self._leave(instance, own)
        else:
            self._discard(instance)

    def ensure_root_mounted(self, own: lxd_guest.Guest) -> None:
        """Ensure that a server's root disk is mounted while its rescue
        instance starts.

        On some pools LXD mounts it only while it is in use. The mount in the
        rescue instance lasts as long as that runs.

        :param own: the server's own LXD instance, stopped.
        """
        if self._driver(own) not in ALWAYS_MOUNTED:
            own.ensure_root_mounted()

    def recover(self) -> None:
        """Remove rescue instances that never got as far as being used, when
        nova-compute starts."""
        try:
            guests = self._guests.all()
            rescued = {guest.uuid for guest in guests if guest.is_rescued}
            for guest in guests:
                if (guest.role == roles.RESCUE and
                        guest.uuid not in rescued):
                    LOG.info('Removing rescue instance %s, left by an '
                             'interrupted operation', guest.name,
                             instance_uuid=guest.uuid)
                    guest.delete()
        except errors.LXDError as exc:
            LOG.warning('Could not remove leftover rescue instances: %s', exc)

    # -- steps --------------------------------------------------------------

    def _create(self, instance: objects.Instance,
                image_meta: objects.ImageMeta, ports: list[Any],
                own: lxd_guest.Guest, fingerprint: str) -> lxd_guest.Guest:
        name = roles.lxd_name(instance, roles.RESCUE)
        wanted = self._guest_configs.define(instance, ports, name=name)
        devices = dict(wanted.devices)
        devices.update(self._config_drives.ensure(instance, ports))
        devices[guest_config.RESCUE_DEVICE] = self._root_of(instance, own)
        config = {**wanted.config, **_uid_range(own),
                  lxd_guest.KEY_ROLE: roles.RESCUE,
                  lxd_guest.KEY_IMAGE: image_meta.id or ''}
        self.ensure_root_mounted(own)
        try:
            guest = self._guests.create(
                name, {'type': 'image', 'fingerprint': fingerprint}, config,
                devices)
        except errors.LXDError as exc:
            self._explain(instance, own, exc)
            raise self._images.explain_create_failure(
                exc, instance, image_meta) from exc
        on_disk = _idmap(own, _LAST_IDMAP)
        if on_disk and _idmap(guest, _NEXT_IDMAP) != on_disk:
            raise exception.InstanceNotRescuable(
                instance_id=instance.uuid,
                reason='LXD does not give the rescue instance the user ids '
                       'that the files of the server have')
        return guest

    def _root_of(self, instance: objects.Instance, own: lxd_guest.Guest
                 ) -> dict[str, str]:
        """Describe the server's root disk as a device of another instance."""
        own.ensure_own_root()
        directory = root_check.lxd_directory(self._session)
        if not directory:
            raise exception.InstanceNotRescuable(
                instance_id=instance.uuid,
                reason='the host does not know where LXD keeps its data; its '
                       'operator has to set [lxd] directory')
        device = {'type': 'disk', 'path': ROOT_PATH, 'source': os.path.join(
            directory, 'storage-pools', _pool(own), 'containers',
            own.container, 'rootfs')}
        if (not _idmap(own, _LAST_IDMAP) and
                own.config.get('security.privileged') != 'true'):
            # The files have the guest's own ids on the disk, so LXD mounts
            # root disks idmapped and can do the same with this mount.
            device['shift'] = 'true'
        return device

    def _start(self, instance: objects.Instance, own: lxd_guest.Guest,
               guest: lxd_guest.Guest) -> None:
        self.ensure_root_mounted(own)
        try:
            guest.start()
        except errors.LXDError as exc:
            self._explain(instance, own, exc)
            raise
        # Whatever the pool: check that the disk is there.
        found = None
        with contextlib.suppress(errors.NotFound):
            found = self._session.get('instances', guest.name, 'files',
                                      params={'path': ROOT_PATH})
        if not found:
            raise self._unreachable(instance, own)

    def _unreachable(self, instance: objects.Instance,
                     own: lxd_guest.Guest
                     ) -> exception.InstanceNotRescuable:
        pool = self._driver(own)
        return exception.InstanceNotRescuable(
            instance_id=instance.uuid,
            reason=f'LXD does not keep the root disk of a stopped server '
                   f'reachable on a storage pool of type {pool}')

    def _explain(self, instance: objects.Instance, own: lxd_guest.Guest,
                 error: errors.LXDError) -> None:
        """Raise an exception that explains LXD's error to the tenant."""
        said = error.message.lower()
        if _NO_SOURCE in said:
            LOG.error('LXD does not find the root disk of %s where the driver '
                      'expects it; check [lxd] directory: %s', own.name,
                      error, instance=instance)
            raise self._unreachable(instance, own) from error
        if _NO_SHIFT in said:
            raise exception.InstanceNotRescuable(
                instance_id=instance.uuid,
                reason='the server has never run on this host; start it '
                       'once first') from error

    def _driver(self, own: lxd_guest.Guest) -> str:
        return self._session.get('storage-pools', _pool(own))['driver']

    def _leave(self, instance: objects.Instance, own: lxd_guest.Guest
               ) -> None:
        """Delete the rescue instance and use the server's own one again."""
        self._discard(instance)
        own.update(config={lxd_guest.KEY_RESCUED: None})

    def _discard(self, instance: objects.Instance) -> None:
        guest = self._guests.find(instance, roles.RESCUE)
        if guest is not None:
            guest.delete()


def _check_image(instance: objects.Instance, image_meta: objects.ImageMeta
                 ) -> None:
    properties = image_meta.properties
    for name in ('hw_rescue_device', 'hw_rescue_bus'):
        if properties.get(name):
            raise exception.InstanceNotRescuable(
                instance_id=instance.uuid,
                reason=f'the rescue image has {name}, which asks for a disk '
                       f'to boot a virtual machine from; use an image that '
                       f'containers can be made from')


def _pool(guest: lxd_guest.Guest) -> str:
    for device in guest.devices.values():
        if device.get('path') == '/':
            return device['pool']
    raise errors.NotFound(f'{guest.name} has no root disk of its own')


def _idmap(guest: lxd_guest.Guest, key: str) -> list[dict[str, Any]]:
    """Return an ID map that LXD has recorded; empty for files that have the
    guest's own IDs."""
    return json.loads(guest.config.get(key) or '[]')


def _uid_range(own: lxd_guest.Guest) -> Mapping[str, str]:
    """Return the keys for the uid range of the files on a root disk."""
    config = {key: value for key, value in own.config.items()
              if key.startswith('security.idmap.')}
    if config.get('security.idmap.isolated') != 'true':
        return config
    on_disk = _idmap(own, _LAST_IDMAP)
    if on_disk:
        config['security.idmap.base'] = str(on_disk[0]['Hostid'])
        config['security.idmap.size'] = str(on_disk[0]['Maprange'])
    return config
