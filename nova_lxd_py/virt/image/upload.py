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

"""Upload of an LXD image to Glance, streamed without a copy on the disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import time
from typing import Any

from nova import context as nova_context
from nova import exception
from nova.image import glance
from nova import objects
from oslo_log import log as logging
from oslo_utils import units

from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import session as lxd

LOG = logging.getLogger(__name__)

#: Seconds between log lines about the progress of an upload.
REPORT_INTERVAL = 5


def upload(session: lxd.Session, image_api: glance.API,
           context: nova_context.RequestContext, instance: objects.Instance,
           image: Mapping[str, Any], fingerprint: str) -> int:
    """Fill a Glance image with an image of an instance.

    :param session: the LXD session.
    :param image_api: Glance.
    :param context: for requests to Glance.
    :param instance: the instance of which it is an image.
    :param image: ``id`` and ``name`` of the Glance image.
    :param fingerprint: LXD's name of its image.
    :returns: the size of the image in bytes.
    :raises errors.LXDError: if LXD does not deliver the whole image.
    :raises nova.exception.ImageUnacceptable: if Glance did not get all of it.
    """
    with ImageSource(session, fingerprint,
                     _Progress(instance, image['id'])) as source:
        stored = image_api.update(
            context, image['id'], _metadata(instance, image['name']),
            data=source, purge_props=False)
        # After a reconnect, only the rest would have been sent.
        if not source.is_complete or stored.get('size') != source.position:
            raise exception.ImageUnacceptable(
                image_id=image['id'],
                reason=f'Glance has {stored.get("size")} bytes of '
                       f'{source.position}')
        return source.position


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
        """Read the next part.

        :param size: maximum number of bytes; all that are left if negative.
        :returns: at least one byte, or nothing at the end.
        :raises errors.LXDError: if LXD broke off before the end, so that a
            truncated image is not taken for a whole one.
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


class _Progress:
    """Logs the progress of an upload every few seconds.

    :param instance: the instance.
    :param image_id: the Glance image.
    """

    def __init__(self, instance: objects.Instance, image_id: str) -> None:
        self._instance = instance
        self._image_id = image_id
        self._next = time.monotonic() + REPORT_INTERVAL

    def __call__(self, position: int, size: int) -> None:
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
