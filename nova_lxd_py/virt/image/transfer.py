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
"""Transfer of one image from Glance to LXD, without a temporary copy.

One thread receives what Glance sends and checks signature and checksum (Nova's
and glanceclient's code does), another passes it on to LXD, and a third
inspects every byte (:mod:`nova_lxd_py.virt.image.inspection`). LXD gets the
last part only when all of the image has arrived and is correct: until then it
has an incomplete upload, which it discards when the connection is closed. If
the inspection, which may end later, finds a fault, LXD has an image without an
alias for a moment, which is never used.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
import errno
import hashlib
import io
import itertools
import queue
import tarfile
import threading
import time
from typing import Any
from urllib import parse
import uuid

from cryptography import exceptions as crypto_exceptions
from nova import conf as nova_conf
from nova import exception
from oslo_log import log as logging
import yaml

from nova_lxd_py.virt.image import format_inspector
from nova_lxd_py.virt.image import inspection as image_inspection
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import session as lxd

CONF = nova_conf.CONF
LOG = logging.getLogger(__name__)

#: Chunks of Glance's (64 KiB) that may wait to be passed on.
QUEUE_LENGTH = 64
#: Bytes to gather before passing them on: fewer, larger writes cost less.
BATCH = 1 << 20
#: Seconds between log lines about the progress of a transfer.
REPORT_INTERVAL = 5.0
#: Seconds between checks of the deadline while nothing arrives.
PATIENCE = 1.0

_MIB = float(1 << 20)


class _Cancelled(Exception):
    """Tells the download that its data is not needed any more."""


@dataclasses.dataclass(frozen=True)
class Imported:
    """The result of a finished transfer.

    :ivar fingerprint: LXD's name of the image.
    :ivar content: what the image was found to be.
    :ivar existed: whether LXD had an image of just this content already.
    """

    fingerprint: str
    content: format_inspector.Content
    existed: bool


class _Sink:
    """The file object to which Nova writes the image.

    :param deadline: when the transfer must be over, on the monotonic clock.
    """

    def __init__(self, deadline: float) -> None:
        self._queue: queue.Queue[bytes | None] = queue.Queue(QUEUE_LENGTH)
        self._deadline = deadline
        self._cancelled = threading.Event()
        self._error: BaseException | None = None

    # What nova.image.glance calls.

    def write(self, data: bytes) -> int:
        """Take the next part, waiting until there is room for it."""
        self._put(data)
        return len(data)

    def truncate(self, size: int = 0) -> int:
        """Do nothing: Nova calls it before it raises an exception for a
        signature that does not match."""
        return size

    # What the thread of the download calls.

    def close(self, error: BaseException | None) -> None:
        """Signal the end of the download.

        :param error: what went wrong, if anything did.
        """
        self._error = error
        try:
            self._put(None)
        except _Cancelled:
            pass

    def _put(self, item: bytes | None) -> None:
        while not self._cancelled.is_set():
            try:
                self._queue.put(item, timeout=PATIENCE)
                return
            except queue.Full:
                if time.monotonic() > self._deadline:
                    break
        raise _Cancelled('the transfer to LXD has ended early')

    # What the reader calls.

    def cancel(self) -> None:
        """Cancel the download, without waiting for its end."""
        self._cancelled.set()

    def __iter__(self) -> Iterator[bytes]:
        """Yield the data; at the end, raise the error of the download."""
        while True:
            try:
                item = self._queue.get(timeout=PATIENCE)
            except queue.Empty:
                if time.monotonic() > self._deadline:
                    raise errors.DeadlineExceeded(
                        'Glance did not deliver the image in time') from None
                continue
            if item is None:
                break
            yield item
        if self._error is not None:
            raise self._error


class Transfer:
    """The transfer of one image.

    :param session: the LXD session.
    :param image_api: :class:`nova.image.glance.API` or the like.
    :param image_meta: :class:`nova.objects.ImageMeta` with its id.
    :param max_unpacked: bytes that the image may have when unpacked.
    :param timeout: seconds that the transfer may take.
    :param instance: the instance for which this is done, for the log; or
        None.
    """

    def __init__(self, session: lxd.Session, image_api: Any, image_meta: Any,
                 max_unpacked: int, timeout: float, instance: Any) -> None:
        self._session = session
        self._image_api = image_api
        self._meta = image_meta
        self._timeout = timeout
        self._instance = instance
        self._inspector = format_inspector.Inspector(max_unpacked)
        self._content: format_inspector.Content | None = None
        self._inspection: image_inspection.Inspection | None = None
        self._is_complete = False
        self._sent_architecture: str | None = None
        self._digest = hashlib.sha256()
        self._received = 0
        self._began = time.monotonic()
        self._reported = self._began

    def run(self, context: Any, trusted_certs: Any,
            properties: dict[str, str]) -> Imported:
        """Transfer the image.

        :param context: the request's context, for Glance.
        :param trusted_certs: ids of certificates to which the image's
            signature must lead (:class:`nova.objects.TrustedCerts`), or None.
        :param properties: LXD image properties to give it.
        :returns: what LXD has now.
        :raises nova.exception.ImageUnacceptable: if it is not an image that a
            container can be made from; LXD has kept nothing of it.
        :raises nova.exception.NovaException: if Glance refuses, or the
            connection breaks off.
        :raises errors.LXDError: if LXD refuses, or the connection breaks
            off.
        """
        sink = _Sink(self._began + self._timeout)
        download = threading.Thread(
            target=self._download, args=(context, trusted_certs, sink),
            name=f'lxd-image-{self._meta.id}', daemon=True)
        download.start()
        try:
            return self._upload(iter(sink), properties)
        except format_inspector.UnacceptableImage as exc:
            raise exception.ImageUnacceptable(
                image_id=self._meta.id, reason=exc.reason) from exc
        finally:
            if self._inspection is not None:
                self._inspection.cancel()
            sink.cancel()
            download.join(2 * PATIENCE)

    # -- download from Glance -----------------------------------------------

    def _download(self, context: Any, trusted_certs: Any, sink: _Sink
                  ) -> None:
        # Log lines of this thread belong to the request as well.
        if hasattr(context, 'update_store'):
            context.update_store()
        try:
            self._image_api.download(context, self._meta.id, data=sink,
                                     trusted_certs=trusted_certs)
        except _Cancelled:
            sink.close(None)
        except Exception as exc:
            sink.close(self._convert_exception(exc))
        else:
            sink.close(None)

    def _convert_exception(self, exc: Exception) -> Exception:
        """Return the Nova exception for an error of the download."""
        if isinstance(exc, crypto_exceptions.InvalidSignature):
            return exception.ImageUnacceptable(
                image_id=self._meta.id,
                reason='its signature does not match its content')
        if isinstance(exc, OSError):
            # glanceclient has no exception of its own for it.
            if exc.errno == errno.EPIPE and 'Corrupt' in str(exc):
                return exception.ImageUnacceptable(
                    image_id=self._meta.id,
                    reason=f'what Glance delivers does not fit the checksum '
                           f'that it has recorded ({exc.strerror}); upload '
                           f'it again')
            servers = ', '.join(CONF.glance.api_servers or ())
            return exception.GlanceConnectionFailed(
                server=servers or '(from the service catalog)',
                reason=f'the download of image {self._meta.id} broke off: '
                       f'{exc}')
        return exc

    # -- upload to LXD ------------------------------------------------------

    def _upload(self, source: Iterator[bytes], properties: dict[str, str]
                ) -> Imported:
        body = self._body(source)
        boundary = uuid.uuid4().hex
        headers = {'X-LXD-properties': parse.urlencode(properties),
                   'Content-Type': f'multipart/form-data; boundary={boundary}'}
        chunks = self._multipart(boundary, body)
        existed = False
        try:
            result = self._session.upload(
                'images', chunks=chunks, headers=headers,
                timeout=self._left())
        except errors.AlreadyExists:
            # Imported for another Glance image with the same content; its
            # fingerprint is our own checksum.
            existed, result = True, {}
        except errors.LXDError:
            if self._is_complete:
                # If the image is to blame, the inspection has a better reason.
                self._inspected()
            raise
        fingerprint = self._digest.hexdigest()
        stored = result.get('fingerprint', fingerprint)
        if stored != fingerprint:
            raise errors.OperationFailed(
                f'LXD has stored something else ({stored}) than image '
                f'{self._meta.id} ({fingerprint})')
        try:
            content = self._inspected()
        except BaseException:
            if not existed:
                drop_unnamed(self._session, fingerprint)
            raise
        took = max(0.001, time.monotonic() - self._began)
        LOG.info('Image %s (%s, %.1f MiB, unpacked %.1f MiB) transferred '
                 'from Glance to LXD in %.1f s', self._meta.id,
                 content.kind.value, self._received / _MIB,
                 content.unpacked_size / _MIB, took,
                 instance=self._instance)
        return Imported(fingerprint, content, existed)

    def _left(self) -> float:
        """Return the seconds that are left, at least one."""
        return max(1.0, self._timeout - (time.monotonic() - self._began))

    def _body(self, source: Iterator[bytes]) -> Iterator[bytes]:
        """Read until it is certain what the image is.

        :returns: its root filesystem in the form that LXD gets.
        """
        head: list[bytes] = []
        pieces = self._rewritten(source, head)
        first = next(pieces, None)
        if first is None:
            return self._passed_on(head, source)
        return self._held_back(itertools.chain([first], pieces))

    def _rewritten(self, source: Iterator[bytes], head: list[bytes]
                   ) -> Iterator[bytes]:
        """Yield the root filesystem of an LXD image.

        :param head: gets what was read of an image of another kind, of which
            nothing is yielded.
        """
        for chunk in source:
            self._count(chunk)
            if self._inspector.kind is None:
                head.append(chunk)
            yield from self._inspector.process(chunk)
            if self._inspector.kind in (format_inspector.Kind.ROOTFS,
                                        format_inspector.Kind.SQUASHFS):
                return
        self._check_length()
        yield from self._inspector.end()
        self._content = self._inspector.content
        self._check_architecture()

    def _held_back(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """Yield the rewritten image, and its last part only when Glance, Nova
        and the inspection have found no fault."""
        held = bytearray()
        for piece in pieces:
            if len(held) >= BATCH:
                yield bytes(held)
                held.clear()
            held += piece
        self._is_complete = True
        yield bytes(held)

    def _passed_on(self, head: list[bytes], source: Iterator[bytes]
                   ) -> Iterator[bytes]:
        """Yield the image as it is, and its last part only when Glance and
        Nova have found no fault."""
        held = bytearray().join(head)
        if self._content is None:
            self._inspection = image_inspection.Inspection(
                self._inspector, f'lxd-inspect-{self._meta.id}')
            for chunk in source:
                self._count(chunk)
                self._inspection.feed(chunk)
                if len(held) >= BATCH:
                    yield bytes(held)
                    held.clear()
                held += chunk
            self._check_length()
        self._is_complete = True
        yield bytes(held)

    def _inspected(self) -> format_inspector.Content:
        """Wait for the result of the inspection of the whole image."""
        if self._content is None:
            assert self._inspection is not None
            self._content = self._inspection.finish(self._left())
            self._check_architecture()
        return self._content

    def _count(self, chunk: bytes) -> None:
        self._received += len(chunk)
        now = time.monotonic()
        if now - self._reported >= REPORT_INTERVAL:
            self._reported = now
            self._report(now - self._began)

    def _check_length(self) -> None:
        expected = self._size()
        if expected and self._received != expected:
            raise format_inspector.UnacceptableImage(
                f'Glance delivered {self._received} bytes of {expected}; '
                f'upload it again')

    def _size(self) -> int:
        if self._meta.obj_attr_is_set('size'):
            return self._meta.size or 0
        return 0

    def _report(self, elapsed: float) -> None:
        size = self._size()
        share = f'{100 * self._received / size:.0f} %, ' if size else ''
        LOG.info('Image %s is being transferred from Glance to LXD: %s%.1f '
                 'MiB, %.1f MiB/s', self._meta.id, share,
                 self._received / _MIB, self._received / _MIB / elapsed,
                 instance=self._instance)

    def _hashed(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            self._digest.update(chunk)
            yield chunk

    def _multipart(self, boundary: str, body: Iterator[bytes]
                   ) -> Iterator[bytes]:
        """Yield a form of generated metadata and the image, in the order
        that LXD wants."""
        self._sent_architecture = self._architecture()
        metadata = metadata_archive(self._sent_architecture)
        self._digest.update(metadata)
        yield (_part(boundary, 'metadata', 'metadata.tar') + metadata +
               b'\r\n' + _part(boundary, 'rootfs', 'rootfs'))
        yield from self._hashed(body)
        yield f'\r\n--{boundary}--\r\n'.encode()

    # -- architectures ------------------------------------------------------

    def _architectures(self) -> list[str]:
        """Return the architectures that this host can run, its own first."""
        return list(self._session.server.get('environment', {}).get(
            'architectures', ()))

    def _architecture(self) -> str:
        """Return the architecture that the image gets in LXD."""
        stated = (self._inspector.architecture or
                  self._meta.properties.get('hw_architecture'))
        if stated:
            return format_inspector.canonical_architecture(stated)
        return self._architectures()[0]

    def _check_architecture(self) -> None:
        content = self._content
        assert content is not None
        known = self._architectures()
        names = ' and '.join(known)
        stated = self._architecture()
        if stated not in known:
            raise format_inspector.UnacceptableImage(
                f'it is for {stated}, this host runs {names}; boot it on '
                f'another host, or use an image for this one')
        if self._sent_architecture not in (None, stated):
            raise format_inspector.UnacceptableImage(
                f'it is for {stated}, which comes too late in its archive; '
                f'put metadata.yaml before rootfs/')
        if content.programs and not content.programs.intersection(known):
            raise format_inspector.UnacceptableImage(
                f'its programs are for {" or ".join(sorted(content.programs))}'
                f', this host runs {names}; set the image property '
                f'hw_architecture so that it is scheduled to a host that can '
                f'run it')


def drop_unnamed(session: lxd.Session, fingerprint: str) -> None:
    """Delete an image unless it has got an alias meanwhile.

    :param session: the LXD session.
    :param fingerprint: LXD's name of the image, whose import failed.
    """
    try:
        image = session.get('images', fingerprint)
        if not image['aliases']:
            session.delete('images', fingerprint)
    except errors.NotFound:
        pass
    except errors.LXDError:
        LOG.exception('Could not delete LXD image %s after its import '
                      'failed; it ages out', fingerprint)


def metadata_archive(architecture: str) -> bytes:
    """Create the metadata archive that LXD needs with a root filesystem.

    Nothing in it depends on where the image came from, so that the same
    content always gets the same fingerprint.

    :param architecture: for which the image is, in LXD's terms.
    :returns: a tar archive.
    """
    content = yaml.safe_dump({
        'architecture': architecture, 'creation_date': 1,
        'properties': {'architecture': architecture}}).encode()
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode='w') as tar:
        entry = tarfile.TarInfo('metadata.yaml')
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
    return archive.getvalue()


def _part(boundary: str, name: str, filename: str) -> bytes:
    return (f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; '
            f'filename="{filename}"\r\nContent-Type: '
            f'application/octet-stream\r\n\r\n').encode()
