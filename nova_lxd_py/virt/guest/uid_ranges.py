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

"""Uid ranges that the servers of an OpenStack project share.

A range must be written down before the first of them is there. LXD allocates
it for an empty instance, the *range holder* of the project, and every template
and server of the project names the same range explicitly. LXD leaves ranges
alone that any instance has.
"""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import hashlib
import time
from typing import Any

from oslo_concurrency import lockutils
from oslo_config import cfg
from oslo_log import log as logging

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.host import subordinate_ids
from nova_lxd_py.virt.lxd import errors

LOG = logging.getLogger(__name__)

#: Fingerprint of the image of which an LXD instance is the template.
KEY_TEMPLATE = 'user.nova.template'
#: Since when (seconds since 1970) no server has needed a template or range.
KEY_UNUSED = 'user.nova.unused_since'

ISOLATED = 'security.idmap.isolated'
BASE = 'security.idmap.base'
SIZE = 'security.idmap.size'
_ALLOCATED = 'volatile.idmap.base'

#: What LXD says when its range of host ids is used up.
_NO_RANGE = 'not enough uid/gid'
#: How many projects lose their ranges then.
_FREED_AT_ONCE = 8

#: Seconds for which what no server needs stays at least, so that a server
#: which is just being made from it is.
GRACE = 600


class ProjectUIDRanges:
    """Knows the ranges, and gives one to each project that needs one.

    :param options: the ``[lxd]`` option group.
    :param guests: the driver's LXD instances.
    """

    def __init__(self, options: cfg.ConfigOpts.GroupAttr,
                 guests: registry.GuestRegistry) -> None:
        self._options = options
        self._guests = guests
        #: When the holders of uid ranges were asked for last.
        self._asked: dict[str, float] = {}

    def of(self, project_id: str) -> dict[str, str]:
        """Find the uid range of an OpenStack project, or have LXD give it
        one.

        :param project_id: the project.
        :returns: the configuration keys of servers and templates that have it.
        :raises errors.LXDError: LXD has none to give.
        """
        name = name_of(self._options, 'uids', project_id)
        with lock(name):
            self._asked[name] = time.time()
            try:
                holder = self._guests.by_name(name)
                if not holder.config.keys() & {BASE, _ALLOCATED}:
                    LOG.warning('The holder of the uid range of project %s '
                                'was never finished; making it anew',
                                project_id)
                    holder.delete()
                    holder = self._hold(name, project_id)
            except errors.NotFound:
                holder = self._hold(name, project_id)
            # LXD has allocated it, so far for this instance only.
            base = holder.config.get(BASE) or holder.config[_ALLOCATED]
            if BASE not in holder.config or KEY_UNUSED in holder.config:
                holder.update(config={BASE: base, KEY_UNUSED: None})
            return {BASE: base, SIZE: str(subordinate_ids.RANGE)}

    def _hold(self, name: str, project_id: str) -> lxd_guest.Guest:
        config = {
            lxd_guest.KEY_ROLE: lxd_guest.ROLE_TEMPLATE,
            lxd_guest.KEY_PROJECT: project_id, 'boot.autostart': 'false',
            ISOLATED: 'true', SIZE: str(subordinate_ids.RANGE)}
        # Servers may be there already, if somebody has deleted the holder.
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
            if _NO_RANGE not in exc.message.lower() or not self._free():
                raise
            holder = create()
        first = int(holder.config[_ALLOCATED])
        LOG.info('Servers of OpenStack project %s have the host uids %d to '
                 '%d', project_id, first, first + subordinate_ids.RANGE - 1)
        return holder

    def _free(self) -> bool:
        """Take uid ranges from projects without servers before their time,
        with the templates that were shifted to them.

        :returns: whether there were any.
        """
        guests = self._guests.all()
        needed = {guest.config.get(BASE) for guest in guests
                  if guest.role != lxd_guest.ROLE_TEMPLATE}
        idle = [guest for guest in guests if _holds_range(guest) and
                guest.config.get(BASE) not in needed]
        idle.sort(key=lambda guest: self._asked.get(guest.name, 0.0))
        freed = False
        for holder in idle[:_FREED_AT_ONCE]:
            # Who has its lock is about to use it, or waits for this thread's.
            with (contextlib.suppress(errors.NotFound,
                                      lockutils.AcquireLockFailedException),
                  lock(holder.name, blocking=False)):
                if time.time() - self._asked.get(holder.name, 0.0) < GRACE:
                    continue
                LOG.info('Taking its uid range from project %s, which has no '
                         'servers here, since there is none left',
                         holder.config.get(lxd_guest.KEY_PROJECT))
                for guest in guests:
                    if (KEY_TEMPLATE in guest.config and
                            guest.config.get(BASE) is not None and
                            guest.config[BASE] == holder.config.get(BASE)):
                        guest.delete()
                holder.delete()
                freed = True
        return freed


def name_of(options: cfg.ConfigOpts.GroupAttr, kind: str, *identity: str
            ) -> str:
    """Name an LXD instance of the driver's own by what it is for.

    :param options: the ``[lxd]`` option group.
    :param kind: what it is.
    :param identity: what tells it from others.
    """
    digest = hashlib.sha256('\0'.join(
        (options.storage_pool, *identity)).encode()).hexdigest()
    return f'nova-{kind}-{digest[:24]}'


def root_device(options: cfg.ConfigOpts.GroupAttr
                ) -> dict[str, Mapping[str, str]]:
    """Describe the root disk of an LXD instance of the driver's own.

    :param options: the ``[lxd]`` option group.
    """
    return {'root': {'type': 'disk', 'path': '/',
                     'pool': options.storage_pool}}


def _holds_range(guest: lxd_guest.Guest) -> bool:
    return (guest.role == lxd_guest.ROLE_TEMPLATE and
            KEY_TEMPLATE not in guest.config)


def lock(name: str, blocking: bool = True
         ) -> contextlib.AbstractContextManager[Any]:
    """Lock an LXD instance of the driver's own.

    :param name: its name.
    :param blocking: whether to wait for whoever has the lock.
    :raises lockutils.AcquireLockFailedException: somebody has it.
    """
    return lockutils.lock(f'lxd-template-{name}', lock_file_prefix=None,
                          blocking=blocking)
