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

"""Taking in a server that migrates here from another host.

The driver of the source calls (:mod:`nova_lxd_py.virt.peer`). What comes has
the role ``incoming`` until Nova finishes the migration on this host: it is not
listed, not counted and cannot be started. If Nova never does,
:mod:`.orphans` deletes it.
"""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
from typing import Any

from nova import context as nova_context
from nova import exception
from nova import objects
from oslo_log import log as logging

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.guest import roles
from nova_lxd_py.virt.image import templates
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import migration
from nova_lxd_py.virt.lxd import session as lxd
from nova_lxd_py.virt.metadata import config_drive
from nova_lxd_py.virt.server import guest_config
from nova_lxd_py.virt.server import local_disks
from nova_lxd_py.virt.server import transfer_slots
from nova_lxd_py.virt.storage import ephemeral_disks
from nova_lxd_py.virt.storage import root_disk

LOG = logging.getLogger(__name__)

#: Bytes of a pool that a migration does not fill.
_SPARE = 256 << 20

#: What may be left here of an earlier migration of the same server.
_REPLACED_ROLES = (roles.INCOMING, roles.MOVED)


class IncomingOps:
    """Takes in servers from other hosts. See :class:`.peer.Receiver`.

    :param session: the LXD session.
    :param guests: the driver's LXD instances.
    :param guest_configs: what LXD instances have to look like.
    :param template_store: chooses uid ranges and has the placeholder.
    :param disks: config drives and ephemeral disks.
    """

    def __init__(self, session: lxd.Session, guests: registry.GuestRegistry,
                 guest_configs: guest_config.GuestConfigBuilder,
                 template_store: templates.TemplateStore,
                 disks: local_disks.LocalDisks) -> None:
        self._session = session
        self._options = session.options
        self._guests = guests
        self._guest_configs = guest_configs
        self._templates = template_store
        self._disks = disks
        self._slots = transfer_slots.IncomingSlots(
            self._options.max_concurrent_migrations)

    def can_take(self, context: nova_context.RequestContext,
                 instance: objects.Instance, flavor: objects.Flavor,
                 migration_id: int, offer: Mapping[str, Any]
                 ) -> dict[str, Any]:
        """Check whether an instance can come to this host; nothing changes.

        :param flavor: the flavor that it is to have.
        :param offer: what the source has: ``server`` (LXD or Incus),
            ``architecture``, the ``size`` to copy in bytes, and ``begin`` if
            the instance comes next and needs a slot.
        :returns: ``pool_driver``, the driver of this host's storage pool, and
            ``busy`` if there is no slot.
        :raises nova.exception.MigrationError: with the reason, if not.
        """
        with _public(instance):
            environment = self._session.get()['environment']
            if environment['server'] != offer['server']:
                raise _refusal(f'this host runs {environment["server"]}, and '
                               f'not {offer["server"]}')
            if offer['architecture'] not in environment['architectures']:
                raise _refusal(f'this host cannot run '
                               f'{offer["architecture"]}')
            if self._slots.is_busy_with(instance):
                raise _refusal('this host has not finished an earlier '
                               'transfer of the server')
            self._refuse_present(instance)
            self._config(instance, flavor)
            self._disks.check(instance)
            pool = self._options.storage_pool
            space = self._session.get('storage-pools', pool, 'resources')[
                'space']
            free = space['total'] - space['used']
            if space['total'] and offer['size'] + _SPARE > free:
                raise _refusal(
                    f'its storage pool has {free >> 20} MiB left, and the '
                    f'server has {offer["size"] >> 20} MiB')
            return {'pool_driver': self._session.storage_pool()['driver'],
                    'busy': bool(offer.get('begin') and
                                 not self._slots.take(migration_id))}

    def pull_instance(self, context: nova_context.RequestContext,
                      instance: objects.Instance, flavor: objects.Flavor,
                      migration_id: int, wanted: Mapping[str, Any]) -> None:
        """Pull the root disk of an instance, or create the placeholder of one
        that boots from a volume. May be repeated.

        :param flavor: the flavor that it is to have.
        :param wanted: ``source`` as in :class:`.migration.Offer`, None for a
            placeholder; ``refresh``, whether most of it is here already;
            ``architecture``; ``root_size``, LXD's quota at the source or '';
            ``root_volume``, Cinder's ID of the volume that it boots from or
            None.
        :raises nova.exception.MigrationError: if it fails. What has come
            stays until :meth:`discard`.
        """
        with (_public(instance), self._slots.used(migration_id, instance),
              self._guests.changing(instance)):
            if wanted['refresh']:
                guest = self._incoming(instance, migration_id)
                migration.refresh_instance(
                    self._session, {**_description(guest.reload()),
                                    'architecture': wanted['architecture']},
                    wanted['source'], self._options.migration_timeout)
                return
            self._refuse_present(instance)
            self._clear(instance)
            root = {'type': 'disk', 'path': '/',
                    'pool': self._options.storage_pool}
            if wanted['root_size'] and wanted['source']:
                root['size'] = wanted['root_size']
            config = {
                **self._config(instance, flavor),
                **self._templates.uid_range(instance),
                lxd_guest.KEY_UUID: instance.uuid,
                lxd_guest.KEY_ROLE: roles.INCOMING,
                lxd_guest.KEY_PROJECT: instance.project_id or '',
                lxd_guest.KEY_MIGRATION: str(migration_id)}
            if wanted['root_volume']:
                config[lxd_guest.KEY_ROOT_VOLUME] = wanted['root_volume']
            self._guests.create(
                roles.lxd_name(instance),
                wanted['source'] or self._templates.placeholder_source(),
                config, {root_disk.DEVICE: root},
                timeout=self._options.migration_timeout,
                architecture=wanted['architecture'])

    def pull_volume(self, context: nova_context.RequestContext,
                    instance: objects.Instance, migration_id: int,
                    wanted: Mapping[str, Any]) -> None:
        """Pull an ephemeral disk or the config drive of an instance whose
        root disk is here. May be repeated.

        :param wanted: ``name``, ``config`` and ``source`` as in
            :class:`.migration.Offer`; ``refresh``, whether most of it is here
            already.
        :raises nova.exception.MigrationError: if it fails.
        """
        with (_public(instance), self._slots.used(migration_id, instance),
              self._guests.changing(instance)):
            self._incoming(instance, migration_id)
            pool, name = self._options.storage_pool, wanted['name']
            if not _is_of(instance, name):
                raise _refusal('this is no volume of the server')
            if not wanted['refresh']:
                with contextlib.suppress(errors.NotFound):
                    self._session.delete('storage-pools', pool, 'volumes',
                                         'custom', name)
            migration.pull_volume(
                self._session, pool, name, wanted['config'],
                wanted['source'], wanted['refresh'],
                self._options.migration_timeout)

    def complete(self, context: nova_context.RequestContext,
                 instance: objects.Instance, migration_id: int,
                 volumes: list[str]) -> None:
        """Mark an instance as complete, so that Nova can finish its
        migration.

        :param volumes: names of the custom volumes that it must have.
        :raises nova.exception.MigrationError: if something is missing.
        """
        with _public(instance), self._guests.changing(instance):
            guest = self._incoming(instance, migration_id)
            for name in volumes:
                self._session.get('storage-pools', self._options.storage_pool,
                                  'volumes', 'custom', name)
            guest.update(config={lxd_guest.KEY_COMPLETE: 'true'})
        self._slots.release(migration_id)

    def discard(self, context: nova_context.RequestContext,
                instance: objects.Instance, migration_id: int) -> None:
        """Delete what has come of an instance in a migration that has failed;
        nothing is a success.

        :raises nova.exception.MigrationError: if something is left.
        """
        with _public(instance, 'discard'), self._guests.changing(instance):
            # A transfer that the source has given up is over now.
            self._slots.release(migration_id)
            for guest in self._guests.of(instance):
                if _belongs_to(guest, migration_id):
                    LOG.info('Discarding LXD instance %s of a failed '
                             'migration', guest.name, instance=instance)
                    self._clear(instance)
                    return

    # -- steps --------------------------------------------------------------

    def _refuse_present(self, instance: objects.Instance) -> None:
        """Refuse a server whose place is taken.

        :raises nova.exception.MigrationError: if LXD has an instance with its
            name that is not left of an earlier migration.
        """
        if self._guests.find(instance) is not None:
            raise _refusal('this host has an LXD instance of the server '
                           'already')
        with contextlib.suppress(errors.NotFound):
            other = self._guests.by_name(roles.lxd_name(instance))
            if (not other.is_ours or other.uuid != instance.uuid or
                    other.role not in _REPLACED_ROLES):
                raise _refusal(f'another LXD instance on this host has the '
                               f'name {other.name}')

    def _clear(self, instance: objects.Instance) -> None:
        """Delete what is here of an instance that is not on this host."""
        self._guests.delete_all(instance)
        self._disks.delete_ephemeral(instance, None)
        self._disks.delete_config_drive(instance, None)

    def _incoming(self, instance: objects.Instance, migration_id: int
                  ) -> lxd_guest.Guest:
        guest = self._guests.find(instance, roles.INCOMING)
        if guest is None or not _belongs_to(guest, migration_id):
            raise _refusal('this host has nothing of the server')
        return guest

    def _config(self, instance: objects.Instance, flavor: objects.Flavor
                ) -> dict[str, str]:
        """Return LXD's configuration for the new flavor on this host.

        :raises nova.exception.NovaException: if the host cannot provide it.
        """
        instance.flavor = flavor
        claimed = instance.migration_context
        self._guest_configs.flavor_devices(flavor)
        return self._guest_configs.config(
            flavor, claimed.new_numa_topology if claimed else None)


