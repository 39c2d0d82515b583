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

import ctypes
import errno
import subprocess

#: Timeout of a privileged function in seconds; replaying a long journal takes
#: time.
TIMEOUT = 300
#: Seconds after which a program or child process of one is killed.
DEADLINE = 240

# From linux/prctl.h.
_PR_SET_NO_NEW_PRIVS = 38

_libc = ctypes.CDLL(None, use_errno=True)


def _limit_privileges() -> None:
    """Keep a program that is executed as root from gaining capabilities.

    The kernel gives a program of uid 0 all capabilities otherwise, not only
    those of the daemon.
    """
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), ctypes.c_ulong(0),
                   ctypes.c_ulong(0), ctypes.c_ulong(0)):
        raise OSError(ctypes.get_errno(), 'prctl')


def run(*command: str) -> str:
    """Run a program of the host with the capabilities of the daemon.

    :param command: program and arguments.
    :returns: its standard output.
    :raises OSError: if it fails, or does not finish in time.
    """
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, preexec_fn=_limit_privileges,
        env={'PATH': '/usr/sbin:/usr/bin:/sbin:/bin', 'LC_ALL': 'C'})
    try:
        output, errors = process.communicate(timeout=DEADLINE)
    except subprocess.TimeoutExpired:
        # It is not waited for: it may be in an uninterruptible system call.
        # The subprocess module reaps it when it starts another program.
        process.kill()
        raise TimeoutError(
            errno.ETIMEDOUT, f'{command[0]} did not finish within '
            f'{DEADLINE} seconds') from None
    if process.returncode:
        raise OSError(errno.EIO, f'{command[0]} failed '
                      f'({process.returncode}): {errors.strip()}')
    return output
