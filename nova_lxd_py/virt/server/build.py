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


"""Building a server: everything from its image to the running guest."""

from __future__ import annotations

from collections.abc import Mapping
import time
from typing import Any

from nova import context as nova_context
from nova import exception
from nova import objects
from nova.virt import virtapi as nova_virtapi
from oslo_log import log as logging

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import injected_files as files
from nova_lxd_py.virt.guest import password as lxd_password
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.guest import roles
from nova_lxd_py.virt.image import cache as image_cache
from nova_lxd_py.virt.image import templates
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.metadata import device_tags
from nova_lxd_py.virt.server import guest_config
from nova_lxd_py.virt.server import local_disks
from nova_lxd_py.virt.server import rollback
from nova_lxd_py.virt.storage import ephemeral_disks
from nova_lxd_py.virt.storage import root_disk
from nova_lxd_py.virt.vif import manager as vif_manager
from nova_lxd_py.virt.volume import server_volumes

LOG = logging.getLogger(__name__)

_Devices = Mapping[str, Mapping[str, str]]


class SpawnOps:
    """Builds servers.

    :param virtapi: Nova's interface for waiting for Neutron's events.
    :param guests: the driver's LXD instances.
    :param guest_configs: what LXD instances have to look like.
    :param vifs: plugs ports.
    :param image_store: images in LXD.
    :param template_store: templates that LXD instances are cloned from.
    :param disks: config drives and ephemeral disks.
    :param passwords: sets administrators' passwords.
    :param volumes: Cinder volumes.
    """

    def __init__(self, virtapi: nova_virtapi.VirtAPI,
                 guests: registry.GuestRegistry,
                 guest_configs: guest_config.GuestConfigBuilder,
                 vifs: vif_manager.VIFManager,
                 image_store: image_cache.ImageStore,
                 template_store: templates.TemplateStore,
                 disks: local_disks.LocalDisks,
                 passwords: lxd_password.AdminPassword,
                 volumes: server_volumes.ServerVolumes) -> None:
        self._virtapi = virtapi
        self._guests = guests
        self._guest_configs = guest_configs
        self._vifs = vifs
        self._images = image_store
        self._templates = template_store
        self._disks = disks
        self._passwords = passwords
        self._volumes = volumes

    def spawn(self, context: nova_context.RequestContext,
              instance: objects.Instance, image_meta: objects.ImageMeta,
              injected_files: list[tuple[str, bytes]],
              admin_password: str | None, network_info: Any,
              block_device_info: dict[str, Any] | None,
              power_on: bool) -> None:
        """Create an LXD instance with its disks, volumes and ports, and start
        it; a failure leaves nothing behind.

        See :meth:`nova.virt.driver.ComputeDriver.spawn`.
        """
        began = time.monotonic()
        with (self._guests.changing(instance),
              rollback.Rollback(instance) as undo):
            files.check(injected_files)
            self._disks.check(instance)
            self._remove_leftovers(instance)
            on_volume = server_volumes.root_mapping(
                block_device_info) is not None
            fingerprint = '' if on_volume else self._images.ensure(
                context, image_meta, instance)
            # Blocks until Neutron has allocated the ports, which it does
            # while the image is transferred.
            ports = list(network_info or ())
            undo.step('unplug the ports',
                      lambda: self._vifs.unplug(instance, ports))
            with self._vifs.plugged(self._virtapi, instance, ports):
                device_tags.publish(context, instance, ports)
                devices = self._disks.create(
                    instance, ports, injected_files, admin_password,
                    block_device_info, undo)
                undo.step('disconnect the volumes',
                          lambda: self._volumes.disconnect(
                              instance, block_device_info))
                connected = self._volumes.connect(
                    context, instance, None, block_device_info)
                devices.update(connected.devices)
                undo.step('delete the LXD instance',
                          lambda: self._guests.delete_all(instance))
                wanted = self._guest_configs.define(
                    instance, ports, ephemeral_disks.swap_mb(
                        instance.flavor, block_device_info))
                if on_volume:
                    self._volumes.provision(context, instance,
                                            block_device_info, connected)
                    guest = self._create_on_volume(
                        instance, wanted, connected.config, devices)
                else:
                    guest = self._create(instance, image_meta, fingerprint,
                                         wanted, devices)
                    guest.ensure_own_root()
                    files.inject(instance, guest, injected_files)
            if power_on:
                self._volumes.mount(instance, guest, block_device_info)
                self._start(instance, guest, image_meta)
                if on_volume:
                    # The root on the volume is there only while it runs.
                    files.inject(instance, guest, injected_files)
                self._passwords.give(instance, guest, admin_password)
            undo.forget()
        LOG.info('Built LXD instance %s in %.1f seconds', guest.name,
                 time.monotonic() - began, instance=instance)

    def _remove_leftovers(self, instance: objects.Instance) -> None:
        """Remove what a crash in the middle of an earlier spawn left."""
        name = roles.lxd_name(instance)
        try:
            guest = self._guests.by_name(name)
        except errors.NotFound:
            return
        if not guest.is_ours or guest.uuid != instance.uuid:
            LOG.error('LXD project %s has a foreign instance with the name '
                      '%s; rename or delete it', self._guests.project, name,
                      instance=instance)
            raise exception.InstanceExists(name=name)
        LOG.warning('Removing LXD instance %s, left by an interrupted build',
                    name, instance=instance)
        self._guests.delete_all(instance)

    def _start(self, instance: objects.Instance, guest: lxd_guest.Guest,
               image_meta: objects.ImageMeta) -> None:
        try:
            guest.start()
        except errors.OperationFailed as exc:
            raise self._images.explain_start_failure(
                exc, instance, image_meta, guest.name) from exc

    def _create(self, instance: objects.Instance,
                image_meta: objects.ImageMeta, fingerprint: str,
                wanted: guest_config.GuestConfig, devices: _Devices
                ) -> lxd_guest.Guest:
        try:
            return self._templates.create(
                instance, fingerprint,
                lambda source, uid_range: self._guests.create(
                    roles.lxd_name(instance), source,
                    {**wanted.config, **uid_range},
                    {**wanted.devices, **devices}))
        except errors.LXDError as exc:
            raise self._images.explain_create_failure(
                exc, instance, image_meta) from exc

    def _create_on_volume(self, instance: objects.Instance,
                          wanted: guest_config.GuestConfig,
                          volume_config: Mapping[str, str],
                          devices: _Devices) -> lxd_guest.Guest:
        """Create the placeholder instance of a volume-backed server, whose
        own root disk stays empty and has no quota."""
        root = wanted.devices[root_disk.DEVICE]
        return self._guests.create(
            roles.lxd_name(instance), self._templates.placeholder_source(),
            {**wanted.config, **self._templates.uid_range(instance),
             **volume_config},
            {**wanted.devices, **devices, root_disk.DEVICE: {
                key: root[key] for key in ('type', 'path', 'pool')}})
