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

"""Options of the connection to LXD, and timeouts."""

from __future__ import annotations

from oslo_config import cfg

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
LXD's data directory, as LXD itself sees it. Rescuing instances needs it. The
driver also checks there that the root of an instance is a directory of its
storage pool, and extends the quotas of full root disks on btrfs.

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
