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

"""The first boot of a volume that Cinder has made from an image.

Cinder copies the image to the volume byte by byte. For a virtual machine that
is a disk; for a container it is an archive, of which the driver makes a
filesystem before the server boots:

1. The volume is compared with what Cinder knows of its image. If it holds
   anything else, that is never overwritten.
2. The image is brought into LXD's image store, as for any other server; from
   the volume itself if Glance does not have it any more. From here on there
   are two copies, so the one on the volume can give way to a filesystem.
3. LXD itself unpacks the image to the volume: the volume is a storage pool of
   LXD's for this moment. The driver never unpacks what a tenant has packed.
4. What LXD has unpacked gets the name ``rootfs``, as the last step. A volume
   without that is one whose first boot was interrupted; the next boot does it
   again, on any host, with the image from Glance.

From then on the volume is like any other one with a root on it: it boots
wherever it is attached to, and so do its snapshots and clones.
"""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import errno
import os
import time
from typing import Any
import uuid

from nova import context as nova_context
from nova import exception
from nova import objects
from nova.volume import cinder
from oslo_config import cfg
from oslo_log import log as logging
from oslo_utils import uuidutils

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.image import cache as image_cache
from nova_lxd_py.virt.image import placeholder
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import session as lxd
from nova_lxd_py.virt.privileged import mounts
from nova_lxd_py.virt.privileged import probe
from nova_lxd_py.virt.privileged import rootfs
from nova_lxd_py.virt.volume import base
from nova_lxd_py.virt.volume import connections
from nova_lxd_py.virt.volume import modes

LOG = logging.getLogger(__name__)

#: LXD's storage pools begin so while an image is unpacked to a volume; the
#: volume's id follows.
POOL_PREFIX = 'nova-boot-'
#: Key of such a pool: the LXD project whose nova-compute has made it.
KEY_POOL_OWNER = 'user.nova.lxd_project'

_LABEL_LENGTH = 12
#: Bytes of an image to read from a volume at a time; many wait to be sent.
_PART = 512 << 10
#: LXD's name for the progress of unpacking.
_PROGRESS = 'create_instance_from_image_unpack_progress'
_NO_SPACE = 'no space left'
_TOO_SMALL = 'its image, unpacked, does not fit into it; use a larger volume'


