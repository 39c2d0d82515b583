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

"""Device tags: the tags that tenants give to ports and disks.

A guest reads them as ``devices`` from the metadata service and the config
drive, with the MAC address of a port or the path of a disk to identify the
device by. There are no bus addresses: a container has no buses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from nova import block_device
from nova import context as nova_context
from nova.network import model as network_model
from nova import objects
from nova.virt import netutils

from nova_lxd_py.virt.storage import ephemeral_disks


def publish(context: nova_context.RequestContext, instance: objects.Instance,
            ports: Iterable[network_model.VIF]) -> None:
    """Save the device metadata of an instance, before its guest can read it.

    :param context: the request context.
    :param instance: the instance, which is saved if anything is tagged.
    :param ports: all its ports.
    """
    devices = [*_nics(context, instance, ports), *_disks(instance)]
    if devices:
        _save(instance, devices)
    elif (instance.obj_attr_is_set('device_metadata') and
            instance.device_metadata is not None):
        # A rebuilt or unshelved instance that had tagged devices before.
        instance.device_metadata = None
        instance.save()


def publish_port(context: nova_context.RequestContext,
                 instance: objects.Instance, port: network_model.VIF) -> None:
    """Add a port to the device metadata, if it is tagged.

    Nova's compute manager removes detached ports.

    :param context: the request context.
    :param instance: the instance, which is saved if the port is tagged.
    :param port: the port.
    """
    added = list(_nics(context, instance, [port]))
    if not added:
        return
    _save(instance, [*_devices_without(instance, mac=port['address']),
                     *added])


def publish_volume(instance: objects.Instance,
                   disk: objects.BlockDeviceMapping) -> None:
    """Add a tagged volume to the device metadata.

    Nova's compute manager removes detached volumes.

    :param instance: the instance, which is saved.
    :param disk: block device mapping of the volume.
    """
    _save(instance, [*_devices_without(instance, serial=disk.volume_id),
                     _volume(disk)])


def unpublish_volume(instance: objects.Instance, volume_id: str) -> None:
    """Remove a volume that could not be attached from the device metadata.

    :param instance: the instance, which is saved.
    :param volume_id: Cinder's id of the volume.
    """
    _save(instance, _devices_without(instance, serial=volume_id))


def _devices_without(instance: objects.Instance, **match: str
                     ) -> list[objects.DeviceMetadata]:
    """Return the device metadata except for the device that matches.

    :param match: one field of the device and its value.
    """
    [(field, value)] = match.items()
    known = instance.device_metadata
    return [device for device in (known.devices if known else ())
            if not (field in device and getattr(device, field) == value)]


def _save(instance: objects.Instance,
          devices: list[objects.DeviceMetadata]) -> None:
    # A new object: changes within the old one would not mark the field dirty.
    instance.device_metadata = objects.InstanceDeviceMetadata(devices=devices)
    instance.save()


def _nics(context: nova_context.RequestContext, instance: objects.Instance,
          ports: Iterable[network_model.VIF]
          ) -> Iterator[objects.NetworkInterfaceMetadata]:
    ports = list(ports)
    if not ports:
        return
    tags = {row.uuid: row.tag for row in
            objects.VirtualInterfaceList.get_by_instance_uuid(
                context, instance.uuid)}
    vlans = netutils.get_cached_vifs_with_vlan(ports)
    trusted = netutils.get_cached_vifs_with_trusted(ports)
    for port in ports:
        mac = port['address']
        tag, vlan = tags.get(port['id']), vlans.get(mac)
        if not tag and not vlan:
            continue
        nic = objects.NetworkInterfaceMetadata(
            mac=mac, vf_trusted=trusted.get(mac, False),
            tags=[tag] if tag else [])
        if vlan:
            nic.vlan = int(vlan)
        yield nic


def _disks(instance: objects.Instance) -> Iterator[objects.DiskMetadata]:
    ephemerals = 0
    for disk in instance.get_bdms():
        path = None
        if disk.is_volume:
            if disk.tag:
                yield _volume(disk)
        elif disk.boot_index == 0:
            path = '/'
        elif block_device.new_format_is_ephemeral(disk):
            path = ephemeral_disks.guest_path(ephemerals)
            ephemerals += 1
        if path and disk.tag:
            yield objects.DiskMetadata(path=path, tags=[disk.tag])


def _volume(disk: objects.BlockDeviceMapping) -> objects.DiskMetadata:
    return objects.DiskMetadata(
        path=block_device.prepend_dev(disk.device_name),
        serial=disk.volume_id, tags=[disk.tag])
