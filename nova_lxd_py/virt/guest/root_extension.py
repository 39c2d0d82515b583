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

"""Temporary extension of the quota of a full root disk.

LXD keeps a file of its own (``backup.yaml``) on the root disk and writes it
with every change. If the guest has filled the disk up to its quota, LXD can
neither change nor start nor copy the instance. :class:`.guest.Guest` extends
the quota then and tries again, with every change except stopping and deleting
the instance; the next start after the guest has freed space removes the
extension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import contextlib
import functools
import os
import time
from typing import TYPE_CHECKING, TypeVar

from oslo_log import log as logging

from nova_lxd_py.virt.guest import root_check
from nova_lxd_py.virt.guest import root_quota
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.privileged import btrfs

if TYPE_CHECKING:
    from nova_lxd_py.virt.guest import guest as lxd_guest
    from nova_lxd_py.virt.lxd import session as lxd

LOG = logging.getLogger(__name__)

_T = TypeVar('_T')

#: Updates configuration keys and devices of an instance.
_Update = Callable[[Mapping[str, 'str | None'] | None,
                    Mapping[str, 'Mapping[str, str] | None'] | None], None]


class RootExtender:
    """Extends the root disk of an LXD instance while LXD needs space in it.

    :param session: the LXD session.
    :param guest: the instance.
    :param update: updates its configuration keys and devices, without an
        extension.
    """

    def __init__(self, session: lxd.Session, guest: lxd_guest.Guest,
                 update: _Update) -> None:
        self._session = session
        self._guest = guest
        self._update = update

    def with_space(
            self, change: Callable[[], _T],
            on_extension: Callable[[int], None] = lambda size: None) -> _T:
        """Call a function that changes the instance; extend its root disk and
        call it again if the disk is full.

        :param change: the function.
        :param on_extension: called with the new size in bytes.
        :returns: the function's result.
        :raises errors.DiskFull: if the disk may not be extended any more.
        :raises errors.LXDError: if the change fails for another reason.
        """
        while True:
            try:
                return change()
            except errors.LXDError as exc:
                if root_quota.is_exceeded(exc):
                    on_extension(self._extend(exc))
                elif not (root_quota.may_be_exceeded(exc) and
                          self.extend_if_full(on_extension)):
                    raise

    def extend_if_full(
            self, on_extension: Callable[[int], None] = lambda size: None
            ) -> bool:
        """Extend the root disk if LXD cannot write to it.

        :param on_extension: called with the new size in bytes.
        :returns: whether it was extended.
        :raises errors.DiskFull: if it may not be extended any more.
        :raises errors.LXDError: if LXD refuses it.
        """
        extended = False

        def note(size: int) -> None:
            nonlocal extended
            extended = True
            on_extension(size)

        # LXD writes to the disk for an update only if that changes something.
        self.with_space(functools.partial(
            self._update, {root_quota.KEY_SPACE_CHECK: str(time.time())},
            None), note)
        self.with_space(functools.partial(
            self._update, {root_quota.KEY_SPACE_CHECK: None}, None), note)
        return extended

    def _extend(self, cause: errors.LXDError) -> int:
        """Extend the quota of the root disk by as much as is necessary.

        :param cause: raised if the disk has no quota that could be extended.
        :returns: the new size in bytes.
        """
        guest = self._guest.reload()
        root = guest.devices.get(root_quota.DEVICE, {})
        size = root_quota.size_bytes(root)
        if size is None:
            raise cause
        own = guest.config.get(root_quota.KEY_ROOT_QUOTA, root['size'])
        limit = (root_quota.size_bytes({'size': own}) or
                 size) + root_quota.MAX_EXTENSION
        if size >= limit:
            raise errors.DiskFull(
                f'The root disk of LXD instance {guest.name} is full, and LXD '
                f'needs space in it: {cause.message}') from cause
        LOG.warning('Root disk of LXD instance %s is full, which keeps LXD '
                    'from changing it; extending its quota of %s until its '
                    'next start with enough free space', guest.name, own,
                    instance_uuid=guest.uuid)
        while True:
            size += root_quota.EXTENSION
            larger = root_quota.extended(root, size)
            try:
                self._update({root_quota.KEY_ROOT_QUOTA: own},
                             {root_quota.DEVICE: larger})
                return size
            except errors.LXDError as exc:
                # The usage can exceed the present quota by much.
                if not root_quota.is_exceeded(exc):
                    raise
                if size >= limit:
                    raise errors.DiskFull(
                        f'The quota of the root disk of LXD instance '
                        f'{guest.name} cannot be extended: {exc.message}'
                        ) from exc
                self._make_space(guest, root['pool'], limit)

    def _make_space(self, guest: lxd_guest.Guest, pool: str, size: int
                    ) -> None:
        """Raise the quota on a btrfs pool, where LXD needs space in the disk
        to raise it. LXD sets the quota that it is told next.

        :param pool: name of the storage pool.
        :param size: the quota in bytes.
        """
        directory = os.path.join(root_check.lxd_directory(self._session),
                                 'storage-pools', pool)
        # Pools are not visible in the mount namespace of the host with snaps,
        # and only those of btrfs need this.
        if os.path.isdir(directory):
            with contextlib.suppress(OSError):
                btrfs.set_quota(directory, guest.container, size)
