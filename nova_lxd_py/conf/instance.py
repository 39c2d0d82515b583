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

"""Options of the configuration and the devices of instances."""

from __future__ import annotations

from oslo_config import cfg

instance_opts = [
    cfg.StrOpt(
        'idmap_isolation',
        default='auto',
        choices=[
            ('auto', 'per instance if LXD mounts root disks idmapped, else '
                     'per project if that avoids shifting the ownership of '
                     'each root disk, else per instance'),
            ('server', 'each instance has its own range of host uids'),
            ('project', 'instances of an OpenStack project share a range'),
            ('off', "all instances share LXD's default range"),
        ],
        help="""
Isolation of the host user ids of unprivileged instances from each other.

A process that escapes from its container runs as an unprivileged user of the
host. With a range per instance, this user owns nothing else. With a range per
project, it can reach files and processes of other instances of the same
project on this host; with ``off``, of all instances on this host.

LXD versions that cannot mount root disks idmapped change the owner of every
file on a new root disk at the first start. Instances with a common range are
cloned from a template whose files were shifted once, which makes spawning
several times faster (see ``fast_spawn``).

The host needs sufficient subordinate ids for root in ``/etc/subuid`` and
``/etc/subgid``: 65536 for each range in use. The flavor extra spec
``lxd:isolated=true`` requires a range per instance, and ``lxd:isolated=false``
LXD's default range.
"""),
    cfg.BoolOpt(
        'fast_spawn',
        default=True,
        help="""
Keep a stopped template instance of each image in use, with the ownership of
its files shifted, and clone new instances from it. This applies if instances
share a uid range and the storage pool can clone. Templates take hardly any
space on such pools, and are deleted with the cached image.
"""),
    cfg.BoolOpt(
        'cloud_init_keys',
        default=False,
        help="""
Also pass user data, vendor data and network configuration in the
``cloud-init.*`` options of LXD, for images whose cloud-init reads only these.
This enables ``devlxd``, through which a guest can read its own configuration
keys. The metadata service and config drives work in both cases. It needs
LXD's API extension ``cloud_init``.
"""),
    cfg.BoolOpt(
        'devlxd',
        default=False,
        help="""
Provide the LXD guest API at ``/dev/lxd/sock`` in instances. If disabled, a
guest cannot learn anything from the LXD that runs it.
"""),
    cfg.BoolOpt(
        'config_drive_device',
        default=False,
        help="""
Provide config drives also as a read-only block device with the label
``config-2``, as in virtual machines, in addition to the directory
``/config-drive``. cloud-init needs the directory only, and only privileged
instances can mount the device; it is for guests that look for a disk with
this label and read it themselves.

The flavor extra spec ``lxd:config_drive_device`` takes precedence, then the
image property ``lxd_config_drive_device``; both are ``true`` or ``false``.

Each device takes a loop device of the host and half a MiB below
``$state_path``, or up to 64 MiB with ``[DEFAULT] config_drive_format=vfat``.
The host needs genisoimage, or the program in ``[DEFAULT] mkisofs_cmd``; for
``vfat``, dosfstools and mtools. LXD must be reached through its unix socket.
"""),
    cfg.BoolOpt(
        'guest_disk_view',
        default=True,
        help="""
Show instances their own disks in ``/sys/block``, and not those of the host:
``lsblk`` lists the root disk and the volumes of the instance. Without it,
users of an instance can read in ``/sys`` which disks the host has, and in the
file names of loop devices the IDs of volumes of other projects.

The files are in ``$state_path/guest-disks``, and LXD mounts them over parts of
``/sys`` of the instances. That needs an LXD that is reached through its unix
socket and, if the LXD project is restricted,
``restricted.devices.disk=allow``. A change applies to an instance from its
next start or hard reboot on.
"""),
    cfg.BoolOpt(
        'inject_password',
        default=True,
        help="""
Set the administrator password that the API returned for a new instance
(``adminPass``), by running ``chpasswd`` in the guest immediately after it has
been started. An instance whose image has no ``chpasswd`` is started without a
password. Disable this to save the time where instances are accessed with key
pairs only.

The administrator is root, or the user in the image property
``os_admin_user``. The password of a running instance can be changed in both
cases.
"""),
    cfg.StrOpt(
        'serial_console_command',
        default='login',
        help="""
Program, with arguments, that runs as root in the guest for each connection to
a serial console (``[serial_console] enabled``), on a terminal of its own. It
must authenticate the user: everybody with a valid token from Nova, or with
access to ``[serial_console] proxyclient_address``, can connect. ``login``
asks for user name and password; an instance whose image lacks the program has
no serial console. Words are quoted as in a shell, but no shell is run.
"""),
    cfg.IntOpt(
        'max_processes',
        default=0, min=0,
        help="""
Maximum number of processes and threads of an instance, so that a fork bomb
cannot exhaust the process ids of the host. 0 means no limit. The flavor extra
spec ``lxd:max_processes`` takes precedence.
"""),
]

device_opts = [
    cfg.ListOpt(
        'passthrough_devices',
        default=[],
        help="""
GPUs and USB devices of this host that flavors may pass through to instances,
as ``gpu:<vendor>:<product>`` or ``usb:<vendor>:<product>`` with the
hexadecimal ids that ``lspci -nn`` and ``lsusb`` show, for example
``gpu:10de:1db4, usb:0403:6001``.

The flavor extra specs ``lxd:gpu`` and ``lxd:usb`` request such devices. All
instances on the host that request a device share it. A device that is not
listed is never passed through. For each listed device that is present, the
host reports a trait to Placement that flavors can require, for example
``CUSTOM_LXD_GPU_10DE_1DB4``.

An instance can do with a device whatever the kernel driver of the host allows,
and can find data of its previous user in the memory of the device: pass
devices through only to tenants who trust each other.
"""),
]
