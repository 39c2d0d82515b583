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
"""Time of a snapshot, and the longest pause of the guest meanwhile.

    python -m benchmarks.snapshot [--pool btrfs|dir] [--megabytes N]

Starts an LXD of its own, makes a server, and alternates between the driver's
``snapshot`` and what ``lxc snapshot``, ``lxc publish`` and
``lxc image export`` do with the same compression. Prints the medians and
their ratio, and the longest time for which a process in the guest, which reads
the clock every 10 ms, did not run: at rest, and during each of the two.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

os.environ.setdefault('OS_NOVA_DISABLE_EVENTLET_PATCHING', '1')

from tests.fixtures import busybox_image  # noqa: E402
from tests.fixtures import driver_host  # noqa: E402
from tests.fixtures import lxd_daemon  # noqa: E402

#: Built-in commands of the shell only: a process started for each tick would
#: wait for a CPU much longer than for a frozen guest.
_TICKER = ('echo $$ > /root/ticker; [ -p /root/clock ] || mkfifo /root/clock; '
           'exec 3<> /root/clock; '
           'while :; do read -t 0.01 nothing <&3; echo $EPOCHREALTIME; done')

#: Random data does not compress and text does: half of each.
_FILL = ('mkdir -p /root/data; i=0; while [ $i -lt {count} ]; do '
         'dd if=/dev/urandom of=/root/data/r$i bs=256k count=2 2>/dev/null; '
         'dd if=/dev/zero bs=256k count=2 2>/dev/null | tr "\\0" "x" '
         '> /root/data/t$i; i=$((i+1)); done; sync')


class FileGlance:
    """Stores an image as Glance's file store does: in chunks, on a disk."""

    def __init__(self, directory: str) -> None:
        self._path = os.path.join(directory, 'image')
        self.size = 0

    def get(self, context: Any, image_id: str) -> dict[str, Any]:
        return {'id': image_id, 'name': 'benchmark'}

    def update(self, context: Any, image_id: str, metadata: Any, data: Any,
               purge_props: bool) -> dict[str, Any]:
        with open(self._path, 'wb') as target:
            while chunk := data.read(64 * 1024):
                target.write(chunk)
            self.size = target.tell()
        return {'size': self.size}


class Benchmark:
    """One instance, and two ways of making an image of it."""

    def __init__(self, host: driver_host.DriverHost, directory: str,
                 megabytes: int) -> None:
        self._host = host
        self._directory = directory
        self._glance = FileGlance(directory)
        host.driver._services.snapshot._image_api = self._glance
        self.server = host.spawn(host.instance(host.image(), root_gb=0))
        self._run(_FILL.format(count=max(1, megabytes)))

    def _run(self, script: str, *arguments: str) -> str:
        return self._host.run(self.server, 'sh', '-c', script, *arguments)

    def by_driver(self) -> float:
        """Make an image with the driver; return the seconds."""
        began = time.monotonic()
        self._host.driver.snapshot(
            self._host.context, self.server,
            '00000000-0000-0000-0000-000000000000', lambda **_kwargs: None)
        return time.monotonic() - began

    def by_hand(self) -> float:
        """Send the requests of LXD's client; return the seconds."""
        api, params = self._host.lxd.api, {'project': self._host.project}
        name = self.server.name
        began = time.monotonic()
        api.must('POST', f'/1.0/instances/{name}/snapshots',
                 {'name': 'benchmark'}, params=params)
        image = api.must('POST', '/1.0/images', {
            'source': {'type': 'snapshot', 'name': f'{name}/benchmark'},
            'compression_algorithm':
                driver_host.CONF.lxd.snapshot_compression,
        }, params=params)['fingerprint']
        content = api.request('GET', f'/1.0/images/{image}/export',
                              params=params).body
        pathlib.Path(self._directory, 'image').write_bytes(content)
        took = time.monotonic() - began
        api.must('DELETE', f'/1.0/images/{image}', params=params)
        api.must('DELETE', f'/1.0/instances/{name}/snapshots/benchmark',
                 params=params)
        return took

    def longest_gap(self, action: Any) -> float:
        """Return the longest time in milliseconds for which a process in the
        guest did not run while something was done."""
        self._run('sh -c "$0" > /root/ticks 2>&1 &', _TICKER)
        time.sleep(0.5)
        action()
        ticks = [float(line) for line in self._run(
            'kill $(cat /root/ticker); cat /root/ticks').splitlines()[:-1]]
        return 1000 * max(after - before for before, after
                          in zip(ticks, ticks[1:], strict=False))

    @property
    def size(self) -> int:
        """Bytes of the last image."""
        return self._glance.size


def main() -> int:
    """Run the benchmark.

    :returns: the exit status.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--pool', choices=('btrfs', 'dir'), default='btrfs')
    parser.add_argument('--megabytes', type=int, default=200,
                        help='content of the root disk')
    parser.add_argument('--rounds', type=int, default=5)
    options = parser.parse_args()
    missing = lxd_daemon.missing()
    if missing or busybox_image.busybox() is None:
        print(missing or 'busybox is not installed', file=sys.stderr)
        return 1
    host = driver_host.DriverHost(lxd_daemon.shared(options.pool))
    host.setUp()
    try:
        with tempfile.TemporaryDirectory() as directory:
            benchmark = Benchmark(host, directory, options.megabytes)
            driver, hand = [], []
            for _round in range(options.rounds):
                hand.append(benchmark.by_hand())
                driver.append(benchmark.by_driver())
            idle = benchmark.longest_gap(lambda: time.sleep(3))
            gap_hand = benchmark.longest_gap(benchmark.by_hand)
            gap_driver = benchmark.longest_gap(benchmark.by_driver)
            ratio = statistics.median(driver) / statistics.median(hand)
            print(f'pool {options.pool}, image of '
                  f'{benchmark.size / (1 << 20):.0f} MiB, compressed with '
                  f'{driver_host.CONF.lxd.snapshot_compression}')
            print(f'  snapshot + publish + export  median '
                  f'{statistics.median(hand):6.2f} s  '
                  f'({min(hand):.2f}-{max(hand):.2f})')
            print(f'  driver                       median '
                  f'{statistics.median(driver):6.2f} s  '
                  f'({min(driver):.2f}-{max(driver):.2f})')
            print(f'  ratio                              {ratio:6.2f}')
            print(f'  longest pause of the guest: idle {idle:.0f} ms, by hand '
                  f'{gap_hand:.0f} ms, driver {gap_driver:.0f} ms')
            return 0
    finally:
        host.cleanUp()


if __name__ == '__main__':
    sys.exit(main())
