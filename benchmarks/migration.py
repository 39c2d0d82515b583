#!/usr/bin/env python3
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
"""Time of a migration to another host, and the downtime of the server.

    python -m benchmarks.migration [--pools btrfs,dir] [--megabytes N]

Starts two LXD daemons, each with a driver, and a server that writes the time
to a file every 10 ms. Some of its data changes, and then it is migrated: by
the driver, and by hand with the requests of ``lxc move`` on a stopped
instance. Prints the seconds of both, and the downtime: from the last time in
the file until the guest runs on the other host.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from typing import Any

os.environ.setdefault('OS_NOVA_DISABLE_EVENTLET_PATCHING', '1')

from tests.fixtures import driver_host  # noqa: E402
from tests.fixtures import lxd_daemon  # noqa: E402
from tests.fixtures import two_hosts  # noqa: E402

#: Addresses for the daemons.
_ADDRESSES = ('127.0.0.1:18743', '127.0.0.1:18744')

_TICKER = ('while :; do echo $EPOCHREALTIME > /root/tick; '
           'usleep 10000; done > /dev/null 2>&1 &')


class Benchmark:
    """Two hosts.

    :param pools: drivers of their storage pools.
    :param megabytes: content of the root disk.
    """

    def __init__(self, bus: two_hosts.Bus, host: driver_host.DriverHost,
                 other: two_hosts.SecondHost, megabytes: int) -> None:
        self._bus = bus
        self._host, self._other = host, other
        image = host.image()
        self.server = host.spawn(host.instance(image, root_gb=0), image)
        self._run('dd if=/dev/urandom of=/root/data bs=1M count=%d; sync'
                  % megabytes)
        self._changed = max(1, megabytes // 100)

    def _run(self, script: str, host: Any = None) -> str:
        return (host or self._host).run(self.server, 'sh', '-c', script)

    def by_driver(self) -> tuple[float, float]:
        """Migrate the server, and go back.

        :returns: seconds, and seconds of the downtime.
        """
        self._run(_TICKER)
        self._run(f'dd if=/dev/urandom of=/root/data bs=1M conv=notrunc '
                  f'count={self._changed}')
        move = two_hosts.Move(self._bus, self.server, self._host, self._other)
        began = time.time()
        move.whole()
        ended = time.time()
        last = float(self._run('cat /root/tick', self._other))
        move.revert()
        return ended - began, ended - last

    def by_hand(self) -> float:
        """Move the server while it is stopped.

        :returns: seconds from the stop until it runs.
        """
        source, target = self._host.lxd.api, self._other.lxd.api
        here = {'project': self._host.project}
        there = {'project': self._other.project}
        name = self.server.name
        began = time.time()
        source.must('PUT', f'/1.0/instances/{name}/state',
                    {'action': 'stop', 'force': True}, params=here)
        operation = source.request(
            'POST', f'/1.0/instances/{name}', {
                'name': name, 'migration': True}, params=here).metadata
        target.must('POST', '/1.0/instances', {
            'name': name, 'architecture': 'x86_64', 'profiles': [],
            'devices': {'root': {'type': 'disk', 'path': '/',
                                 'pool': self._other.lxd.pool}},
            'source': {
                'type': 'migration', 'mode': 'pull',
                'operation': f'https://{_ADDRESSES[0]}/1.0/operations/'
                             f'{operation["id"]}',
                'certificate': source.must('GET', '/1.0')['environment'][
                    'certificate'],
                'secrets': operation['metadata']}}, params=there)
        for action in ('start', 'stop'):
            target.must('PUT', f'/1.0/instances/{name}/state',
                        {'action': action, 'force': True}, params=there)
            if action == 'start':
                took = time.time() - began
        time.sleep(1)
        target.must('DELETE', f'/1.0/instances/{name}', params=there)
        source.must('PUT', f'/1.0/instances/{name}/state',
                    {'action': 'start'}, params=here)
        return took


def _measure(pools: list[str], megabytes: int, rounds: int) -> None:
    bus = two_hosts.Bus()
    lxds = [lxd_daemon.RealLXD(pool) for pool in pools]
    entered: list[Any] = []
    try:
        for lxd in lxds:
            lxd.__enter__()
            entered.append(lxd.close)
        # Their sockets are known from now on.
        host = driver_host.DriverHost(lxds[0], migration_address=_ADDRESSES[0])
        other = two_hosts.SecondHost(host, lxds[1],
                                     migration_address=_ADDRESSES[1])
        for fixture in (bus, host, other):
            fixture.setUp()
            entered.append(fixture.cleanUp)
        benchmark = Benchmark(bus, host, other, megabytes)
        hand, driver, down = [], [], []
        for _round in range(rounds):
            hand.append(benchmark.by_hand())
            whole, downtime = benchmark.by_driver()
            driver.append(whole)
            down.append(downtime)
        print(f'{pools[0]} to {pools[1]}, {megabytes} MiB, of which 1 % has '
              f'changed')
        for name, values in (('by hand, stopped', hand),
                             ('driver, all', driver),
                             ('driver, downtime', down)):
            print(f'  {name:18} median {statistics.median(values):6.2f} s  '
                  f'({min(values):.2f}-{max(values):.2f})')
        print(f'  downtime / by hand        '
              f'{statistics.median(down) / statistics.median(hand):6.2f}')
    finally:
        while entered:
            entered.pop()()


def main() -> int:
    """Run the benchmark.

    :returns: the exit status.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--pools', default='btrfs,btrfs',
                        help='drivers of the two storage pools')
    parser.add_argument('--megabytes', type=int, default=1000,
                        help='content of the root disk')
    parser.add_argument('--rounds', type=int, default=3)
    options = parser.parse_args()
    missing = lxd_daemon.missing()
    if missing:
        print(missing, file=sys.stderr)
        return 1
    _measure(options.pools.split(','), options.megabytes, options.rounds)
    return 0


if __name__ == '__main__':
    sys.exit(main())
