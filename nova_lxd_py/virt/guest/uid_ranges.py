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

"""Uid ranges that are shared by the instances of an OpenStack project.

LXD allocates a range only for an instance. Therefore the driver creates an
empty one for each project, the *range holder*, and configures its range
explicitly on all templates and instances of the project. LXD does not allocate
a range that an instance has.
"""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import hashlib
import json
import time
from typing import Any

from oslo_concurrency import lockutils
from oslo_config import cfg
from oslo_log import log as logging

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.guest import roles
from nova_lxd_py.virt.host import subordinate_ids
from nova_lxd_py.virt.lxd import errors

LOG = logging.getLogger(__name__)

#: Fingerprint of the image whose template the LXD instance is.
KEY_TEMPLATE = 'user.nova.template'
#: Time (seconds since 1970) since when a template or range has been unused.
KEY_UNUSED = 'user.nova.unused_since'

ISOLATED = 'security.idmap.isolated'
BASE = 'security.idmap.base'
SIZE = 'security.idmap.size'
_ALLOCATED = 'volatile.idmap.base'

#: Part of the error of LXD if its host ids are exhausted.
_NO_RANGE = 'not enough uid/gid'
#: Maximum number of unused ranges that are released then.
_FREED_AT_ONCE = 8

#: Seconds for which an unused range or template is kept at least, because a
#: new instance may be about to use it.
GRACE = 600


class ProjectUIDRanges:
    """Uid ranges of projects, allocated on demand.

    :param options: the ``[lxd]`` option group.
    :param guests: the driver's LXD instances.
    """

    def __init__(self, options: cfg.ConfigOpts.GroupAttr,
                 guests: registry.GuestRegistry) -> None:
        self._options = options
        self._guests = guests
        #: Time of the last use of each range holder.
        self._asked: dict[str, float] = {}

    def config_for(self, project_id: str) -> dict[str, str]:
        """Return the uid range of a project; allocate one if it has none.

        :param project_id: id of the OpenStack project.
        :returns: configuration keys for the project's instances and templates.
        :raises errors.LXDError: if LXD has no free range.
        """
        name = auxiliary_name(self._options, 'uids', project_id)
        with lock(name):
            self._asked[name] = time.time()
            try:
                holder = self._guests.by_name(name)
                if not holder.config.keys() & {BASE, _ALLOCATED}:
                    LOG.warning('Uid range holder %s of project %s is '
                                'incomplete; recreating it', name, project_id)
                    holder.delete()
                    holder = self._create_holder(name, project_id)
            except errors.NotFound:
                holder = self._create_holder(name, project_id)
            # LXD has allocated the range, for this instance only. Configure
            # it explicitly, so that it does not change.
            base = holder.config.get(BASE) or holder.config[_ALLOCATED]
            if BASE not in holder.config or KEY_UNUSED in holder.config:
                holder.update(config={BASE: base, KEY_UNUSED: None})
            return {BASE: base, SIZE: str(subordinate_ids.RANGE)}

    def _create_holder(self, name: str, project_id: str) -> lxd_guest.Guest:
        config = {
            lxd_guest.KEY_ROLE: roles.TEMPLATE,
            lxd_guest.KEY_PROJECT: project_id, 'boot.autostart': 'false',
            ISOLATED: 'true', SIZE: str(subordinate_ids.RANGE)}
        # Instances exist already if the holder has been deleted manually.
        known = [guest.config[BASE] for guest in self._guests.all()
                 if guest.config.get(lxd_guest.KEY_PROJECT) == project_id
                 and guest.config.get(BASE)]
        if known:
            config[BASE] = known[0]

        def create() -> lxd_guest.Guest:
            return self._guests.create(name, {'type': 'none'}, config,
                                       root_device(self._options))
        try:
            holder = create()
        except errors.LXDError as exc:
            if (_NO_RANGE not in exc.message.lower() or
                    not self._release_unused()):
                raise
            holder = create()
        first = int(holder.config[_ALLOCATED])
        LOG.info('Allocated host uids %d to %d for instances of project %s',
                 first, first + subordinate_ids.RANGE - 1, project_id)
        return holder

    def _release_unused(self) -> bool:
        """Release uid ranges of projects without instances prematurely.

        Templates that were shifted to these ranges are deleted.

        :returns: whether a range was released.
        """
        guests = self._guests.all()
        needed = {guest.config.get(BASE) for guest in guests
                  if guest.role != roles.TEMPLATE}
        idle = [guest for guest in guests if _holds_range(guest) and
                guest.config.get(BASE) not in needed]
        idle.sort(key=lambda guest: self._asked.get(guest.name, 0.0))
        freed = False
        for holder in idle[:_FREED_AT_ONCE]:
            # A thread with this lock is about to use the range, or waits for
            # the lock that this thread has.
            with (contextlib.suppress(errors.NotFound,
                                      lockutils.AcquireLockFailedException),
                  lock(holder.name, blocking=False)):
                if time.time() - self._asked.get(holder.name, 0.0) < GRACE:
                    continue
                LOG.info('Releasing the uid range of project %s, which has no '
                         'instances on this host, because LXD has no free one',
                         holder.config.get(lxd_guest.KEY_PROJECT))
                for guest in guests:
                    if (KEY_TEMPLATE in guest.config and
                            guest.config.get(BASE) is not None and
                            guest.config[BASE] == holder.config.get(BASE)):
                        guest.delete()
                holder.delete()
                freed = True
        return freed


def of_guest(guest: lxd_guest.Guest) -> tuple[int, int, int] | None:
    """Return which IDs of the host a guest has, or gets at its next start.

    :param guest: the guest, just read.
    :returns: first user ID, first group ID, and how many; 0 for a guest with
        the IDs of the host; None if LXD has not assigned any.
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
        return None
    return (first['uid']['Hostid'], first['gid']['Hostid'],
            min(entry['Maprange'] for entry in first.values()))


def auxiliary_name(options: cfg.ConfigOpts.GroupAttr, kind: str,
                   *identity: str) -> str:
    """Return the name of an auxiliary LXD instance of the driver.

    :param options: the ``[lxd]`` option group.
    :param kind: its kind, which is part of the name.
    :param identity: what distinguishes it from others of its kind.
    """
    digest = hashlib.sha256('\0'.join(
        (options.storage_pool, *identity)).encode()).hexdigest()
    return f'nova-{kind}-{digest[:24]}'


def root_device(options: cfg.ConfigOpts.GroupAttr
                ) -> dict[str, Mapping[str, str]]:
    """Return the root disk device of an auxiliary LXD instance.

    :param options: the ``[lxd]`` option group.
    """
    return {'root': {'type': 'disk', 'path': '/',
                     'pool': options.storage_pool}}


def _holds_range(guest: lxd_guest.Guest) -> bool:
    return (guest.role == roles.TEMPLATE and
            KEY_TEMPLATE not in guest.config)


def lock(name: str, blocking: bool = True
         ) -> contextlib.AbstractContextManager[Any]:
    """Lock an auxiliary LXD instance.

    :param name: its name.
    :param blocking: whether to wait for the lock.
    :raises lockutils.AcquireLockFailedException: if it is not blocking and
        the lock is taken.
    """
    return lockutils.lock(f'lxd-template-{name}', lock_file_prefix=None,
                          blocking=blocking)
