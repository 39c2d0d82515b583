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

"""Actions of the driver that run as root.

nova-compute runs as an unprivileged user. What the driver itself does as root
is in the functions of this package that are decorated as entry points of one
of the contexts below. Each context is a daemon of its own (oslo.privsep) that
is started at the first call, by the ``helper_command`` of its section in
nova.conf or through rootwrap. The driver also calls privileged functions of
os-vif, os-brick and Nova, which run in the daemons of those projects.

Network and storage are separate, so that each has only the capabilities that
it needs, and a share or volume that does not answer never delays a port.
Programs that a daemon executes have no more capabilities than the daemon.

Arguments come from an unprivileged process. Therefore each function validates
them: network devices by the names that the driver gives them, mount points and
loop devices by the ids of volumes, and paths of devices by their type. They
are passed as msgpack: numbers, strings, bytes, lists and dictionaries only.

This package is imported by the daemons: it must not import nova.
"""

from __future__ import annotations

from oslo_config import cfg
from oslo_privsep import capabilities
from oslo_privsep import priv_context


def _available(*wanted: int) -> list[int]:
    """Return those of the given capabilities that root has.

    In a container, it may lack some. oslo.privsep does not start a daemon that
    lacks any of its capabilities, so that those which only single functions
    need are optional.
    """
    with open('/proc/self/status', encoding='ascii',
              errors='replace') as stream:
        (bounding,) = (int(line.split()[1], 16) for line in stream
                       if line.startswith('CapBnd:'))
    return [capability for capability in wanted if bounding >> capability & 1]


#: Storage: loop devices, filesystems on volumes, and processes that use them.
context = priv_context.PrivContext(
    __name__,
    cfg_section='nova_lxd_py_privileged',
    pypath=__name__ + '.context',
    capabilities=[
        # Owner of the directory above a guest's root filesystem.
        capabilities.CAP_CHOWN,
        # Files of guests and of other processes, whatever their mode.
        capabilities.CAP_DAC_OVERRIDE,
        capabilities.CAP_DAC_READ_SEARCH,
        capabilities.CAP_FOWNER,
        # Id maps of user namespaces.
        capabilities.CAP_SETGID,
        capabilities.CAP_SETUID,
        # Mounts, loop devices, freezing of filesystems.
        capabilities.CAP_SYS_ADMIN,
        # Open files of the processes of guests.
        capabilities.CAP_SYS_PTRACE,
        *_available(
            # Nodes of loop devices on hosts without udev.
            capabilities.CAP_MKNOD,
            # Growing of mounted ext4 filesystems.
            capabilities.CAP_SYS_RESOURCE),
    ],
)

#: Network devices of ports. Settings below /proc/sys are writable for uid 0.
network_context = priv_context.PrivContext(
    __name__,
    cfg_section='nova_lxd_py_privileged_network',
    pypath=__name__ + '.network_context',
    capabilities=[
        capabilities.CAP_NET_ADMIN,
    ],
)

# The default is one thread for each CPU. Threads for storage mostly wait, for
# up to the deadlines of their work.
for _section, _threads in ((context.cfg_section, 32),
                           (network_context.cfg_section, 16)):
    cfg.CONF.set_default('thread_pool_size', group=_section, default=_threads)
