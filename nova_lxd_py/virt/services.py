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

"""The composition root: builds every collaborator of the driver once."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any

from nova.image import glance
from nova.virt import virtapi as nova_virtapi

from nova_lxd_py import conf
from nova_lxd_py.virt.console import log as console_log
from nova_lxd_py.virt.console import serial
from nova_lxd_py.virt.guest import diagnostics
from nova_lxd_py.virt.guest import events
from nova_lxd_py.virt.guest import password as lxd_password
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.host import host as lxd_host
from nova_lxd_py.virt.image import cache as image_cache
from nova_lxd_py.virt.image import templates
from nova_lxd_py.virt.lxd import session as lxd
from nova_lxd_py.virt.metadata import config_drive
from nova_lxd_py.virt.server import build as build_server
from nova_lxd_py.virt.server import guest_config
from nova_lxd_py.virt.server import rescue
from nova_lxd_py.virt.server import resize
from nova_lxd_py.virt.server import snapshot
from nova_lxd_py.virt.storage import ephemeral_disks
from nova_lxd_py.virt.storage import root_disk
from nova_lxd_py.virt.vif import interfaces
from nova_lxd_py.virt.vif import manager as vif_manager
from nova_lxd_py.virt.volume import attachments
from nova_lxd_py.virt.volume import boot_volumes
from nova_lxd_py.virt.volume import filesystems
from nova_lxd_py.virt.volume import manager as volume_manager
from nova_lxd_py.virt.volume import provisioning
from nova_lxd_py.virt.volume import root_volumes
from nova_lxd_py.virt.volume import server_volumes
from nova_lxd_py.virt.volume import usage


@dataclasses.dataclass(frozen=True)
class Services:
    """What the driver delegates to."""

    session: lxd.Session
    guests: registry.GuestRegistry
    watcher: events.EventWatcher
    host: lxd_host.Host
    vifs: vif_manager.VIFManager
    interfaces: interfaces.InterfaceOps
    volumes: server_volumes.ServerVolumes
    images: image_cache.ImageStore
    templates: templates.TemplateStore
    guest_configs: guest_config.GuestConfigBuilder
    lifecycle: build_server.Lifecycle
    resizes: resize.ResizeOps
    rescues: rescue.RescueOps
    snapshots: snapshot.SnapshotOps
    passwords: lxd_password.AdminPassword
    console_log: console_log.ConsoleLog
    serial_consoles: serial.SerialConsoles
    diagnostics: diagnostics.Diagnostics


def build(virtapi: nova_virtapi.VirtAPI,
          emit_event: Callable[[Any], None]) -> Services:
    """Build the collaborators; nothing is asked of LXD yet.

    :param virtapi: Nova's way of waiting for Neutron's events.
    :param emit_event: takes lifecycle events for Nova
        (:meth:`nova.virt.driver.ComputeDriver.emit_event`).
    """
    options = conf.CONF.lxd
    session = lxd.Session(options)
    guests = registry.GuestRegistry(session)
    watcher = events.EventWatcher(session, guests, emit_event,
                                  options.guest_shutdown_delay)
    vifs = vif_manager.VIFManager()
    image_api = glance.API()
    images = image_cache.ImageStore(session, options, image_api)
    template_store = templates.TemplateStore(session, options, guests)
    host = lxd_host.Host(session, options)
    guest_configs = guest_config.GuestConfigBuilder(session, options, host,
                                                    vifs)
    serial_consoles = serial.SerialConsoles(session, options, guests, watcher)
    volumes = _volumes(session, guests, images)
    snapshots = snapshot.SnapshotOps(session, options, guests, image_api)
    config_drives = config_drive.ConfigDriveManager(session, options)
    passwords = lxd_password.AdminPassword(session, options, guests)
    rescues = rescue.RescueOps(session, options, guests, watcher,
                               guest_configs, vifs, images, config_drives,
                               passwords, volumes)
    ephemeral = ephemeral_disks.EphemeralDisks(session, options)
    root_disks = root_disk.RootDiskManager(session, options, guests)
    lifecycle = build_server.Lifecycle(
        virtapi, options, guests, watcher, guest_configs, vifs, images,
        template_store, config_drives, ephemeral, root_disks, rescues,
        snapshots, passwords, serial_consoles, volumes)
    resizes = resize.ResizeOps(
        session, options, guests, guest_configs, vifs, template_store,
        ephemeral, root_disks, lifecycle, volumes)
    return Services(
        session=session, guests=guests, watcher=watcher, host=host,
        vifs=vifs, interfaces=interfaces.InterfaceOps(guests, vifs),
        volumes=volumes, images=images, templates=template_store,
        guest_configs=guest_configs, lifecycle=lifecycle, resizes=resizes,
        rescues=rescues, snapshots=snapshots, passwords=passwords,
        console_log=console_log.ConsoleLog(session, guests),
        serial_consoles=serial_consoles,
        diagnostics=diagnostics.Diagnostics(guests))


def _volumes(session: lxd.Session, guests: registry.GuestRegistry,
             images: image_cache.ImageStore) -> server_volumes.ServerVolumes:
    options = conf.CONF.lxd
    connections = volume_manager.VolumeManager(options)
    users = usage.VolumeUsage(guests, connections)
    return server_volumes.ServerVolumes(
        attachments.Attachments(guests, connections,
                                filesystems.Filesystems(options), users),
        boot_volumes.BootVolumes(
            session, guests,
            root_volumes.RootVolumes(options, connections, users),
            provisioning.VolumeProvisioner(session, options, guests, images)))