def _refusal(reason: str) -> exception.MigrationError:
    return exception.MigrationError(reason=reason)


def _belongs_to(guest: lxd_guest.Guest, migration_id: int) -> bool:
    return (guest.role == roles.INCOMING and
            guest.config.get(lxd_guest.KEY_MIGRATION) == str(migration_id))


def _is_of(instance: objects.Instance, name: str) -> bool:
    """Return whether a custom volume can be the driver's for an instance."""
    return (name == config_drive.volume_name(instance) or name.startswith(
        ephemeral_disks.volume_name(instance, '')))


def _description(guest: lxd_guest.Guest) -> dict[str, Any]:
    """Return what a request to refresh an instance has to repeat of it."""
    return {'name': guest.name, 'profiles': [],
            'config': {key: value for key, value in guest.config.items()
                       if not key.startswith('volatile.')},
            'devices': {key: dict(value)
                        for key, value in guest.devices.items()}}


@contextlib.contextmanager
def _public(instance: objects.Instance, action: str = 'take in') -> Any:
    """Raise what the source may show to the owner of the server.

    :param action: what is done with the server, for the log.
    :raises nova.exception.MigrationError: for every error.
    """
    try:
        yield
    except exception.NovaException as exc:
        LOG.warning('Could not %s the server: %s', action,
                    exc.format_message(), instance=instance)
        if isinstance(exc, exception.MigrationError):
            raise
        raise _refusal(exc.format_message()) from exc
    except errors.LXDError as exc:
        LOG.error('LXD could not %s the server: %s', action, exc,
                  instance=instance)
        raise _refusal('LXD on the destination host cannot take it; the log '
                       'of nova-compute there has the reason') from exc
