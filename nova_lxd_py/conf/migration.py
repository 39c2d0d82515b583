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

"""Options of migrations between hosts."""

from __future__ import annotations

from oslo_config import cfg

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
Seconds without any progress after which the transfer of a disk is cancelled,
for example because the storage of one of the hosts does not answer. The
instance is started again where it was. LXD itself notices a broken network
earlier. Do not choose it too small: while large files are compared, LXD
reports no progress.
"""),
]
