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

"""Giving a server another flavor on this host.

Where only limits change, and the root disk does not shrink, they are applied
to the running container: the guest does not notice. It is stopped and started
only if the new flavor changes what LXD decides at a start (nesting,
privileges, uid range), or if volumes are attached, whose connections Nova
makes anew.

There is one LXD instance throughout. Until the resize is confirmed its key
``user.nova.resize`` says that the way back is open; going back means to apply
the old flavor again. Nova calls ``destroy`` first when it reverts, which
:meth:`.teardown.TeardownOps.destroy` recognizes by this key.
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
    """Resizes servers in place; calls for one server never interleave.

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
                instance: objects.Instance, dest: str, flavor: objects.Flavor,
                network_info: Any, block_device_info: dict[str, Any] | None,
                timeout: int, retry_interval: int) -> dict[str, Any]:
        """See that a server can have a flavor, as long as it is easy to go
        back, and stop it if it has to be.

        See :meth:`nova.virt.driver.ComputeDriver.migrate_disk_and_power_off`.

        :param dest: address of the host to which it is to go.
        :param flavor: the new flavor; the instance still has the old one.
        :param timeout: seconds that the guest gets to shut down.
        :param retry_interval: seconds after which it is asked again.
        :returns: what :meth:`finish` gets.
        :raises nova.exception.InstanceFaultRollback: the server cannot be
            resized so, and is as it was.
        """
        if dest != CONF.my_ip:
            raise exception.InstanceFaultRollback(exception.MigrationError(
                reason='LXD servers cannot be moved to another host yet; '
                       'have it resized on its own host'))
        guest = self._guests.get(instance)
        running = guest.power_state != power_state.SHUTDOWN
        stopped_here = False
        try:
            config = self._guest_configs.config(flavor, _claimed(instance))
            devices = self._guest_configs.flavor_devices(flavor)
            self._refuse_smaller_disks(
                instance, guest, flavor, devices[root_disk.DEVICE],
                block_device_info)
            if running and (_has_volumes(block_device_info) or
                            _must_restart(guest, config) or
                            _range_changes(instance.flavor, flavor)):
                LOG.info('Stopping the server for its new flavor %s',
                         flavor.name, instance=instance)
                stopped_here = True
                self._power.power_off(instance, timeout, retry_interval)
            with self._guests.changing(instance):
                guest.reload()
                self._refuse_too_little_memory(guest, flavor)
                self._root_disks.update(instance, guest, {
                    **{key: config[key] for key in _TRIED_FIRST
                       if key in config},
                    lxd_guest.KEY_RESIZE: _migration_id(instance),
                }, devices)
                if _has_volumes(block_device_info):
                    self._volumes.release(instance, guest.reload(),
                                          block_device_info)
        except (errors.LXDError, exception.InvalidInput,
                exception.ComputeResourcesUnavailable,
                exception.ResizeError) as exc:
            LOG.warning('The server cannot get flavor %(flavor)s and stays '
                        'as it is: %(error)s',
                        {'flavor': flavor.name, 'error': exc},
                        instance=instance)
            if stopped_here:
                self._power.power_on(context, instance, network_info,
                                     block_device_info)
            raise exception.InstanceFaultRollback(_for_tenants(exc)) from exc
        return {'in_place': True}

    def finish(self, context: nova_context.RequestContext,
               migration: objects.Migration, instance: objects.Instance,
               network_info: Any, block_device_info: dict[str, Any] | None,
               power_on: bool) -> None:
        """Give a server its new flavor.

        See :meth:`nova.virt.driver.ComputeDriver.finish_migration`.

        :param migration: Nova's record of it.
        :param instance: the server, which has the new flavor by now.
        :param power_on: whether it shall run.
        :raises nova.exception.MigrationError: it comes from another host.
        """
        _refuse_other_hosts(migration)
        self._apply(instance, instance.old_flavor, network_info,
                    block_device_info, {})
        if power_on:
            self._power.power_on(context, instance, network_info,
                                 block_device_info)
        LOG.info('Resized to flavor %s', instance.flavor.name,
                 instance=instance)

    def confirm(self, migration: objects.Migration,
                instance: objects.Instance) -> None:
        """Close the way back.

        See :meth:`nova.virt.driver.ComputeDriver.confirm_migration`.
        """
        _refuse_other_hosts(migration)
        with self._guests.changing(instance):
            guest = self._guests.find(instance)
            if guest is None:
                return
            try:
                self._root_disks.update(
                    instance, guest, {lxd_guest.KEY_RESIZE: None}, {})
            except errors.LXDError as exc:
                # The server is what it shall be; the next resize writes the
                # key again and nothing else heeds it.
                LOG.warning('LXD keeps the mark of the resize: %s', exc,
                            instance=instance)

    def revert(self, context: nova_context.RequestContext,
               instance: objects.Instance, network_info: Any,
               migration: objects.Migration,
               block_device_info: dict[str, Any] | None,
               power_on: bool) -> None:
        """Give a server its old flavor back, at whichever point the resize
        was given up.

        See :meth:`nova.virt.driver.ComputeDriver.finish_revert_migration`.

        :param instance: the server, which has the old flavor again.
        :param migration: Nova's record of the resize.
        :param power_on: whether it shall run.
        """
        guest = self._guests.get(instance)
        config = self._guest_configs.config(instance.flavor,
                                            instance.numa_topology)
        given_up = {lxd_guest.KEY_RESIZE: None}
        if (_has_volumes(block_device_info) or _must_restart(guest, config) or
                _range_changes(instance.flavor, instance.new_flavor)):
            self._stop(instance)
        try:
            self._apply(instance, instance.new_flavor, network_info,
                        block_device_info, given_up)
        except (errors.OperationFailed, errors.InvalidRequest,
                exception.ResizeError) as exc:
            if guest.reload().power_state == power_state.SHUTDOWN:
                raise
            LOG.warning('The running server cannot have its old limits back, '
                        'restarting it: %s', exc, instance=instance)
            self._stop(instance)
            self._apply(instance, instance.new_flavor, network_info,
                        block_device_info, given_up)
        if power_on:
            self._power.power_on(context, instance, network_info,
                                 block_device_info)
        LOG.info('Back to flavor %s', instance.flavor.name, instance=instance)

    # -- how ----------------------------------------------------------------

    def _stop(self, instance: objects.Instance) -> None:
        self._power.power_off(instance, CONF.shutdown_timeout,
                              _RETRY_INTERVAL)

    def _apply(self, instance: objects.Instance, former: objects.Flavor | None,
               network_info: Any, block_device_info: dict[str, Any] | None,
               marks: Mapping[str, str | None]) -> None:
        """Apply a server's flavor, be it running or not.

        :param instance: the server.
        :param former: the flavor that LXD's instance may have.
        :param marks: keys of the driver's to change on it as well.
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
            config, corrected = guest_config.config_changes(guest, wanted)
            config.update(marks)
            if not running and _range_changes(instance.flavor, former):
                config.update({key: None for key in guest.config
                               if key.startswith('security.idmap.')})
                config.update(self._templates.uid_range(instance))
            devices = {name: device for name, device in corrected.items()
                       if name.startswith(passthrough.DEVICE_PREFIX)}
            devices[root_disk.DEVICE] = wanted.devices[root_disk.DEVICE]
            self._root_disks.update(instance, guest, config, devices)
            if former is not None:
                self._disks.resize(instance, former.ephemeral_gb,
                                   instance.flavor.ephemeral_gb)
            if running:
                # For what the flavor says of their bandwidth.
                self._vifs.plug(instance, ports)

    # -- what cannot be -----------------------------------------------------

    def _refuse_smaller_disks(
            self, instance: objects.Instance, guest: lxd_guest.Guest,
            flavor: objects.Flavor, root: Mapping[str, str],
            block_device_info: dict[str, Any] | None) -> None:
        old = instance.flavor
        if flavor.root_gb and not server_volumes.is_volume_backed(
                block_device_info):
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
        """Keep a smaller limit from making the kernel kill processes.

        What it merely caches for the guest is given up without harm.
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
        # LXD takes all that is cached for available, but files of a tmpfs
        # and shared memory exist nowhere else.
        used = total - available + (measured.get('memory_Shmem_bytes') or 0)
        if used > limit:
            raise exception.ResizeError(reason=(
                f'it uses {round(used / units.Mi)} MiB of memory, more than '
                f'the {flavor.memory_mb} MiB of the flavor; stop it first'))


