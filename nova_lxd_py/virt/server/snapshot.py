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

from collections.abc import Callable, Iterator, Mapping
import contextlib
import functools
import time
from typing import Any
from urllib import parse

from nova.compute import power_state
from nova.compute import task_states
from nova import context as nova_context
from nova import exception
from nova.image import glance
from nova import objects
from oslo_log import log as logging
from oslo_utils import units

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.guest import root_quota
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import session as lxd
from nova_lxd_py.virt.volume import server_volumes

LOG = logging.getLogger(__name__)

#: LXD image aliases of images under way begin so, then follow the uuids of
#: the server and of the Glance image.
ALIAS_PREFIX = 'snapshot-'

#: What every LXD can compress with.
FALLBACK_COMPRESSION = 'gzip'

#: Seconds between lines about the progress in the log.
REPORT_INTERVAL = 5

#: Seconds between attempts to thaw a server while LXD cannot be reached.
RETRY_INTERVAL = 1

#: LXD's name for the progress of making an image.
_PACK_PROGRESS = 'create_image_from_container_pack_progress'

UpdateTaskState = Callable[..., None]


class SnapshotOps:
    """Creates Glance images of servers.

    :param session: the LXD session.
    :param guests: the driver's LXD instances.
    :param image_api: Glance.
    :param volumes: Cinder volumes.
    """

    def __init__(self, session: lxd.Session,
                 guests: registry.GuestRegistry, image_api: glance.API,
                 volumes: server_volumes.ServerVolumes) -> None:
        self._session = session
        self._options = session.options
        self._guests = guests
        self._image_api = image_api
        self._volumes = volumes
        #: UUIDs of quiesced instances that Nova has yet to unquiesce.
        self._quiesced_by_nova: set[str] = set()

    def take(self, context: nova_context.RequestContext,
             instance: objects.Instance, image_id: str,
             update_task_state: UpdateTaskState) -> None:
        """Fill a Glance image with a server's root disk.

        The server's state stays what it is. LXD has nothing left of it
        afterwards, whatever the outcome.
        See :meth:`nova.virt.driver.ComputeDriver.snapshot`.

        :param image_id: the image that Nova has created, still empty.
        :param update_task_state: how Nova is told about the progress.
        :raises nova.exception.InstanceNotRunning: LXD does not have the
            server.
        :raises nova.exception.InstanceNotFound: it was deleted meanwhile.
        :raises errors.LXDError: LXD failed, for example for lack of space.
        """
        began = time.monotonic()
        update_task_state(task_state=task_states.IMAGE_PENDING_UPLOAD)
        name = self._image_api.get(context, image_id)['name']
        with contextlib.ExitStack() as cleanup:
            copy = self._copy(instance, cleanup)
            copied = time.monotonic()
            LOG.info('Copied the root disk in %.1f seconds for image %s',
                     copied - began, image_id, instance=instance)
            try:
                fingerprint = self._publish(instance, image_id, copy, cleanup)
            except errors.LXDError as exc:
                if self._guests.find(
                        instance, lxd_guest.ROLE_SNAPSHOT) is None:
                    LOG.info('Cancelled image %s: the server is being deleted',
                             image_id, instance=instance)
                    raise exception.InstanceNotFound(
                        instance_id=instance.uuid) from exc
                raise
            packed = time.monotonic()
            # The upload may take long; do not hold the space until then.
            _quietly(copy.delete)
            update_task_state(
                task_state=task_states.IMAGE_UPLOADING,
                expected_state=task_states.IMAGE_PENDING_UPLOAD)
            size = self._upload(context, instance, image_id, fingerprint,
                                _metadata(instance, name))
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
            self.delete_snapshots(instance)
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
            cleanup.callback(_quietly, lambda: self._delete_copy(instance))
            with self._quiesced(instance, guest):
                return self._guests.create(
                    lxd_guest.lxd_name(instance,
                                       lxd_guest.ROLE_SNAPSHOT),
                    {'type': 'copy', 'source': guest.name,
                     'instance_only': True},
                    {lxd_guest.KEY_UUID: instance.uuid,
                     lxd_guest.KEY_ROLE: lxd_guest.ROLE_SNAPSHOT,
                     # It never runs, so it needs no uid range of its own.
                     'security.idmap.isolated': 'false'},
                    devices, timeout=self._options.image_timeout)

    def _publish(self, instance: objects.Instance, image_id: str,
                 copy: lxd_guest.Guest, cleanup: contextlib.ExitStack
                 ) -> str:
        """Let LXD make an image of the copy.

        :returns: the image's fingerprint.
        """
        alias = f'{ALIAS_PREFIX}{instance.uuid}-{image_id}'
        # Unique, so that no image is the same as one that LXD has already,
        # such as one that it has imported from an earlier snapshot.
        properties = {'description': f'Image {image_id}'}
        report = _Report(instance, image_id)
        cleanup.callback(_quietly, lambda: self._delete_image(alias))

        def pack(compression: str) -> str:
            return self._session.post('images', body={
                'source': {'type': 'instance', 'name': copy.name},
                'compression_algorithm': compression,
                'aliases': [{'name': alias}],
                'properties': properties,
            }, timeout=self._options.image_timeout,
                progress=report.packing)['fingerprint']

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

    def _upload(self, context: nova_context.RequestContext,
                instance: objects.Instance, image_id: str, fingerprint: str,
                metadata: Mapping[str, Any]) -> int:
        """Stream the image from LXD to Glance.

        :returns: its size in bytes.
        """
        report = _Report(instance, image_id)
        with ImageSource(self._session, fingerprint,
                         report.uploaded) as source:
            image = self._image_api.update(context, image_id, dict(metadata),
                                           data=source, purge_props=False)
            # A connection that broke and was opened again would have gone
            # on with the rest only.
            if not source.is_complete or image.get('size') != source.position:
                raise exception.ImageUnacceptable(
                    image_id=image_id,
                    reason=f'Glance has {image.get("size")} bytes of '
                           f'{source.position}')
            return source.position

    # -- cleaning up --------------------------------------------------------

    def delete_snapshots(self, instance: objects.Instance | None = None
                         ) -> None:
        """Remove leftovers of interrupted snapshots from LXD.

        :param instance: the instance, None for all while no snapshot is
            running.
        :raises errors.LXDError: if LXD cannot remove them.
        """
        for guest in self._guests.all():
            if (guest.role == lxd_guest.ROLE_SNAPSHOT and
                    (instance is None or guest.uuid == instance.uuid)):
                guest.delete()
        prefix = ALIAS_PREFIX + (instance.uuid if instance else '')
        for url in self._session.get('images', 'aliases'):
            alias = parse.unquote(parse.urlparse(url).path.rpartition('/')[2])
            if alias.startswith(prefix):
                LOG.info('Removing LXD image %s, left by an interrupted '
                         'snapshot', alias, instance=instance)
                self._delete_image(alias)

    def recover(self) -> None:
        """Clean up after snapshots that were interrupted by the end of
        nova-compute; errors are logged only.
        """
        _quietly(self.delete_snapshots)
        self.thaw()

    def thaw(self) -> None:
        """Thaw servers that stayed frozen after they had been quiesced, such
        as while LXD could not be reached; errors are logged only.

        Servers that Nova has yet to unquiesce stay frozen.
        """
        _quietly(self._thaw_all)

    def _thaw_all(self) -> None:
        for guest in self._guests.all():
            if (lxd_guest.KEY_QUIESCED in guest.config and
                    guest.role != lxd_guest.ROLE_SNAPSHOT):
                _quietly(functools.partial(self._thaw, guest))

    def _thaw(self, guest: lxd_guest.Guest) -> None:
        with self._guests.lock(guest.uuid):
            if guest.uuid in self._quiesced_by_nova:
                return
            with contextlib.suppress(errors.InstanceNotFound):
                if lxd_guest.KEY_QUIESCED in guest.reload().config:
                    LOG.warning('Thawing LXD instance %s, which an '
                                'interrupted snapshot left frozen',
                                guest.name, instance_uuid=guest.uuid)
                    self._unfreeze(guest)

    def _delete_copy(self, instance: objects.Instance) -> None:
        copy = self._guests.find(instance, lxd_guest.ROLE_SNAPSHOT)
        if copy is not None:
            copy.delete()

    def _delete_image(self, alias: str) -> None:
        with contextlib.suppress(errors.NotFound):
            target = self._session.get('images', 'aliases', alias)['target']
            self._session.delete('images', target)

    # -- consistency --------------------------------------------------------

    def quiesce(self, instance: objects.Instance,
                image_meta: objects.ImageMeta) -> None:
        """Freeze an instance, so that its volumes are consistent.

        A container's processes can only be stopped altogether, so this is
        done for servers alone whose image asks for it.
        See :meth:`nova.virt.driver.ComputeDriver.quiesce`.

        :raises nova.exception.InstanceQuiesceNotSupported: if the image does
            not, or if a volume cannot be written to.
        """
        if not _must_quiesce(image_meta):
            # A snapshot of its volumes is made all the same, and gets at
            # least what has been written until now.
            with self._guests.changing(instance):
                self._volumes.flush(instance, self._guests.active(instance))
            raise exception.InstanceQuiesceNotSupported(
                instance_id=instance.uuid,
                reason='a container is quiesced by freezing it; set '
                       'os_require_quiesce=true on its image to allow that')
        with self._guests.changing(instance):
            guest = self._guests.active(instance)
            with contextlib.ExitStack() as failure:
                if guest.power_state == power_state.RUNNING:
                    # Nova does not call unquiesce then.
                    failure.callback(_quietly, lambda: self._unfreeze(guest))
                    self._freeze(guest)
                failed = self._volumes.flush(instance, guest)
                if failed:
                    raise exception.InstanceQuiesceNotSupported(
                        instance_id=instance.uuid,
                        reason='the host could not write its cached data of '
                               f'volumes {", ".join(failed)}')
                failure.pop_all()
            self._quiesced_by_nova.add(instance.uuid)

    def unquiesce(self, instance: objects.Instance) -> None:
        """Thaw an instance after :meth:`quiesce`; a thawed one is a success.

        See :meth:`nova.virt.driver.ComputeDriver.unquiesce`.
        """
        with self._guests.changing(instance):
            # From here on, :meth:`thaw` completes what fails.
            self._quiesced_by_nova.discard(instance.uuid)
            self._retry_unreachable(lambda: self._unquiesce(instance))

    def _unquiesce(self, instance: objects.Instance) -> None:
        guest = self._guests.active(instance)
        if lxd_guest.KEY_QUIESCED in guest.config:
            self._unfreeze(guest)

    def _retry_unreachable(self, action: Callable[[], None]) -> None:
        """Call a function, again while LXD cannot be reached, such as while
        it restarts, for ``[lxd] request_timeout``."""
        deadline = time.monotonic() + self._options.request_timeout
        while True:
            try:
                return action()
            except (errors.Unreachable, errors.OperationLost,
                    errors.DeadlineExceeded):
                if time.monotonic() > deadline:
                    raise
                time.sleep(RETRY_INTERVAL)

    @contextlib.contextmanager
    def _quiesced(self, instance: objects.Instance,
                  guest: lxd_guest.Guest) -> Iterator[None]:
        if (guest.power_state != power_state.RUNNING or
                not _must_quiesce(instance.image_meta)):
            yield
            return
        LOG.info('Freezing the guest while its root disk is copied, since the '
                 'image has os_require_quiesce', instance=instance)
        try:
            self._freeze(guest)
            yield
        finally:
            self._retry_unreachable(lambda: self._unfreeze(guest))

    @staticmethod
    def _freeze(guest: lxd_guest.Guest) -> None:
        guest.update(config={lxd_guest.KEY_QUIESCED: 'true'})
        guest.freeze()

    @staticmethod
    def _unfreeze(guest: lxd_guest.Guest) -> None:
        guest.unfreeze()
        guest.update(config={lxd_guest.KEY_QUIESCED: None})


