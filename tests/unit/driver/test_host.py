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


"""Images of the host and what it reports, through the driver."""

from __future__ import annotations

from collections.abc import Callable
import os
import threading
from typing import Any

from nova.compute import power_state
from nova.compute import provider_tree
from nova import objects

from tests.fixtures import driver_host
from tests.fixtures import fake_driver_host


class ImageCacheTest(fake_driver_host.FakeDriverTestCase):

    def setUp(self) -> None:
        super().setUp()
        cfg = driver_host.CONF
        for name, value in (('remove_unused_base_images', True),
                            ('remove_unused_original_minimum_age_seconds',
                             0)):
            cfg.set_override(name, value, 'image_cache')
            self.addCleanup(cfg.clear_override, name, 'image_cache')

    def images(self) -> set[str]:
        """Images that the driver has brought, by their fingerprints."""
        return {fingerprint for (project, fingerprint) in
                self.lxd.daemon.store.images if project == self.host.project}

    def age(self, *servers: objects.Instance) -> None:
        self.driver.manage_image_cache(self.context, list(servers))

    def test_unused_goes(self) -> None:
        image = self.host.image()
        self.assertTrue(self.driver.cache_image(self.context, image.id))
        self.assertFalse(self.driver.cache_image(self.context, image.id))
        self.assertEqual(1, len(self.images()))
        self.age()
        self.assertEqual(set(), self.images())

    def test_used_stays(self) -> None:
        image = self.host.image()
        server = self.host.spawn(self.host.instance(image), image)
        self.age(server)
        self.assertEqual(1, len(self.images()))

    def test_operators_images_stay(self) -> None:
        own = self.lxd.add_image(project=self.host.project, alias='mine')
        self.age()
        self.assertEqual({own}, self.images())

    def test_new_name_that_appears_meanwhile(self) -> None:
        """Another image of Glance has the same content."""
        image = self.host.image()
        self.driver.cache_image(self.context, image.id)
        [fingerprint] = self.images()
        other = self.host.image()

        def name(request: Any) -> None:
            self.lxd.daemon.store.aliases[
                self.host.project, f'nova-{other.id}'] = {
                    'target': fingerprint, 'description': ''}
        self.lxd.before('GET', f'/1.0/images/{fingerprint}', name)
        self.age()
        self.assertEqual({fingerprint}, self.images())

    def test_asked_for_while_it_ages(self) -> None:
        """A server that comes meanwhile waits, and gets its image."""
        image = self.host.image()
        self.driver.cache_image(self.context, image.id)
        [fingerprint] = self.images()
        server = self.host.instance(image)
        spawning = threading.Thread(target=self.host.spawn,
                                    args=(server, image))
        lookups: list[int] = []

        def pause(request: Any) -> None:
            self.lxd.clear_requests()
            spawning.start()
            # Without a lock it would find the image, which then goes.
            spawning.join(0.3)
            lookups.append(self.lxd.count('GET', '/1.0/images/aliases/*'))
        self.lxd.before('DELETE', f'/1.0/images/{fingerprint}', pause)
        self.age()
        spawning.join(10)
        self.assert_state(power_state.RUNNING, server)
        self.assertEqual([0], lookups)
        self.assertEqual([image.id] * 2, self.host.glance.downloads)

    def test_lxd_refuses(self) -> None:
        image = self.host.image()
        self.driver.cache_image(self.context, image.id)
        self.lxd.fail_next('DELETE', '/1.0/images/*')
        self.age()
        self.assertEqual(1, len(self.images()))
        self.age()
        self.assertEqual(set(), self.images())


class PortsTest(fake_driver_host.FakeDriverTestCase):

    def plug_and(self, act: Callable[..., None]) -> None:
        """Have another thread act on a port while it is plugged.

        Nova's lock of a server is not held wherever it plugs.
        """
        server = self.host.spawn(power_on=False)
        [port] = self.host.ports()
        second = threading.Thread(target=act, args=(server, [port]))
        real, seen = self.network._os_vif_plug, []

        def plug(vif: Any, info: Any) -> None:
            if not seen:
                seen.append(len(self.network.calls))
                second.start()
                # Without a lock it would get to work meanwhile.
                second.join(0.3)
                seen.append(len(self.network.calls))
            real(vif, info)
        self.useFixture(driver_host.fixtures.MockPatch('os_vif.plug', plug))
        self.driver.plug_vifs(server, [port])
        second.join(10)
        self.assertEqual(seen[0], seen[1])
        self.assertLess(seen[1], len(self.network.calls))
        self.names = {f'tap{port["id"]}'[:14], f'tin{port["id"]}'[:14]}

    def test_one_port_two_threads(self) -> None:
        self.plug_and(self.driver.plug_vifs)
        self.assertEqual(self.names, self.network.names())

    def test_unplugged_meanwhile(self) -> None:
        self.plug_and(self.driver.unplug_vifs)
        self.assertEqual(set(), self.network.names())


class ResourcesTest(fake_driver_host.FakeDriverTestCase):

    def test_memory_is_in_mebibytes(self) -> None:
        # LXD's own host is this machine.
        page, pages = os.sysconf('SC_PAGE_SIZE'), os.sysconf('SC_PHYS_PAGES')
        mebibytes = page * pages >> 20
        node = self.driver.get_available_nodes()[0]
        found = self.driver.get_available_resource(node)
        self.assertEqual((mebibytes, 4), (found['memory_mb'],
                                          found['vcpus']))
        tree = provider_tree.ProviderTree()
        tree.new_root(node, '6a0e0f0e-0000-4000-8000-000000000001')
        self.driver.update_provider_tree(tree, node)
        inventory = tree.data(node).inventory
        self.assertEqual(mebibytes, inventory['MEMORY_MB']['total'])
        self.assertEqual(100, inventory['DISK_GB']['total'])
        self.assertEqual(4, inventory['VCPU']['total'])
