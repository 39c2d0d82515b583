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

"""A Glance in memory, for tests whose subject is the driver and LXD.

It offers what the driver uses of :class:`nova.image.glance.API`.
"""

from __future__ import annotations

import errno
import hashlib
from typing import Any, BinaryIO
import uuid

from nova import exception
from nova import objects

CHUNK = 64 * 1024


class MemoryGlance:
    """Keeps images, and can misbehave on request.

    :ivar downloads: ids of the images that were downloaded, in order.
    :ivar damage: set to a function of bytes to change what downloads give,
        so that they no longer fit the recorded checksum.
    """

    def __init__(self) -> None:
        self._images: dict[str, dict[str, Any]] = {}
        self._data: dict[str, bytes] = {}
        self.downloads: list[str] = []
        self.damage: Any = None

    def add(self, data: bytes, name: str = 'image', min_disk: int = 0,
            **properties: str) -> str:
        """Upload an image.

        :param data: its content.
        :param name: its name.
        :param min_disk: GiB that a flavor's disk must have.
        :param properties: its properties.
        :returns: its id.
        """
        image_id = str(uuid.uuid4())
        self._images[image_id] = {
            'id': image_id, 'name': name, 'status': 'active',
            'disk_format': 'raw', 'container_format': 'bare',
            'min_disk': min_disk, 'min_ram': 0, 'owner': 'fake',
            'properties': dict(properties)}
        self._store(image_id, data)
        return image_id

    def _store(self, image_id: str, data: bytes) -> None:
        self._data[image_id] = data
        self._images[image_id].update(
            size=len(data), checksum=hashlib.md5(
                data, usedforsecurity=False).hexdigest(), status='active')
        self._images[image_id]['properties'].update(
            os_hash_algo='sha512', os_hash_value=hashlib.sha512(
                data).hexdigest())

    def meta(self, image_id: str) -> objects.ImageMeta:
        """Describe an image the way Nova hands it to a driver."""
        return objects.ImageMeta.from_dict(self._images[image_id])

    def data(self, image_id: str) -> bytes:
        """Give the content of an image."""
        return self._data[image_id]

    # -- what nova.image.glance.API offers ----------------------------------

    def get(self, context: Any, image_id: str, include_locations: bool = False,
            show_deleted: bool = True) -> dict[str, Any]:
        try:
            return dict(self._images[image_id])
        except KeyError:
            raise exception.ImageNotFound(image_id=image_id) from None

    def create(self, context: Any, image_info: dict[str, Any],
               data: BinaryIO | None = None) -> dict[str, Any]:
        image_id = str(uuid.uuid4())
        self._images[image_id] = {
            'status': 'queued', 'min_disk': 0, 'min_ram': 0, 'owner': 'fake',
            'size': 0, 'properties': {}, **image_info, 'id': image_id}
        if data is not None:
            self.update(context, image_id, {}, data)
        return self.get(context, image_id)

    def update(self, context: Any, image_id: str, image_info: dict[str, Any],
               data: Any = None, purge_props: bool = False) -> dict[str, Any]:
        image = self._images.get(image_id)
        if image is None:
            raise exception.ImageNotFound(image_id=image_id)
        changes = dict(image_info)
        properties = changes.pop('properties', {})
        if purge_props:
            image['properties'] = {}
        image['properties'].update(properties)
        image.update(changes)
        if data is not None:
            self._store(image_id, b''.join(iter(lambda: data.read(CHUNK),
                                                b'')))
        return self.get(context, image_id)

    def delete(self, context: Any, image_id: str) -> None:
        if self._images.pop(image_id, None) is None:
            raise exception.ImageNotFound(image_id=image_id)
        self._data.pop(image_id, None)

    def download(self, context: Any, image_id: str, data: Any = None,
                 dest_path: str | None = None, trusted_certs: Any = None
                 ) -> Any:
        self.get(context, image_id)
        self.downloads.append(image_id)
        content = self._data[image_id]
        if self.damage is not None:
            content = self.damage(content)
        chunks = (content[start:start + CHUNK]
                  for start in range(0, len(content), CHUNK))
        if data is None:
            return chunks
        for chunk in chunks:
            data.write(chunk)
        self._check(image_id, content)
        return None

    def _check(self, image_id: str, content: bytes) -> None:
        """Do what glanceclient does at the end of a download."""
        expected = self._images[image_id]['properties']['os_hash_value']
        actual = hashlib.sha512(content).hexdigest()
        if actual != expected:
            raise OSError(errno.EPIPE,
                          f'Corrupt image download. Hash was {actual} '
                          f'expected {expected}')
