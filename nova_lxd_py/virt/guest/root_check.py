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

"""The root of an instance is a directory on its storage pool, and no link.

LXD reads and writes in it as root: when it makes an image of an instance,
when files are injected, when a rescue instance gets it as a disk. A root that
leads elsewhere would make that the host's files. Images are checked before LXD
gets them (:mod:`nova_lxd_py.virt.image.rootfs_rules`); this is the second
line, for whatever LXD or its tools make of an image nevertheless.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from oslo_log import log as logging

from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.privileged import rootfs_check

if TYPE_CHECKING:
    from nova_lxd_py.virt.guest import guest as lxd_guest
    from nova_lxd_py.virt.lxd import session as lxd

LOG = logging.getLogger(__name__)


def lxd_directory(session: lxd.Session) -> str:
    """Return where LXD keeps its data on this host, '' if that is unknown."""
    if session.options.directory:
        return session.options.directory
    if session.is_local:
        return os.path.dirname(os.path.realpath(session.endpoint))
    return ''


def ensure_own_root(session: lxd.Session, guest: lxd_guest.Guest) -> None:
    """Check that the root of an instance is what the driver has made.

    Pools whose root disks are not mounted on this host are left out.

    :param session: the LXD session.
    :param guest: the LXD instance.
    :raises errors.OperationFailed: if it is a link, or no directory.
    """
    directory = lxd_directory(session)
    for device in guest.devices.values():
        if device.get('path') != '/' or not device.get('pool'):
            continue
        pool = os.path.join(directory, 'storage-pools', device['pool'])
        # Snaps have a mount namespace of their own.
        if not directory or not os.path.isdir(pool):
            return
        try:
            found = rootfs_check.find(pool, guest.container)
        except PermissionError:
            found = rootfs_check.find_as_root(pool, guest.container)
        if found == rootfs_check.REPLACED:
            LOG.critical('The root of LXD instance %s is not a directory of '
                         'the storage pool %s: nothing is read from it or '
                         'written to it. Look for what has replaced it before '
                         'you delete the instance', guest.name, pool,
                         instance_uuid=guest.uuid)
            raise errors.OperationFailed(
                f'The root of LXD instance {guest.name} is not a directory of '
                f'its storage pool')
