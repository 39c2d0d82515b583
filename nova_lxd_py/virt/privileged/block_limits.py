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

"""Limits of what a guest reads from and writes to block devices, as root.

LXD has limits for its disk devices only, and of each direction either bytes or
requests; block devices of guests have none. So they are written to the control
group that LXC makes for a container, in which a guest cannot change them.

This module is imported by the privileged daemon: it must not import nova.
"""

from __future__ import annotations

import os
import re

from nova_lxd_py.virt import privileged
from nova_lxd_py.virt.privileged import command
from nova_lxd_py.virt.privileged import validation

_TOP = '/sys/fs/cgroup'
#: Files of cgroup v1, by the names of cgroup v2.
_FILES = {'rbps': 'blkio.throttle.read_bps_device',
          'wbps': 'blkio.throttle.write_bps_device',
          'riops': 'blkio.throttle.read_iops_device',
          'wiops': 'blkio.throttle.write_iops_device'}

_LIMIT = re.compile(rf'({"|".join(_FILES)})=([1-9][0-9]{{0,18}})')
_NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9_-]{0,255}')


def _group(container: str, init: int) -> tuple[str, bool]:
    """Find the control group of a container.

    :returns: its directory, and whether it is one of cgroup v1.
    :raises FileNotFoundError: if the process is not in it.
    """
    paths = {}
    with open(f'/proc/{init}/cgroup', encoding='utf-8',
              errors='surrogateescape') as stream:
        for line in stream:
            _number, controllers, path = line.rstrip('\n').split(':', 2)
            for controller in controllers.split(','):
                paths[controller] = path
    first = 'blkio' in paths
    # cgroup v2 names no controllers.
    path = paths.get('blkio' if first else '', '')
    # LXC adds a number where an earlier group of that name is left. A guest
    # can create groups with any names, but only below its own one.
    found = re.match(
        rf'(?:/[^/]+)*?/lxc\.payload\.{re.escape(container)}(?:-\d+)?(?=/|$)',
        path)
    if not found:
        raise FileNotFoundError(f'{container} has no control group')
    return f'{_TOP}{"/blkio" if first else ""}{found.group()}', first


@privileged.context.entrypoint_with_timeout(command.TIMEOUT)
def set_limits(container: str, init: int, device: str, limits: str) -> None:
    """Replace the limits of a container for a block device.

    :param container: LXC's name of the container.
    :param init: process id of its init on the host.
    :param device: path of the block device.
    :param limits: limits per second as in ``io.max`` of cgroup v2; what is not
        named is unlimited.
    :raises OSError: if the kernel cannot limit it.
    """
    if not isinstance(container, str) or not _NAME.fullmatch(container):
        raise ValueError(f'{container!r} is not a name')
    if not isinstance(init, int) or init <= 0:
        raise ValueError(f'{init!r} is not a process')
    wanted = {}
    for limit in limits.split():
        parsed = _LIMIT.fullmatch(limit)
        if not parsed:
            raise ValueError(f'{limit!r} is not a limit')
        wanted[parsed.group(1)] = parsed.group(2)
    number = os.stat(validation.checked_device(device)).st_rdev
    about = f'{os.major(number)}:{os.minor(number)}'
    directory, first = _group(container, init)
    if first:
        for name, file in _FILES.items():
            _write(f'{directory}/{file}', f'{about} {wanted.get(name, 0)}')
    else:
        _write(f'{directory}/io.max', ' '.join((about, *(
            f'{name}={wanted.get(name, "max")}' for name in _FILES))))


def _write(path: str, line: str) -> None:
    # Not created where the kernel has no such limit.
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, line.encode('ascii'))
    finally:
        os.close(descriptor)
