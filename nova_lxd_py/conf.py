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
runs servers as LXD system containers on the host of this nova-compute.
""")

connection_opts = [
    cfg.StrOpt(
        'endpoint',
        help="""
Where the LXD of this host listens: the path of its unix socket, or an
``https://`` URL.

Left empty, the sockets of the LXD snap, of a distribution's LXD package and
of Incus are tried, in this order. With a URL, ``client_certificate``,
``client_key`` and ``server_certificate`` must be set as well.

Access to the unix socket is equivalent to root on the host.
"""),
    cfg.StrOpt(
        'client_certificate',
        help="""
Path of the PEM certificate with which nova-compute identifies itself to an
``https://`` endpoint. LXD must trust it (``lxc config trust add``).
"""),
    cfg.StrOpt(
        'client_key',
        help="""
Path of the PEM private key that belongs to ``client_certificate``. Only
nova-compute's user should be able to read it.
"""),
    cfg.StrOpt(
        'server_certificate',
        help="""
Path of the PEM certificate that the LXD at an ``https://`` endpoint shows.

The connection is refused unless the server shows exactly this certificate;
certificate authorities are not consulted.
"""),
    cfg.StrOpt(
        'directory',
        help="""
Directory in which LXD keeps its data, as LXD itself sees it. Left empty, it is
the directory of LXD's unix socket. Set it where the socket is elsewhere, or
with an ``https://`` endpoint. Only rescuing a server needs to know it.
"""),
    cfg.StrOpt(
        'project',
        default='nova',
        regex=r'^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$',
        help="""
LXD project in which this nova-compute keeps its instances and images.

The driver never reads or changes anything in other projects, so containers
of the operator's own are safe from it. Two nova-compute services must not
share a project.
"""),
    cfg.BoolOpt(
        'create_project',
        default=True,
        help="""
Create ``project`` at start-up when it is missing. Switch this off where
nova-compute's certificate may not create projects, and create it by hand:

    lxc project create nova -c features.images=true \\
        -c features.profiles=true -c features.storage.volumes=true
"""),
    cfg.StrOpt(
        'storage_pool',
        default='default',
        help="""
LXD storage pool for root disks, images and ephemeral disks. Its size is what
the host reports to Placement as DISK_GB. Pools of type btrfs, zfs, lvm (thin)
and ceph enforce the root disk size of a flavor and clone images at once; a
``dir`` pool does neither.
"""),
]

timeout_opts = [
    cfg.IntOpt(
        'startup_timeout',
        default=30, min=0, max=3600,
        help="""
Seconds to wait at start-up for an LXD that does not answer yet, for example
since the host has just booted, before nova-compute gives up.
"""),
    cfg.IntOpt(
        'request_timeout',
        default=30, min=1, max=3600,
        help="""
Seconds within which LXD must answer a plain request. An LXD that takes longer
counts as unreachable.
"""),
    cfg.IntOpt(
        'operation_timeout',
        default=300, min=10, max=86400,
        help="""
Seconds within which LXD must finish an operation on an instance, such as
creating, starting or deleting it. Raise it for slow disks or for large images
on a ``dir`` pool. An operation that runs longer is cancelled where LXD can.
"""),
    cfg.IntOpt(
        'image_timeout',
        default=3600, min=60, max=86400,
        help="""
Seconds that the transfer of one image between Glance and LXD may take.
"""),
    cfg.IntOpt(
        'soft_reboot_timeout',
        default=60, min=1, max=3600,
        help="""
Seconds that a guest gets to shut down in a soft reboot before the driver does
a hard one. (For stopping a server see ``[DEFAULT] shutdown_timeout``.)
"""),
    cfg.IntOpt(
        'guest_shutdown_delay',
        default=5, min=1, max=60,
        help="""
Seconds for which a server must stay down after its guest shut itself down
before Nova is told. A guest that reboots itself is down for a moment too and
must not be taken for a stopped one.
"""),
]

instance_opts = [
    cfg.StrOpt(
        'idmap_isolation',
        default='auto',
        choices=[
            ('auto', 'per server where LXD mounts root disks idmapped, else '
                     'per project where that saves shifting every new root '
                     'disk, else per server'),
            ('server', 'each server has a uid range of its own'),
            ('project', 'servers of an OpenStack project share a uid range'),
            ('off', "all servers share LXD's default uid range"),
        ],
        help="""
How far apart the user ids of unprivileged servers are on the host.

A server that breaks out of its container finds itself as an unprivileged host
user. With a range per server that user owns nothing else; with a range per
project it could reach files and processes of the same project's other servers
on this host; with ``off`` those of all servers on this host.

LXD versions that do not mount root disks idmapped change the owner of every
file of a new root disk at its first start. Servers that share a range are
cloned from one template whose files were shifted once, which makes creating
them several times faster (see ``fast_spawn``).

