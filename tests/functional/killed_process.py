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

"""Work in a process that is killed in the middle of it."""

from __future__ import annotations

from collections.abc import Callable
import os
import signal
import time

#: Seconds between looks at it.
_INTERVAL = 0.0005


def run(action: Callable[[], object], when: Callable[[], bool],
        timeout: float = 60) -> bool:
    """Do something in a copy of this process, and kill that with SIGKILL.

    The copy has one thread only, and must use connections of its own.

    :param action: what to do.
    :param when: whether it is time to kill it.
    :param timeout: seconds after which it is killed in any case.
    :returns: whether it was killed before it had done everything.
    """
    child = os.fork()
    if not child:
        try:
            action()
        finally:
            # Nothing that this process wants to do at its end.
            os._exit(0)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and not when():
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(_INTERVAL)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])
