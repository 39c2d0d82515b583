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

"""The ``[lxd]`` options of nova.conf."""

from __future__ import annotations

from collections.abc import Iterable

from nova import conf as nova_conf
from nova.conf import paths as nova_paths
from oslo_config import cfg

lxd_group = cfg.OptGroup(
    'lxd',
    title='LXD driver options',
    help="""
Options of the LXD compute driver (``compute_driver = lxd.LXDDriver``), which
runs instances as LXD system containers on the compute host.
""")

connection_opts = [
    cfg.StrOpt(
        'endpoint',
        help="""
LXD endpoint of this compute host: the path of a unix socket, or an
``https://`` URL.

If unset, the sockets of the LXD snap, of a distribution's LXD package and of
Incus are tried, in this order. A URL also requires ``client_certificate``,
``client_key`` and ``server_certificate``.

Access to the unix socket is equivalent to root on the host.
"""),
    cfg.StrOpt(
        'client_certificate',
        help="""
Path of the PEM client certificate that nova-compute presents to an
``https://`` endpoint. Add it to LXD's trust store with ``lxc config trust
add``.
"""),
    cfg.StrOpt(
        'client_key',
        help="""
Path of the PEM private key of ``client_certificate``. It should be readable
by the user of nova-compute only.
"""),
    cfg.StrOpt(
        'server_certificate',
        help="""
Path of the PEM certificate of the LXD server at an ``https://`` endpoint.

The certificate is pinned: the connection is refused unless the server presents
exactly this one. Certificate authorities are not consulted.
"""),
    cfg.StrOpt(
        'directory',
        help="""
LXD's data directory, as LXD itself sees it. It is needed only to rescue
instances.

If unset, the directory of LXD's unix socket is used. Set it if the socket is
elsewhere, or if ``endpoint`` is an ``https://`` URL.
"""),
    cfg.StrOpt(
        'project',
        default='nova',
        regex=r'^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$',
        help="""
LXD project for the instances, images and volumes of this nova-compute service.

The driver never reads or changes objects in other projects, so that containers
of the operator are safe from it. Two nova-compute services must not share a
project.
"""),
    cfg.BoolOpt(
        'create_project',
        default=True,
        help="""
Create ``project`` at start-up if it does not exist. Disable this if the
certificate of nova-compute may not create projects, and create the project
manually:

    lxc project create nova -c features.images=true \\
        -c features.profiles=true -c features.storage.volumes=true
"""),
    cfg.StrOpt(
        'storage_pool',
        default='default',
        help="""
LXD storage pool for root disks, images and ephemeral disks. Its size is
reported to Placement as DISK_GB.

Pools of the drivers btrfs, zfs, lvm (thin) and ceph enforce the root disk size
of a flavor and clone images instead of copying them; a ``dir`` pool does
neither.
"""),
]

timeout_opts = [
    cfg.IntOpt(
        'startup_timeout',
        default=120, min=0, max=3600,
        help="""
Seconds to wait at start-up for LXD to answer. nova-compute exits if LXD does
not answer in time. The default allows for a reboot of the host, after which an
LXD with many instances takes a while to answer.
"""),
    cfg.IntOpt(
        'request_timeout',
        default=30, min=1, max=3600,
        help="""
Seconds to wait for the answer to a request. LXD is considered unreachable
if it does not answer in time, or if no connection can be made for as long.
Background operations have timeouts of their own, see ``operation_timeout`` and
``image_timeout``.
"""),
    cfg.IntOpt(
        'operation_timeout',
        default=300, min=10, max=86400,
        help="""
Seconds to wait for a background operation of LXD on an instance, such as
creating, starting or deleting it. Increase it for slow disks, or for large
images on a ``dir`` pool. An operation that exceeds it is cancelled if LXD
supports that.
"""),
    cfg.IntOpt(
        'max_concurrent_operations',
        min=1, max=1024, sample_default='4 for each CPU, at least 8',
        help="""
Maximum number of instances that LXD creates, starts, stops by force or deletes
at the same time; further ones wait, for at most ``operation_timeout``. LXD
would begin all at once, and its database times out when hundreds of instances
are deleted together. Clean shutdowns, migrations, snapshots and transfers of
images are not counted.
"""),
    cfg.IntOpt(
        'image_timeout',
        default=3600, min=60, max=86400,
        help="""
Seconds that the transfer of one image between Glance and LXD may take,
including the import into LXD's image store.
"""),
    cfg.IntOpt(
        'soft_reboot_timeout',
        default=60, min=1, max=3600,
        help="""
Seconds to wait for the guest to shut down in a soft reboot before the driver
does a hard reboot. The timeout for stopping an instance is ``[DEFAULT]
shutdown_timeout``.
"""),
    cfg.IntOpt(
        'guest_shutdown_delay',
        default=5, min=1, max=60,
        help="""
Seconds for which an instance must stay stopped after a shutdown from within
the guest before Nova is notified. A guest that reboots is stopped for a
moment, too, and must not be reported as shut down.
"""),
]

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

