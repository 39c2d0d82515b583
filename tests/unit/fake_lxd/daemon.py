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

"""The daemon: its state, and the way of a request through it."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import threading
from typing import Any

from tests.unit.fake_lxd import errors
from tests.unit.fake_lxd import events
from tests.unit.fake_lxd import extensions
from tests.unit.fake_lxd import faults
from tests.unit.fake_lxd import interactive
from tests.unit.fake_lxd import operations
from tests.unit.fake_lxd import routing
from tests.unit.fake_lxd import state

ExecHandler = Callable[
    [state.Instance, list[str], dict[str, str], interactive.Stdin],
    tuple[int, bytes, bytes]]


@dataclasses.dataclass
class Logged:
    """One line of the request log.

    :ivar broken: the body ended before it should have.
    """

    method: str
    path: str
    query: dict[str, str]
    body: Any
    headers: dict[str, str]
    broken: bool = False

    def __str__(self) -> str:
        return f'{self.method} {self.path}'


class Daemon:
    """A fake LXD without its transport.

    :ivar uid_range: first host id for containers, and how many.
    :ivar stop_hook_delay: seconds for which a container that says Stopped is
        still busy stopping.
    :ivar reboot_gap: seconds for which a guest that reboots is down.
    :ivar record_delay: seconds for which a new instance is listed, but has no
        uid range yet.
    :ivar idmapped_mounts: whether root disks are mounted idmapped instead of
        shifted.
    :ivar speed: by what LXD's own waiting for a guest is divided.
    :ivar compressions: what the host has programs for.
    :ivar host_interfaces: network devices of the host; None is any.
    :ivar host_paths: files and devices of the host; None is any.
    :ivar exec_handler: the commands that guests have: gets instance, command,
        environment and standard input, gives exit code, output and errors,
        and raises FileNotFoundError for others.
    :ivar console_handler: what the console of a guest answers to what is
        typed; it echoes without.
    """

    def __init__(self) -> None:
        self.store = state.Store()
        self.faults = faults.Faults()
        self.events = events.Hub()
        self.operations = operations.Operations(
            self.faults, lambda op: self.events.publish(
                'operation', op.project, op.as_dict()))
        self.extensions = list(extensions.LXD_5_0_2)
        self.environment: dict[str, Any] = {}
        self.uid_range = (100000, 10000001)
        self.stop_hook_delay = 0.0
        self.reboot_gap = 0.0
        self.speed = 1.0
        self.idmapped_mounts = False
        self.record_delay = 0.0
        self.compressions = {'none', 'gzip', 'bzip2', 'xz', 'lzma', 'zstd'}
        self.host_interfaces: set[str] | None = None
        self.host_paths: set[str] | None = None
        self.exec_handler: ExecHandler | None = None
        self.console_handler: Callable[
            [state.Instance, bytes], bytes] | None = None
        self.exec_log: list[tuple[str, list[str]]] = []
        self.default_guest = state.Guest()
        self.requests: list[Logged] = []
        self.is_up = True
        self._log_lock = threading.Lock()

    def log_request(self, request: routing.Request, broken: bool = False
                    ) -> None:
        body: Any = request.body
        if request.headers.get('content-type', '').startswith(
                'application/json') or body[:1] == b'{':
            body = request.json_or_empty()
        with self._log_lock:
            self.requests.append(Logged(
                request.method, request.path, request.query, body,
                dict(request.headers), broken))

    def answer(self, request: routing.Request, raw_path: str
               ) -> routing.Response | routing.Upgrade:
        """Find the response to a request.

        :raises errors.Dropped: there is none, the connection breaks.
        """
        self.log_request(request)
        try:
            self.faults.on_request(request)
            handler, parts = routing.find(
                'GET' if request.method == 'HEAD' else request.method,
                raw_path)
            if not request.trusted and request.path not in ('/', '/1.0'):
                raise errors.APIError(403, 'not authorized')
            response = handler(self, request, **parts)
        except errors.APIError as exc:
            response = routing.failure(exc)
        except errors.Dropped:
            raise
        except Exception as exc:  # a bug in the fake must show in the test
            response = routing.failure(errors.internal(f'fake LXD: {exc!r}'))
        self.faults.on_response(request)
        return response
