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

"""Programs of the host that work on volumes.

This module is imported by the privileged daemon: it must not import nova.
"""

from __future__ import annotations

import errno
import subprocess

#: Timeout in seconds; replaying a long journal takes time.
TIMEOUT = 300


def run(*command: str) -> str:
    """Run a program of the host.

    :param command: program and arguments.
    :returns: its standard output.
    :raises OSError: if it fails.
    """
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=TIMEOUT, env={'PATH': '/usr/sbin:/usr/bin:/sbin:/bin',
                              'LC_ALL': 'C'})
    if done.returncode:
        raise OSError(errno.EIO, f'{command[0]} failed '
                      f'({done.returncode}): {done.stderr.strip()}')
    return done.stdout
