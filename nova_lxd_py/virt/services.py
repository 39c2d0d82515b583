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

"""The composition root: builds, starts and stops the driver's collaborators.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

from nova import context as nova_context
from nova.image import glance
from nova.virt import virtapi as nova_virtapi
from oslo_log import log as logging

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
from nova_lxd_py.virt.lxd import server_kind
from nova_lxd_py.virt.lxd import session as lxd
from nova_lxd_py.virt.metadata import config_drive
from nova_lxd_py.virt import peer
from nova_lxd_py.virt import preflight
from nova_lxd_py.virt.preflight import directory_locks
from nova_lxd_py.virt.server import build as build_ops
from nova_lxd_py.virt.server import failed_reboots
from nova_lxd_py.virt.server import guest_config
from nova_lxd_py.virt.server import incoming as incoming_ops
from nova_lxd_py.virt.server import local_disks
from nova_lxd_py.virt.server import migrate as migrate_ops
from nova_lxd_py.virt.server import orphans as orphan_ops
from nova_lxd_py.virt.server import outgoing as outgoing_ops
from nova_lxd_py.virt.server import power as power_ops
from nova_lxd_py.virt.server import quiesce
from nova_lxd_py.virt.server import repin as repin_ops
from nova_lxd_py.virt.server import rescue as rescue_ops
from nova_lxd_py.virt.server import resize as resize_ops
from nova_lxd_py.virt.server import snapshot as snapshot_ops
from nova_lxd_py.virt.server import teardown as teardown_ops
from nova_lxd_py.virt.storage import ephemeral_disks
from nova_lxd_py.virt.storage import root_disk
from nova_lxd_py.virt.vif import interfaces
from nova_lxd_py.virt.vif import manager as vif_manager
from nova_lxd_py.virt.volume import attachment
from nova_lxd_py.virt.volume import connections
from nova_lxd_py.virt.volume import provisioning
from nova_lxd_py.virt.volume import reconcile
from nova_lxd_py.virt.volume import server_volumes
from nova_lxd_py.virt.volume import statistics
from nova_lxd_py.virt.volume import swap
from nova_lxd_py.virt.volume import usage

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Services:
    """What the driver delegates to."""

    session: lxd.Session
    directory_locks: directory_locks.DirectoryLocks
    guests: registry.GuestRegistry
    watcher: events.EventWatcher
    host: lxd_host.Host
    vifs: vif_manager.VIFManager
    interfaces: interfaces.InterfaceOps
    volumes: server_volumes.ServerVolumes
    volume_swapper: swap.VolumeSwapper
    volume_reconciler: reconcile.Reconciler
    volume_statistics: statistics.VolumeStatistics
    images: image_cache.ImageStore
    templates: templates.TemplateStore
    spawn: build_ops.SpawnOps
    teardown: teardown_ops.TeardownOps
    power: power_ops.PowerOps
    migrate: migrate_ops.MigrateOps
    peer_server: peer.PeerServer
    rescue: rescue_ops.RescueOps
    snapshot: snapshot_ops.SnapshotOps
    quiescer: quiesce.Quiescer
    orphans: orphan_ops.OrphanSweeper
    repin: repin_ops.RepinOps
    passwords: lxd_password.AdminPassword
    console_log: console_log.ConsoleLog
    serial_consoles: serial.SerialConsoleManager
    diagnostics: diagnostics.Diagnostics

    def start(self, host: str) -> None:
        """Check LXD and the options, then recover from whatever ended the
        last nova-compute.

        :param host: name of this compute host.
        :raises exception_mapping.StartupError: if this host cannot run
            servers.
        """
        preflight.check(self.session, conf.CONF)
        self.directory_locks.take(host)
        # LXD continues what a nova-compute that was killed has requested,
        # such as a shutdown, and would undo what is done meanwhile.
        self.session.wait_for_operations()
        # The mounts of volumes come before the guests frozen for a snapshot
        # are thawed and use them.
        self.volume_reconciler.run()
        self.snapshot.recover()
        self.quiescer.thaw()
        self.rescue.recover()
        self.orphans.sweep(nova_context.get_admin_context(), min_age=0)
        self.serial_consoles.recover()
        self.watcher.start()
        if self.session.options.migration_address:
            self.peer_server.start(host)
        LOG.info('Using %s at %s, project %s, storage pool %s',
                 server_kind.version(self.session.server),
                 self.session.endpoint, self.session.project,
                 self.session.options.storage_pool)

    def stop(self) -> None:
        """Stop the threads that the driver has started."""
        self.peer_server.stop()
        self.serial_consoles.stop()
        self.watcher.stop()
        self.directory_locks.release()


def build(virtapi: nova_virtapi.VirtAPI,
          emit_event: Callable[[Any], None]) -> Services:
    """Build the collaborators without sending a request to LXD.

    :param virtapi: Nova's interface for waiting for Neutron's events.
    :param emit_event: called with lifecycle events for Nova
        (:meth:`nova.virt.driver.ComputeDriver.emit_event`).
    """
    session = lxd.Session(conf.CONF.lxd)
    guests = registry.GuestRegistry(session)
    watcher = events.EventWatcher(session, guests, emit_event,
                                  session.options.guest_shutdown_delay)
    host = lxd_host.Host(session)
    vifs = vif_manager.VIFManager()
    image_api = glance.API()
    images = image_cache.ImageStore(session, image_api)
    template_store = templates.TemplateStore(session, guests)
    guest_configs = guest_config.GuestConfigBuilder(session, host, vifs)
    host_connections = connections.VolumeConnections(session.options)
    volume_usage = usage.VolumeUsage(guests, host_connections)
    attacher = attachment.VolumeAttacher(session.options, host_connections,
                                         volume_usage)
    provisioner = provisioning.VolumeProvisioner(session, guests, images)
    swapper = swap.VolumeSwapper(guests, attacher)
    reconciler = reconcile.Reconciler(guests, host_connections, volume_usage,
                                      attacher, swapper, provisioner)
    volumes = server_volumes.ServerVolumes(guests, host_connections,
                                           volume_usage, attacher, provisioner)
    config_drives = config_drive.ConfigDriveManager(session)
    ephemeral = ephemeral_disks.EphemeralDiskManager(session)
    disks = local_disks.LocalDisks(config_drives, ephemeral)
    root_disks = root_disk.RootDiskManager(session, guests)
    passwords = lxd_password.AdminPassword(session, guests)
    serial_consoles = serial.SerialConsoleManager(session, guests, watcher)
    quiescer = quiesce.Quiescer(session.options, guests, volumes)
    snapshot = snapshot_ops.SnapshotOps(session, guests, image_api, quiescer)
    watcher.on_reconnect = functools.partial(_reconnected, reconciler,
                                             quiescer)
    watcher.on_restart = reconciler.restore_limits
    watcher.on_failed_reboot = failed_reboots.RebootCompleter(
        guests, vifs).complete
    rescue = rescue_ops.RescueOps(session, guests, guest_configs, vifs,
                                  images, config_drives, passwords, volumes)
    power = power_ops.PowerOps(session.options, guests, guest_configs, vifs,
                               disks, root_disks, rescue, volumes)
    teardown = teardown_ops.TeardownOps(
        guests, vifs, disks, snapshot, serial_consoles, volumes)
    resize = resize_ops.ResizeOps(guests, guest_configs, vifs, template_store,
                                  ephemeral, root_disks, power, volumes)
    return Services(
        session=session,
        directory_locks=directory_locks.DirectoryLocks(session.options),
        guests=guests, watcher=watcher, host=host,
        vifs=vifs, interfaces=interfaces.InterfaceOps(guests, vifs),
        volumes=volumes,
        volume_swapper=swapper, volume_reconciler=reconciler,
        volume_statistics=statistics.VolumeStatistics(guests),
        images=images, templates=template_store,
        spawn=build_ops.SpawnOps(
            virtapi, guests, guest_configs, vifs, images, template_store,
            disks, passwords, volumes),
        teardown=teardown, power=power,
        migrate=migrate_ops.MigrateOps(
            guests, resize,
            outgoing_ops.OutgoingOps(session, peer.PeerClient()), power,
            teardown, vifs, serial_consoles, volumes),
        peer_server=peer.PeerServer(incoming_ops.IncomingOps(
            session, guests, guest_configs, template_store, disks)),
        rescue=rescue, snapshot=snapshot, quiescer=quiescer,
        orphans=orphan_ops.OrphanSweeper(session, guests, disks),
        repin=repin_ops.RepinOps(guests, guest_configs),
        passwords=passwords,
        console_log=console_log.ConsoleLog(session, guests),
        serial_consoles=serial_consoles,
        diagnostics=diagnostics.Diagnostics(guests))


def _reconnected(reconciler: reconcile.Reconciler,
                 quiescer: quiesce.Quiescer) -> None:
    """Recover from an interruption of the connection to LXD."""
    try:
        reconciler.run()
    finally:
        quiescer.thaw()
