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

"""The empty image of LXD instances whose root filesystem is on a volume.

LXD cannot start an instance that was created without an image, because the
directory for its root is missing. This image has that directory and nothing
else.
"""

from __future__ import annotations

import hashlib
import io
import tarfile

from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import session as lxd

#: In the image, so that operators see what it is.
_DESCRIPTION = 'Empty root disk of servers that boot from volumes'


def ensure(session: lxd.Session) -> str:
    """Ensure that the empty image is in LXD.

    :param session: the LXD session.
    :returns: its fingerprint.
    :raises errors.LXDError: if LXD does not accept it.
    """
    architecture = session.server['environment']['architectures'][0]
    content = archive(architecture)
    fingerprint = hashlib.sha256(content).hexdigest()
    try:
        session.get('images', fingerprint)
    except errors.NotFound:
        try:
            session.upload('images', chunks=[content], headers={
                'Content-Type': 'application/octet-stream'})
        except errors.AlreadyExists:
            # Another thread has just imported it.
            pass
    return fingerprint


def archive(architecture: str) -> bytes:
    """Write the image; it is always the same, byte by byte.

    :param architecture: LXD's name of the host's.
    :returns: an uncompressed tarball.
    """
    metadata = (f'architecture: {architecture}\n'
                f'creation_date: 1\n'
                f'properties:\n'
                f'  description: {_DESCRIPTION}\n').encode()
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w', format=tarfile.PAX_FORMAT) as tar:
        entry = tarfile.TarInfo('metadata.yaml')
        entry.size, entry.mode = len(metadata), 0o644
        tar.addfile(entry, io.BytesIO(metadata))
        entry = tarfile.TarInfo('rootfs')
        entry.type, entry.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(entry)
    return out.getvalue()
