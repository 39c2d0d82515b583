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

"""Failed builds leave nothing behind, whichever step fails.

The requests of a build to LXD are counted first. Then each of them fails once
in two ways: LXD refuses it, or LXD carries it out and the answer is lost.
"""

from __future__ import annotations

import itertools
import unittest

from nova import exception

from tests.fixtures import driver_host
from tests.fixtures import faulty_proxy
from tests.fixtures import lxd_daemon

NO_LXD = lxd_daemon.missing()


@unittest.skipIf(NO_LXD, NO_LXD or '')
class SpawnFailureTest(unittest.TestCase):

    #: ``[lxd]`` options and flavor of the builds.
    options = {'idmap_isolation': 'server'}

    def setUp(self) -> None:
        super().setUp()
        lxd = lxd_daemon.shared()
        self.proxy = faulty_proxy.FaultyProxy(lxd.endpoint)
        self.proxy.setUp()
        self.addCleanup(self.proxy.cleanUp)
        self.host = driver_host.DriverHost(
            lxd, self.proxy.path, operation_timeout=60, **self.options)
        self.host.setUp()
        self.addCleanup(self.host.cleanUp)

    def _instance(self, image):
        return self.host.instance(image, config_drive='True')

    def _count_changes(self, image) -> int:
        self.proxy.behave()
        server = self.host.spawn(self._instance(image), image)
        count = sum(request.method != 'GET' for request in self.proxy.seen)
        self.host.driver.destroy(self.host.context, server, [])
        return count

    def _assert_nothing_left(self, what: str) -> None:
        servers = [name for name, entry in self.host.lxd_instances().items()
                   if entry['config'].get('user.nova.role') != 'template']
        self.assertEqual([], servers, what)
        self.assertEqual([], self.host.lxd_volumes(), what)

    def _spoil_each(self, how: faulty_proxy.Spoil) -> None:
        image = self.host.image()
        # The first transfers the image and the second may make a template.
        self._count_changes(image)
        steps = self._count_changes(image)
        self.assertGreaterEqual(steps, 3)
        failed = 0
        # A build may send a request once more, or not.
        for number in itertools.count():
            server = self._instance(image)
            self.proxy.spoil(number, how)
            try:
                self.host.spawn(server, image)
            except exception.NovaException:
                failed += 1
                what = f'{how.name} of {self.proxy.spoilt}'
                self.proxy.behave()
                self._assert_nothing_left(what)
                # The same instance can be built on this host afterwards.
                self.host.spawn(server, image)
            spoilt = self.proxy.spoilt
            self.proxy.behave()
            self.host.driver.destroy(self.host.context, server, [])
            self._assert_nothing_left(f'destroy after {how.name}')
            if spoilt is None:
                break
        self.assertGreaterEqual(number, 3)
        self.assertGreater(failed, 1)

    def test_lxd_refuses(self) -> None:
        self._spoil_each(faulty_proxy.Spoil.REFUSE)

    def test_answer_is_lost(self) -> None:
        self._spoil_each(faulty_proxy.Spoil.LOSE_ANSWER)

    def test_image_transfer_fails(self) -> None:
        for how in faulty_proxy.Spoil:
            for number in range(2):
                image = self.host.image()
                server = self._instance(image)
                self.proxy.spoil(number, how)
                try:
                    self.host.spawn(server, image)
                except exception.NovaException:
                    self.proxy.behave()
                    self._assert_nothing_left(f'{how} {number}')
                    self.host.spawn(server, image)
                self.proxy.behave()
                self.host.driver.destroy(self.host.context, server, [])


@unittest.skipIf(NO_LXD, NO_LXD or '')
class LostPoolTest(unittest.TestCase):
    """The storage pool of the driver is gone."""

    def setUp(self) -> None:
        super().setUp()
        self.lxd = lxd_daemon.shared()
        self.lxd.api.must('POST', '/1.0/storage-pools',
                          {'name': 'lost', 'driver': 'dir'})
        self.host = driver_host.DriverHost(self.lxd, storage_pool='lost')
        self.host.setUp()
        self.addCleanup(self.host.cleanUp)
        self.lxd.api.must('DELETE', '/1.0/storage-pools/lost')

    def test_build_has_a_fault_and_deletion_ends(self) -> None:
        image = self.host.image()
        server = self.host.instance(image, config_drive='True',
                                    ephemeral_gb=1)
        info = {'block_device_mapping': [], 'swap': None,
                'ephemerals': [{'size': 1}], 'root_device_name': '/dev/sda'}
        with self.assertRaises(exception.NovaException) as caught:
            self.host.spawn(server, image, block_device_info=info)
        # Otherwise Nova leaves the server in BUILD, without a fault.
        self.assertNotIsInstance(caught.exception,
                                 exception.InstanceNotFound)
        self.host.driver.destroy(self.host.context, server, [], info)


class ClonedSpawnFailureTest(SpawnFailureTest):
    """The same where servers are cloned from a template."""

    options = {'idmap_isolation': 'project'}


class SharedRangeSpawnFailureTest(SpawnFailureTest):
    """The same where all servers share LXD's uid range."""

    options = {'idmap_isolation': 'off', 'fast_spawn': False}
