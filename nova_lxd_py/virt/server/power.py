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


"""Starting, stopping, rebooting and freezing servers."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from nova.compute import power_state
from nova import context as nova_context
from nova import exception
from nova import objects
from oslo_config import cfg
from oslo_log import log as logging

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.guest import roles
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.server import guest_config
from nova_lxd_py.virt.server import local_disks
from nova_lxd_py.virt.server import rescue
from nova_lxd_py.virt.server import rollback
from nova_lxd_py.virt.storage import ephemeral_disks
from nova_lxd_py.virt.storage import root_disk
from nova_lxd_py.virt.vif import manager as vif_manager
from nova_lxd_py.virt.volume import server_volumes

LOG = logging.getLogger(__name__)


class PowerOps:
    """Starts and stops servers; calls for one server never interleave.

    :param options: the ``[lxd]`` option group.
    :param guests: the driver's LXD instances.
    :param guest_configs: what LXD instances have to look like.
    :param vifs: plugs ports.
    :param disks: config drives and ephemeral disks.
    :param root_disks: root disks.
    :param rescues: rescue instances.
    :param volumes: Cinder volumes.
    """

    def __init__(self, options: cfg.ConfigOpts.GroupAttr,
                 guests: registry.GuestRegistry,
                 guest_configs: guest_config.GuestConfigBuilder,
                 vifs: vif_manager.VIFManager,
                 disks: local_disks.LocalDisks,
                 root_disks: root_disk.RootDiskManager,
                 rescues: rescue.RescueOps,
                 volumes: server_volumes.ServerVolumes) -> None:
        self._options = options
        self._guests = guests
        self._guest_configs = guest_configs
        self._vifs = vifs
        self._disks = disks
        self._root_disks = root_disks
        self._rescues = rescues
        self._volumes = volumes

    def power_off(self, instance: objects.Instance, timeout: int,
                  retry_interval: int) -> None:
        """Stop an instance, cleanly if time is given; one that LXD does not
        have counts as stopped, so that it can be rebuilt.

        What it has written to its volumes is on their storage afterwards.

        See :meth:`nova.virt.driver.ComputeDriver.power_off`.

        :param timeout: seconds for the guest to shut down; 0 stops it by
            force.
        :param retry_interval: seconds between shutdown requests.
        """
        with self._guests.changing(instance):
            try:
                guest = self._guests.active(instance)
                if timeout > 0 and guest.power_state != power_state.SHUTDOWN:
                    self._shut_down(instance, guest, timeout, retry_interval)
                guest.stop()
                self._volumes.flush(instance, guest)
                with contextlib.suppress(errors.DiskFull):
                    # The key is removed again when the guest is started.
                    self._clear_suspended(guest)
            except errors.InstanceNotFound as exc:
                LOG.warning('Nothing to power off: %s', exc,
                            instance=instance)

    def _shut_down(self, instance: objects.Instance, guest: lxd_guest.Guest,
                   timeout: int, retry_interval: int) -> None:
        """Ask the guest to shut down until it has or the time is over."""
        # A frozen guest could not act on the request. One without network may.
        with contextlib.suppress(exception.VirtualInterfacePlugException):
            self._vifs.unblock(instance)
        with contextlib.suppress(errors.NotRunning):
            guest.unfreeze()
        deadline = time.monotonic() + timeout
        while (left := round(deadline - time.monotonic())) > 0:
            try:
                guest.shut_down(min(left, retry_interval or left))
                return
            except errors.OperationFailed as exc:
                LOG.debug('Guest has not shut down yet: %s', exc,
                          instance=instance)
        LOG.warning('Guest did not shut down within %d seconds; stopping it '
                    'by force', timeout, instance=instance)

    def power_on(self, context: nova_context.RequestContext,
                 instance: objects.Instance, network_info: Any,
                 block_device_info: dict[str, Any] | None) -> None:
        """Start an instance, with all that it needs from the host; let a
        frozen one continue.

        See :meth:`nova.virt.driver.ComputeDriver.power_on`.
        """
        with self._guests.changing(instance):
            guest = self._active(instance)
            if guest.power_state != power_state.SHUTDOWN:
                with contextlib.suppress(errors.NotRunning):
                    self._thaw(instance, guest)
                    self._clear_suspended(guest)
                    return
                guest.reload()
            self._start(context, instance, guest, network_info,
                        block_device_info)

    def start_again(self, context: nova_context.RequestContext,
                    instance: objects.Instance, network_info: Any,
                    block_device_info: dict[str, Any] | None) -> None:
        """Start an instance that was stopped for a resize or migration that
        then failed.

        Waits for an LXD that does not answer. Errors are logged only: the one
        that led here has to stay the one raised.
        """
        with rollback.Rollback(instance, 'resize or migration',
                               'hard reboot the server') as undo:
            undo.step('start the guest', lambda: self.power_on(
                context, instance, network_info, block_device_info))

    def _active(self, instance: objects.Instance) -> lxd_guest.Guest:
        """Find the LXD instance that acts as a server, also if a migration
        has failed after Nova has decided that the server is on this host.

        :raises errors.InstanceNotFound: if LXD has none.
        """
        try:
            return self._guests.active(instance)
        except errors.InstanceNotFound:
            if self._guests.reclaim(instance) is None:
                raise
        return self._guests.active(instance)

    @staticmethod
    def _clear_suspended(guest: lxd_guest.Guest) -> None:
        """Let a guest that is frozen later count as paused again."""
        if lxd_guest.KEY_SUSPENDED in guest.config:
            guest.update(config={lxd_guest.KEY_SUSPENDED: None})

    def reboot(self, context: nova_context.RequestContext,
               instance: objects.Instance, network_info: Any,
               reboot_type: str, block_device_info: dict[str, Any] | None,
               ) -> None:
        """Reboot an instance.

        See :meth:`nova.virt.driver.ComputeDriver.reboot`.

        :param reboot_type: ``SOFT`` lets the guest shut down and becomes a
            hard reboot if that takes too long; ``HARD`` also recreates or
            repairs everything the instance has from the host.
        """
        with self._guests.changing(instance):
            self._active(instance)
            self._rescues.finish_interrupted(instance)
            guest = self._guests.active(instance)
            if not (reboot_type == 'SOFT' and
                    self._soft_reboot(instance, guest)):
                guest.stop()
                self._start(context, instance, guest.reload(), network_info,
                            block_device_info)

    def _soft_reboot(self, instance: objects.Instance,
                     guest: lxd_guest.Guest) -> bool:
        if guest.power_state != power_state.RUNNING:
            return False
        try:
            guest.reboot(self._options.soft_reboot_timeout)
        except (errors.OperationFailed, errors.InvalidRequest,
                errors.DeadlineExceeded) as exc:
            LOG.warning('Soft reboot failed, doing a hard reboot: %s', exc,
                        instance=instance)
            return False
        return True

    def pause(self, instance: objects.Instance) -> None:
        """Freeze all processes of an instance.

        See :meth:`nova.virt.driver.ComputeDriver.pause`.
        """
        with self._guests.changing(instance):
            guest = self._guests.active(instance)
            guest.freeze()
            self._block(instance, guest)

    def unpause(self, instance: objects.Instance) -> None:
        """Let the processes of a paused instance continue.

        See :meth:`nova.virt.driver.ComputeDriver.unpause`.
        """
        with self._guests.changing(instance):
            self._thaw(instance, self._guests.active(instance))

    def suspend(self, instance: objects.Instance) -> None:
        """Keep an instance from running until it is resumed.

        LXD cannot save the memory of a container, so the guest is frozen and
        stays in RAM, with a key that tells Nova's suspend from a pause.
        See :meth:`nova.virt.driver.ComputeDriver.suspend`.
        """
        with self._guests.changing(instance):
            guest = self._guests.active(instance)
            guest.update(config={lxd_guest.KEY_SUSPENDED: 'true'})
            with contextlib.suppress(errors.NotRunning):
                guest.freeze()
                self._block(instance, guest)

    def _block(self, instance: objects.Instance, guest: lxd_guest.Guest
               ) -> None:
        """Keep packets from a guest that has just been frozen."""
        # One that is quiesced is thawed by the Quiescer, whatever it is else.
        if lxd_guest.KEY_QUIESCED not in guest.config:
            self._vifs.block(instance)

    def _thaw(self, instance: objects.Instance, guest: lxd_guest.Guest
              ) -> None:
        """Thaw a guest; it never runs without its network.

        If LXD fails, it is still frozen, and answers pings.

        :raises nova.exception.VirtualInterfacePlugException: if it would have
            no network.
        :raises errors.LXDError: as :meth:`.guest.Guest.unfreeze`.
        """
        self._vifs.unblock(instance)
        guest.unfreeze()

    def resume(self, context: nova_context.RequestContext,
               instance: objects.Instance, network_info: Any,
               block_device_info: dict[str, Any] | None) -> None:
        """Let a suspended instance continue, or start it if the host has been
        rebooted meanwhile.

        See :meth:`nova.virt.driver.ComputeDriver.resume`.
        """
        self.power_on(context, instance, network_info, block_device_info)

    def resume_state_on_host_boot(self, context: nova_context.RequestContext,
                                  instance: objects.Instance,
                                  network_info: Any,
                                  block_device_info: dict[str, Any] | None,
                                  ) -> None:
        """Start an instance that ran before the host went down.

        See :meth:`nova.virt.driver.ComputeDriver.resume_state_on_host_boot`.
        """
        with self._guests.changing(instance):
            guest = self._guests.active(instance)
            # Paused and suspended guests still hold their memory.
            if guest.power_state == power_state.SHUTDOWN:
                self._start(context, instance, guest, network_info,
                            block_device_info)

    def _start(self, context: nova_context.RequestContext,
               instance: objects.Instance, guest: lxd_guest.Guest,
               network_info: Any, block_device_info: dict[str, Any] | None
               ) -> None:
        """Repair a stopped guest in every respect and start it."""
        ports = list(network_info or ())
        self._vifs.plug(instance, ports, guest_stopped=True)
        wanted = self._guest_configs.define(
            instance, ports,
            ephemeral_disks.swap_mb(instance.flavor, block_device_info),
            guest.name)
        config, devices = guest_config.config_changes(guest, wanted)
        config.update({lxd_guest.KEY_ROLE: guest.role,
                       lxd_guest.KEY_SUSPENDED: None,
                       lxd_guest.KEY_QUIESCED: None})
        devices.update(self._disks.ensure_config_drive(instance, ports))
        if guest.role == roles.RESCUE:
            self._rescues.ensure_root_mounted(self._guests.get(instance))
        else:
            devices.update(self._disks.ensure_ephemeral(instance,
                                                        block_device_info))
            connected = self._volumes.connect(context, instance, guest,
                                              block_device_info)
            config.update(connected.config)
            devices.update(connected.devices)
        self._root_disks.update(instance, guest, config, devices)
        if guest.role != roles.RESCUE:
            self._volumes.mount(instance, guest, block_device_info)
        guest.start()
