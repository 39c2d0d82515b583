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

"""The compute driver that Nova loads: it delegates, and holds no logic."""

from __future__ import annotations

from typing import Any

from nova import exception
from nova.image import glance
from nova.virt import driver
from nova.virt import hardware
from oslo_config import cfg
from oslo_log import log as logging

from nova_lxd_py import conf
from nova_lxd_py.virt.console import log as console_log
from nova_lxd_py.virt.console import serial
from nova_lxd_py.virt import exception_mapping
from nova_lxd_py.virt.guest import diagnostics
from nova_lxd_py.virt.guest import events
from nova_lxd_py.virt.guest import password as lxd_password
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.host import host as lxd_host
from nova_lxd_py.virt.image import cache as image_cache
from nova_lxd_py.virt.image import templates
from nova_lxd_py.virt.lxd import session
from nova_lxd_py.virt.metadata import config_drive
from nova_lxd_py.virt import preflight
from nova_lxd_py.virt.server import build
from nova_lxd_py.virt.server import guest_config
from nova_lxd_py.virt.server import repin
from nova_lxd_py.virt.server import rescue
from nova_lxd_py.virt.server import resize
from nova_lxd_py.virt.server import snapshot
from nova_lxd_py.virt.storage import ephemeral_disks as disks
from nova_lxd_py.virt.storage import root_disk
from nova_lxd_py.virt.vif import interfaces
from nova_lxd_py.virt.vif import manager as vif_manager
from nova_lxd_py.virt.volume import attachments
from nova_lxd_py.virt.volume import boot_volumes
from nova_lxd_py.virt.volume import filesystems
from nova_lxd_py.virt.volume import lxd_devices
from nova_lxd_py.virt.volume import manager as volume_manager
from nova_lxd_py.virt.volume import provisioning
from nova_lxd_py.virt.volume import root_volumes
from nova_lxd_py.virt.volume import usage

CONF = conf.CONF
LOG = logging.getLogger(__name__)


