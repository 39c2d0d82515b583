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

"""Limit on the servers that a host sends and takes in at the same time.

A server gets a slot on both hosts before it is stopped, so that waiting is no
downtime. The slot on the source ends with the call of Nova. That on the
destination is a lease: the source may be killed, and then nobody returns it.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import threading
import time

from nova import objects

#: Seconds after which a slot of a migration that sends no calls is free. A
#: guest may take long to shut down between two calls.
LEASE = 900.0


class IncomingSlots:
    """Slots of the migrations to this host.

    :param number: how many there are.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._lock = threading.Lock()
        #: Instance of the call under way, and time of the last one, by
        #: migration ID.
        self._running: dict[int, str] = {}
        self._used: dict[int, float] = {}

    def take(self, migration_id: int) -> bool:
        """Take a slot, or keep the one that a migration has.

        :param migration_id: ID of Nova's record of the migration.
        :returns: whether it has one.
        """
        with self._lock:
            now = time.monotonic()
            self._used = {
                each: used for each, used in self._used.items()
                if each in self._running or now - used < LEASE}
            if (migration_id not in self._used and
                    len(self._used) >= self._number):
                return False
            self._used[migration_id] = now
            return True

    @contextlib.contextmanager
    def used(self, migration_id: int, instance: objects.Instance
             ) -> Iterator[None]:
        """Keep the slot of a migration for the time of a call, of which it
        makes one at a time.

        A call is not refused for the lack of a slot: a restart forgets them.

        :param instance: the instance that is migrated.
        """
        with self._lock:
            self._running[migration_id] = instance.uuid
            self._used[migration_id] = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._running.pop(migration_id, None)
                if migration_id in self._used:
                    self._used[migration_id] = time.monotonic()

    def is_busy_with(self, instance: objects.Instance) -> bool:
        """Return whether a call for an instance is under way."""
        with self._lock:
            return instance.uuid in self._running.values()

    def release(self, migration_id: int) -> None:
        """Free the slot of a migration. Idempotent."""
        with self._lock:
            self._used.pop(migration_id, None)
