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

"""Overhead of the driver when volumes are attached, and their throughput.

    python -m benchmarks.volumes [--rounds N] [--megabytes N]

Needs root. Uses an LXD of its own and a volume for os-brick's ``local``
connector. In turn, the driver attaches and detaches it, and the same is done
by hand: os-brick's connect, for a filesystem ``mount -t ext4``, and the
requests of ``lxc config device add``, which reads the instance and writes it
back with the new device if it is unchanged. A third variant is a single
request without reading. (By hand the contents of the volume are not checked,
and the mount has no mapped ids: root of a guest could not use it.) Then the
guest and the host write and read the same volume with the same ``dd``, without
the page cache (O_DIRECT) and with it (and fsync at the end). Prints medians
and their ratios.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

os.environ.setdefault('OS_NOVA_DISABLE_EVENTLET_PATCHING', '1')

# Before any import of Nova.
from tests.fixtures import busybox_image  # noqa: E402
from tests.fixtures import driver_host  # noqa: E402
from tests.fixtures import lab_volumes  # noqa: E402
from tests.fixtures import lxd_daemon  # noqa: E402

import fixtures  # noqa: E402,H306
from nova import utils  # noqa: E402
from os_brick.initiator import connector as brick_connector  # noqa: E402
from oslo_utils import units  # noqa: E402

PATH = '/dev/vdb'
DIRECTORY = '/mnt/vdb'
#: For the shell of busybox, whose dd does not report its duration.
_TIMED = ('echo $EPOCHREALTIME; {command} 2>/dev/null || exit 1; '
          'echo $EPOCHREALTIME')
MODES = ('block', 'filesystem')


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True,
                          text=True).stdout


class Benchmark:
    """An instance, a volume, and several ways of attaching it."""

    def __init__(self, host: driver_host.DriverHost,
                 storage: lab_volumes.Storage, directory: str, megabytes: int
                 ) -> None:
        self._host = host
        self._directory = directory
        self._megabytes = megabytes
        self.server = host.spawn()
        self._path = f'/1.0/instances/{self.server.name}'
        self._params = {'project': host.project}
        self.volumes = {mode: storage.volume(4 * units.Gi) for mode in MODES}
        run('mkfs.ext4', '-q', '-E', 'root_owner=0:0',
            self.volumes['filesystem'].data()['device_path'])
        for volume in self.volumes.values():
            # Holes would be allocated in the first round only.
            with open(volume.file, 'r+b') as stream:
                os.posix_fallocate(stream.fileno(), 0, volume.size)

    # -- attach and detach --------------------------------------------------

    def by_driver(self, mode: str) -> tuple[float, float]:
        """Attach and detach with the driver.

        :returns: seconds of both.
        """
        connection = self.volumes[mode].connection()
        self.server.metadata = {'lxd_volume_mode': mode}
        began = time.perf_counter()
        self._host.driver.attach_volume(self._host.context, connection,
                                        self.server, PATH)
        attached = time.perf_counter()
        self._check(mode)
        again = time.perf_counter()
        self._host.driver.detach_volume(self._host.context, connection,
                                        self.server, PATH)
        return attached - began, time.perf_counter() - again

    def by_hand(self, mode: str) -> tuple[float, float]:
        """Attach and detach with os-brick, mount and the requests of LXD's
        own client.

        :returns: seconds of both.
        """
        return self._without_driver(mode, self._add_as_client)

    def blindly(self, mode: str) -> tuple[float, float]:
        """Attach with a request that reads nothing, and detach as by hand.

        :returns: seconds of both.
        """
        return self._without_driver(mode, self._add_blindly)

    def _without_driver(self, mode: str, add: Callable[[dict[str, str]], None]
                        ) -> tuple[float, float]:
        data = self.volumes[mode].connection()['data']
        connector = brick_connector.InitiatorConnector.factory(
            'local', utils.get_root_helper())
        target = os.path.join(self._directory, 'by-hand')
        os.makedirs(target, exist_ok=True)
        began = time.perf_counter()
        found = connector.connect_volume(data)
        if mode == 'block':
            device = {'type': 'unix-block', 'path': PATH,
                      # Required by LXD.
                      'source': os.path.realpath(found['path'])}
        else:
            run('mount', '-t', 'ext4', '-o', 'nosuid,nodev', found['path'],
                target)
            device = {'type': 'disk', 'path': DIRECTORY, 'source': target}
        add(device)
        attached = time.perf_counter()
        self._check(mode)
        again = time.perf_counter()
        self._change(lambda devices: devices.pop('by-hand'))
        if mode == 'filesystem':
            run('umount', target)
        connector.disconnect_volume(data, found)
        return attached - began, time.perf_counter() - again

    def _add_as_client(self, device: dict[str, str]) -> None:
        self._change(lambda devices: devices.update({'by-hand': device}))

    def _add_blindly(self, device: dict[str, str]) -> None:
        self._host.lxd.api.must(
            'PATCH', self._path, {'devices': {'by-hand': device}},
            params=self._params)

    def _change(self, change: Callable[[dict[str, Any]], Any]) -> None:
        api = self._host.lxd.api
        answer = api.call('GET', self._path, params=self._params)
        change(answer.metadata['devices'])
        api.must('PUT', self._path, answer.metadata, params=self._params,
                 headers={'If-Match': answer.headers['etag']})

    def _check(self, mode: str) -> None:
        self._host.run(self.server, 'sh', '-c', f'[ -b {PATH} ]' if
                       mode == 'block' else f'[ -d {DIRECTORY}/lost+found ]')

    # -- throughput ---------------------------------------------------------

    def throughput(self, mode: str, rounds: int
                   ) -> dict[str, tuple[list[float], list[float]]]:
        """Measure writing and reading a volume in the guest and on the host.

        :returns: seconds of guest and host for each way.
        """
        connection = self.volumes[mode].connection()
        self.server.metadata = {'lxd_volume_mode': mode}
        self._host.driver.attach_volume(self._host.context, connection,
                                        self.server, PATH)
        device = connection['lxd_device_path']
        with contextlib.ExitStack() as stack:
            stack.callback(
                self._host.driver.detach_volume, self._host.context,
                connection, self.server, PATH)
            inside, outside = PATH, device
            if mode == 'filesystem':
                # Another mount of the same filesystem, without mapped ids.
                mount = os.path.join(self._directory, 'on-host')
                os.makedirs(mount, exist_ok=True)
                run('mount', '-t', 'ext4', device, mount)
                stack.callback(run, 'umount', mount)
                inside, outside = f'{DIRECTORY}/data', f'{mount}/data'
                run('dd', 'if=/dev/zero', f'of={outside}', 'bs=1M',
                    f'count={self._megabytes}', 'conv=fsync')
            return {what: self._pair(command.format(
                size=self._megabytes, path='{path}'), inside, outside, rounds)
                for what, command in (
                    ('write, O_DIRECT', 'dd if=/dev/zero of={path} bs=1M '
                     'count={size} oflag=direct conv=notrunc'),
                    ('read, O_DIRECT', 'dd if={path} of=/dev/null bs=1M '
                     'count={size} iflag=direct'),
                    ('write, fsync', 'dd if=/dev/zero of={path} bs=1M '
                     'count={size} conv=notrunc,fsync'))}

    def _pair(self, command: str, inside: str, outside: str, rounds: int
              ) -> tuple[list[float], list[float]]:
        guest, host = [], []
        for number in range(rounds + 1):
            pair = ((guest, self._in_guest, inside),
                    (host, self._on_host, outside))
            # The order decides what is in the page cache.
            for seconds, run_it, path in pair[::(-1) ** number]:
                run('sync')
                took = run_it(command.format(path=path))
                # The first round is not counted.
                if number:
                    seconds.append(took)
        return guest, host

    def _in_guest(self, command: str) -> float:
        return _seconds(self._host.run(
            self.server, 'sh', '-c', _TIMED.format(command=command)))

    @staticmethod
    def _on_host(command: str) -> float:
        shell = str(busybox_image.busybox())
        return _seconds(run(shell, 'sh', '-c', _TIMED.format(
            command=f'{shell} {command}')))


def _seconds(output: str) -> float:
    began, ended = output.split()
    return float(ended) - float(began)


def shown(seconds: list[float]) -> str:
    return (f'{statistics.median(seconds) * 1000:7.1f} ms '
            f'({min(seconds) * 1000:.1f}-{max(seconds) * 1000:.1f})')


def measure(benchmark: Benchmark, rounds: int, megabytes: int) -> None:
    for mode in MODES:
        ways = {'by hand': benchmark.by_hand, 'blindly': benchmark.blindly,
                'driver': benchmark.by_driver}
        results: dict[str, list[tuple[float, float]]] = {
            name: [] for name in ways}
        for number in range(rounds + 1):
            for name, way in ways.items():
                took = way(mode)
                # The first round starts the privsep daemon.
                if number:
                    results[name].append(took)
        # Detaching blindly is detaching by hand.
        for index, what, others in ((0, 'attach', ('by hand', 'blindly')),
                                    (1, 'detach', ('by hand',))):
            driver = [took[index] for took in results['driver']]
            print(f'{mode:10s} {what}: driver {shown(driver)}')
            for name in others:
                other = [took[index] for took in results[name]]
                ratio = statistics.median(driver) / statistics.median(other)
                print(f'{"":10s}   {name} {shown(other)}, ratio {ratio:.2f}')
    for mode in MODES:
        for what, (guest, host) in benchmark.throughput(
                mode, rounds).items():
            rates = [megabytes / statistics.median(seconds)
                     for seconds in (guest, host)]
            print(f'{mode:10s} {what}: guest {rates[0]:.0f} MiB/s, host '
                  f'{rates[1]:.0f} MiB/s, ratio {rates[0] / rates[1]:.2f}')


def main() -> int:
    """Run the benchmark.

    :returns: the exit status.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=20)
    parser.add_argument('--megabytes', type=int, default=256,
                        help='how much dd writes and reads')
    options = parser.parse_args()
    missing = lxd_daemon.missing()
    if missing:
        print(missing, file=sys.stderr)
        return 1
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        host = driver_host.DriverHost(
            lxd_daemon.shared(), volume_filesystems=['ext4'])
        storage = lab_volumes.Storage(lab_volumes.LocalVolume, daemon=True)
        patch = fixtures.MonkeyPatch('nova.volume.cinder.API.get',
                                     lambda *args: {})
        for fixture in (host, storage, patch):
            fixture.setUp()
            stack.callback(fixture.cleanUp)
        measure(Benchmark(host, storage, directory, options.megabytes),
                options.rounds, options.megabytes)
    return 0


if __name__ == '__main__':
    sys.exit(main())
