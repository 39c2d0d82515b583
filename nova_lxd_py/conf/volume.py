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

"""Options of Cinder volumes."""

from __future__ import annotations

from nova.conf import paths as nova_paths
from oslo_config import cfg

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
