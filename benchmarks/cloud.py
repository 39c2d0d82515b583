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

"""Time until a server is ACTIVE, and which component needs it.

    python -m benchmarks.cloud [--rounds N] [--image NAME]

Needs root and the quickstart cloud (devstack/quickstart.sh up). Starts a
second nova-compute with Nova's fake driver, which does nothing: the time of a
server there is Nova's share, the rest that of LXD and this driver.
LXD's own time for the same instance is measured through its REST API.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from typing import Any
import uuid

from tests.fixtures import cloud
from tests.fixtures import other_host
from tests.fixtures import raw_lxd

FAKE_HOST = f'fake-{uuid.uuid4().hex[:8]}'
FAKE_DRIVER = 'fake.FakeDriverWithoutFakeNodes'
#: Seconds between requests for the status of a server.
INTERVAL = 0.02


class Clock:
    """Measures the creation of servers.

    :param admin: an administrator's connection.
    :param image: name of the image.
    :param flavor: name of the flavor.
    """

    def __init__(self, admin: Any, image: str, flavor: str) -> None:
        self._admin = admin
        self._image = admin.image.find_image(image, ignore_missing=False)
        self._flavor = admin.compute.find_flavor(flavor, ignore_missing=False)

    def boot(self, host: str, network: Any = None) -> float:
        """Make a server, wait until it is ACTIVE and delete it.

        :param host: the compute host.
        :param network: a Neutron network; None for a server without one.
        :returns: seconds from the request to ACTIVE.
        """
        compute = self._admin.compute
        began = time.perf_counter()
        server = compute.create_server(
            name='benchmark', flavor_id=self._flavor.id,
            image_id=self._image.id, availability_zone=f'nova:{host}',
            networks=[{'uuid': network.id}] if network else 'none')
        try:
            while True:
                server = compute.get_server(server.id)
                if server.status == 'ACTIVE':
                    return time.perf_counter() - began
                if server.status == 'ERROR':
                    sys.exit(f'A server on {host} failed: {server.fault}')
                time.sleep(INTERVAL)
        finally:
            cloud.CloudTestCase.delete(server.id, self._admin)
            # What LXD still does after a deletion must not slow down the next.
            time.sleep(1)


def raw_launch(image_id: str) -> float:
    """Create and start such an instance by LXD's API alone, and delete it.

    :returns: seconds until it runs.
    """
    api = raw_lxd.Client(str(cloud.PREFIX / 'lxd' / 'unix.socket'),
                         cloud.LXD_PROJECT)
    fingerprint = api.must(
        'GET', f'/1.0/images/aliases/glance-{image_id}')['target']
    name = 'benchmark-' + uuid.uuid4().hex[:8]
    began = time.perf_counter()
    api.must('POST', '/1.0/instances', {
        'name': name, 'profiles': [],
        'config': {'limits.cpu': '1', 'limits.memory': '256MiB',
                   'security.idmap.isolated': 'true'},
        'source': {'type': 'image', 'fingerprint': fingerprint},
        'devices': {'root': {'type': 'disk', 'path': '/', 'size': '2GiB',
                             'pool': cloud.POOL}}})
    try:
        api.must('PUT', f'/1.0/instances/{name}/state',
                 {'action': 'start', 'timeout': -1})
        return time.perf_counter() - began
    finally:
        api.must('PUT', f'/1.0/instances/{name}/state',
                 {'action': 'stop', 'force': True, 'timeout': -1})
        api.must('DELETE', f'/1.0/instances/{name}')
        time.sleep(1)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog='benchmarks.cloud', description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--rounds', type=int, default=10)
    parser.add_argument('--image', default=cloud.distribution())
    parser.add_argument('--flavor', default='lxd.small')
    options = parser.parse_args()
    if os.geteuid():
        sys.exit('Run it as root: it makes requests to the cloud\'s LXD.')
    if not (cloud.PREFIX / 'clouds.yaml').exists():
        sys.exit('There is no quickstart cloud: devstack/quickstart.sh up')
    admin = cloud.connect(cloud.ADMIN_CLOUD)
    clock = Clock(admin, options.image, options.flavor)
    real = next(service.host for service in admin.compute.services(
        binary='nova-compute') if service.host != FAKE_HOST)
    private = next(admin.network.networks(name='private'))
    image_id = admin.image.find_image(options.image).id
    figures: dict[str, list[float]] = {
        key: [] for key in ('network', 'lxd', 'fake', 'raw')}
    with other_host.running(admin, FAKE_HOST,
                            f'compute_driver = {FAKE_DRIVER}\n'):
        # The first two bring the image and its template into the pool.
        for _ in range(2):
            clock.boot(real)
        clock.boot(FAKE_HOST)
        for _ in range(options.rounds):
            figures['lxd'].append(clock.boot(real))
            figures['fake'].append(clock.boot(FAKE_HOST))
            figures['network'].append(clock.boot(real, private))
            figures['raw'].append(raw_launch(image_id))
    medians = {key: statistics.median(found)
               for key, found in figures.items()}
    print(f'Image {options.image}, flavor {options.flavor}, medians of '
          f'{options.rounds}, seconds from POST /servers to ACTIVE')
    for key, title in (('network', 'this driver, one port'),
                       ('lxd', 'this driver, no network'),
                       ('fake', "Nova's fake driver, no network"),
                       ('raw', 'LXD alone (create and start)')):
        print(f'{title:32} {medians[key]:6.2f} s')
    for key, title in (('lxd', 'no network'), ('network', 'one port')):
        print(f'this driver - fake driver, over LXD alone ({title}): ratio '
              f'{(medians[key] - medians["fake"]) / medians["raw"]:5.2f}')


if __name__ == '__main__':
    main()