The host needs enough subordinate ids for root in ``/etc/subuid`` and
``/etc/subgid``: 65536 for each range in use. Flavors can ask for an own range
per server with the extra spec ``lxd:isolated=true``, and for LXD's default
range, which servers share, with ``lxd:isolated=false``.
"""),
    cfg.BoolOpt(
        'fast_spawn',
        default=True,
        help="""
Keep a stopped, already shifted template of each image in use and clone new
servers from it, where servers share a uid range and the storage pool can clone
at once. Templates cost no disk space worth mentioning on such pools and
disappear with the cached image.
"""),
    cfg.BoolOpt(
        'boot_network_wait',
        default=True,
        help="""
Start a new server only when Neutron has reported its ports as plugged, within
``[DEFAULT] vif_plugging_timeout`` seconds. Switch this off only for a network
back end that never reports.
"""),
    cfg.BoolOpt(
        'cloud_init_keys',
        default=False,
        help="""
Also pass user data, vendor data and network configuration through LXD's own
``cloud-init.*`` instance options, for images whose cloud-init reads only
those. This switches ``devlxd`` on, through which a guest can read its own
configuration keys. Metadata service and config drive work either way.
"""),
    cfg.BoolOpt(
        'devlxd',
        default=False,
        help="""
Offer the guest the LXD guest API at ``/dev/lxd/sock``. Off, a guest learns
nothing of the LXD that runs it.
"""),
    cfg.BoolOpt(
        'config_drive_device',
        default=False,
        help="""
Show servers with a config drive a read-only block device labelled ``config-2``
besides the folder ``/config-drive``, as virtual machines have it. cloud-init
needs the folder only, and only privileged servers can mount the device; it is
for guests that look for a disk of that label and read it themselves.

The extra spec ``lxd:config_drive_device`` of the flavor goes before this, then
the property ``lxd_config_drive_device`` of the image; each is ``true`` or
``false``.

Such a device takes a loop device of the host and half a megabyte below
``$state_path``, with ``[DEFAULT] config_drive_format=vfat`` up to 64. The host
needs genisoimage, or what ``[DEFAULT] mkisofs_cmd`` names; for ``vfat``
dosfstools and mtools. LXD must be reached through its unix socket.
"""),
    cfg.BoolOpt(
        'inject_password',
        default=True,
        help="""
Give each new server the administrator's password that Nova made for it and
that the API returned (``adminPass``): ``chpasswd`` in the guest sets it, right
after the server has been started. A server whose image has no ``chpasswd`` is
started all the same. Switch this off to save the moment that it takes, where
servers are reached with key pairs only.

The administrator is root, or whom the image names in ``os_admin_user``.
Changing the password of a running server later is possible either way.
"""),
    cfg.StrOpt(
        'serial_console_command',
        default='login',
        help="""
Program, with arguments, that runs as root in the guest for each connection to
a server's serial console (``[serial_console] enabled``), on a terminal of its
own. It has to find out who is there: whoever has a valid token from Nova, or
reaches ``[serial_console] proxyclient_address``, gets to it. ``login`` asks
for name and password; a server whose image lacks it has no serial console.
Quoting is as in a shell, which is not involved.
"""),
    cfg.IntOpt(
        'max_processes',
        default=0, min=0,
        help="""
Most processes and threads that a server may have at a time, so that a fork
bomb does not take the host's process table. 0 sets no limit. Flavors can set
their own with the extra spec ``lxd:max_processes``.
"""),
]

device_opts = [
    cfg.ListOpt(
        'passthrough_devices',
        default=[],
        help="""
GPUs and USB devices of this host that flavors may give to servers, as
``gpu:<vendor>:<product>`` or ``usb:<vendor>:<product>`` with the hexadecimal
ids that ``lspci -nn`` and ``lsusb`` show, for example
``gpu:10de:1db4, usb:0403:6001``.

A server gets such a device if the extra spec ``lxd:gpu`` or ``lxd:usb`` of its
flavor names it; all servers on the host with such a flavor share it. A host
that does not list a device never gives it away, whatever flavors say. For each
one that it has and lists, the host reports a trait to Placement that flavors
can require, for example ``CUSTOM_LXD_GPU_10DE_1DB4``.

Whoever has a device can do with it what the host's kernel driver allows, and
find what the server before left in its memory: give devices to tenants who
trust each other.
"""),
]

image_opts = [
    cfg.IntOpt(
        'image_max_unpacked_gb',
        default=100, min=1, max=65536,
        help="""
Largest size in GiB that an image may have when unpacked. The transfer of an
image that turns out to be larger, for example one made to fill the host's
disk, is stopped at that point and the image is refused.
"""),
    cfg.IntOpt(
        'image_parallel_imports',
        default=2, min=1, max=64,
        help="""
How many different images may be transferred into LXD at the same time. One
image is only ever transferred once, however many servers wait for it.
"""),
]

snapshot_opts = [
    cfg.StrOpt(
        'snapshot_compression',
        default='zstd',
        choices=[
            ('zstd', 'fastest; about the size of gzip'),
            ('gzip', 'three times slower; readable by every LXD'),
            ('xz', 'smallest and by far the slowest'),
            ('none', 'no compression; slower than zstd on most disks, since '
                     'more is written, sent and stored'),
        ],
        help="""