class VolumeProvisioner:
    """Makes root filesystems of the images that volumes hold.

    :param session: the way to LXD.
    :param guests: the driver's LXD instances.
    :param image_store: images in LXD.
    """

    def __init__(self, session: lxd.Session,
                 guests: registry.GuestRegistry, image_store: image_cache.ImageStore
                 ) -> None:
        self._session = session
        self._options = session.options
        self._guests = guests
        self._images = image_store
        self._cinder = cinder.API()

    def placeholder_source(self) -> dict[str, str]:
        """Return what the LXD instance of a volume-backed server is made from.

        :returns: the ``source`` for LXD's ``POST /1.0/instances``.
        :raises errors.LXDError: if LXD does not take the image for it.
        """
        return {'type': 'image',
                'fingerprint': placeholder.ensure(self._session)}

    def prepare(self, context: nova_context.RequestContext,
                instance: objects.Instance,
                connection_info: dict[str, Any]) -> None:
        """See that there is a root on the volume that a new server boots
        from; make it of the volume's image if there is not.

        :param context: for asking Cinder and Glance.
        :param instance: the server, whose lock must be held.
        :param connection_info: how the host is connected to the volume; gets
            what is on it, so that it need not be looked for again.
        :raises nova.exception.BuildAbortException: no server can boot from
            what is on the volume, which is left as it is.
        :raises nova.exception.VolumeAttachFailed: it cannot be read or
            written.
        :raises errors.LXDError: LXD cannot unpack the image.
        """
        identifier = connections.volume_id(connection_info)
        path = base.device_path(connection_info) or ''
        with connections.lock(identifier):
            first = _FirstBoot(
                self._options, self._images, instance, identifier, path,
                self._cinder.get(context, identifier))
            with connections.map_exceptions('boot from', instance, identifier,
                                   exception.VolumeAttachFailed):
                ready = first.is_ready()
            if not ready:
                fingerprint = first.fetch(context)
                with connections.map_exceptions('make a filesystem on', instance,
                                       identifier,
                                       exception.VolumeAttachFailed):
                    first.make_filesystem()
                self._unpack(instance, identifier, first, fingerprint)
            connection_info[modes.KEY_KIND] = first.kind

    def _unpack(self, instance: objects.Instance, identifier: str,
                first: _FirstBoot, fingerprint: str) -> None:
        """Have LXD unpack an image to a volume."""
        began = time.monotonic()
        self.drop_pool(identifier)
        failure = (instance, identifier, exception.VolumeAttachFailed)
        with contextlib.ExitStack() as undo:
            with connections.map_exceptions('mount', *failure):
                workshop = first.open()
            undo.callback(first.close)
            undo.callback(self.drop_pool, identifier)
            pool = POOL_PREFIX + identifier
            self._session.post('storage-pools', body={
                'name': pool, 'driver': 'dir',
                'description': 'A volume that gets its root filesystem',
                'config': {'source': workshop,
                           KEY_POOL_OWNER: self._session.project}})
            report = _Report(instance, identifier)
            try:
                guest = self._guests.create(
                    lxd_guest.lxd_name(instance,
                                       lxd_guest.ROLE_UNPACKED),
                    {'type': 'image', 'fingerprint': fingerprint},
                    {lxd_guest.KEY_UUID: instance.uuid,
                     lxd_guest.KEY_ROLE: lxd_guest.ROLE_UNPACKED,
                     'boot.autostart': 'false'},
                    {'root': {'type': 'disk', 'path': '/', 'pool': pool}},
                    timeout=self._options.image_timeout,
                    progress=report.unpacking)
            except errors.LXDError as exc:
                if _NO_SPACE in exc.message.lower():
                    raise first.refusal(_TOO_SMALL) from exc
                raise self._images.explain_create_failure(
                    exc, instance, first.image) from exc
            undo.callback(self._discard, guest)
            with connections.map_exceptions('complete', *failure):
                first.complete()
        LOG.info('Made the root filesystem on volume %(volume)s of image '
                 '%(image)s in %(seconds).1f seconds',
                 {'volume': identifier, 'image': first.image.id,
                  'seconds': time.monotonic() - began}, instance=instance)

    def _discard(self, guest: lxd_guest.Guest) -> None:
        try:
            guest.delete()
        except errors.LXDError as exc:
            LOG.warning('LXD instance %s stays for now: %s', guest.name, exc)

    # -- what crashes leave -------------------------------------------------

    def recover(self) -> None:
        """Remove what interrupted first boots have left in LXD."""
        try:
            pools = {pool['name'] for pool in self._session.get(
                'storage-pools', params={'recursion': 1})}
        except errors.LXDError as exc:
            LOG.warning('Could not look for storage pools of interrupted '
                        'first boots: %s', exc)
            return
        for pool in pools:
            if pool.startswith(POOL_PREFIX):
                identifier = pool.removeprefix(POOL_PREFIX)
                # A first boot that is under way has the lock.
                with connections.lock(identifier):
                    self.drop_pool(identifier)

    def drop_pool(self, identifier: str) -> None:
        """Let go of a volume that an image was being unpacked to.

        :param identifier: Cinder's id of the volume.
        """
        name = POOL_PREFIX + identifier
        try:
            pool = self._session.get('storage-pools', name)
            if pool['config'].get(KEY_POOL_OWNER) != self._session.project:
                return
            for guest in self._guests.all():
                if (guest.role == lxd_guest.ROLE_UNPACKED and
                        guest.devices.get('root', {}).get('pool') == name):
                    guest.delete()
            self._session.delete('storage-pools', name)
        except errors.NotFound:
            return
        except errors.LXDError as exc:
            LOG.warning('The storage pool %(pool)s of LXD, through which an '
                        'image was unpacked to a volume, stays for now: '
                        '%(error)s', {'pool': name, 'error': exc})