class ImageSource:
    """An image of LXD as the file that Glance's client reads.

    The request to LXD is sent at the first read, in the thread of that read.

    :param session: the LXD session.
    :param fingerprint: LXD's name of the image.
    :param report: called with bytes read so far and their total number.
    """

    def __init__(self, session: lxd.Session, fingerprint: str,
                 report: Callable[[int, int], None]) -> None:
        self._session = session
        self._fingerprint = fingerprint
        self._report = report
        self._stack = contextlib.ExitStack()
        self._chunks: Iterator[bytes] | None = None
        self._pending = memoryview(b'')
        #: Bytes read so far.
        self.position = 0
        #: Bytes that LXD has announced.
        self.size = 0
        #: Whether everything has been read.
        self.is_complete = False

    def __enter__(self) -> ImageSource:
        return self

    def __exit__(self, *_exc: Any) -> None:
        self._stack.close()

    def read(self, size: int = -1) -> bytes:
        """Read on.

        :param size: most bytes to return; all that is there if negative.
        :returns: at least one byte, or nothing at the end.
        :raises errors.LXDError: LXD broke off before the end, so that no
            truncated image passes for a whole one.
        """
        if size < 0:
            return b''.join(iter(lambda: self.read(units.Mi), b''))
        if not self._pending and not self.is_complete:
            self._pending = memoryview(next(self._opened(), b''))
            if not self._pending:
                if self.position != self.size:
                    raise errors.OperationFailed(
                        f'LXD gave {self.position} of {self.size} bytes of '
                        f'image {self._fingerprint}')
                self.is_complete = True
        part, self._pending = self._pending[:size], self._pending[size:]
        self.position += len(part)
        self._report(self.position, self.size)
        return bytes(part)

    def _opened(self) -> Iterator[bytes]:
        if self._chunks is None:
            headers, self._chunks = self._stack.enter_context(
                self._session.download(
                    'images', self._fingerprint, 'export',
                    timeout=self._session.options.image_timeout))
            self.size = int(headers['Content-Length'])
        return self._chunks


