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
"""Inspection of an image in parallel with its transfer.

Decompressing an image takes longer than passing its bytes on, and LXD has to
process it after the last of them. So the inspection runs in a thread of its
own, and the transfer waits for it only when the queue is full.
"""

from __future__ import annotations

import queue
import threading

from nova_lxd_py.virt.image import format_inspector
from nova_lxd_py.virt.lxd import errors

#: Parts of an image (64 KiB each, from Glance) that may wait.
BACKLOG = 1024
#: Seconds between checks whether the inspection has failed or is cancelled.
PATIENCE = 1.0


class Inspection:
    """Runs an inspector in a thread of its own.

    :param inspector: has seen the beginning of the image.
    :param name: of the thread.
    """

    def __init__(self, inspector: format_inspector.Inspector,
                 name: str) -> None:
        self._inspector = inspector
        self._queue: queue.Queue[bytes | None] = queue.Queue(BACKLOG)
        self._cancelled = threading.Event()
        self._error: Exception | None = None
        self._content: format_inspector.Content | None = None
        self._thread = threading.Thread(target=self._run, name=name,
                                        daemon=True)
        self._thread.start()

    def feed(self, part: bytes) -> None:
        """Inspect the next part, waiting until there is room for it.

        :param part: any number of bytes.
        :raises format_inspector.UnacceptableImage: if no container can be
            made of what has been inspected so far.
        """
        self._put(part)

    def finish(self, timeout: float) -> format_inspector.Content:
        """Signal the end of the image, and wait for the result.

        :param timeout: seconds.
        :returns: what the image is.
        :raises format_inspector.UnacceptableImage: if no container can be
            made of it.
        :raises errors.DeadlineExceeded: if it takes too long.
        """
        self._put(None)
        self._thread.join(timeout)
        if self._error is not None:
            raise self._error
        if self._content is None:
            self.cancel()
            raise errors.DeadlineExceeded(
                'The inspection of the image did not end in time')
        return self._content

    def cancel(self) -> None:
        """End the inspection, without waiting for that."""
        self._cancelled.set()

    def _put(self, item: bytes | None) -> None:
        while True:
            if self._error is not None:
                raise self._error
            try:
                self._queue.put(item, timeout=PATIENCE)
                return
            except queue.Full:
                continue

    def _run(self) -> None:
        try:
            while not self._cancelled.is_set():
                try:
                    part = self._queue.get(timeout=PATIENCE)
                except queue.Empty:
                    continue
                if part is None:
                    self._content = self._inspector.finish()
                    return
                self._inspector.feed(part)
        except Exception as exc:
            self._error = exc