How LXD compresses the image that it makes of a server's disk for a snapshot,
a backup or a shelved server. LXD makes one image at a time, so this also
bounds how many snapshots a host gets done. Where LXD lacks the program for the
chosen compression, gzip is used.
"""),
]

volume_opts = [
    cfg.BoolOpt(
        'volume_use_multipath',
        default=False,
        help="""
Connect to iSCSI, Fibre Channel and NVMe volumes over all paths that the
storage offers, through the multipath support of the host's kernel
(``multipathd`` must run, or native NVMe multipath be on). Connections that
exist already are not changed.
"""),
    cfg.BoolOpt(
        'volume_enforce_multipath',
        default=False,
        help="""
With ``volume_use_multipath``, refuse to attach volumes while ``multipathd``
does not run. Off, they are attached over a single path then.
"""),
    cfg.IntOpt(
        'volume_scan_attempts',
        default=5, min=1, max=60,
        help="""
How often the host looks for the device of a volume that it has just been
connected to, before it gives up. The pauses between the attempts grow.
"""),
    cfg.StrOpt(
        'volume_share_directory',
        default=nova_paths.state_path_def('mnt'),
        sample_default='$state_path/mnt',
        help="""
Directory below which the shares are mounted on which NFS and similar back ends
of Cinder keep volumes as files. Not to be shared with another nova-compute or
cinder-volume: a share is unmounted when the last volume on it is detached.
"""),
    cfg.StrOpt(
        'volume_mode',
        default='block',
        choices=[
            ('block', 'the volume is a block device in the guest'),
            ('filesystem', "the host mounts the volume's filesystem for the "
                           'guest'),
        ],
        help="""
How servers get volumes where nobody says otherwise.

Where ``volume_filesystems`` allows it, the property ``lxd_volume_mode`` of the
volume says otherwise, then the metadata of the server with this key, the
flavor's extra spec ``lxd:volume_mode``, and the image's property
``lxd_volume_mode``, in this order.
"""),
    cfg.ListOpt(
        'volume_filesystems',
        default=[],
        item_type=cfg.types.String(choices=['ext4', 'xfs']),
        help="""
Filesystems that the host may mount for servers: ``ext4``, ``xfs`` or both. An
empty volume that is to be mounted gets the first one. The host needs e2fsprogs
or xfsprogs, and a kernel that mounts with mapped user ids (Linux 5.12 for
ext4, 5.19 for xfs).

Empty, which is the default, volumes are block devices always, and servers
cannot boot from volumes. The host's kernel reads what is on a volume when it
mounts it, and whoever owns the volume may have prepared it: allow only
filesystems whose code you trust with that.
"""),
    cfg.StrOpt(
        'volume_mount_directory',
        default=nova_paths.state_path_def('volumes'),
        sample_default='$state_path/volumes',
        help="""
Directory below which volumes are mounted that servers get as filesystems. LXD
must see it at the same path.
"""),
    cfg.StrOpt(
        'volume_root_directory',
        default='/run/nova-lxd-py',
        help="""
Directory below which volumes are mounted that servers boot from. LXD must see
it at the same path, and the root users of containers have to get there: every
folder on the way needs the permission to pass through (``x``) for everybody,
which Nova's own state directory often has not. What is in it is closed to all
others.
"""),
    cfg.StrOpt(
        'volume_encryption_directory',
        default=nova_paths.state_path_def('encrypted-volumes'),
        sample_default='$state_path/encrypted-volumes',
        help="""
Directory for links to the devices of encrypted volumes, one for each while it
is attached. os-brick's encryptors need them; nothing in them is secret.
The host needs cryptsetup, device-mapper in its kernel, and ``[key_manager]``
as Cinder has it.
"""),
    cfg.StrOpt(
        'volume_nfs_options',
        help="""
Mount options for NFS shares with volumes, as ``mount -o`` takes them; see
nfs(5). Options that Cinder gives for a share are added to them.
"""),
]

ALL_OPTS = (connection_opts + timeout_opts + instance_opts + device_opts +
            image_opts + snapshot_opts + volume_opts)


def register_opts(conf: cfg.ConfigOpts) -> None:
    """Register the ``[lxd]`` options.

    :param conf: the configuration to extend, normally ``nova.conf.CONF``.
    """
    conf.register_group(lxd_group)
    conf.register_opts(ALL_OPTS, group=lxd_group)


def list_opts() -> Iterable[tuple[cfg.OptGroup, list[cfg.Opt]]]:
    """Name the options for oslo-config-generator and the documentation.

    :returns: pairs of group and options.
    """
    return [(lxd_group, ALL_OPTS)]


CONF = nova_conf.CONF
register_opts(CONF)
