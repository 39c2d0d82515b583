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

"""Resizing a server on its host.

If only limits change, and the root disk does not shrink, they are applied to
the running container and the guest does not notice. The guest is restarted
only if the new flavor changes what LXD applies at a start (nesting,
privileges, uid range), or if volumes are attached, since Nova makes new
connections for them.

There is one LXD instance throughout. Its key ``user.nova.resize`` marks it
until the resize is confirmed or reverted; reverting means to apply the old
flavor again. Nova calls ``destroy`` first when it reverts a resize;
:meth:`.teardown.TeardownOps.destroy` recognizes that by this key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nova.compute import power_state
from nova import conf as nova_conf
from nova import context as nova_context
from nova import exception
from nova import objects
from nova.virt import driver as virt_driver
from oslo_log import log as logging
from oslo_utils import units

from nova_lxd_py import extra_specs
from nova_lxd_py.virt.guest import flavor as lxd_flavor
from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.host import passthrough
from nova_lxd_py.virt.image import templates
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.server import guest_config
from nova_lxd_py.virt.server import power as power_ops
from nova_lxd_py.virt.storage import ephemeral_disks as disks
from nova_lxd_py.virt.storage import root_disk
from nova_lxd_py.virt.vif import manager as vif_manager
from nova_lxd_py.virt.volume import server_volumes

CONF = nova_conf.CONF
LOG = logging.getLogger(__name__)

#: Limits that the kernel may refuse to a running guest, so that they are
#: tried as long as the resize can still be called off.
_TRIED_FIRST = ('limits.memory', 'limits.memory.swap')

#: Seconds between requests to a guest to shut down.
_RETRY_INTERVAL = 10


class ResizeOps:
    """Resizes servers in place.

    :param guests: the driver's LXD instances.
    :param guest_configs: what LXD instances have to look like.
    :param vifs: plugs ports.
    :param template_store: chooses uid ranges.
    :param ephemeral_disks: ephemeral disks.
    :param root_disks: root disks.
    :param power: starts and stops servers.
    :param volumes: Cinder volumes.
    """

    def __init__(self, guests: registry.GuestRegistry,
                 guest_configs: guest_config.GuestConfigBuilder,
                 vifs: vif_manager.VIFManager,
                 template_store: templates.TemplateStore,
                 ephemeral_disks: disks.EphemeralDiskManager,
                 root_disks: root_disk.RootDiskManager,
                 power: power_ops.PowerOps,
                 volumes: server_volumes.ServerVolumes) -> None:
        self._guests = guests
        self._guest_configs = guest_configs
        self._vifs = vifs
        self._templates = template_store
        self._disks = ephemeral_disks
        self._root_disks = root_disks
        self._power = power
        self._volumes = volumes

    # -- the steps of a resize ----------------------------------------------

    def prepare(self, context: nova_context.RequestContext,
                instance: objects.Instance, flavor: objects.Flavor,
                network_info: Any, block_device_info: dict[str, Any] | None,
                timeout: int, retry_interval: int) -> dict[str, Any]:
        """Check that an instance can have a flavor while a rollback is easy,
        and stop it if necessary.

        See :meth:`nova.virt.driver.ComputeDriver.migrate_disk_and_power_off`.

        :param flavor: the new flavor; the instance still has the old one.
        :param timeout: seconds for the guest to shut down.
        :param retry_interval: seconds between shutdown requests.
        :returns: the ``disk_info`` that Nova hands to ``finish_migration``.
        :raises nova.exception.InstanceFaultRollback: if the instance cannot
            be resized; it is as it was then.
        """
        stopped_here = False
        try:
            guest = self._guests.get(instance)
            running = guest.power_state != power_state.SHUTDOWN
            config = self._guest_configs.config(flavor, _claimed(instance))
            devices = self._guest_configs.flavor_devices(flavor)
            self.check_disks(instance, guest, flavor, block_device_info)
            if running and (server_volumes.mappings(block_device_info) or
                            _must_restart(guest, config) or
                            _range_changes(instance.flavor, flavor)):
                LOG.info('Stopping the guest for the new flavor %s',
                         flavor.name, instance=instance)
                stopped_here = True
                self._power.power_off(instance, timeout, retry_interval)
            with self._guests.changing(instance):
                self._refuse_too_little_memory(guest.reload(), flavor)
                if server_volumes.mappings(block_device_info):
                    # First, since a start of the guest undoes it.
                    self._volumes.release(instance, guest, block_device_info)
                    guest.reload()
                self._root_disks.update(instance, guest, {
                    **{key: config[key] for key in _TRIED_FIRST
                       if key in config},
                    lxd_guest.KEY_RESIZE: _migration_id(instance),
                }, devices)
        except (errors.LXDError, exception.NovaException) as exc:
            LOG.warning('Keeping the old flavor, since %(flavor)s cannot be '
                        'applied: %(error)s',
                        {'flavor': flavor.name, 'error': exc},
                        instance=instance)
            if stopped_here:
                self._power.start_again(context, instance, network_info,
                                        block_device_info)
            raise exception.InstanceFaultRollback(
                public_error(instance, exc)) from exc
        return {'in_place': True}

    def finish(self, context: nova_context.RequestContext,
               instance: objects.Instance, network_info: Any,
               block_device_info: dict[str, Any] | None, power_on: bool
               ) -> None:
        """Apply the new flavor of an instance.

        See :meth:`nova.virt.driver.ComputeDriver.finish_migration`.

        :param instance: the instance, which has the new flavor by now.
        :param power_on: whether to start it.
        """
        self._apply(instance, instance.old_flavor, network_info,
                    block_device_info, {})
        if power_on:
            self._power.power_on(context, instance, network_info,
                                 block_device_info)
        LOG.info('Resized to flavor %s', instance.flavor.name,
                 instance=instance)

    def confirm(self, instance: objects.Instance) -> None:
        """Mark a resize as confirmed, so that it cannot be reverted.

        See :meth:`nova.virt.driver.ComputeDriver.confirm_migration`.
        """
        with self._guests.changing(instance):
            guest = self._guests.find(instance)
            if guest is None:
                return
            try:
                self._root_disks.update(
                    instance, guest, {lxd_guest.KEY_RESIZE: None}, {})
            except errors.LXDError as exc:
                # The flavor is applied; the next resize writes the key again,
                # and it is read only while a resize is being reverted.
                LOG.warning('Could not remove the key %s of a confirmed '
                            'resize: %s', lxd_guest.KEY_RESIZE, exc,
                            instance=instance)

    def revert(self, context: nova_context.RequestContext,
               instance: objects.Instance, network_info: Any,
               block_device_info: dict[str, Any] | None,
               power_on: bool) -> None:
        """Apply the old flavor of an instance again, however far the resize
        got.

        See :meth:`nova.virt.driver.ComputeDriver.finish_revert_migration`.

        :param instance: the instance, which has the old flavor again.
        :param power_on: whether to start it.
        """
        guest = self._guests.get(instance)
        config = self._guest_configs.config(instance.flavor,
                                            instance.numa_topology)
        unmarked = {lxd_guest.KEY_RESIZE: None}
        if (server_volumes.mappings(block_device_info) or
                _must_restart(guest, config) or
                _range_changes(instance.flavor, instance.new_flavor)):
            self._stop(instance)
        try:
            self._apply(instance, instance.new_flavor, network_info,
                        block_device_info, unmarked)
        except (errors.OperationFailed, errors.InvalidRequest,
                exception.ResizeError) as exc:
            if guest.reload().power_state == power_state.SHUTDOWN:
                raise
            LOG.warning('Old limits cannot be applied to the running guest, '
                        'restarting it: %s', exc, instance=instance)
            self._stop(instance)
            self._apply(instance, instance.new_flavor, network_info,
                        block_device_info, unmarked)
        if power_on:
            self._power.power_on(context, instance, network_info,
                                 block_device_info)
        LOG.info('Reverted to flavor %s', instance.flavor.name,
                 instance=instance)

    # -- steps --------------------------------------------------------------

    def _stop(self, instance: objects.Instance) -> None:
        self._power.power_off(instance, CONF.shutdown_timeout,
                              _RETRY_INTERVAL)

    def _apply(self, instance: objects.Instance, former: objects.Flavor | None,
               network_info: Any, block_device_info: dict[str, Any] | None,
               marks: Mapping[str, str | None]) -> None:
        """Apply the flavor of an instance, running or not.

        :param instance: the instance.
        :param former: the flavor that the LXD instance may have now.
        :param marks: keys of the driver to change as well.
        """
        with self._guests.changing(instance):
            guest = self._guests.get(instance)
            running = guest.power_state != power_state.SHUTDOWN
            if running:
                self._refuse_too_little_memory(guest, instance.flavor)
            ports = list(network_info or ())
            wanted = self._guest_configs.define(
                instance, ports,
                disks.swap_mb(instance.flavor, block_device_info))
            config, repaired = guest_config.config_changes(guest, wanted)
            config.update(marks)
            if not running and _range_changes(instance.flavor, former):
                config.update({key: None for key in guest.config
                               if key.startswith('security.idmap.')})
                config.update(self._templates.uid_range(instance))
            devices = {name: device for name, device in repaired.items()
                       if name.startswith(passthrough.DEVICE_PREFIX)}
            devices[root_disk.DEVICE] = wanted.devices[root_disk.DEVICE]
            self._root_disks.update(instance, guest, config, devices)
            if former is not None:
                self._disks.resize(instance, former.ephemeral_gb,
                                   instance.flavor.ephemeral_gb)
            if running:
                # Applies the bandwidth limits of the flavor.
                self._vifs.plug(instance, ports)

    # -- checks ------------------------------------------------------------

    def check_disks(
            self, instance: objects.Instance, guest: lxd_guest.Guest,
            flavor: objects.Flavor,
            block_device_info: dict[str, Any] | None) -> None:
        """Check that a flavor does not make the disks of an instance smaller.

        :param guest: its LXD instance, freshly read.
        :param flavor: the new flavor; the instance still has the old one.
        :raises nova.exception.ResizeError: if it does.
        """
        old = instance.flavor
        root = self._guest_configs.root_device(flavor)
        on_volume = server_volumes.root_mapping(block_device_info) is not None
        if flavor.root_gb and not on_volume:
            if flavor.root_gb < old.root_gb:
                raise exception.ResizeError(reason=(
                    f'its root disk cannot be made smaller, from '
                    f'{old.root_gb} to {flavor.root_gb} GiB'))
            if not old.root_gb and not self._root_disks.fits(
                    instance, guest, root):
                raise exception.ResizeError(reason=(
                    f'what is on its root disk does not fit into '
                    f'{flavor.root_gb} GiB'))
        ephemeral = sum(
            int(disk['size']) for disk in
            virt_driver.block_device_info_get_ephemerals(block_device_info))
        if flavor.ephemeral_gb < (ephemeral or old.ephemeral_gb):
            raise exception.ResizeError(reason=(
                f'its ephemeral disks cannot be made smaller, from '
                f'{ephemeral or old.ephemeral_gb} to {flavor.ephemeral_gb} '
                f'GiB'))

    def _refuse_too_little_memory(self, guest: lxd_guest.Guest,
                                  flavor: objects.Flavor) -> None:
        """Check that a smaller limit does not make the kernel kill processes.

        Cached pages do not count, the kernel drops them.

        :raises nova.exception.ResizeError: if the guest uses more memory.
        """
        if guest.power_state == power_state.SHUTDOWN:
            return
        limit = flavor.memory_mb * units.Mi
        if guest.state()['memory']['usage'] <= limit:
            return
        measured = guest.metrics()
        total = measured.get('memory_MemTotal_bytes')
        available = measured.get('memory_MemAvailable_bytes')
        if total is None or available is None:
            return
        # LXD counts all cached pages as available, but those of tmpfs and
        # shared memory cannot be dropped.
        used = total - available + (measured.get('memory_Shmem_bytes') or 0)
        if used > limit:
            raise exception.ResizeError(reason=(
                f'it uses {round(used / units.Mi)} MiB of memory, more than '
                f'the {flavor.memory_mb} MiB of the flavor; stop it first'))


def _claimed(instance: objects.Instance
             ) -> objects.InstanceNUMATopology | None:
    """Return the NUMA topology that Nova has claimed for the new flavor."""
    context = instance.migration_context
    return context.new_numa_topology if context is not None else None


def _migration_id(instance: objects.Instance) -> str:
    context = instance.migration_context
    return str(context.migration_id) if context is not None else 'unknown'


def _must_restart(guest: lxd_guest.Guest, config: Mapping[str, str]
                  ) -> bool:
    """Whether LXD applies a part of the configuration at a start only."""
    return guest.power_state != power_state.SHUTDOWN and any(
        guest.config.get(key, 'false') != config.get(key, 'false')
        for key in lxd_flavor.RESTART_KEYS)


def _range_changes(flavor: objects.Flavor, other: objects.Flavor | None
                   ) -> bool:
    """Whether two flavors may give a server different uid ranges."""
    return other is not None and any(
        lxd_flavor.flag(flavor, spec) != lxd_flavor.flag(other, spec)
        for spec in (extra_specs.ISOLATED, extra_specs.PRIVILEGED))


def public_error(instance: objects.Instance, exc: Exception
                 ) -> exception.NovaException:
    """Return the error that the tenant sees, without LXD's own text, which
    may name paths of the host."""
    if isinstance(exc, (exception.ResizeError, exception.MigrationError)):
        return exc
    if isinstance(exc, (exception.InvalidInput,
                        exception.ComputeResourcesUnavailable)):
        return exception.ResizeError(reason=exc.format_message())
    if isinstance(exc, errors.InstanceNotFound):
        return exception.InstanceNotFound(instance_id=instance.uuid)
    if isinstance(exc, exception.VolumeDetachFailed):
        return exception.ResizeError(
            reason=f'volume {exc.kwargs.get("volume_id")} could not be '
                   f'disconnected from the host')
    return exception.ResizeError(
        reason='LXD could not apply the new flavor; the log of nova-compute '
               'has the reason')