class _Report:
    """Logs the progress every few seconds."""

    def __init__(self, instance: objects.Instance, image_id: str) -> None:
        self._instance = instance
        self._image_id = image_id
        self._next = time.monotonic() + REPORT_INTERVAL

    def packing(self, operation: Mapping[str, Any]) -> None:
        """Report what LXD says of the operation that makes the image."""
        # LXD makes one image at a time, and says nothing while it waits.
        said = (operation.get('metadata') or {}).get(
            _PACK_PROGRESS, 'waiting for LXD to begin')
        LOG.info('Making image %s: %s', self._image_id, said,
                 instance=self._instance)

    def uploaded(self, position: int, size: int) -> None:
        """Report how much has been sent."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + REPORT_INTERVAL
        LOG.info('Uploading image %(image)s: %(done).0f of %(size).0f MiB', {
            'image': self._image_id, 'done': position / units.Mi,
            'size': size / units.Mi}, instance=self._instance)


def _metadata(instance: objects.Instance, name: str) -> dict[str, Any]:
    """Describe the image the way Nova's own drivers do."""
    properties = {
        'kernel_id': instance.kernel_id,
        'ramdisk_id': instance.ramdisk_id,
        'image_location': 'snapshot',
        'image_state': 'available',
        'owner_id': instance.project_id,
    }
    if instance.os_type:
        properties['os_type'] = instance.os_type
    return {'status': 'active', 'name': name, 'disk_format': 'raw',
            'container_format': 'bare', 'properties': properties}


def _must_quiesce(image_meta: objects.ImageMeta) -> bool:
    return bool(image_meta.properties.get('os_require_quiesce', False))


def _quietly(action: Callable[[], None]) -> None:
    """Clean up; errors are logged, and the next snapshot, deletion or start
    tries again."""
    try:
        action()
    except errors.LXDError as exc:
        LOG.warning('Could not clean up after a snapshot: %s', exc)
