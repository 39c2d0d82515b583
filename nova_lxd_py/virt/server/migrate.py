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

"""Migrating a server to another host, with the same or another flavor.

The steps, S being the source and D the destination:

1. Nova's claim on D; ``migrate_disk_and_power_off`` on S.
2. S checks the disks and asks D's driver. A no leaves the server running.
   If the hosts send or take in other servers, it waits for its turn.
3. If a second copy is incremental, D's LXD pulls everything from S's while the
   guest runs. D's copy has the role ``incoming``.
4. S shuts the guest down. D pulls root disk, ephemeral disks and config drive,
   or what has changed in them, and marks its copy as complete. A server that
   boots from a volume has a placeholder on D instead of a copy.
5. S disconnects volumes and ports, and marks its LXD instance as ``moved``.
6. Nova gives the server to D; ``finish_migration`` there makes the copy the
   server's LXD instance, applies the flavor and starts it.
7. ``confirm_migration`` on S deletes what is there; or ``destroy`` on D and
   ``finish_revert_migration`` on S make S's the server's LXD instance again.

A crash before the end of step 5 leaves the server on S, where Nova calls
``finish_revert_migration`` at the next start; later, D has it whole. Neither
is listed, started or counted as long as it has one of the roles; a hard reboot
where Nova has the server takes the role away
(:meth:`.registry.GuestRegistry.reclaim`), and :mod:`.orphans` deletes what is
not needed any more.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

from nova.compute import power_state
from nova import conf as nova_conf
from nova import context as nova_context
from nova import exception
from nova import objects
from oslo_log import log as logging

from nova_lxd_py.virt.console import serial
from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.guest import roles
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.server import outgoing as outgoing_ops
from nova_lxd_py.virt.server import power as power_ops
from nova_lxd_py.virt.server import resize as resize_ops
from nova_lxd_py.virt.server import teardown as teardown_ops
from nova_lxd_py.virt.vif import manager as vif_manager
from nova_lxd_py.virt.volume import server_volumes

CONF = nova_conf.CONF
LOG = logging.getLogger(__name__)

_BlockDeviceInfo = dict[str, Any] | None


class MigrateOps:
    """Migrates and resizes servers, on this host or to another one.

    :param guests: the driver's LXD instances.
    :param resize: resizes servers in place.
    :param outgoing: sends disks.
    :param power: starts and stops servers.
    :param teardown: removes servers.
    :param vifs: plugs ports.
    :param serial_consoles: serial consoles.
    :param volumes: Cinder volumes.
    """

    def __init__(self, guests: registry.GuestRegistry,
                 resize: resize_ops.ResizeOps,
                 outgoing: outgoing_ops.OutgoingOps,
                 power: power_ops.PowerOps,
                 teardown: teardown_ops.TeardownOps,
                 vifs: vif_manager.VIFManager,
                 serial_consoles: serial.SerialConsoleManager,
                 volumes: server_volumes.ServerVolumes) -> None:
        self._guests = guests
        self._resize = resize
        self._outgoing = outgoing
        self._power = power
        self._teardown = teardown
        self._vifs = vifs
        self._serial_consoles = serial_consoles
        self._volumes = volumes

    def prepare(self, context: nova_context.RequestContext,
                instance: objects.Instance, dest: str, flavor: objects.Flavor,
                network_info: Any, block_device_info: _BlockDeviceInfo,
                timeout: int, retry_interval: int) -> dict[str, Any]:
        """Do what a migration or resize needs on the source.

        See :meth:`nova.virt.driver.ComputeDriver.migrate_disk_and_power_off`.

        :param dest: address of the destination host.
        :param flavor: the new flavor; the instance still has the old one.
        :param timeout: seconds for the guest to shut down.
        :param retry_interval: seconds between shutdown requests.
        :returns: the ``disk_info`` that Nova hands to ``finish_migration``.
        :raises nova.exception.InstanceFaultRollback: if it cannot be done;
            the instance is as it was then.
        """
        record = _record(context, instance)
        if record is None or not is_between_hosts(record):
            if record is None and dest != CONF.my_ip:
                raise exception.InstanceFaultRollback(exception.MigrationError(
                    reason='Nova has no record of the migration'))
            return self._resize.prepare(
                context, instance, flavor, network_info, block_device_info,
                timeout, retry_interval)
        began = stopped = False
        try:
            guest = self._guests.get(instance)
            self._resize.check_disks(instance, guest, flavor,
                                     block_device_info)
            shipment = self._outgoing.prepare(context, instance, guest,
                                              record, flavor)
            with self._outgoing.turn(shipment) as incremental:
                began = True
                running = guest.reload().power_state != power_state.SHUTDOWN
                ahead = running and self._copy_ahead(shipment, incremental)
                if running:
                    stopped = True
                    self._power.power_off(instance, timeout, retry_interval)
                stopped_at = time.monotonic()
                self._outgoing.copy(shipment, refresh=ahead)
                self._outgoing.complete(shipment)
            self._leave(shipment, network_info, block_device_info)
        except (errors.LXDError, exception.NovaException) as exc:
            LOG.warning('Keeping the server on this host, since it cannot be '
                        'moved to %(host)s: %(error)s',
                        {'host': record.dest_compute, 'error': exc},
                        instance=instance)
            if began:
                self._outgoing.discard(context, instance,
                                       record.dest_compute, record.id)
            if stopped:
                self._power.start_again(context, instance, network_info,
                                        block_device_info)
            elif began:
                # LXD freezes a running guest at the end of a copy, and until
                # it notices that nobody takes it.
                with contextlib.suppress(errors.LXDError):
                    guest.unfreeze()
            raise exception.InstanceFaultRollback(
                resize_ops.public_error(instance, exc)) from exc
        LOG.info('Copied to host %(host)s in %(seconds).1f seconds after the '
                 'guest was stopped', {
                     'host': record.dest_compute,
                     'seconds': time.monotonic() - stopped_at},
                 instance=instance)
        return {'in_place': False, 'migration_id': record.id}

    def finish(self, context: nova_context.RequestContext,
               migration: objects.Migration, instance: objects.Instance,
               network_info: Any, block_device_info: _BlockDeviceInfo,
               power_on: bool) -> None:
        """Make what has come to this host the server, and apply its flavor.

        See :meth:`nova.virt.driver.ComputeDriver.finish_migration`.

        :param migration: Nova's record of the migration.
        :param instance: the instance, which has the new flavor by now.
        :param power_on: whether to start it.
        :raises nova.exception.MigrationError: if it has not come whole.
        """
        if is_between_hosts(migration):
            with self._guests.changing(instance):
                if (self._guests.find(instance) is None and
                        self._guests.reclaim(instance) is None):
                    raise exception.MigrationError(reason=(
                        'the server has not come to this host completely'))
        self._resize.finish(context, instance, network_info,
                            block_device_info, power_on)

    def confirm(self, migration: objects.Migration,
                instance: objects.Instance) -> None:
        """Delete what has stayed on the source.

        See :meth:`nova.virt.driver.ComputeDriver.confirm_migration`.
        """
        if is_between_hosts(migration):
            # Ports and volumes have been disconnected in the migration.
            self._teardown.destroy(instance, None, None, True)
        else:
            self._resize.confirm(instance)

    def revert(self, context: nova_context.RequestContext,
               instance: objects.Instance, network_info: Any,
               migration: objects.Migration,
               block_device_info: _BlockDeviceInfo, power_on: bool) -> None:
        """Make what has stayed on the source the server again, however far
        the migration got.

        See :meth:`nova.virt.driver.ComputeDriver.finish_revert_migration`.

        :param instance: the instance, which has the old flavor again.
        :param migration: Nova's record of the migration.
        :param power_on: whether to start it.
        """
        if not is_between_hosts(migration):
            self._resize.revert(context, instance, network_info,
                                block_device_info, power_on)
            return
        with self._guests.changing(instance):
            if self._guests.find(instance) is None:
                self._guests.reclaim(instance)
        # Nova has destroyed the server there, unless this is called since
        # nova-compute was ended in the middle of a migration.
        self._outgoing.discard(context, instance, migration.dest_compute,
                               migration.id)
        if power_on:
            self._power.power_on(context, instance, network_info,
                                 block_device_info)
        LOG.info('Server is on this host again', instance=instance)

    # -- steps --------------------------------------------------------------

    def _copy_ahead(self, shipment: outgoing_ops.Shipment, incremental: bool
                    ) -> bool:
        """Copy the disks of a running guest, if that shortens its downtime.

        :returns: whether it has been done.
        """
        if not incremental:
            LOG.info('Copying the disks after the guest has been stopped: '
                     'LXD cannot send only the changes between these storage '
                     'pools', instance=shipment.instance)
            return False
        LOG.info('Copying the disks to host %s while the guest runs',
                 shipment.host, instance=shipment.instance)
        self._outgoing.copy(shipment, refresh=False)
        return True

    def _leave(self, shipment: outgoing_ops.Shipment, network_info: Any,
               block_device_info: _BlockDeviceInfo) -> None:
        """Disconnect a stopped guest, and keep it for a revert."""
        instance = shipment.instance
        with self._guests.changing(instance):
            guest = shipment.guest.reload()
            if server_volumes.mappings(block_device_info):
                self._volumes.release(instance, guest, block_device_info)
            self._vifs.unplug_all(instance, network_info, guest.devices)
            self._serial_consoles.remove(instance)
            # Last: until here the server is on this host.
            guest.update(config={
                lxd_guest.KEY_ROLE: roles.MOVED,
                lxd_guest.KEY_MIGRATION: str(shipment.migration_id)})


def is_between_hosts(migration: objects.Migration) -> bool:
    """Return whether a migration goes to another host.

    The addresses do not tell: services on several hosts may have the same
    ``[DEFAULT] my_ip``.
    """
    return migration.source_compute != migration.dest_compute


def _record(context: nova_context.RequestContext, instance: objects.Instance
            ) -> objects.Migration | None:
    """Return Nova's record of the migration of an instance."""
    if instance.migration_context is None:
        return None
    return objects.Migration.get_by_id(
        context, instance.migration_context.migration_id)
