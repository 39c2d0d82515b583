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

"""The compute driver that Nova loads.

Each method hands Nova's call on to the collaborator that does the work; all
of them are built in :mod:`.services`.
"""

from __future__ import annotations

from typing import Any

from nova.compute import utils as compute_utils
from nova import exception
from nova.virt import driver
from nova.virt import hardware

from nova_lxd_py import conf
from nova_lxd_py.virt import exception_mapping
from nova_lxd_py.virt import services
from nova_lxd_py.virt.volume import lxd_devices

CONF = conf.CONF


@exception_mapping.map_all_exceptions
class LXDDriver(driver.ComputeDriver):
    """Runs servers as LXD system containers.

    :param virtapi: Nova's interface for waiting for Neutron's events.
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
        self._services = services.build(virtapi, self.emit_event)

    # -- service ------------------------------------------------------------

    def init_host(self, host):
        self._services.start(host)
        if not hasattr(super(), 'process_instances_at_startup'):
            # Nova 31 to 33.
            self._services.repin.repin_host(host)

    def process_instances_at_startup(self, context, instances):
        self._services.repin.repin(instances)
        return instances

    def cleanup_host(self, host):
        self._services.stop()

    def get_available_nodes(self, refresh=False):
        return [self._services.host.nodename]

    def get_available_resource(self, nodename):
        return self._services.host.available_resource(nodename)

    def update_provider_tree(self, provider_tree, nodename, allocations=None):
        self._services.host.update_provider_tree(
            provider_tree, nodename,
            self._get_allocation_ratios(
                provider_tree.data(nodename).inventory),
            self._get_reserved_host_disk_gb_from_config())

    def get_host_uptime(self):
        return self._services.host.uptime()

    def get_host_cpu_stats(self):
        return self._services.host.cpu_stats()

    def get_host_ip_addr(self):
        return CONF.my_ip

    # -- servers ------------------------------------------------------------

    def list_instances(self):
        return [guest.name for guest in self._services.guests.servers()]

    def list_instance_uuids(self):
        return [guest.uuid for guest in self._services.guests.servers()]

    def get_num_instances(self):
        return self._services.watcher.server_count()

    def instance_exists(self, instance):
        return self._services.guests.find(instance) is not None

    def get_info(self, instance, use_cache=True):
        return hardware.InstanceInfo(
            state=self._services.watcher.power_state(instance, use_cache))

    def spawn(self, context, instance, image_meta, injected_files,
              admin_password, allocations, network_info=None,
              block_device_info=None, power_on=True, accel_info=None):
        self._services.spawn.spawn(
            context, instance, image_meta, injected_files, admin_password,
            network_info, block_device_info, power_on)

    def destroy(self, context, instance, network_info, block_device_info=None,
                destroy_disks=True, destroy_secrets=True):
        self._services.teardown.destroy(instance, network_info or [],
                                        block_device_info, destroy_disks)

    def cleanup(self, context, instance, network_info, block_device_info=None,
                destroy_disks=True, migrate_data=None, destroy_vifs=True,
                destroy_secrets=True):
        self._services.teardown.destroy(
            instance, (network_info or []) if destroy_vifs else None,
            block_device_info, destroy_disks)

    def power_off(self, instance, timeout=0, retry_interval=0):
        self._services.power.power_off(instance, timeout, retry_interval)

    def power_on(self, context, instance, network_info,
                 block_device_info=None, accel_info=None, share_info=None):
        self._services.power.power_on(context, instance, network_info,
                                      block_device_info)

    def reboot(self, context, instance, network_info, reboot_type,
               block_device_info=None, bad_volumes_callback=None,
               accel_info=None, share_info=None):
        self._services.power.reboot(context, instance, network_info,
                                    reboot_type, block_device_info)

    def pause(self, instance):
        self._services.power.pause(instance)

    def unpause(self, instance):
        self._services.power.unpause(instance)

    def suspend(self, context, instance):
        self._services.power.suspend(instance)

    def resume(self, context, instance, network_info, block_device_info=None,
               share_info=None):
        self._services.power.resume(context, instance, network_info,
                                    block_device_info)

    def poll_rebooting_instances(self, timeout, instances):
        """Do nothing: a soft reboot that takes too long becomes a hard reboot
        by itself (``[lxd] soft_reboot_timeout``)."""

    def resume_state_on_host_boot(self, context, instance, network_info,
                                  share_info, block_device_info=None):
        self._services.power.resume_state_on_host_boot(
            context, instance, network_info, block_device_info)

    def rescue(self, context, instance, network_info, image_meta,
               rescue_password, block_device_info, share_info):
        self._services.rescue.rescue(context, instance, network_info,
                                     image_meta, rescue_password)

    def unrescue(self, context, instance):
        self._services.rescue.unrescue(context, instance)

    def snapshot(self, context, instance, image_id, update_task_state):
        self._services.snapshot.take(context, instance, image_id,
                                     update_task_state)

    def quiesce(self, context, instance, image_meta):
        self._services.quiescer.quiesce(instance, image_meta)

    def unquiesce(self, context, instance, image_meta):
        self._services.quiescer.unquiesce(instance)

    def set_admin_password(self, instance, new_pass):
        self._services.passwords.change(instance, new_pass)

    def get_console_output(self, context, instance):
        # Nova encodes the text as latin-1 and so gets the same bytes back.
        return self._services.console_log.output(instance).decode('latin-1')

    def get_serial_console(self, context, instance):
        return self._services.serial_consoles.connect(instance)

    def get_diagnostics(self, instance):
        return self._services.diagnostics.read_plain(instance)

    def get_instance_diagnostics(self, instance):
        return self._services.diagnostics.read(instance)

    # -- ports --------------------------------------------------------------

    def plug_vifs(self, instance, network_info):
        self._services.vifs.plug(instance, network_info)

    def unplug_vifs(self, instance, network_info):
        self._services.vifs.unplug(instance, network_info)

    def attach_interface(self, context, instance, image_meta, vif):
        self._services.interfaces.attach(context, instance, vif)

    def detach_interface(self, context, instance, vif):
        self._services.interfaces.detach(instance, vif)

    # -- volumes ------------------------------------------------------------

    def get_volume_connector(self, instance):
        return self._services.host.volume_connector()

    def get_device_name_for_instance(self, instance, bdms, block_device_obj):
        taken = {instance.root_device_name,
                 *(bdm.device_name for bdm in bdms)} - {None}
        compute_utils.check_max_disk_devices_to_attach(len(taken) + 1)
        return lxd_devices.choose_path(
            block_device_obj.get('device_name'), taken)

    def attach_volume(self, context, connection_info, instance, mountpoint,
                      disk_bus=None, device_type=None, encryption=None):
        self._services.volumes.attach(context, instance, connection_info,
                                      mountpoint, encryption)

    def detach_volume(self, context, connection_info, instance, mountpoint,
                      encryption=None):
        self._services.volumes.detach(instance, connection_info, mountpoint)

    def extend_volume(self, context, connection_info, instance,
                      requested_size):
        self._services.volumes.extend(context, instance, connection_info,
                                      requested_size)

    def swap_volume(self, context, old_connection_info, new_connection_info,
                    instance, mountpoint, resize_to):
        self._services.volume_swapper.swap(
            context, instance, old_connection_info, new_connection_info,
            mountpoint, resize_to)

    def get_all_volume_usage(self, context, compute_host_bdms):
        return self._services.volume_statistics.all(compute_host_bdms)

    def block_stats(self, instance, disk_id):
        return self._services.volume_statistics.of_disk(instance, disk_id)

    # -- images -------------------------------------------------------------

    def cache_image(self, context, image_id):
        return self._services.images.cache_image(context, image_id)

    def manage_image_cache(self, context, all_instances):
        self._services.images.manage_cache(all_instances)
        self._services.templates.prune()
        self._services.quiescer.thaw()
        self._services.orphans.sweep(context)

    # -- migration ----------------------------------------------------------

    def migrate_disk_and_power_off(self, context, instance, dest, flavor,
                                   network_info, block_device_info=None,
                                   timeout=0, retry_interval=0):
        return self._services.migrate.prepare(
            context, instance, dest, flavor, network_info, block_device_info,
            timeout, retry_interval)

    def finish_migration(self, context, migration, instance, disk_info,
                         network_info, image_meta, resize_instance,
                         allocations, block_device_info=None, power_on=True,
                         share_info=None):
        self._services.migrate.finish(context, migration, instance,
                                      network_info, block_device_info,
                                      power_on)

    def confirm_migration(self, context, migration, instance, network_info):
        self._services.migrate.confirm(migration, instance)

    def finish_revert_migration(self, context, instance, network_info,
                                migration, block_device_info=None,
                                power_on=True, share_info=None):
        self._services.migrate.revert(context, instance, network_info,
                                      migration, block_device_info, power_on)

    def check_can_live_migrate_destination(self, context, instance,
                                           src_compute_info, dst_compute_info,
                                           block_migration=False,
                                           disk_over_commit=False):
        raise exception.MigrationPreCheckError(
            reason='LXD cannot move the memory of a running container to '
                   'another host; migrate the server instead (cold '
                   'migration), which stops it while its disks are copied, '
                   'and only for seconds if it boots from a volume')

    def cleanup_live_migration_destination_check(self, context,
                                                 dest_check_data):
        """Do nothing: the check has prepared nothing."""
