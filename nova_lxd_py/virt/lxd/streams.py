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

"""Content of requests that is not JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
import time

import requests

from nova_lxd_py.virt.lxd import errors


class UploadSource:
    """Iterator over the source of an upload that keeps its exception.

    :param chunks: the content.
    :param deadline: time on the monotonic clock at which the upload fails.
    :ivar error: the exception of the source, None if there was none.
    """

    def __init__(self, chunks: Iterable[bytes], deadline: float) -> None:
        self._chunks = chunks
        self._deadline = deadline
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[bytes]:
        try:
            for chunk in self._chunks:
                if time.monotonic() > self._deadline:
                    raise errors.DeadlineExceeded(
                        'The transfer to LXD took too long')
                if chunk:
                    yield chunk
        except Exception as exc:
            self.error = exc
            # requests passes other exceptions on unchanged; for LXD, it is a
            # broken connection.
            raise requests.exceptions.ConnectionError(
                'the source of the upload failed') from exc
