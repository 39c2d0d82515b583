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

"""Consoles of containers."""

from __future__ import annotations

import queue
import threading


class Console:
    """The terminal that a container's console is.

    :ivar typed: all that clients have typed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._output: queue.Queue[bytes | None] | None = None
        self.typed = b''

    def attach(self) -> queue.Queue[bytes | None] | None:
        """Become the one client that it can have."""
        with self._lock:
            if self._output is not None:
                return None
            self._output = queue.Queue()
            return self._output

    def detach(self) -> None:
        with self._lock:
            self._output = None

    def show(self, data: bytes | None) -> None:
        """Show the client what the guest prints; None hangs up."""
        with self._lock:
            if self._output is not None:
                self._output.put(data)
