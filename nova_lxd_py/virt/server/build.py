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

"""The life of a server on this host: spawn, destroy, power and reboot."""

from __future__ import annotations

import time
from typing import Any

from nova.compute import power_state
from nova.compute import task_states
from nova import context as nova_context
from nova import exception
from nova import objects
from nova.virt import virtapi as nova_virtapi
from oslo_config import cfg
from oslo_log import log as logging

from nova_lxd_py.virt.console import serial
from nova_lxd_py.virt.guest import events
from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import injected_files as files
from nova_lxd_py.virt.guest import password as lxd_password
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.image import cache as image_cache
from nova_lxd_py.virt.image import templates
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.metadata import config_drive
from nova_lxd_py.virt.metadata import device_tags
from nova_lxd_py.virt.server import guest_config
from nova_lxd_py.virt.server import rescue
from nova_lxd_py.virt.server import rollback
from nova_lxd_py.virt.server import snapshot
from nova_lxd_py.virt.storage import ephemeral_disks as disks
from nova_lxd_py.virt.storage import root_disk
from nova_lxd_py.virt.vif import manager as vif_manager
from nova_lxd_py.virt.volume import lxd_devices
from nova_lxd_py.virt.volume import server_volumes

LOG = logging.getLogger(__name__)


class Lifecycle:
    """Brings servers up and down; calls for one server never interleave.

    :param virtapi: Nova's way of waiting for Neutron's events.
    :param options: the ``[lxd]`` option group.
    :param guests: the driver's LXD instances.
    :param watcher: what is known of their power states.
    :param definitions: what their LXD instances look like.
    :param vifs: plugs their ports.
    :param image_store: their images.
    :param template_store: what new ones are cloned from.
    :param config_drives: their config drives.
    :param ephemeral_disks: their ephemeral disks.
    :param root_disks: their root disks.
    :param rescues: what else may run in a server's place.
    :param snapshots: images being made of them.
    :param passwords: sets their administrators' passwords.
    :param serial_consoles: their serial consoles.
    :param volumes: their Cinder volumes.
    """

    def __init__(self, virtapi: nova_virtapi.VirtAPI,
                 options: cfg.ConfigOpts.GroupAttr,
                 guests: registry.GuestRegistry, watcher: events.EventWatcher,
                 definitions: guest_config.GuestConfigBuilder,
                 vifs: vif_manager.VIFManager,
                 image_store: image_cache.ImageStore,
                 template_store: templates.TemplateStore,
                 config_drives: config_drive.ConfigDriveManager,
                 ephemeral_disks: disks.EphemeralDisks,
                 root_disks: root_disk.RootDiskManager, rescues: rescue.RescueOps,
                 snapshots: snapshot.SnapshotOps,
                 passwords: lxd_password.AdminPassword,
                 serial_consoles: serial.SerialConsoles,
                 volumes: server_volumes.ServerVolumes) -> None:
        self._virtapi = virtapi
        self._options = options
        self._guests = guests
        self._watcher = watcher
        self._definitions = definitions
        self._vifs = vifs
        self._images = image_store
        self._templates = template_store
        self._config_drives = config_drives
        self._disks = ephemeral_disks
        self._root_disks = root_disks
        self._rescues = rescues
        self._snapshots = snapshots
        self._passwords = passwords
        self._serial_consoles = serial_consoles
        self._volumes = volumes

    # -- up -----------------------------------------------------------------

    def spawn(self, context: nova_context.RequestContext,
              instance: objects.Instance, image_meta: objects.ImageMeta,
              injected_files: list[tuple[str, bytes]],
              admin_password: str | None, network_info: Any,
              block_device_info: dict[str, Any] | None,
              power_on: bool) -> None:
        """Make a server and start it; a failure leaves nothing behind.

        See :meth:`nova.virt.driver.ComputeDriver.spawn`.
        """
        began = time.monotonic()
        with (self._guests.lock(instance.uuid),
              rollback.Rollback(instance) as undone):
            files.check(injected_files)
            self._config_drives.check(instance)
            self._make_room(instance)
            on_volume = server_volumes.is_volume_backed(block_device_info)
            if not on_volume:
                fingerprint = self._images.ensure(context, image_meta,
                                                  instance)
            # Neutron has allocated the ports meanwhile.
            ports = list(network_info or ())
            undone.step('unplug its ports',
                        lambda: self._vifs.unplug(instance, ports))
            with self._vifs.plugged(self._virtapi, instance, ports):
                device_tags.publish(context, instance, ports)
                undone.step(
                    'delete its config drive',
                    lambda: self._config_drives.remove(instance))
                extra = self._config_drives.build(
                    context, instance, ports, injected_files, admin_password)
                undone.step(
                    'delete its ephemeral disks',
                    lambda: self._disks.delete(instance))
                extra.update(self._disks.create(instance, block_device_info))
                undone.step(
                    'disconnect its volumes',
                    lambda: self._volumes.disconnect(instance,
                                                     block_device_info))
                connected = self._volumes.connect(
                    context, instance, None, block_device_info)
                extra.update(connected.devices)
                undone.step(
                    'delete its LXD instance',
                    lambda: self._discard(instance))
                swap_mb = disks.swap_mb(instance.flavor, block_device_info)
                if on_volume:
                    self._volumes.provision(context, instance,
                                            block_device_info)
                    guest = self._create_on_volume(
                        instance, ports, connected.config, extra, swap_mb)
                else:
                    guest = self._create(instance, image_meta, ports,
                                         fingerprint, extra, swap_mb)
                    files.inject(instance, guest, injected_files)
            if power_on:
                self._volumes.mount(instance, guest, block_device_info)
                guest.start()
                if on_volume:
                    # LXD writes to the root on the volume while it runs.
                    files.inject(instance, guest, injected_files)
                self._passwords.give(instance, guest, admin_password)
            undone.forget()
        self._watcher.forget(instance)
        LOG.info('Made LXD instance %s in %.1f seconds', guest.name,
                 time.monotonic() - began, instance=instance)

    def _make_room(self, instance: objects.Instance) -> None:
        """Remove what a crash in the middle of an earlier spawn left."""
        name = lxd_guest.lxd_name(instance)
        try:
            guest = self._guests.by_name(name)
        except errors.NotFound:
            return
        if guest.uuid != instance.uuid:
            LOG.error('LXD project %s has an instance %s already that is not '
                      'this server; rename or delete it',
                      self._options.project, name, instance=instance)
            raise exception.InstanceExists(name=name)
        LOG.warning('Removing what an interrupted build left of this server',
                    instance=instance)
        self._discard(instance)

    def _create(self, instance: objects.Instance,
                image_meta: objects.ImageMeta, ports: list[Any],
                fingerprint: str, extra_devices: dict[str, dict[str, str]],
                swap_mb: int) -> lxd_guest.Guest:
        wanted = self._definitions.define(instance, ports, swap_mb)
        try:
            return self._templates.create(
                instance, fingerprint,
                lambda source, uid_range: self._guests.create(
                    lxd_guest.lxd_name(instance), source,
                    {**wanted.config, **uid_range},
                    {**wanted.devices, **extra_devices}))
        except errors.LXDError as exc:
            raise self._images.explain_create_failure(
                exc, instance, image_meta) from exc

    def _create_on_volume(self, instance: objects.Instance, ports: list[Any],
                          volume_config: dict[str, str],
                          extra_devices: dict[str, dict[str, str]],
                          swap_mb: int) -> lxd_guest.Guest:
        """Make the stub of a server that boots from a volume."""
        wanted = self._definitions.define(instance, ports, swap_mb)
        return self._guests.create(
            lxd_guest.lxd_name(instance),
            self._volumes.placeholder_source(),
            {**wanted.config, **self._templates.uid_range(instance),
             **volume_config},
            {**wanted.devices, **extra_devices,
             root_disk.DEVICE: {'type': 'disk', 'path': '/',
                                'pool': self._options.storage_pool}})

    # -- down ---------------------------------------------------------------

    def destroy(self, instance: objects.Instance, network_info: Any,
                block_device_info: dict[str, Any] | None,
                destroy_disks: bool) -> None:
        """Take a server off this host; what is not there is a success.

        See :meth:`nova.virt.driver.ComputeDriver.destroy`.
        """
        with self._guests.lock(instance.uuid):
            guest = self._guests.find(instance)
            if guest is None:
                LOG.warning('LXD has no instance of this server; removing '
                            'what else there may be of it', instance=instance)
            elif _is_reverted_here(instance, guest):
                LOG.info('Keeping its LXD instance, which gets the old flavor '
                         'back next', instance=instance)
                if lxd_devices.of_guest(guest):
                    guest.stop()
                    self._volumes.release(instance, guest, block_device_info)
                return
            root_volume = lxd_guest.root_volume(guest)
            volumes = server_volumes.data_devices(guest)
            if destroy_disks:
                self._discard(instance)
                self._disks.delete(instance)
                self._snapshots.delete_snapshots(instance)
            elif guest is not None:
                guest.stop()
                guest.update(devices={
                    name: None for name, device in guest.devices.items()
                    if device.get('path') != '/'},
                    config=server_volumes.DISCONNECTED)
            # Not before: somebody may ask for a console until it is gone.
            self._serial_consoles.remove(instance)
            # Nova frees them in Cinder next: nothing may be left of them.
            self._volumes.remove(instance, root_volume, volumes,
                                 block_device_info, force=destroy_disks)
            self._vifs.unplug(instance, network_info or ())
            self._config_drives.remove(instance)
        self._watcher.forget(instance)

    def _discard(self, instance: objects.Instance) -> None:
        """Delete all LXD instances of a server."""
        # What has another one's root disk as a device goes first.
        for guest in sorted(self._guests.of(instance), key=lambda guest:
                            guest.role == lxd_guest.ROLE_SERVER):
            try:
                guest.delete()
            except errors.LXDError as exc:
                if guest.reload().power_state != power_state.SHUTDOWN:
                    raise exception.InstancePowerOffFailure(
                        reason=exc.message) from exc
                raise

    # -- power --------------------------------------------------------------

    def power_off(self, instance: objects.Instance, timeout: int,
                  retry_interval: int) -> None:
        """Stop a server, cleanly if time is given.

        See :meth:`nova.virt.driver.ComputeDriver.power_off`.

        :param timeout: seconds that the guest gets; 0 stops it by force.
        :param retry_interval: seconds after which it is asked again.
        """
        with self._guests.lock(instance.uuid):
            self._stop(instance, self._guests.active(instance), timeout,
                       retry_interval)
        self._watcher.forget(instance)

    def _stop(self, instance: objects.Instance, guest: lxd_guest.Guest,
              timeout: int, retry_interval: int) -> None:
        if timeout > 0 and guest.power_state != power_state.SHUTDOWN:
            # A frozen guest could not act on the request.
            guest.unfreeze()
            deadline = time.monotonic() + timeout
            while (left := round(deadline - time.monotonic())) > 0:
                try:
                    guest.shut_down(min(left, retry_interval or left))
                    break
                except errors.OperationFailed as exc:
                    LOG.debug('Not shut down yet: %s', exc, instance=instance)
            else:
                LOG.warning('The guest did not shut down within %d seconds; '
                            'stopping it by force', timeout,
                            instance=instance)
        guest.stop()
        self._forget_suspension(guest)

    def power_on(self, context: nova_context.RequestContext,
                 instance: objects.Instance, network_info: Any,
                 block_device_info: dict[str, Any] | None) -> None:
        """Start a server, with all that it needs from the host.

        See :meth:`nova.virt.driver.ComputeDriver.power_on`.
        """
        with self._guests.lock(instance.uuid):
            guest = self._guests.active(instance)
            if guest.power_state == power_state.SHUTDOWN:
                self._bring_up(context, instance, guest, network_info,
                               block_device_info)
            else:
                guest.unfreeze()
                self._forget_suspension(guest)
        self._watcher.forget(instance)

    @staticmethod
    def _forget_suspension(guest: lxd_guest.Guest) -> None:
        """Let a guest that is frozen later count as paused again."""
        if lxd_guest.KEY_SUSPENDED in guest.config:
            guest.update(config={lxd_guest.KEY_SUSPENDED: None})

    def reboot(self, context: nova_context.RequestContext,
               instance: objects.Instance, network_info: Any,
               reboot_type: str, block_device_info: dict[str, Any] | None,
               ) -> None:
        """Reboot a server.

        See :meth:`nova.virt.driver.ComputeDriver.reboot`.

        :param reboot_type: ``SOFT`` lets the guest shut down and becomes a
            hard reboot where that takes too long; ``HARD`` makes everything
            anew that the server has from the host.
        """
        with self._guests.lock(instance.uuid):
            self._rescues.finish_interrupted(instance)
            guest = self._guests.active(instance)
            if not (reboot_type == 'SOFT' and
                    self._soft_reboot(instance, guest)):
                guest.stop()
                self._bring_up(context, instance, guest.reload(),
                               network_info, block_device_info)
        self._watcher.forget(instance)

    def _soft_reboot(self, instance: objects.Instance,
                     guest: lxd_guest.Guest) -> bool:
        if guest.power_state != power_state.RUNNING:
            return False
        try:
            guest.reboot(self._options.soft_reboot_timeout)
        except (errors.OperationFailed, errors.InvalidRequest,
                errors.DeadlineExceeded) as exc:
            LOG.warning('Soft reboot failed, doing a hard one: %s', exc,
                        instance=instance)
            return False
        return True

    def pause(self, instance: objects.Instance) -> None:
        """Stop all processes of a server where they are.

        See :meth:`nova.virt.driver.ComputeDriver.pause`.
        """
        with self._guests.lock(instance.uuid):
            self._guests.active(instance).freeze()
        self._watcher.forget(instance)

    def unpause(self, instance: objects.Instance) -> None:
        """Let the processes of a paused server run on.

        See :meth:`nova.virt.driver.ComputeDriver.unpause`.
        """
        with self._guests.lock(instance.uuid):
            self._guests.active(instance).unfreeze()
        self._watcher.forget(instance)

    def suspend(self, instance: objects.Instance) -> None:
        """Keep a server from running until it is resumed.

        LXD cannot save the memory of a container, so it stays in RAM: this
        is a pause that Nova tells apart.
        See :meth:`nova.virt.driver.ComputeDriver.suspend`.
        """
        with self._guests.lock(instance.uuid):
            guest = self._guests.active(instance)
            guest.update(config={lxd_guest.KEY_SUSPENDED: 'true'})
            if guest.power_state != power_state.SHUTDOWN:
                guest.freeze()
        self._watcher.forget(instance)

    def resume(self, context: nova_context.RequestContext,
               instance: objects.Instance, network_info: Any,
               block_device_info: dict[str, Any] | None) -> None:
        """Let a suspended server run on, or start it where the host has been
        rebooted meanwhile.

        See :meth:`nova.virt.driver.ComputeDriver.resume`.
        """
        self.power_on(context, instance, network_info, block_device_info)

    def resume_state_on_host_boot(self, context: nova_context.RequestContext,
                                  instance: objects.Instance,
                                  network_info: Any,
                                  block_device_info: dict[str, Any] | None,
                                  ) -> None:
        """Start a server that ran before the host went down.

        See :meth:`nova.virt.driver.ComputeDriver.resume_state_on_host_boot`.
        """
        with self._guests.lock(instance.uuid):
            guest = self._guests.active(instance)
            # Paused and suspended servers still hold their memory.
            if guest.power_state == power_state.SHUTDOWN:
                self._bring_up(context, instance, guest, network_info,
                               block_device_info)
        self._watcher.forget(instance)

    def _bring_up(self, context: nova_context.RequestContext,
                  instance: objects.Instance, guest: lxd_guest.Guest,
                  network_info: Any,
                  block_device_info: dict[str, Any] | None) -> None:
        """Put a stopped guest right in every respect and start it."""
        ports = list(network_info or ())
        self._vifs.plug(instance, ports, guest_stopped=True)
        wanted = self._definitions.define(
            instance, ports,
            disks.swap_mb(instance.flavor, block_device_info))
        config, devices = guest_config.config_changes(guest, wanted)
        config.update({lxd_guest.KEY_ROLE: guest.role,
                       lxd_guest.KEY_SUSPENDED: None,
                       lxd_guest.KEY_QUIESCED: None})
        devices.update(self._config_drives.ensure(context, instance, ports))
        if guest.role == lxd_guest.ROLE_RESCUE:
            self._rescues.ensure_root_mounted(self._guests.get(instance))
        else:
            devices.update(self._disks.ensure(instance, block_device_info))
            connected = self._volumes.connect(context, instance, guest,
                                              block_device_info)
            config.update(connected.config)
            devices.update(connected.devices)
        self._root_disks.update(instance, guest, config, devices)
        if guest.role != lxd_guest.ROLE_RESCUE:
            self._volumes.mount(instance, guest, block_device_info)
        self._root_disks.start(instance, guest)


def _is_reverted_here(instance: objects.Instance, guest: lxd_guest.Guest
                      ) -> bool:
    """Whether Nova asks for the deletion as the first step of reverting a
    resize on this host, where there is only one LXD instance."""
    return (instance.task_state == task_states.RESIZE_REVERTING and
            not instance.deleted and
            lxd_guest.KEY_RESIZE in guest.config)