class _FirstBoot:
    """What is to be done with one volume.

    :param options: the ``[lxd]`` option group.
    :param image_store: images in LXD.
    :param instance: the server.
    :param identifier: Cinder's id of the volume.
    :param path: of its block device.
    :param volume: Cinder's description of it.
    """

    def __init__(self, options: cfg.ConfigOpts.GroupAttr,
                 image_store: image_cache.ImageStore,
                 instance: objects.Instance, identifier: str, path: str,
                 volume: Mapping[str, Any]) -> None:
        self._options = options
        self._images = image_store
        self._instance = instance
        self._identifier = identifier
        self._path = path
        self._size_gb = volume.get('size')
        self._about: Mapping[str, str] = (
            volume.get('volume_image_metadata') or {})
        if not uuidutils.is_uuid_like(self._about.get('image_id')):
            # Its owner may have written anything there.
            self._about = {}
        self._target = os.path.join(options.volume_mount_directory,
                                    identifier)
        self._holds_image = False
        #: The filesystem that is on the volume by now.
        self.kind = ''
        #: The image of which the volume gets its root.
        self.image: objects.ImageMeta = objects.ImageMeta()

    def refusal(self, reason: str) -> exception.BuildAbortException:
        """Say why a server cannot boot from the volume; no other host could
        do it.

        :param reason: what is wrong with the volume.
        """
        return exception.BuildAbortException(
            instance_uuid=self._instance.uuid,
            reason=f'the server cannot boot from volume {self._identifier}: '
                   f'{reason}')

    def is_ready(self) -> bool:
        """Look what is on the volume.

        :returns: whether a server can boot from it as it is.
        :raises nova.exception.BuildAbortException: no server can.
        :raises OSError: it cannot be read.
        """
        allowed = self._options.volume_filesystems
        found = probe.content(self._path)
        if found in allowed:
            self.kind = found
            state = rootfs.root_state(self._path, found, self._target)
            if state == rootfs.OTHER:
                raise self.refusal('its filesystem has files, but no root '
                                   'filesystem of a system')
            if state == rootfs.UNFINISHED and not self._about.get('image_id'):
                raise self.refusal('its filesystem is empty')
            return state == rootfs.READY
        if found:
            self._holds_image = self._is_the_image()
            if not self._holds_image:
                raise self.refusal(modes.root_refusal(found, allowed))
        elif not self._about.get('image_id'):
            raise self.refusal(modes.root_refusal('', allowed))
        return False

    def _is_the_image(self) -> bool:
        """Whether there is nothing on the volume but what Cinder has copied
        to it."""
        checksum, size = self._checksum()
        if not checksum or not size or not self._about.get('image_id'):
            return False
        LOG.info('Comparing volume %(volume)s with image %(image)s',
                 {'volume': self._identifier,
                  'image': self._about['image_id']}, instance=self._instance)
        return rootfs.contains_image(self._path, size, checksum)

    def _checksum(self) -> tuple[str, int]:
        size = str(self._about.get('size') or '')
        return (self._about.get('checksum') or '',
                int(size) if size.isdecimal() else 0)

    def fetch(self, context: nova_context.RequestContext) -> str:
        """Have the image of the volume in LXD.

        :param context: for Glance.
        :returns: LXD's fingerprint of it.
        :raises nova.exception.BuildAbortException: it cannot be had, or does
            not fit.
        :raises nova.exception.NovaException: as
            :meth:`.images.ImageStore.ensure`.
        """
        image_id = self._about['image_id']
        try:
            source = None
            try:
                self.image = self._images.describe(context, image_id)
            except (exception.ImageNotFound, exception.ImageNotAuthorized):
                source = self._copy_on_volume(image_id)
            return self._images.ensure(context, self.image, self._instance,
                                       self._size_gb or 0, source)
        except exception.FlavorDiskTooSmall:
            raise self.refusal(_TOO_SMALL) from None

    def _copy_on_volume(self, image_id: str) -> _CopyOnVolume:
        """Take the image from the volume, since Glance does not have it."""
        if not self._holds_image:
            raise self.refusal(
                f'its image {image_id}, of which its root filesystem has to '
                f'be made at the first boot, is not in Glance any more')
        checksum, size = self._checksum()
        # Whoever has the volume can change what Cinder says of its image. So
        # this must not become the image of that id for other servers, nor be
        # taken for one of them that the host has already.
        self.image = objects.ImageMeta.from_dict({
            'id': str(uuid.uuid5(uuid.UUID(self._identifier), checksum)),
            'size': size, 'name': self._about.get(
                'image_name') or image_id, 'properties': {}})
        return _CopyOnVolume(self._path, size)

    def make_filesystem(self) -> None:
        """Put a filesystem in place of the image, unless there is one.

        :raises OSError: there is something else by now, or it cannot be
            written.
        """
        if self.kind:
            return
        if self._holds_image:
            checksum, size = self._checksum()
            rootfs.wipe_image(self._path, size, checksum)
        self.kind = self._options.volume_filesystems[0]
        mounts.make_filesystem(self._path, self.kind,
                               self._identifier[:_LABEL_LENGTH])

    def open(self) -> str:
        """Mount the volume for unpacking.

        :returns: path of an empty folder on it.
        :raises OSError: it cannot be mounted.
        """
        return rootfs.open_staging(self._path, self.kind, self._target)

    def complete(self) -> None:
        """Make what LXD has unpacked the root.

        :raises OSError: it cannot be done.
        """
        rootfs.complete(self._target)

    def close(self) -> None:
        """Unmount the volume. What keeps it from that says so when the root
        is mounted, or with the next attempt."""
        try:
            rootfs.close_staging(self._target)
        except OSError as error:
            LOG.warning('Volume %(volume)s cannot be unmounted after '
                        'unpacking: %(error)s',
                        {'volume': self._identifier, 'error': error},
                        instance=self._instance)


class _CopyOnVolume:
    """The image that a volume holds, as Glance would give it.

    :param path: of the volume's block device.
    :param size: bytes of the image.
    """

    def __init__(self, path: str, size: int) -> None:
        self._path = path
        self._size = size

    def download(self, context: nova_context.RequestContext, image_id: str,
                 data: Any, trusted_certs: Any = None) -> None:
        """See :meth:`nova.image.glance.API.download`."""
        position = 0
        while position < self._size:
            chunk = rootfs.read(self._path, position,
                                min(_PART, self._size - position))
            if not chunk:
                raise OSError(errno.EIO, 'The volume ends within its image')
            data.write(chunk)
            position += len(chunk)


class _Report:
    """Tells of the progress in the log."""

    def __init__(self, instance: objects.Instance, identifier: str) -> None:
        self._instance = instance
        self._identifier = identifier

    def unpacking(self, operation: Mapping[str, Any]) -> None:
        """Report what LXD says of the operation that unpacks the image."""
        said = (operation.get('metadata') or {}).get(_PROGRESS, 'under way')
        LOG.info('Unpacking the image to volume %(volume)s: %(progress)s',
                 {'volume': self._identifier, 'progress': said},
                 instance=self._instance)
