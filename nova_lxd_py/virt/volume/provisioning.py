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
is a disk; for a container it is an archive, which the driver replaces by a
filesystem with its content before the server boots:

1. The volume is compared with Cinder's checksum of its image. If it holds
   anything else, that is never overwritten.
2. The image is imported into LXD's image store, as for any other server; from
   the volume itself if it has been deleted in Glance. Now there are two
   copies, so the one on the volume can be overwritten.
3. LXD unpacks the image to the volume, which is a storage pool of LXD for that
   purpose. The driver never unpacks what a tenant has packed.
4. What LXD has unpacked gets the name ``rootfs``, as the last step. A volume
   without it is one whose first boot was interrupted; the next boot repeats
   it, on any host, with the image from Glance, or on this one with the copy
   that LXD has taken from the volume.

From then on the volume is like any other one with a root filesystem: servers
boot from it on any host, and from its snapshots and clones.
"""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import errno
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
from nova_lxd_py.virt.guest import roles
from nova_lxd_py.virt.image import cache as image_cache
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import session as lxd
from nova_lxd_py.virt.privileged import mounts
from nova_lxd_py.virt.privileged import probe
from nova_lxd_py.virt.privileged import rootfs
from nova_lxd_py.virt.volume import base
from nova_lxd_py.virt.volume import connections
from nova_lxd_py.virt.volume import modes

LOG = logging.getLogger(__name__)

#: Prefix of the names of storage pools through which LXD unpacks an image to a
#: volume, before the volume's ID.
POOL_PREFIX = 'nova-boot-'
#: Key of such a pool: the LXD project whose nova-compute has created it.
KEY_POOL_OWNER = 'user.nova.lxd_project'

#: Bytes of an image to read from a volume at a time; many are buffered.
_PART = 512 << 10
#: Key of LXD's operations with the progress of unpacking.
_PROGRESS = 'create_instance_from_image_unpack_progress'
_NO_SPACE = 'no space left'
_TOO_SMALL = 'its image, unpacked, does not fit into it; use a larger volume'


class VolumeProvisioner:
    """Makes root filesystems of the images that volumes hold.

    :param session: the LXD session.
    :param guests: the driver's LXD instances.
    :param image_store: images in LXD.
    """

    def __init__(self, session: lxd.Session,
                 guests: registry.GuestRegistry,
                 image_store: image_cache.ImageStore) -> None:
        self._session = session
        self._options = session.options
        self._guests = guests
        self._images = image_store
        self._cinder = cinder.API()

    def prepare(self, context: nova_context.RequestContext,
                instance: objects.Instance,
                connection_info: dict[str, Any]) -> None:
        """Ensure that there is a root filesystem on the volume from which a
        new server boots; make it of the volume's image if there is none.

        :param context: for requests to Cinder and Glance.
        :param instance: the instance, whose lock must be held.
        :param connection_info: connection of the volume; the filesystem is
            added to it, so that it need not be probed again.
        :raises nova.exception.BuildAbortException: if no server can boot from
            what is on the volume, which is left as it is.
        :raises nova.exception.VolumeAttachFailed: if the volume cannot be read
            or written.
        :raises errors.LXDError: if LXD cannot unpack the image.
        """
        identifier = connections.volume_id(connection_info)
        path = connection_info[base.DEVICE_PATH]
        with connections.lock(identifier):
            first = _FirstBoot(
                self._options, self._images, instance, identifier, path,
                self._cinder.get(context, identifier))
            failure = (instance, identifier, exception.VolumeAttachFailed)
            with connections.map_exceptions('boot from', *failure):
                ready = first.is_ready()
            if not ready:
                fingerprint = first.fetch(context)
                with connections.map_exceptions('make a filesystem on',
                                                *failure):
                    first.make_filesystem()
                self._unpack(instance, identifier, first, fingerprint)
            connection_info[modes.KEY_KIND] = first.kind

    def _unpack(self, instance: objects.Instance, identifier: str,
                first: _FirstBoot, fingerprint: str) -> None:
        """Unpack an image to a volume through LXD."""
        began = time.monotonic()
        self.drop_pool(identifier)
        failure = (instance, identifier, exception.VolumeAttachFailed)
        with contextlib.ExitStack() as undo:
            with connections.map_exceptions('mount', *failure):
                staging = rootfs.open_staging(first.path, first.kind,
                                              first.target)
            undo.callback(first.close)
            undo.callback(self.drop_pool, identifier)
            pool = POOL_PREFIX + identifier
            self._session.post('storage-pools', body={
                'name': pool, 'driver': 'dir',
                'description': 'Volume to which an image is unpacked',
                'config': {'source': staging,
                           KEY_POOL_OWNER: self._session.project}})

            def report(operation: Mapping[str, Any]) -> None:
                progress = (operation.get('metadata') or {}).get(
                    _PROGRESS, 'under way')
                LOG.info('Unpacking the image to volume %(volume)s: '
                         '%(progress)s', {'volume': identifier,
                                          'progress': progress},
                         instance=instance)
            try:
                self._guests.create(
                    roles.lxd_name(instance, roles.UNPACKED),
                    {'type': 'image', 'fingerprint': fingerprint},
                    {lxd_guest.KEY_UUID: instance.uuid,
                     lxd_guest.KEY_ROLE: roles.UNPACKED,
                     'boot.autostart': 'false'},
                    {'root': {'type': 'disk', 'path': '/', 'pool': pool}},
                    timeout=self._options.image_timeout,
                    progress=report)
            except errors.LXDError as exc:
                if _NO_SPACE in exc.message.lower():
                    raise first.refusal(_TOO_SMALL) from exc
                raise self._images.explain_create_failure(
                    exc, instance, first.image) from exc
            with connections.map_exceptions('complete', *failure):
                rootfs.complete(first.target)
        LOG.info('Made the root filesystem on volume %(volume)s of image '
                 '%(image)s in %(seconds).1f seconds',
                 {'volume': identifier, 'image': first.image.id,
                  'seconds': time.monotonic() - began}, instance=instance)

    # -- leftovers ----------------------------------------------------------

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
        """Delete the storage pool through which an image was being unpacked to
        a volume, if there is one, with the LXD instance in it.

        :param identifier: Cinder's ID of the volume.
        """
        name = POOL_PREFIX + identifier
        try:
            pool = self._session.get('storage-pools', name)
            if pool['config'].get(KEY_POOL_OWNER) != self._session.project:
                return
            for guest in self._guests.all():
                if (guest.role == roles.UNPACKED and
                        guest.devices.get('root', {}).get('pool') == name):
                    guest.delete()
            self._session.delete('storage-pools', name)
        except errors.NotFound:
            return
        except errors.LXDError as exc:
            LOG.warning('Could not delete storage pool %(pool)s of LXD, '
                        'through which an image was unpacked to a volume: '
                        '%(error)s', {'pool': name, 'error': exc})


class _FirstBoot:
    """The first boot of one volume.

    :param options: the ``[lxd]`` option group.
    :param image_store: images in LXD.
    :param instance: the instance.
    :param identifier: Cinder's ID of the volume.
    :param path: path of its block device.
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
        self.path = path
        self._size_gb = volume.get('size')
        self._about: Mapping[str, str] = (
            volume.get('volume_image_metadata') or {})
        if not uuidutils.is_uuid_like(self._about.get('image_id')):
            # The owner of the volume can write anything there.
            self._about = {}
        self.target = modes.mount_directory(options, identifier)
        self._holds_image = False
        #: The filesystem on the volume, once there is one.
        self.kind = ''
        #: The image of which the root filesystem is made.
        self.image: objects.ImageMeta = objects.ImageMeta()

    def refusal(self, reason: str) -> exception.BuildAbortException:
        """Return the exception for a volume from which no host can boot.

        :param reason: what is wrong with the volume.
        """
        return exception.BuildAbortException(
            instance_uuid=self._instance.uuid,
            reason=f'the server cannot boot from volume {self._identifier}: '
                   f'{reason}')

    def is_ready(self) -> bool:
        """Whether a server can boot from the volume as it is.

        :raises nova.exception.BuildAbortException: if it never can.
        :raises OSError: if the volume cannot be read.
        """
        allowed = self._options.volume_filesystems
        found = probe.content(self.path)
        if found in allowed:
            self.kind = found
            state = rootfs.root_state(self.path, found, self.target)
            if state == rootfs.OTHER:
                raise self.refusal('its filesystem has files, but no root '
                                   'filesystem of a system')
            if state == rootfs.UNFINISHED and not self._about.get('image_id'):
                raise self.refusal('its filesystem is empty')
            return state == rootfs.READY
        if found:
            self._holds_image = self._is_the_image()
            if not self._holds_image:
                raise self.refusal(
                    modes.root_refusal(found, allowed))
        elif not self._about.get('image_id'):
            raise self.refusal(modes.root_refusal('', allowed))
        return False

    def _is_the_image(self) -> bool:
        """Whether the volume holds exactly what Cinder has copied to it."""
        checksum, size = self._checksum()
        if not checksum or not size or not self._about.get('image_id'):
            return False
        LOG.info('Comparing volume %(volume)s with image %(image)s',
                 {'volume': self._identifier,
                  'image': self._about['image_id']}, instance=self._instance)
        return rootfs.contains_image(self.path, size, checksum)

    def _checksum(self) -> tuple[str, int]:
        size = str(self._about.get('size') or '')
        return (self._about.get('checksum') or '',
                int(size) if size.isdecimal() else 0)

    def fetch(self, context: nova_context.RequestContext) -> str:
        """Import the image of the volume into LXD.

        :param context: for requests to Glance.
        :returns: LXD's fingerprint of it.
        :raises nova.exception.BuildAbortException: if it is gone, or does not
            fit.
        :raises nova.exception.NovaException: see
            :meth:`.cache.ImageStore.ensure`.
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

    def _copy_on_volume(self, image_id: str) -> _CopyOnVolume | None:
        """Take the image from the volume, since Glance does not have it.

        :returns: what to read it from; None if LXD has it from the volume,
            which an interrupted first boot has wiped since.
        """
        checksum, size = self._checksum()
        # The owner of the volume can change its image metadata in Cinder. So
        # this must neither become the image with that ID for other servers
        # nor be replaced by one that the host has already.
        self.image = objects.ImageMeta.from_dict({
            'id': str(uuid.uuid5(uuid.UUID(self._identifier), checksum)),
            'size': size, 'name': self._about.get(
                'image_name') or image_id, 'properties': {}})
        if self._holds_image:
            return _CopyOnVolume(self.path, size)
        if self._images.has(self.image.id):
            return None
        raise self.refusal(
            f'its image {image_id}, of which its root filesystem has to be '
            f'made at the first boot, is not in Glance any more')

    def make_filesystem(self) -> None:
        """Replace the image by an empty filesystem, unless there is one.

        :raises OSError: if the volume has been changed, or cannot be written.
        """
        if self.kind:
            return
        if self._holds_image:
            checksum, size = self._checksum()
            rootfs.wipe_image(self.path, size, checksum)
        self.kind = self._options.volume_filesystems[0]
        mounts.make_filesystem(self.path, self.kind,
                               self._identifier[:mounts.LABEL_LENGTH])

    def close(self) -> None:
        """Unmount the volume; an error is logged only, since it is raised
        again when the root filesystem is mounted."""
        try:
            rootfs.close_staging(self.target)
        except OSError as error:
            LOG.warning('Could not unmount volume %(volume)s after unpacking: '
                        '%(error)s',
                        {'volume': self._identifier, 'error': error},
                        instance=self._instance)


class _CopyOnVolume:
    """The image on a volume, with the interface of Glance's client.

    :param path: path of the volume's block device.
    :param size: size of the image in bytes.
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
