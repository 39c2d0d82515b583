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
"""What is wrong with an image, from the errors and logs of LXD.

LXD's own text can name paths of the host and is for the operator's log only.
"""

from __future__ import annotations

import re

from oslo_log import log as logging

from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import session as lxd

LOG = logging.getLogger(__name__)

#: What LXD says when it could not make a root disk of an image, and what that
#: means to the image's owner. The first match wins.
_CREATE_FAILURES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("architecture isn't supported",),
     'it is for processors that this host does not have'),
    (('unsupported compression', 'unsupported image format'),
     'LXD on this host cannot unpack it; upload it as a rootfs tarball '
     'compressed with gzip or xz'),
    (('executable file not found', 'unsquashfs: not found'),
     'this host lacks the tool that unpacks it; the operator has to install '
     'squashfs-tools, xz or zstd, or upload it compressed with gzip'),
    (('unpack failed', 'failed to unpack', 'failed unpacking',
      'error unpacking', 'failed to run: tar', 'failed to run: unsquashfs',
      'failed to extract'),
     'LXD could not unpack it; its content is damaged, upload it again'),
)
_DISK_FULL = ('disk quota exceeded', 'no space left on device', 'qgroup')

#: Bytes of the log of a start to read.
_MAX_LOG = 256 << 10

#: How liblxc reports that it could not run the image's init.
_EXEC_FAILED = re.compile(
    r' - ((?:(?! - )[^\n]){1,80}) - Failed to exec "/sbin/init"')
_EXEC_REASONS = {
    'No such file or directory': 'there is no /sbin/init in it, or what that '
                                 'needs to run is missing',
    'Permission denied': 'its /sbin/init is not executable',
    'Exec format error': 'its /sbin/init is not a program for the processors '
                         'of this host',
}


def is_disk_full(error: errors.LXDError) -> bool:
    """Check whether LXD ran out of space while it unpacked an image."""
    return any(phrase in error.message.lower() for phrase in _DISK_FULL)


def create_reason(error: errors.LXDError) -> str | None:
    """Explain why LXD could not make a root disk of an image.

    :param error: the error from LXD.
    :returns: what is wrong with the image, None if it is not to blame.
    """
    text = error.message.lower()
    for phrases, reason in _CREATE_FAILURES:
        if any(phrase in text for phrase in phrases):
            return reason
    return None


def start_reason(session: lxd.Session, name: str) -> str | None:
    """Explain why LXD could not start an instance made from an image.

    :param session: the LXD session.
    :param name: name of the LXD instance, which has just failed to start.
    :returns: what is wrong with the image, None if it is not to blame.
    """
    log = bytearray()
    try:
        with session.download('instances', name, 'logs', 'lxc.log') as (
                _headers, chunks):
            for chunk in chunks:
                log += chunk
                if len(log) > _MAX_LOG:
                    break
    except errors.LXDError as exc:
        LOG.debug('Could not read the log of LXD instance %s: %s', name, exc)
        return None
    found = _EXEC_FAILED.search(log.decode('utf-8', 'replace'))
    if found is None:
        return None
    return _EXEC_REASONS.get(found[1],
                             f'its /sbin/init cannot be run ({found[1]})')