Each device takes a loop device of the host and half a megabyte below
``$state_path``, or up to 64 MB with ``[DEFAULT] config_drive_format=vfat``.
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

image_opts = [
    cfg.IntOpt(
        'image_max_unpacked_gb',
        default=100, min=1, max=65536,
        help="""
Maximum size in GiB of an unpacked image. The import of an image that turns
out to be larger, for example one made to fill the disk of the host, is aborted
and the image is refused.
"""),
    cfg.IntOpt(
        'image_parallel_imports',
        default=2, min=1, max=64,
        help="""
Number of different images that are imported into LXD at the same time. An
image is imported only once, regardless of how many instances wait for it.
"""),
]

migration_opts = [
    cfg.StrOpt(
        'migration_address',
        help="""
Address of this host at which the LXD of other compute hosts fetch instances
that are migrated or resized to them, with or without a port (8443 by default),
for example ``192.0.2.11`` or ``[2001:db8::11]:8443``.

The driver sets LXD's ``core.https_address`` to it. If that is set already, it
must include this address. With it the API of LXD can be reached on this
network, for clients whose certificate LXD trusts; the driver adds none. Only
the compute hosts need to reach it.

Instances can be migrated between hosts that have this option. If unset, which
is the default, they can only be resized on their own host.
"""),
    cfg.IntOpt(
        'migration_timeout',
        default=3600, min=60, max=86400,
        help="""
Seconds that the transfer of one disk of an instance to another host may take.
If it takes longer, the migration fails and the instance is started again where
it was.
"""),
    cfg.IntOpt(
        'max_concurrent_migrations',
        default=4, min=1, max=1000,
        help="""
Number of instances that this host sends to other hosts at the same time, and
number of those that it takes in. Others wait, and run until it is their turn.
"""),
    cfg.IntOpt(
        'migration_progress_timeout',
        default=600, min=1, max=86400,
        help="""
Seconds without any progress after which the transfer of a disk is given up,
for example because the storage of one of the hosts does not answer. The
instance is started again where it was. LXD itself notices a broken network
earlier. Do not choose it too small: while large files are compared, LXD
reports no progress.
"""),
]

snapshot_opts = [
    cfg.StrOpt(
        'snapshot_compression',
        default='zstd',
        choices=[
            ('zstd', 'fastest; about the size of gzip'),
            ('gzip', 'three times slower; supported by every LXD'),
            ('xz', 'smallest and by far the slowest'),
            ('none', 'no compression; slower than zstd on most disks, because '
                     'more data is written, sent and stored'),
        ],
        help="""
Compression of the image that LXD creates for a snapshot, a backup or a shelved
instance. LXD creates one image at a time, so that this also limits the
rate of snapshots of a host. If the host lacks the program for the chosen
compression, gzip is used.
"""),
]

