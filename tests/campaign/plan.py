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

"""What a random campaign does: operations, and the choice among them.

Every server has random numbers of its own, so that what is done with it
depends on the seed and on its own state only, not on how fast the others are.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import random

NONE = None
ACTIVE = 'ACTIVE'
SHUTOFF = 'SHUTOFF'
PAUSED = 'PAUSED'
SUSPENDED = 'SUSPENDED'
RESCUE = 'RESCUE'
VERIFY_RESIZE = 'VERIFY_RESIZE'
OFFLOADED = 'SHELVED_OFFLOADED'

#: Statuses in which a server can stay.
STATUSES = (ACTIVE, SHUTOFF, PAUSED, SUSPENDED, RESCUE, VERIFY_RESIZE,
            OFFLOADED)

PATHS = ('/dev/vdb', '/dev/vdc')
MAX_PORTS = 1
MAX_SIZE = 3

#: Daemons that are killed, see :mod:`tests.campaign.faults`.
DAEMONS = ('lxd', 'nova-compute', 'ovs-vswitchd', 'mariadb')


@dataclasses.dataclass
class Volume:
    """A Cinder volume.

    :ivar kind: its volume type.
    :ivar mode: ``block`` or ``filesystem``.
    :ivar size: GiB.
    :ivar path: device name at its server, None while it is at none.
    :ivar data: checksum of what was written on it.
    """

    identifier: str
    kind: str
    mode: str
    size: int = 1
    path: str | None = None
    data: str | None = None


@dataclasses.dataclass
class Slot:
    """One of the servers, which is created again after it was deleted.

    :ivar status: Nova's status of the server, None while there is none.
    :ivar from_volume: whether it boots from a volume.
    :ivar data: checksum of a file in its root.
    :ivar large: whether it has the larger of two flavors.
    :ivar port: a port that was added to it.
    """

    number: int
    seed: int
    status: str | None = None
    server: str | None = None
    address: str | None = None
    from_volume: bool = False
    data: str | None = None
    large: bool = False
    port: str | None = None
    volumes: list[Volume] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(f'{self.seed} {self.number}')

    def attached(self) -> list[Volume]:
        return [volume for volume in self.volumes if volume.path]

    def free(self) -> list[Volume]:
        return [volume for volume in self.volumes if not volume.path]

    def extendable(self) -> list[Volume]:
        # Not all machines let mounted filesystems grow.
        return [volume for volume in self.attached() if volume.size < MAX_SIZE
                and (volume.kind, volume.mode) == ('loop', 'block')]


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of the API.

    :ivar before: statuses in which it is possible.
    :ivar after: status after it; the same if it is :data:`SAME`.
    :ivar weight: how often it is chosen.
    :ivar needs: what else it needs of a server.
    """

    name: str
    before: tuple[str | None, ...]
    after: str | None
    weight: int = 1
    needs: Callable[[Slot], bool] = lambda slot: True


SAME = 'the same'

OPERATIONS = (
    Operation('create', (NONE,), ACTIVE, 3),
    Operation('create_from_volume', (NONE,), ACTIVE),
    Operation('stop', (ACTIVE,), SHUTOFF),
    Operation('start', (SHUTOFF,), ACTIVE, 3),
    Operation('reboot_soft', (ACTIVE,), ACTIVE),
    Operation('reboot_hard', (ACTIVE, SHUTOFF, PAUSED, SUSPENDED), ACTIVE),
    Operation('pause', (ACTIVE,), PAUSED),
    Operation('unpause', (PAUSED,), ACTIVE, 3),
    Operation('suspend', (ACTIVE,), SUSPENDED),
    Operation('resume', (SUSPENDED,), ACTIVE, 3),
    Operation('rescue', (ACTIVE, SHUTOFF), RESCUE,
              needs=lambda slot: not slot.from_volume),
    Operation('unrescue', (RESCUE,), ACTIVE, 3),
    Operation('rebuild', (ACTIVE, SHUTOFF), SAME),
    Operation('resize', (ACTIVE,), VERIFY_RESIZE),
    Operation('confirm', (VERIFY_RESIZE,), ACTIVE, 2),
    Operation('revert', (VERIFY_RESIZE,), ACTIVE, 2),
    Operation('shelve', (ACTIVE, SHUTOFF), OFFLOADED),
    Operation('unshelve', (OFFLOADED,), ACTIVE, 3),
    Operation('create_image', (ACTIVE, SHUTOFF, PAUSED, SUSPENDED), SAME),
    Operation('attach_volume', (ACTIVE, SHUTOFF), SAME, 4,
              lambda slot: len(slot.attached()) < len(PATHS)),
    Operation('detach_volume', (ACTIVE, SHUTOFF), SAME, 2,
              lambda slot: bool(slot.attached())),
    Operation('extend_volume', (ACTIVE,), SAME, 1,
              lambda slot: bool(slot.extendable())),
    Operation('attach_port', (ACTIVE, SHUTOFF), SAME, 2,
              lambda slot: slot.port is None),
    Operation('detach_port', (ACTIVE, SHUTOFF), SAME, 2,
              lambda slot: slot.port is not None),
    Operation('metadata', (ACTIVE, SHUTOFF, PAUSED), SAME),
    Operation('console', (ACTIVE,), SAME),
    Operation('delete', STATUSES, NONE),
)


def possible(slot: Slot) -> list[Operation]:
    """List the operations that a server's state allows."""
    return [operation for operation in OPERATIONS
            if slot.status in operation.before and operation.needs(slot)]


def choose(slot: Slot) -> Operation:
    """Choose the next operation of a server."""
    found = possible(slot)
    return slot.random.choices(
        found, [operation.weight for operation in found])[0]


def status_after(slot: Slot, operation: Operation) -> str | None:
    """Return the status that a server has after an operation."""
    return slot.status if operation.after == SAME else operation.after


class FaultPlan:
    """After how many operations which daemon is killed.

    :param seed: of the random numbers.
    :param every: average number of operations between two faults.
    """

    def __init__(self, seed: int, every: int) -> None:
        self._random = random.Random(f'{seed} faults')
        self._every = every
        self._daemons: list[str] = []
        self.next_at = self._distance()

    def _distance(self) -> int:
        return self._random.randint(max(1, self._every // 2),
                                    self._every + self._every // 2)

    def take(self) -> tuple[str, float]:
        """Return the next daemon and for how long it stays away, in seconds.

        All daemons have their turn before one is killed again.
        """
        if not self._daemons:
            self._daemons = list(DAEMONS)
            self._random.shuffle(self._daemons)
        self.next_at += self._distance()
        return self._daemons.pop(), self._random.uniform(0, 3)
