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
is in the functions of this package that are decorated with
``@context.entrypoint_with_timeout``. They run in a daemon of their own
(oslo.privsep), which is started at the first call by
``[nova_lxd_py_privileged] helper_command`` or through rootwrap. The driver
also calls privileged functions of os-vif, os-brick and Nova, which run in the
daemons of those projects.

Arguments come from an unprivileged process. Therefore each function validates
them: network devices by the names that the driver gives them, mount points and
loop devices by the ids of volumes, and paths of devices by their type. They
are passed as msgpack: numbers, strings, bytes, lists and dictionaries only.

This package is imported by the daemon: it must not import nova.
"""

from __future__ import annotations

from oslo_privsep import capabilities
from oslo_privsep import priv_context

context = priv_context.PrivContext(
    'nova_lxd_py',
    cfg_section='nova_lxd_py_privileged',
    pypath=__name__ + '.context',
    capabilities=[
        capabilities.CAP_CHOWN,
        capabilities.CAP_DAC_OVERRIDE,
        capabilities.CAP_DAC_READ_SEARCH,
        capabilities.CAP_FOWNER,
        capabilities.CAP_NET_ADMIN,
        capabilities.CAP_SETGID,
        capabilities.CAP_SETUID,
        capabilities.CAP_SYS_ADMIN,
        capabilities.CAP_SYS_PTRACE,
    ],
)
