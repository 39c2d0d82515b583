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

"""The extra specs of the ``lxd:`` namespace.

This table says which there are and what values they have. The driver reads
flavors by it, Nova's API validates them by it (:mod:`.extra_spec_validators`),
and the definitions for Glance's metadata catalogue have the same descriptions
(``etc/metadefs/compute-lxd-flavor.json``; the unit tests compare them).

nova-api loads this module, so it imports neither Nova nor the driver.
"""

from __future__ import annotations

import dataclasses

NAMESPACE = 'lxd'

NESTED = 'lxd:nested_allowed'
PRIVILEGED = 'lxd:privileged_allowed'
ISOLATED = 'lxd:isolated'
PROCESSES = 'lxd:max_processes'
VOLUME_MODE = 'lxd:volume_mode'
CONFIG_DRIVE_DEVICE = 'lxd:config_drive_device'
GPU = 'lxd:gpu'
USB = 'lxd:usb'

#: Vendor and product of a device, as ``lspci -nn`` and ``lsusb`` show them.
DEVICE = '[0-9a-fA-F]{4}:[0-9a-fA-F]{4}'
DEVICES = f' *{DEVICE} *(, *{DEVICE} *)*'

#: The kernel's ``PID_MAX_LIMIT`` on 64-bit systems. The pids cgroup refuses
#: more, and the instance would not start.
MAX_PROCESSES = 4 * 1024 * 1024


@dataclasses.dataclass(frozen=True)
class ExtraSpec:
    """Type and values of an extra spec.

    :ivar type: ``bool``, ``int`` or ``str``.
    :ivar description: for administrators who create flavors.
    :ivar minimum: smallest value of an ``int``.
    :ivar maximum: largest value of an ``int``.
    :ivar choices: values of a ``str``, if they can be listed.
    :ivar pattern: regular expression of a ``str``.
    """

    type: type[bool] | type[int] | type[str]
    description: str
    minimum: int | None = None
    maximum: int | None = None
    choices: tuple[str, ...] = ()
    pattern: str | None = None


#: All extra specs of the namespace, by name.
EXTRA_SPECS = {
    NESTED: ExtraSpec(
        bool,
        'Allow the instance to run nested containers (LXD, Docker, '
        "Kubernetes). This exposes more of the host's kernel to it."),
    PRIVILEGED: ExtraSpec(
        bool,
        'Run the instance as a privileged container: root in the instance is '
        'root on the host. Only for tenants who are trusted like '
        'administrators of the host.'),
    ISOLATED: ExtraSpec(
        bool,
        'true: the instance gets a range of host user ids of its own, or is '
        "not started. false: it gets LXD's default range, which instances "
        'share. Not set: [lxd] idmap_isolation of the compute host applies.'),
    PROCESSES: ExtraSpec(
        int,
        'Maximum number of processes and threads of the instance; 0 means no '
        'limit. Not set: [lxd] max_processes of the compute host applies.',
        minimum=0, maximum=MAX_PROCESSES),
    GPU: ExtraSpec(
        str,
        'Pass a GPU of the host through to the instance, named by the '
        'hexadecimal ids of its vendor and product, such as 10de:1db4; or a '
        'comma-separated list. The host must list it in [lxd] '
        'passthrough_devices. Instances on a host share it.',
        pattern=DEVICES),
    USB: ExtraSpec(
        str,
        'Pass a USB device of the host through to the instance, named by the '
        'hexadecimal ids of its vendor and product, such as 0403:6001; or a '
        'comma-separated list. The host must list it in [lxd] '
        'passthrough_devices.',
        pattern=DEVICES),
    VOLUME_MODE: ExtraSpec(
        str,
        'Default mode of Cinder volumes, which the property of a volume and '
        'the instance metadata override. block: block devices. filesystem: '
        'the host mounts their filesystems, if [lxd] volume_filesystems '
        'allows it. Not set: the image property lxd_volume_mode or [lxd] '
        'volume_mode of the compute host applies.',
        choices=('block', 'filesystem')),
    CONFIG_DRIVE_DEVICE: ExtraSpec(
        bool,
        'Provide a config drive also as a read-only block device with the '
        'label config-2, in addition to the directory /config-drive. Not set: '
        'the image property lxd_config_drive_device or [lxd] '
        'config_drive_device of the compute host applies.'),
}
