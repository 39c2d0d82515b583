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

"""Time of spawn and destroy, compared with LXD alone.

    python -m benchmarks.spawn [--image FILE] [--rounds N]

Runs the driver and plain requests to LXD's REST API in turn, against an LXD of
its own (btrfs), and prints medians and their ratios. Without --image it makes
a Debian root filesystem with debootstrap.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any
import uuid

os.environ.setdefault('OS_NOVA_DISABLE_EVENTLET_PATCHING', '1')

from tests.fixtures import driver_host  # noqa: E402
from tests.fixtures import lxd_daemon  # noqa: E402

#: Packages of a typical cloud image, 70 MB compressed.
PACKAGES = 'systemd-sysv,dbus,openssh-server,sudo,iproute2,python3-minimal'
#: Idle instances for the count of requests at rest.
AT_REST = (1, 50)


def timed(action: Callable[[], Any]) -> float:
    """Call a function.

    :returns: the seconds that it took.
    """
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def settle(lxd: lxd_daemon.RealLXD) -> None:
    """Wait until btrfs has removed deleted subvolumes, which it does in the
    background and at the cost of later operations."""
    assert lxd.directory is not None
    pool = str(lxd.directory / 'storage-pools' / lxd.pool)
    # The first sync makes it begin at once, not in half a minute.
    for command in ('filesystem', 'subvolume'):
        subprocess.run(['btrfs', command, 'sync', pool], check=True,
                       stdout=subprocess.DEVNULL)


def debian_image(directory: str) -> bytes:
    """Make a small Debian with debootstrap.

    :returns: a root filesystem as tar.gz.
    """
    root = os.path.join(directory, 'root')
    subprocess.run(['debootstrap', '--variant=minbase',
                    f'--include={PACKAGES}', 'stable', root],
                   check=True, stdout=subprocess.DEVNULL)
    archive = os.path.join(directory, 'debian.tar.gz')
    subprocess.run(['tar', '-C', root, '--numeric-owner', '--exclude=./dev/*',
                    '--exclude=./var/cache/apt/*', '--exclude=./var/lib/apt/*',
                    '-czf', archive, '.'], check=True)
    return pathlib.Path(archive).read_bytes()


class Raw:
    """Creates and deletes instances by LXD's API alone."""

    def __init__(self, host: driver_host.DriverHost, fingerprint: str) -> None:
        self._api = host.lxd.api
        self._params = {'project': host.project}
        self._pool = host.lxd.pool
        self._fingerprint = fingerprint

    def launch(self, config: dict[str, str]) -> str:
        """Create and start an instance from the image.

        :returns: its name.
        """
        name = 'raw-' + uuid.uuid4().hex[:8]
        self._api.must('POST', '/1.0/instances', {
            'name': name, 'profiles': [], 'config': config,
            'source': {'type': 'image', 'fingerprint': self._fingerprint},
            'devices': {'root': {'type': 'disk', 'path': '/', 'size': '5GiB',
                                 'pool': self._pool}}}, params=self._params)
        self._api.must('PUT', f'/1.0/instances/{name}/state',
                       {'action': 'start', 'timeout': -1}, params=self._params)
        return name

    def delete(self, name: str) -> None:
        """Stop by force and delete."""
        self._api.must('PUT', f'/1.0/instances/{name}/state',
                       {'action': 'stop', 'force': True, 'timeout': -1},
                       params=self._params)
        self._api.must('DELETE', f'/1.0/instances/{name}',
                       params=self._params)


#: Configuration of an instance with the flavor of the benchmark.
CONFIG = {'limits.cpu': '1', 'limits.memory': '512MiB',
          'security.idmap.isolated': 'true', 'boot.autostart': 'false'}


def compare(lxd: lxd_daemon.RealLXD, content: bytes, rounds: int, title: str,
            **options: Any) -> None:
    """Compare spawn and destroy with some options to LXD alone."""
    with driver_host.DriverHost(lxd, **options) as host:
        image = host.image(content)
        figures: dict[str, list[float]] = {
            key: [] for key in ('spawn', 'destroy', 'launch', 'delete')}
        # The first use imports the image into LXD and its pool.
        server = host.spawn(host.instance(image, root_gb=5, memory_mb=512),
                            image)
        host.driver.destroy(host.context, server, [])
        fingerprint = host.lxd.api.must(
            'GET', f'/1.0/images/aliases/glance-{image.id}',
            params={'project': host.project})['target']
        raw = Raw(host, fingerprint)
        raw.delete(raw.launch(CONFIG))
        for _ in range(rounds):
            server = host.instance(image, root_gb=5, memory_mb=512)
            # One after the other: a booting guest uses the CPU.
            figures['spawn'].append(timed(
                lambda: host.spawn(server, image)))
            figures['destroy'].append(timed(
                lambda: host.driver.destroy(host.context, server, [])))
            settle(lxd)
            names: list[str] = []
            figures['launch'].append(timed(
                lambda: names.append(raw.launch(CONFIG))))
            figures['delete'].append(timed(lambda: raw.delete(names[0])))
            settle(lxd)
    show(title, 'spawn', figures['spawn'], 'raw create + start',
         figures['launch'])
    show(title, 'destroy', figures['destroy'], 'raw stop + delete',
         figures['delete'])


