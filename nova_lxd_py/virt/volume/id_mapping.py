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

"""User and group IDs of a guest, with which the host mounts its volumes."""

from __future__ import annotations

import errno
import json

from oslo_log import log as logging

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.volume import base

LOG = logging.getLogger(__name__)


def id_range(guest: lxd_guest.Guest) -> tuple[int, int, int]:
    """Return which IDs of the host a guest has, or gets at its next start.

    :param guest: the guest, just read.
    :returns: first user ID, first group ID, and how many; 0 for a guest with
        the IDs of the host.
    :raises base.Refused: if LXD has not assigned any.
    """
    if guest.config.get('security.privileged') == 'true':
        return 0, 0, 0
    entries = json.loads(guest.config.get('volatile.idmap.next') or '[]')
    first = {}
    for entry in entries:
        if entry['Nsid'] == 0:
            for flag, kind in (('Isuid', 'uid'), ('Isgid', 'gid')):
                if entry[flag]:
                    first[kind] = entry
    if set(first) != {'uid', 'gid'}:
        raise base.Refused('LXD has not given the server a range of user ids')
    return (first['uid']['Hostid'], first['gid']['Hostid'],
            min(entry['Maprange'] for entry in first.values()))


def raise_if_unsupported(guest: lxd_guest.Guest, identifier: str,
                         error: OSError) -> None:
    """Convert the error of a kernel that cannot mount with mapped IDs.

    :param guest: the guest for which the host mounts the volume.
    :param identifier: Cinder's ID of the volume.
    :param error: the error of the mount.
    :raises base.Refused: if it is that one.
    """
    if error.errno in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        LOG.error('The kernel cannot mount volume %(volume)s with mapped ids, '
                  'which takes Linux 5.12, for xfs 5.19: %(error)s',
                  {'volume': identifier, 'error': error},
                  instance_uuid=guest.uuid)
        raise base.Refused(
            'the kernel of the host cannot map the user ids of its '
            'filesystem; attach it as a block device') from None
