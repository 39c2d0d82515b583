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
"""Fast spawn: templates to clone new instances from, and their uid ranges.

An LXD that does not mount root disks idmapped changes the owner of every file
of a new root disk at its first start, which is most of the time that a launch
takes. A clone of an instance whose files have been shifted once avoids this,
if it has the same uid range (see :mod:`.uid_ranges`). So the driver keeps a
*template* per image, pool and uid range: a stopped instance that has never
run, but whose files LXD has shifted.

LXD shifts the files of an instance before it looks at its devices. So a
template comes about by starting an instance that has a device which cannot
work: nothing of the image is ever run, and nothing is written to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import contextlib
import time
from typing import Any, TypeVar

from nova import conf as nova_conf
from nova import objects
from oslo_log import log as logging

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import isolation as lxd_isolation
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.guest import roles
from nova_lxd_py.virt.guest import uid_ranges
from nova_lxd_py.virt.host import subordinate_ids
from nova_lxd_py.virt.image import placeholder
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import session as lxd

CONF = nova_conf.CONF
LOG = logging.getLogger(__name__)

KEY_TEMPLATE, KEY_UNUSED = uid_ranges.KEY_TEMPLATE, uid_ranges.KEY_UNUSED
_BASE = uid_ranges.BASE
#: The uid map to which LXD has shifted a root disk, the one that it shall
#: have, and the one of the last start.
_SHIFTED = 'volatile.last_state.idmap'
_WANTED = 'volatile.idmap.next'
_CURRENT = 'volatile.idmap.current'
#: What LXD writes there while a root disk has not been shifted.
_UNSHIFTED = ('', '[]')

#: How LXD writes the time of what has not happened.
_NEVER = '0001-01-01'

#: Keys of a template that LXD would copy to its clones.
_NOT_INHERITED = {KEY_TEMPLATE: '', KEY_UNUSED: ''}

#: A device that keeps a template from starting: names of network interfaces
#: have at most 15 characters, so that no host can have this one.
_OBSTACLE = 'never-starts'
_OBSTACLE_DEVICE = {'type': 'nic', 'nictype': 'physical', 'name': 'eth0',
                    'parent': 'nova-has-no-such-nic'}

#: Storage drivers whose copies share blocks with what they are copied from.
_CLONING_DRIVERS = ('btrfs', 'zfs', 'ceph')

#: Seconds for which no second attempt is made at a template that failed.
RETRY_AFTER = 600

_T = TypeVar('_T')


class _Useless(Exception):
    """There is no point in a template, because LXD shifts nothing."""


class _Impossible(Exception):
    """No template can be made of this image."""


class TemplateStore:
    """Decides what instances are created from, and manages templates.

    :param session: the LXD session.
    :param guests: the driver's LXD instances.
    """

    def __init__(self, session: lxd.Session,
                 guests: registry.GuestRegistry) -> None:
        self._session = session
        self._options = session.options
        self._guests = guests
        self._can_clone: bool | None = None
        self._ranges = uid_ranges.ProjectUIDRanges(self._options, guests)
        #: Whether LXD mounts root disks idmapped; None until seen.
        self._shift_is_free: bool | None = None
        #: Templates not created for the first server of their image.
        self._left_out: set[str] = set()
        #: Templates that could not be created, and when that was.
        self._failed: dict[str, float] = {}

    # -- interface ----------------------------------------------------------

    def source_for(self, instance: objects.Instance, fingerprint: str
                   ) -> tuple[dict[str, Any], dict[str, str]]:
        """Return what to create an LXD instance from.

        The first server of a new image is made from the image: a template
        would delay it, and for many images there is no second one. The next
        server waits until the template of its image and range is made; others
        that come meanwhile wait for the same one.

        :param instance: the instance.
        :param fingerprint: LXD's name of its image.
        :returns: the ``source`` for LXD's ``POST /1.0/instances`` and the
            configuration keys that must go with it.
        :raises nova.exception.NovaException: if the flavor asks for a uid
            range that this host does not have.
        :raises errors.LXDError: if LXD has no uid range to give.
        """
        from_image = {'type': 'image', 'fingerprint': fingerprint}
        isolation = self._isolation(instance)
        if not (self._clones_pay() and isolation in (
                lxd_isolation.Isolation.PROJECT, lxd_isolation.Isolation.OFF)):
            return from_image, self._range_config(isolation, instance)
        config = self._range_config(isolation, instance)
        owner = (instance.project_id or ''
                 if isolation is lxd_isolation.Isolation.PROJECT else '')
        name = uid_ranges.auxiliary_name(
            self._options, 'template', fingerprint, owner)
        try:
            self._ensure_template(name, fingerprint, owner, config, instance)
        except _Useless:
            # Then a range for the instance alone costs nothing either.
            isolation = self._isolation(instance)
            return from_image, self._range_config(isolation, instance)
        except _Impossible as exc:
            LOG.debug('There is no template to clone: %s', exc,
                      instance=instance)
            return from_image, config
        return ({'type': 'copy', 'source': name, 'instance_only': True},
                {**config, **_NOT_INHERITED})

    def create(self, instance: objects.Instance, fingerprint: str,
               make: Callable[[dict[str, Any], dict[str, str]], _T]) -> _T:
        """Create an LXD instance in the fastest way that works.

        :param instance: the instance.
        :param fingerprint: LXD's name of its image.
        :param make: makes it, given what :meth:`source_for` returns; called
            once more if a clone cannot be made, for example because the
            template has just been deleted.
        :returns: what ``make`` returns.
        :raises nova.exception.NovaException: as :meth:`source_for`.
        :raises errors.LXDError: as ``make``.
        """
        source, config = self.source_for(instance, fingerprint)
        if source['type'] == 'image':
            return make(source, config)
        try:
            return make(source, config)
        except (errors.NotFound, errors.InvalidRequest,
                errors.OperationFailed) as exc:
            LOG.warning('Could not clone %s, making the server from its image '
                        'instead: %s', source['source'], exc,
                        instance=instance)
            return make({'type': 'image', 'fingerprint': fingerprint}, config)

    def placeholder_source(self) -> dict[str, str]:
        """Return what the LXD instance of a volume-backed server is made from.

        :returns: the ``source`` for LXD's ``POST /1.0/instances``.
        :raises errors.LXDError: if LXD does not accept the image for it.
        """
        return {'type': 'image',
                'fingerprint': placeholder.ensure(self._session)}

    def uid_range(self, instance: objects.Instance) -> dict[str, str]:
        """Return the uid range of a server that comes from elsewhere than an
        image, such as another host.

        :param instance: the instance.
        :returns: the configuration keys.
        :raises nova.exception.NovaException: as :meth:`source_for`.
        """
        return self._range_config(self._isolation(instance), instance)

    def prune(self) -> list[str]:
        """Delete templates and holders of uid ranges that are not needed any
        more: templates of images that are gone, incomplete ones, and after a
        time (``[image_cache] remove_unused_original_minimum_age_seconds``)
        those without servers.

        :returns: LXD's names of what was deleted.
        """
        guests = self._guests.all()
        images = {image['fingerprint'] for image in self._session.get(
            'images', params={'recursion': 1})}
        deleted = []
        for guest in guests:
            if guest.role != roles.TEMPLATE:
                continue
            with (contextlib.suppress(errors.NotFound),
                  uid_ranges.lock(guest.name)):
                if self._is_spent(guest.reload(), guests, images):
                    LOG.info('Deleting auxiliary LXD instance %s, which no '
                             'server needs any more', guest.name)
                    guest.delete()
                    deleted.append(guest.name)
        return deleted

    # -- decisions ----------------------------------------------------------

    def _isolation(self, instance: objects.Instance
                   ) -> lxd_isolation.Isolation:
        ranges = 1
        if self._session.is_local:
            ranges = subordinate_ids.capacity(self._session.endpoint)
        return lxd_isolation.select(
            instance.flavor, self._options.idmap_isolation,
            free_ranges=ranges, shift_is_free=self._shift_is_free is True,
            can_clone=self._options.fast_spawn and self._pool_clones())

    def _clones_pay(self) -> bool:
        """Return whether a clone of a template is faster than a launch."""
        return (self._options.fast_spawn and self._shift_is_free is not True
                and self._pool_clones())

    def _pool_clones(self) -> bool:
        if self._can_clone is None:
            pool = self._session.storage_pool()
            self._can_clone = pool['driver'] in _CLONING_DRIVERS or (
                pool['driver'] == 'lvm' and
                pool['config'].get('lvm.use_thinpool', 'true') == 'true')
        return self._can_clone

    def _range_config(self, isolation: lxd_isolation.Isolation,
                      instance: objects.Instance) -> dict[str, str]:
        config = lxd_isolation.config(isolation)
        if isolation is lxd_isolation.Isolation.PROJECT:
            config.update(self._ranges.config_for(instance.project_id or ''))
        return config

    # -- templates ----------------------------------------------------------

    def _ensure_template(self, name: str, fingerprint: str, owner: str,
                         config: Mapping[str, str],
                         instance: objects.Instance) -> None:
        """Ensure that there is a template.

        :raises _Useless: if LXD shifts nothing.
        :raises _Impossible: if there can be none, for now.
        """
        guest = self._find_ready(name, fingerprint, config)
        if guest is not None and KEY_UNUSED not in guest.config:
            return
        with uid_ranges.lock(name):
            guest = self._find_ready(name, fingerprint, config)
            if guest is not None:
                if KEY_UNUSED in guest.config:
                    guest.update(config={KEY_UNUSED: None})
                return
            failed = self._failed.get(name)
            if failed and time.monotonic() - failed < RETRY_AFTER:
                raise _Impossible('an earlier attempt at one failed')
            if self._shift_is_free:
                raise _Useless()
            if name not in self._left_out and self._is_new(fingerprint):
                self._left_out.add(name)
                raise _Impossible('this is the first server of its image')
            try:
                self._make_template(name, fingerprint, owner, config,
                                    instance)
            except (_Impossible, errors.LXDError) as exc:
                self._failed[name] = time.monotonic()
                LOG.warning('Could not make a template of LXD image %s; '
                            'servers are made from the image itself for the '
                            'next %d seconds, which takes longer: %s',
                            fingerprint[:12], RETRY_AFTER, exc,
                            instance=instance)
                raise _Impossible(str(exc)) from exc

    def _is_new(self, fingerprint: str) -> bool:
        """Return whether LXD has never made anything from an image."""
        image = self._session.get('images', fingerprint)
        return image['last_used_at'].startswith(_NEVER)

    def _find_ready(self, name: str, fingerprint: str,
                    config: Mapping[str, str]) -> lxd_guest.Guest | None:
        try:
            guest = self._guests.by_name(name)
        except errors.NotFound:
            return None
        if (guest.config.get(KEY_TEMPLATE) != fingerprint or
                not _is_complete(guest) or
                guest.config.get(_BASE) != config.get(_BASE)):
            return None
        return guest

    def _make_template(self, name: str, fingerprint: str, owner: str,
                       config: Mapping[str, str],
                       instance: objects.Instance) -> None:
        began = time.monotonic()
        with contextlib.suppress(errors.NotFound):
            # Incomplete, because nova-compute or the host went down.
            self._guests.by_name(name).delete()
        with contextlib.ExitStack() as undo:
            undo.callback(self._discard, name)
            guest = self._guests.create(
                name, {'type': 'image', 'fingerprint': fingerprint}, {
                    **config, 'boot.autostart': 'false',
                    lxd_guest.KEY_ROLE: roles.TEMPLATE,
                    lxd_guest.KEY_PROJECT: owner,
                    KEY_TEMPLATE: fingerprint},
                {**uid_ranges.root_device(self._options),
                 _OBSTACLE: _OBSTACLE_DEVICE})
            self._shift(guest)
            guest.update(devices={_OBSTACLE: None})
            undo.pop_all()
        self._shift_is_free = False
        LOG.info('Made a template of LXD image %s in %.1f seconds; further '
                 'servers are cloned from it', fingerprint[:12],
                 time.monotonic() - began, instance=instance)

    def _shift(self, guest: lxd_guest.Guest) -> None:
        """Have LXD shift a root disk, by a start that fails as intended."""
        try:
            guest.start()
        except (errors.OperationFailed, errors.InvalidRequest) as exc:
            LOG.debug('Template %s was not started, as intended: %s',
                      guest.name, exc)
        config = guest.reload().config
        if guest.status != 'Stopped':
            raise _Impossible('it runs, although it must not')
        if config.get(_SHIFTED, '') not in _UNSHIFTED:
            if config[_SHIFTED] == config.get(_WANTED):
                return
        elif config.get(_CURRENT) == config.get(_WANTED):
            self._shift_is_free = True
            LOG.info('LXD mounts root disks idmapped, so servers need no '
                     'templates and can have uid ranges of their own')
            raise _Useless()
        raise _Impossible('LXD did not shift the files of its root disk')

    def _discard(self, name: str) -> None:
        try:
            self._guests.by_name(name).delete()
        except errors.NotFound:
            pass
        except errors.LXDError as exc:
            LOG.warning('Could not delete the incomplete template %s, it is '
                        'deleted later: %s', name, exc)

    # -- age ----------------------------------------------------------------

    def _is_spent(self, template: lxd_guest.Guest,
                  guests: list[lxd_guest.Guest], images: set[str]) -> bool:
        config = template.config
        fingerprint = config.get(KEY_TEMPLATE)
        if fingerprint and (fingerprint not in images or
                            not _is_complete(template)):
            return True
        if any(_needs(guest, template) for guest in guests):
            if KEY_UNUSED in config:
                template.update(config={KEY_UNUSED: None})
            return False
        if not CONF.image_cache.remove_unused_base_images:
            return False
        now = int(time.time())
        since = config.get(KEY_UNUSED, '')
        if not since.isdigit() or int(since) > now:
            template.update(config={KEY_UNUSED: str(now)})
            since = str(now)
        return now - int(since) >= max(
            uid_ranges.GRACE,
            CONF.image_cache.remove_unused_original_minimum_age_seconds)


def _is_complete(template: lxd_guest.Guest) -> bool:
    """Return whether a template can be cloned, and is not the leftover of a
    crash."""
    config = template.config
    return (_OBSTACLE not in template.devices and
            config.get(_SHIFTED, '') not in _UNSHIFTED and
            config[_SHIFTED] == config.get(_WANTED))


def _needs(guest: lxd_guest.Guest, template: lxd_guest.Guest) -> bool:
    """Return whether another LXD instance needs a template, or a holder of a
    uid range."""
    if guest.name == template.name:
        return False
    owner = template.config.get(lxd_guest.KEY_PROJECT, '')
    if template.config.get(KEY_TEMPLATE) is None:
        return (guest.config.get(_BASE) == template.config.get(_BASE) and
                bool(guest.config.get(_BASE)))
    return (guest.role != roles.TEMPLATE and
            (not owner or
             guest.config.get(lxd_guest.KEY_PROJECT) == owner) and
            guest.config.get('volatile.base_image') ==
            template.config[KEY_TEMPLATE])