def show(title: str, ours: str, our_figures: list[float], theirs: str,
         their_figures: list[float]) -> None:
    """Print two medians and their ratio."""
    mine, other = (statistics.median(figures)
                   for figures in (our_figures, their_figures))
    print(f'{title:32} {ours:12} {mine * 1000:7.0f} ms   {theirs:28}'
          f'{other * 1000:7.0f} ms   ratio {mine / other:5.2f}', flush=True)


def first_use(lxd: lxd_daemon.RealLXD, content: bytes, rounds: int) -> None:
    """Compare the first instance of an image to an import by hand."""
    ours, by_hand = [], []
    for _ in range(rounds):
        # Each host has a project of its own, with its own images.
        settle(lxd)
        with driver_host.DriverHost(lxd) as host:
            image = host.image(content)
            server = host.instance(image, root_gb=5, memory_mb=512)
            ours.append(timed(lambda: host.spawn(server, image)))
        settle(lxd)
        with driver_host.DriverHost(lxd) as host, \
                tempfile.TemporaryDirectory() as directory:
            image = host.image(content)
            by_hand.append(timed(
                lambda: _import_by_hand(host, image.id, directory)))
    show('first use of an image', 'spawn', ours,
         'download, import, launch', by_hand)


def _import_by_hand(host: driver_host.DriverHost, image_id: str, directory: str
                    ) -> None:
    path = os.path.join(directory, 'image')
    with open(path, 'wb') as file:
        host.glance.download(host.context, image_id, file)
    metadata = os.path.join(directory, 'metadata.yaml')
    pathlib.Path(metadata).write_text(
        f'architecture: {os.uname().machine}\ncreation_date: 1\n')
    subprocess.run(['tar', '-C', directory, '-cf', f'{directory}/metadata.tar',
                    'metadata.yaml'], check=True)
    subprocess.run(
        ['lxc', 'image', 'import', f'{directory}/metadata.tar', path,
         '--alias', 'by-hand', '--project', host.project], check=True,
        env={**os.environ, **host.lxd.environment},
        stdout=subprocess.DEVNULL)
    fingerprint = host.lxd.api.must(
        'GET', '/1.0/images/aliases/by-hand',
        params={'project': host.project})['target']
    Raw(host, fingerprint).launch(CONFIG)


def at_rest(lxd: lxd_daemon.RealLXD) -> None:
    """Count the requests of one round of Nova's periodic tasks."""
    with driver_host.DriverHost(lxd) as host:
        image = host.image()
        servers = []
        for wanted in AT_REST:
            while len(servers) < wanted:
                servers.append(host.spawn(
                    host.instance(image, memory_mb=32), image))
            time.sleep(2)
            session = host.driver._services.session
            for _ in range(2):
                before = session.request_count
                # What Nova does once a minute, and its power sync.
                host.driver.get_available_resource(host.driver.
                                                   get_available_nodes()[0])
                host.driver.get_num_instances()
                for server in servers:
                    host.driver.get_info(server)
            print(f'at rest with {wanted:3} servers: '
                  f'{session.request_count - before} requests in a round',
                  flush=True)
        for server in servers:
            host.driver.destroy(host.context, server, [])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog='benchmarks.spawn', description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--image', help='root filesystem or LXD image')
    parser.add_argument('--rounds', type=int, default=10)
    options = parser.parse_args()
    lacking = lxd_daemon.missing()
    if lacking:
        sys.exit(lacking)
    with tempfile.TemporaryDirectory() as directory:
        content = (pathlib.Path(options.image).read_bytes() if options.image
                   else debian_image(directory))
    print(f'Image of {len(content) / 1e6:.0f} MB, btrfs, medians of '
          f'{options.rounds}')
    with lxd_daemon.RealLXD() as lxd:
        compare(lxd, content, options.rounds, 'from the image, own range',
                idmap_isolation='server')
        compare(lxd, content, options.rounds, 'from a template, own project',
                idmap_isolation='project')
        first_use(lxd, content, max(3, options.rounds // 2))
        at_rest(lxd)


if __name__ == '__main__':
    main()
