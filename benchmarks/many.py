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

"""Many servers at once, against a plain loop over LXD's REST API.

    python -m benchmarks.many [--image FILE] [--servers N] [--parallel N]
                              [--burst N] [--rounds N]

Needs root. Both create and then delete the same number of instances of one
image with the same number of threads. Nova builds at most 10 instances at a
time ([DEFAULT] max_concurrent_builds), but deletes as many as it has threads
for requests (64, [DEFAULT] executor_thread_pool_size).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from concurrent import futures
import pathlib
import statistics
import sys
import time
from typing import Any

from benchmarks import spawn
from tests.fixtures import busybox_image
from tests.fixtures import driver_host
from tests.fixtures import lxd_daemon

#: Far above the ranges of the driver's instances, and within the ten million
#: ids of Debian's LXD.
FIRST_UID = 5_000_000


def throughput(action: Callable[[Any], Any], items: Iterable[Any],
               parallel: int) -> tuple[float, list[Any]]:
    """Call a function for many items in parallel.

    :returns: calls per second, and the result of each.
    :raises Exception: if a call fails.
    """
    items = list(items)
    began = time.perf_counter()
    with futures.ThreadPoolExecutor(parallel) as pool:
        results = list(pool.map(action, items))
    return len(items) / (time.perf_counter() - began), results


def config(number: int) -> dict[str, str]:
    """Configure an instance of the loop, with a uid range of its own.

    LXD 5.0 gives instances that are made at the same time the same range,
    with which some then fail to start; so this names them.
    """
    return {**spawn.CONFIG, 'limits.memory': '64MiB',
            'security.idmap.base': str(FIRST_UID + number * 65536),
            'security.idmap.size': '65536'}


class PlainLoop(spawn.Raw):
    """Creates and deletes instances as a script would do it.

    :ivar failures: deletions that LXD has failed, mostly because its database
        was too busy. They are repeated, since nothing may be left.
    """

    def __init__(self, host: driver_host.DriverHost, fingerprint: str) -> None:
        super().__init__(host, fingerprint)
        self.failures: list[str] = []

    def delete(self, name: str) -> None:
        deadline = time.monotonic() + 300
        step = super().delete
        while True:
            try:
                step(name)
                return
            except AssertionError as error:
                if time.monotonic() > deadline:
                    raise
                if 'already stopped' in str(error):
                    step = self._delete_stopped
                else:
                    self.failures.append(str(error))

    def _delete_stopped(self, name: str) -> None:
        self._api.must('DELETE', f'/1.0/instances/{name}',
                       params=self._params)


def compare(lxd: lxd_daemon.RealLXD, content: bytes, title: str,
            options: argparse.Namespace, **settings: Any) -> None:
    """Measure driver and loop in turn, and print the rates and the ratio of
    the times."""
    rates: dict[str, list[float]] = {
        key: [] for key in ('spawn', 'destroy', 'launch', 'delete')}
    with driver_host.DriverHost(lxd, **settings) as host:
        image = host.image(content)
        # The first two bring the image and its template into the pool.
        for _ in range(2):
            host.driver.destroy(host.context, host.spawn(
                host.instance(image), image), [])
        raw = PlainLoop(host, host.lxd.api.must(
            'GET', f'/1.0/images/aliases/glance-{image.id}',
            params={'project': host.project})['target'])
        for _ in range(options.rounds):
            servers = [host.instance(image, memory_mb=64)
                       for _ in range(options.servers)]
            rate, _ = throughput(lambda server: host.spawn(server, image),
                                 servers, options.parallel)
            rates['spawn'].append(rate)
            rate, _ = throughput(lambda server: host.driver.destroy(
                host.context, server, []), servers, options.burst)
            rates['destroy'].append(rate)
            spawn.settle(lxd)
            rate, names = throughput(
                lambda number: raw.launch(config(number)),
                range(options.servers), options.parallel)
            rates['launch'].append(rate)
            rate, _ = throughput(raw.delete, names, options.burst)
            rates['delete'].append(rate)
            spawn.settle(lxd)
    if raw.failures:
        print(f'{title:30} raw failed {len(raw.failures)} times and was '
              f'repeated, such as: {raw.failures[0]}')
    for ours, theirs in (('spawn', 'launch'), ('destroy', 'delete')):
        mine, other = (statistics.median(rates[key])
                       for key in (ours, theirs))
        print(f'{title:30} {ours:8} {mine:5.2f}/s   raw {theirs:7} '
              f'{other:5.2f}/s   time ratio {other / mine:5.2f}', flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog='benchmarks.many', description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--image', help='root filesystem or LXD image, by '
                        'default a tiny one that boots busybox')
    parser.add_argument('--servers', type=int, default=100)
    parser.add_argument('--parallel', type=int, default=10,
                        help='instances created at a time')
    parser.add_argument('--burst', type=int, default=64,
                        help='instances deleted at a time')
    parser.add_argument('--rounds', type=int, default=3)
    options = parser.parse_args()
    lacking = lxd_daemon.missing()
    if lacking:
        sys.exit(lacking)
    content = (pathlib.Path(options.image).read_bytes() if options.image
               else busybox_image.unified())
    print(f'{options.servers} servers, {options.parallel} created and '
          f'{options.burst} deleted at a time, btrfs, medians of '
          f'{options.rounds}')
    with lxd_daemon.RealLXD() as lxd:
        compare(lxd, content, 'from the image, own range', options,
                idmap_isolation='server')
        compare(lxd, content, 'from a template, own project', options,
                idmap_isolation='project')


if __name__ == '__main__':
    main()
