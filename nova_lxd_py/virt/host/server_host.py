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

"""Programs that the host of LXD lacks, and security holes of its packages."""

from __future__ import annotations

from collections.abc import Mapping
import os
import subprocess
from typing import Any

from oslo_log import log as logging

LOG = logging.getLogger(__name__)

#: Programs that LXD and Incus run, but their packages do not depend on: name
#: and package.
_PROGRAMS = (('zstd', 'zstd'),)

_DIRECTORIES = ('usr/sbin', 'usr/bin', 'sbin', 'bin', 'usr/local/sbin',
                'usr/local/bin')

#: Packages with the security fixes of 2026, by Debian's release, from their
#: changelogs. The version that the server reports does not tell: Debian adds
#: the fixes to an old one.
_FIXED = {
    '12': ('lxd', '5.0.2-5+deb12u6'),
    '13': ('incus-base', '6.0.4-2+deb13u12'),
}

#: Seconds that the package manager may take.
_TIMEOUT = 10


def missing_programs(root: str = '/') -> list[str]:
    """List the packages of programs that the host lacks.

    :param root: root directory of the host.
    """
    return [package for program, package in _PROGRAMS
            if not any(os.access(os.path.join(root, directory, program),
                                 os.X_OK) for directory in _DIRECTORIES)]


def outdated_package(server: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """Return the package of the server if it has known security holes.

    :param server: the server's answer to ``GET /1.0``.
    :returns: its name, its version and the first version without the holes;
        None if it has none, or is from elsewhere than Debian's packages.
    """
    environment = server.get('environment', {})
    if environment.get('os_name') != 'Debian GNU/Linux':
        return None
    name, fixed = _FIXED.get(environment.get('os_version', ''), ('', ''))
    if not name.startswith(environment.get('server', '?')):
        return None
    installed = _dpkg('dpkg-query', '--show', '--showformat',
                      '${db:Status-Status} ${Version}', name)
    if installed is None or not installed.startswith('installed '):
        return None
    version = installed.partition(' ')[2]
    if _dpkg('dpkg', '--compare-versions', version, 'lt', fixed) is None:
        return None
    return name, version, fixed


def _dpkg(*command: str) -> str | None:
    """Run a command of the package manager.

    :returns: its output, None if it fails.
    """
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL,
                              capture_output=True, text=True,
                              timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.SubprocessError) as exc:
        LOG.debug('Cannot ask for the version of the LXD package: %s', exc)
        return None
    return done.stdout if done.returncode == 0 else None
