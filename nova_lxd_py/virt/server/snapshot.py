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

"""Images of servers: snapshots, backups and shelved servers.

LXD copies the server's root disk, makes a unified image of the copy, and the
driver streams it to Glance without storing it. On pools with copy-on-write the
copy takes a moment and the guest does not notice.

Why a copy and not one of LXD's snapshots: LXD keeps a snapshot mounted while
it packs it, cannot cancel the packing and cannot delete the instance
meanwhile. A copy is an LXD instance of its own: the server can be started,
stopped, resized or deleted at once, and deleting the copy ends the packing.

The copy has the server's UUID and a role of its own, the LXD image an alias,
so that leftovers of a crash are removed: before the next snapshot, with the
server's deletion, and when nova-compute starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
import contextlib
import time
from typing import Any
from urllib import parse

from nova.compute import task_states
from nova import context as nova_context
from nova import exception
from nova.image import glance
from nova import objects
from oslo_log import log as logging
from oslo_utils import units

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.guest import roles
from nova_lxd_py.virt.guest import root_quota
from nova_lxd_py.virt.image import upload as image_upload
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import session as lxd
from nova_lxd_py.virt.server import quiesce

LOG = logging.getLogger(__name__)

#: Prefix of the LXD aliases of images that are being made. The UUID of the
#: server follows, of which Nova makes one image at a time.
ALIAS_PREFIX = 'snapshot-'

#: What every LXD can compress with.
FALLBACK_COMPRESSION = 'gzip'

#: LXD's name for the progress of making an image.
_PACK_PROGRESS = 'create_image_from_container_pack_progress'

UpdateTaskState = Callable[..., None]


class SnapshotOps:
    """Creates Glance images of servers.

    :param session: the LXD session.
    :param guests: the driver's LXD instances.
    :param image_api: Glance.
    :param quiescer: freezes instances whose image asks for it.
    """

    def __init__(self, session: lxd.Session,
                 guests: registry.GuestRegistry, image_api: glance.API,
                 quiescer: quiesce.Quiescer) -> None:
        self._session = session
        self._options = session.options
        self._guests = guests
        self._image_api = image_api
        self._quiescer = quiescer
        #: Aliases that LXD may have; all before :meth:`recover`.
        self._aliases: set[str] = set()
        self._has_recovered = False

    def take(self, context: nova_context.RequestContext,
             instance: objects.Instance, image_id: str,
             update_task_state: UpdateTaskState) -> None:
        """Fill a Glance image with a server's root disk.

        The server's state stays what it is. LXD has nothing left of it
        afterwards, whatever the outcome.
        See :meth:`nova.virt.driver.ComputeDriver.snapshot`.

        :param image_id: the image that Nova has created, still empty.
        :param update_task_state: how Nova is told about the progress.
        :raises nova.exception.InstanceNotRunning: if LXD does not have the
            instance.
        :raises nova.exception.InstanceNotFound: if it is deleted meanwhile.
        :raises errors.LXDError: if LXD fails, for example for lack of
            space.
        """
        began = time.monotonic()
        update_task_state(task_state=task_states.IMAGE_PENDING_UPLOAD)
        image = self._image_api.get(context, image_id)
        with contextlib.ExitStack() as cleanup:
            copy = self._copy(instance, cleanup)
            copied = time.monotonic()
            LOG.info('Copied the root disk in %.1f seconds for image %s',
                     copied - began, image_id, instance=instance)
            try:
                fingerprint = self._publish(instance, image_id, copy, cleanup)
            except errors.LXDError as exc:
                if self._guests.find(instance, roles.SNAPSHOT) is None:
                    LOG.info('Cancelled image %s: the server is being deleted',
                             image_id, instance=instance)
                    raise exception.InstanceNotFound(
                        instance_id=instance.uuid) from exc
                raise
            packed = time.monotonic()
            # The upload may take long; do not hold the space until then.
            _quietly(copy.delete, instance)
            update_task_state(
                task_state=task_states.IMAGE_UPLOADING,
                expected_state=task_states.IMAGE_PENDING_UPLOAD)
            size = image_upload.upload(self._session, self._image_api,
                                       context, instance, image, fingerprint)
        LOG.info('Created image %(image)s of %(size).1f MiB in %(total).1f '
                 'seconds (copying %(copy).1f, packing %(pack).1f, uploading '
                 '%(upload).1f)', {
                     'image': image_id, 'size': size / units.Mi,
                     'total': time.monotonic() - began,
                     'copy': copied - began, 'pack': packed - copied,
                     'upload': time.monotonic() - packed}, instance=instance)

    # -- steps --------------------------------------------------------------

    def _copy(self, instance: objects.Instance, cleanup: contextlib.ExitStack
              ) -> lxd_guest.Guest:
        """Copy the root disk, without its volumes, ports and other devices."""
        with self._guests.changing(instance):
            self._delete_copy(instance)
            self._delete_image(ALIAS_PREFIX + instance.uuid)
            try:
                guest = self._guests.get(instance)
            except errors.NotFound as exc:
                raise exception.InstanceNotRunning(
                    instance_id=instance.uuid) from exc
            guest.ensure_own_root()
            # LXD takes over all devices that it is not told otherwise of;
            # a volume could not be deleted as long as the copy had it too.
            devices = {device: {'type': 'none'} for device in guest.devices}
            # LXD needs some space in the copy even if the disk is full.
            devices.update({device: root_quota.extended(
                value, (root_quota.size_bytes(value) or 0) +
                root_quota.MAX_EXTENSION)
                for device, value in guest.devices.items()
                if value.get('path') == '/'})
            cleanup.callback(_quietly, lambda: self._delete_copy(instance),
                             instance)
            with self._quiescer.quiesced(instance, guest):
                # On btrfs, the copy has the same quota before it gets another.
                return guest.with_space(lambda: self._guests.create(
                    roles.lxd_name(instance, roles.SNAPSHOT),
                    {'type': 'copy', 'source': guest.name,
                     'instance_only': True},
                    {lxd_guest.KEY_UUID: instance.uuid,
                     lxd_guest.KEY_ROLE: roles.SNAPSHOT,
                     # It never runs, so it needs no uid range of its own.
                     'security.idmap.isolated': 'false'},
                    devices, timeout=self._options.image_timeout))

    def _publish(self, instance: objects.Instance, image_id: str,
                 copy: lxd_guest.Guest, cleanup: contextlib.ExitStack
                 ) -> str:
        """Let LXD make an image of the copy.

        :returns: the image's fingerprint.
        """
        alias = ALIAS_PREFIX + instance.uuid
        # Unique, so that no image is the same as one that LXD has already,
        # such as one that it has imported from an earlier snapshot.
        properties = {'description': f'Image {image_id}'}
        cleanup.callback(_quietly, lambda: self._delete_image(alias),
                         instance)
        self._aliases.add(alias)

        def report(operation: Mapping[str, Any]) -> None:
            # LXD makes one image at a time, and says nothing while it waits.
            progress = (operation.get('metadata') or {}).get(
                _PACK_PROGRESS, 'waiting for LXD to begin')
            LOG.info('Making image %s: %s', image_id, progress,
                     instance=instance)

        def pack(compression: str) -> str:
            return self._session.post('images', body={
                'source': {'type': 'instance', 'name': copy.name},
                'compression_algorithm': compression,
                'aliases': [{'name': alias}],
                'properties': properties,
            }, timeout=self._options.image_timeout,
                progress=report)['fingerprint']

        wanted = self._options.snapshot_compression
        try:
            return pack(wanted)
        except errors.InvalidRequest as exc:
            # Refused before it began: the program is not there.
            if wanted == FALLBACK_COMPRESSION:
                raise
            LOG.warning('LXD cannot compress with %s ([lxd] '
                        'snapshot_compression), using %s: %s', wanted,
                        FALLBACK_COMPRESSION, exc, instance=instance)
        return pack(FALLBACK_COMPRESSION)

    # -- cleaning up --------------------------------------------------------

    def delete_image_of(self, instance: objects.Instance,
                        guests: Iterable[lxd_guest.Guest]) -> None:
        """Remove the image that an interrupted snapshot of an instance has
        left in LXD, or that one is making now.

        LXD is asked only where there may be one.

        :param instance: the instance.
        :param guests: LXD instances that it had.
        :raises errors.LXDError: if LXD cannot remove it.
        """
        alias = ALIAS_PREFIX + instance.uuid
        if (alias in self._aliases or not self._has_recovered or
                any(guest.role == roles.SNAPSHOT
                    for guest in guests)):
            self._delete_image(alias)

    def recover(self) -> None:
        """Clean up after snapshots that were interrupted by the end of
        nova-compute; errors are logged only.
        """
        _quietly(self._delete_leftovers)

    def _delete_leftovers(self) -> None:
        """Remove the leftovers of all snapshots, while none is running."""
        for guest in self._guests.all():
            if guest.role == roles.SNAPSHOT:
                guest.delete()
        for url in self._session.get('images', 'aliases'):
            alias = parse.unquote(parse.urlparse(url).path.rpartition('/')[2])
            if alias.startswith(ALIAS_PREFIX):
                LOG.info('Removing LXD image %s, left by an interrupted '
                         'snapshot', alias,
                         instance_uuid=alias.removeprefix(ALIAS_PREFIX))
                self._delete_image(alias)
        self._has_recovered = True

    def _delete_copy(self, instance: objects.Instance) -> None:
        copy = self._guests.find(instance, roles.SNAPSHOT)
        if copy is not None:
            copy.delete()

    def _delete_image(self, alias: str) -> None:
        # Also for one that LXD has made after a deletion found none.
        self._aliases.add(alias)
        with contextlib.suppress(errors.NotFound):
            target = self._session.get('images', 'aliases', alias)['target']
            self._session.delete('images', target)
        self._aliases.discard(alias)


def _quietly(action: Callable[[], None],
             instance: objects.Instance | None = None) -> None:
    """Clean up; errors are logged, and the next snapshot, deletion or start
    tries again.

    :param instance: the instance, None for all.
    """
    try:
        action()
    except errors.LXDError as exc:
        LOG.warning('Could not clean up after a snapshot: %s', exc,
                    instance=instance)