volume_opts = [
    cfg.BoolOpt(
        'volume_use_multipath',
        default=False,
        help="""
Connect iSCSI, Fibre Channel and NVMe volumes over all paths that the storage
back end offers. This needs a running ``multipathd``, or native NVMe multipath
in the kernel. Existing connections are not changed.
"""),
    cfg.BoolOpt(
        'volume_enforce_multipath',
        default=False,
        help="""
If ``volume_use_multipath`` is enabled, refuse to attach volumes while
``multipathd`` is not running. If disabled, they are attached over a single
path in this case.
"""),
    cfg.IntOpt(
        'volume_scan_attempts',
        default=5, min=1, max=60,
        help="""
Number of times that the host scans for the device of a newly connected volume
before the attachment fails. The pauses between the scans increase.
"""),
    cfg.StrOpt(
        'volume_share_directory',
        default=nova_paths.state_path_def('mnt'),
        sample_default='$state_path/mnt',
        help="""
Directory below which the shares of NFS and similar Cinder back ends are
mounted. It must not be shared with another nova-compute or with
cinder-volume: a share is unmounted when the last volume on it is detached.
"""),
    cfg.StrOpt(
        'volume_mode',
        default='block',
        choices=[
            ('block', 'the volume is a block device in the guest'),
            ('filesystem', 'the host mounts the filesystem of the volume for '
                           'the guest'),
        ],
        help="""
Default mode in which instances get volumes.

If ``volume_filesystems`` is set, it is overridden by, in this order: the
property ``lxd_volume_mode`` of the volume, the instance metadata with this
key, the flavor extra spec ``lxd:volume_mode`` and the image property
``lxd_volume_mode``.
"""),
    cfg.ListOpt(
        'volume_filesystems',
        default=[],
        item_type=cfg.types.String(choices=['ext4', 'xfs']),
        help="""
Filesystems that the host may mount for instances: ``ext4``, ``xfs`` or both.
An empty volume in filesystem mode is formatted with the first one. The host
needs e2fsprogs or xfsprogs, and a kernel that supports idmapped mounts (Linux
5.12 for ext4, 5.19 for xfs).

If empty, which is the default, volumes are always block devices, and instances
cannot boot from volumes. The kernel of the host parses the content of a volume
when it mounts it, and the tenant may have crafted this content: allow only
filesystems whose kernel code you trust with that.
"""),
    cfg.BoolOpt(
        'volume_discard',
        default=True,
        help="""
Mount volumes, also those that instances boot from, with the mount option
``discard``: the storage gets back the space of files that are deleted in the
instance, if it and the connection support that. Disable it for storage that
discards slowly.

It applies when a volume is mounted next: when it is attached or the instance
is started by Nova. It does not affect block devices, for which the instance
itself decides, and encrypted volumes, which ignore it.
"""),
    cfg.StrOpt(
        'volume_mount_directory',
        default=nova_paths.state_path_def('volumes'),
        sample_default='$state_path/volumes',
        help="""
Directory below which volumes in filesystem mode are mounted. LXD must see it
at the same path.
"""),
    cfg.StrOpt(
        'volume_root_directory',
        default='/run/nova-lxd-py',
        help="""
Directory below which boot volumes are mounted. LXD must see it at the same
path. The root users of containers must be able to reach it: every directory
on the path needs the search permission (``x``) for others, which the state
directory of Nova often lacks. Its content is not accessible to others.

Every nova-compute of a host needs a directory of its own: at its start, and
when it reaches LXD again, it unmounts what none of its servers has. It does
not start if another one uses this directory, ``volume_mount_directory``,
``volume_share_directory`` or ``volume_encryption_directory``: a file beside
each, with the suffix ``.nova-compute.lock``, is locked and names the owner.
"""),
    cfg.StrOpt(
        'volume_encryption_directory',
        default=nova_paths.state_path_def('encrypted-volumes'),
        sample_default='$state_path/encrypted-volumes',
        help="""
Directory for symbolic links to the devices of attached encrypted volumes. They
are needed by the encryptors of os-brick and contain no secrets. The host needs
cryptsetup, device-mapper in its kernel, and the same ``[key_manager]``
configuration as Cinder.
"""),
    cfg.StrOpt(
        'volume_nfs_options',
        help="""
Mount options for NFS shares with volumes, in the syntax of ``mount -o``; see
nfs(5). Options that Cinder returns for a share are added to them.
"""),
]

ALL_OPTS = (connection_opts + timeout_opts + instance_opts + device_opts +
            image_opts + migration_opts + snapshot_opts +
            volume_opts)


def register_opts(conf: cfg.ConfigOpts) -> None:
    """Register the ``[lxd]`` options.

    :param conf: the configuration to extend, normally ``nova.conf.CONF``.
    """
    conf.register_group(lxd_group)
    conf.register_opts(ALL_OPTS, group=lxd_group)


def list_opts() -> Iterable[tuple[cfg.OptGroup, list[cfg.Opt]]]:
    """List the options for oslo-config-generator and the documentation.

    :returns: pairs of group and options.
    """
    return [(lxd_group, ALL_OPTS)]


CONF = nova_conf.CONF
register_opts(CONF)