def _claimed(instance: objects.Instance
             ) -> objects.InstanceNUMATopology | None:
    """Find what Nova has chosen of the host for the new flavor."""
    context = instance.migration_context
    return context.new_numa_topology if context is not None else None


def _migration_id(instance: objects.Instance) -> str:
    context = instance.migration_context
    return str(context.migration_id) if context is not None else 'unknown'


def _refuse_other_hosts(migration: objects.Migration) -> None:
    if migration.source_compute != migration.dest_compute:
        raise exception.MigrationError(
            reason='LXD servers cannot be moved to another host yet')


def _has_volumes(block_device_info: dict[str, Any] | None) -> bool:
    return bool(virt_driver.block_device_info_get_mapping(block_device_info))


def _must_restart(guest: lxd_guest.Guest, config: Mapping[str, str]
                  ) -> bool:
    """Whether LXD would apply some of a configuration at a start only."""
    return guest.power_state != power_state.SHUTDOWN and any(
        guest.config.get(key, 'false') != config.get(key, 'false')
        for key in lxd_flavor.RESTART_KEYS)


def _range_changes(flavor: objects.Flavor, other: objects.Flavor | None
                   ) -> bool:
    """Whether two flavors may give a server different uid ranges."""
    return other is not None and any(
        lxd_flavor.flag(flavor, spec) != lxd_flavor.flag(other, spec)
        for spec in (lxd_flavor.SPEC_ISOLATED, lxd_flavor.SPEC_PRIVILEGED))


def _for_tenants(exc: Exception) -> exception.NovaException:
    """Say why without LXD's own words, which may name paths of the host."""
    if isinstance(exc, exception.ResizeError):
        return exc
    if isinstance(exc, (exception.InvalidInput,
                        exception.ComputeResourcesUnavailable)):
        return exception.ResizeError(reason=exc.format_message())
    return exception.ResizeError(
        reason='LXD on the host could not apply the new flavor; its log '
               'tells the operator why')