@exception_mapping.map_all_exceptions
class LXDDriver(driver.ComputeDriver):
    """Runs servers as LXD system containers.

    :param virtapi: Nova's way of waiting for Neutron's events.
    """

    capabilities = {
        **driver.ComputeDriver.capabilities,
        'has_imagecache': True,
        'supports_evacuate': True,
        'supports_attach_interface': True,
        'supports_extend_volume': True,
        'supports_tagged_attach_interface': True,
        'supports_tagged_attach_volume': True,
        'supports_device_tagging': True,
        'supports_multiattach': True,
        'supports_trusted_certs': True,
        'supports_pcpus': True,
        'supports_image_type_raw': True,
    }

    def __init__(self, virtapi: Any) -> None:
        super().__init__(virtapi)
        options: cfg.ConfigOpts.GroupAttr = CONF.lxd
        self._session = session.Session(options)
        self._guests = registry.GuestRegistry(self._session)
        self._watcher = events.EventWatcher(
            self._session, self._guests, self.emit_event,
            options.guest_shutdown_delay)
        self._vifs = vif_manager.VIFManager()
        image_api = glance.API()
        self._images = image_cache.ImageStore(
            self._session, options, image_api)
        self._templates = templates.TemplateStore(self._session, options,
                                                  self._guests)
        self._host = lxd_host.Host(self._session, options)
        self._definitions = guest_config.GuestConfigBuilder(
            self._session, options, self._host, self._vifs)
        self._consoles = console_log.ConsoleLog(self._session, self._guests)
        self._diagnostics = diagnostics.Diagnostics(self._guests)
        self._serial_consoles = serial.SerialConsoles(
            self._session, options, self._guests, self._watcher)
        volumes = volume_manager.VolumeManager(options)
        volume_holders = usage.VolumeUsage(self._guests, volumes)
        self._attachments = attachments.Attachments(
            self._guests, volumes, filesystems.Filesystems(options),
            volume_holders)
        self._boot_volumes = boot_volumes.BootVolumes(
            self._session, self._guests,
            root_volumes.RootVolumes(options, volumes, volume_holders),
            provisioning.VolumeProvisioner(self._session, options, self._guests,
                                           self._images))
        self._interfaces = interfaces.InterfaceOps(self._guests, self._vifs)
        self._snapshots = snapshot.SnapshotOps(self._session, options,
                                               self._guests, image_api)
        config_drives = config_drive.ConfigDriveManager(self._session, options)
        self._passwords = lxd_password.AdminPassword(self._session, options,
                                                     self._guests)
        self._rescues = rescue.RescueOps(
            self._session, options, self._guests, self._watcher,
            self._definitions, self._vifs, self._images, config_drives,
            self._passwords, self._attachments)
        ephemeral_disks = disks.EphemeralDisks(self._session, options)
        root_disks = root_disk.RootDiskManager(self._session, options, self._guests)
        self._lifecycle = build.Lifecycle(
            virtapi, options, self._guests, self._watcher, self._definitions,
            self._vifs, self._images, self._templates, config_drives,
            ephemeral_disks, root_disks, self._rescues, self._snapshots,
            self._passwords, self._serial_consoles, self._attachments,
            self._boot_volumes)
        self._migrations = resize.ResizeOps(
            self._session, options, self._guests, self._definitions,
            self._vifs, self._templates, ephemeral_disks, root_disks,
            self._lifecycle, self._attachments, self._boot_volumes)

    # -- service ------------------------------------------------------------

    def init_host(self, host):
        preflight.check(self._session, CONF)
        # Before the servers that stood still for it run on.
        self._attachments.recover()
        self._snapshots.recover()
        self._rescues.recover()
        self._boot_volumes.recover()
        self._serial_consoles.recover()
        self._watcher.start()
        LOG.info('LXD %s at %s: servers go to project %s, pool %s',
                 self._session.server['environment']['server_version'],
                 self._session.endpoint, CONF.lxd.project,
                 CONF.lxd.storage_pool)

    def process_instances_at_startup(self, context, instances):
        repin.follow(self._guests, self._definitions, instances)
        return instances

    def cleanup_host(self, host):
        self._serial_consoles.stop()
        self._watcher.stop()

    def get_available_nodes(self, refresh=False):
        return [self._host.nodename]

    def get_available_resource(self, nodename):
        return self._host.available_resource(nodename)

    def update_provider_tree(self, provider_tree, nodename, allocations=None):
        self._host.update_provider_tree(
            provider_tree, nodename,
            self._get_allocation_ratios(
                provider_tree.data(nodename).inventory),
            self._get_reserved_host_disk_gb_from_config())

    def get_host_uptime(self):
        return self._host.uptime()

    def get_host_cpu_stats(self):
        return self._host.cpu_stats()

    def get_host_ip_addr(self):
        return CONF.my_ip

    # -- servers ------------------------------------------------------------

    def list_instances(self):
        return [guest.name for guest in self._guests.servers()]

    def list_instance_uuids(self):
        return [guest.uuid for guest in self._guests.servers()]

    def get_num_instances(self):
        return self._watcher.server_count()

    def instance_exists(self, instance):
        return self._guests.find(instance) is not None

    def get_info(self, instance, use_cache=True):
        return hardware.InstanceInfo(
            state=self._watcher.power_state(instance, use_cache))

    def spawn(self, context, instance, image_meta, injected_files,
              admin_password, allocations, network_info=None,
              block_device_info=None, power_on=True, accel_info=None):
        self._lifecycle.spawn(context, instance, image_meta, injected_files,
                              admin_password, network_info,
                              block_device_info, power_on)

    def destroy(self, context, instance, network_info, block_device_info=None,
                destroy_disks=True, destroy_secrets=True):
        self._lifecycle.destroy(instance, network_info, block_device_info,
                                destroy_disks)

    def cleanup(self, context, instance, network_info, block_device_info=None,
                destroy_disks=True, migrate_data=None, destroy_vifs=True,
                destroy_secrets=True):
        self._lifecycle.destroy(instance,
                                network_info if destroy_vifs else None,
                                block_device_info, destroy_disks)

    def power_off(self, instance, timeout=0, retry_interval=0):
        self._lifecycle.power_off(instance, timeout, retry_interval)

    def power_on(self, context, instance, network_info,
                 block_device_info=None, accel_info=None, share_info=None):
        self._lifecycle.power_on(context, instance, network_info,
                                 block_device_info)

    def reboot(self, context, instance, network_info, reboot_type,
               block_device_info=None, bad_volumes_callback=None,
               accel_info=None, share_info=None):
        self._lifecycle.reboot(context, instance, network_info, reboot_type,
                               block_device_info)

    def pause(self, instance):
        self._lifecycle.pause(instance)

    def unpause(self, instance):
        self._lifecycle.unpause(instance)

    def suspend(self, context, instance):
        self._lifecycle.suspend(instance)

    def resume(self, context, instance, network_info, block_device_info=None,
               share_info=None):
        self._lifecycle.resume(context, instance, network_info,
                               block_device_info)

    def poll_rebooting_instances(self, timeout, instances):
        """Nothing to poll: a reboot that hangs becomes a hard one itself."""

    def resume_state_on_host_boot(self, context, instance, network_info,
                                  share_info, block_device_info=None):
        self._lifecycle.resume_state_on_host_boot(
            context, instance, network_info, block_device_info)

    def rescue(self, context, instance, network_info, image_meta,
               rescue_password, block_device_info, share_info):
        self._rescues.rescue(context, instance, network_info, image_meta,
                             rescue_password)

    def unrescue(self, context, instance):
        self._rescues.unrescue(context, instance)

    def snapshot(self, context, instance, image_id, update_task_state):
        self._snapshots.take(context, instance, image_id, update_task_state)

    def quiesce(self, context, instance, image_meta):
        self._snapshots.quiesce(instance, image_meta)

    def unquiesce(self, context, instance, image_meta):
        self._snapshots.unquiesce(instance)

    def set_admin_password(self, instance, new_pass):
        self._passwords.change(instance, new_pass)

    def get_console_output(self, context, instance):
        # Nova encodes text as latin-1, so this gives it the bytes as they are.
        return self._consoles.output(instance).decode('latin-1')

    def get_serial_console(self, context, instance):
        return self._serial_consoles.connect(instance)

    def get_diagnostics(self, instance):
        return self._diagnostics.read_plain(instance)

    def get_instance_diagnostics(self, instance):
        return self._diagnostics.read(instance)

    # -- ports --------------------------------------------------------------

    def plug_vifs(self, instance, network_info):
        self._vifs.plug(instance, network_info)

    def unplug_vifs(self, instance, network_info):
        self._vifs.unplug(instance, network_info)

    def attach_interface(self, context, instance, image_meta, vif):
        self._interfaces.attach(context, instance, vif)

    def detach_interface(self, context, instance, vif):
        self._interfaces.detach(instance, vif)

    # -- volumes ------------------------------------------------------------

    def get_volume_connector(self, instance):
        return self._host.volume_connector()

    def get_device_name_for_instance(self, instance, bdms, block_device_obj):
        return lxd_devices.choose_path(
            block_device_obj.get('device_name'),
            [instance.root_device_name, *(bdm.device_name for bdm in bdms)])

    def attach_volume(self, context, connection_info, instance, mountpoint,
                      disk_bus=None, device_type=None, encryption=None):
        self._attachments.attach(context, instance, connection_info,
                                 mountpoint, encryption)

    def detach_volume(self, context, connection_info, instance, mountpoint,
                      encryption=None):
        if not self._boot_volumes.detach(instance, connection_info):
            self._attachments.detach(instance, connection_info, mountpoint)

    def extend_volume(self, context, connection_info, instance,
                      requested_size):
        if not self._boot_volumes.extend(instance, connection_info,
                                         requested_size):
            self._attachments.extend(context, instance, connection_info,
                                     requested_size)

    def swap_volume(self, context, old_connection_info, new_connection_info,
                    instance, mountpoint, resize_to):
        self._attachments.swap(context, instance, old_connection_info,
                               new_connection_info, mountpoint, resize_to)

    # -- images -------------------------------------------------------------

    def cache_image(self, context, image_id):
        return self._images.cache_image(context, image_id)

    def manage_image_cache(self, context, all_instances):
        self._images.manage_cache(all_instances)
        self._templates.prune()

    # -- migration ----------------------------------------------------------

    def migrate_disk_and_power_off(self, context, instance, dest, flavor,
                                   network_info, block_device_info=None,
                                   timeout=0, retry_interval=0):
        return self._migrations.prepare(
            context, instance, dest, flavor, network_info, block_device_info,
            timeout, retry_interval)

    def finish_migration(self, context, migration, instance, disk_info,
                         network_info, image_meta, resize_instance,
                         allocations, block_device_info=None, power_on=True,
                         share_info=None):
        self._migrations.finish(context, migration, instance, network_info,
                                block_device_info, power_on)

    def confirm_migration(self, context, migration, instance, network_info):
        self._migrations.confirm(migration, instance)

    def finish_revert_migration(self, context, instance, network_info,
                                migration, block_device_info=None,
                                power_on=True, share_info=None):
        self._migrations.revert(context, instance, network_info, migration,
                                block_device_info, power_on)

    def check_can_live_migrate_destination(self, context, instance,
                                           src_compute_info, dst_compute_info,
                                           block_migration=False,
                                           disk_over_commit=False):
        raise exception.MigrationPreCheckError(
            reason='LXD cannot move the memory of a running container to '
                   'another host')

    def cleanup_live_migration_destination_check(self, context,
                                                 dest_check_data):
        """Nothing was prepared, so there is nothing to clean."""
