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


"""Images in LXD that age out."""

from __future__ import annotations

import time
from typing import Any
from unittest import mock

import fixtures
from nova import objects

from nova_lxd_py.virt.image import cache as image_cache
from nova_lxd_py.virt.image import transfer as image_transfer
from tests.fixtures import image_case
from tests.fixtures import image_samples

DAY = image_case.DAY


class PruneTestCase(image_case.ImageTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.now = time.time()
        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.image.cache.time.time', lambda: self.now))
        self.image_id = self.glance.add(image_case.rootfs())
        self.fingerprint = self.ensure(self.image_id)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    def prune(self, *used: str) -> list[str]:
        return self.store.prune(set(used))

    def test_used(self) -> None:
        for _round in range(3):
            self.assertEqual([], self.prune(self.image_id))
            self.pass_time(2 * DAY)
        self.assertIn(self.fingerprint, self.lxd_images)

    def test_nothing_changes_while_used(self) -> None:
        with self.lxd.recording() as requests:
            self.prune(self.image_id)
        self.assertEqual(['GET'], [entry.method for entry in requests])

    def test_unused(self) -> None:
        self.assertEqual([], self.prune())
        self.pass_time(DAY - 10)
        self.assertEqual([], self.prune())
        self.pass_time(20)
        self.assertEqual([self.fingerprint], self.prune())
        self.assertNothingLeft()

    def test_age_survives_a_restart_of_the_driver(self) -> None:
        self.prune()
        self.pass_time(DAY + 1)
        self.store = self.new_store()
        self.assertEqual([self.fingerprint], self.prune())

    def test_used_again(self) -> None:
        self.prune()
        self.pass_time(DAY + 1)
        self.ensure(self.image_id)
        self.assertEqual([], self.prune())
        self.pass_time(DAY + 1)
        self.prune(self.image_id)
        self.assertEqual([], self.prune())

    def test_asked_for_meanwhile(self) -> None:
        """A server comes after the list of images was read."""
        self.prune()
        self.pass_time(DAY + 1)
        listed = self.session.get('images', params={'recursion': 1})
        self.ensure(self.image_id)
        get = self.session.get

        def stale(*path: str, **kwargs: Any) -> Any:
            return listed if path == ('images',) else get(*path, **kwargs)

        with mock.patch.object(self.session, 'get', stale):
            self.assertEqual([], self.prune())
        self.assertIn(self.fingerprint, self.lxd_images)

    def test_switched_off(self) -> None:
        self.cfg.config(group='image_cache', remove_unused_base_images=False)
        self.prune()
        self.pass_time(9 * DAY)
        self.assertEqual([], self.prune())

    def test_clock_set_back(self) -> None:
        self.prune()
        self.pass_time(-30 * DAY)
        self.assertEqual([], self.prune())
        self.pass_time(DAY + 1)
        self.assertEqual([self.fingerprint], self.prune())

    def test_two_names(self) -> None:
        other = self.glance.add(self.glance.data(self.image_id))
        self.ensure(other)
        self.prune(other)
        self.pass_time(DAY + 1)
        self.assertEqual([], self.prune(other))
        self.prune()
        self.pass_time(DAY + 1)
        self.assertEqual([self.fingerprint], self.prune())
        self.assertNothingLeft()

    def test_foreign_images(self) -> None:
        foreign = self.lxd.add_image(project='nova', alias='mine')
        bare = self.lxd.add_image(image_samples.unified(), project='nova')
        # LXD lists it behind them.
        later = self.ensure(self.glance.add(image_case.rootfs(1)))
        self.prune()
        self.pass_time(9 * DAY)
        self.assertEqual({self.fingerprint, later}, set(self.prune()))
        self.assertEqual({foreign, bare}, set(self.lxd_images))

    def test_operators_name_for_our_image(self) -> None:
        self.session.post('images', 'aliases', body={
            'name': 'mine', 'target': self.fingerprint})
        self.prune()
        self.pass_time(DAY + 1)
        self.prune()
        self.assertEqual({'mine': self.fingerprint}, self.aliases)

    def test_operators_image_with_our_name(self) -> None:
        """The operator has brought the same content before."""
        image_id = self.glance.add(image_case.rootfs())
        image_transfer.Transfer(
            self.session, self.glance, self.glance.meta(image_id), 1 << 30,
            60, None).run(self.context, None, {})
        fingerprint = self.ensure(image_id)
        self.prune()
        self.pass_time(DAY + 1)
        self.prune()
        self.assertEqual({}, self.aliases)
        self.assertEqual([fingerprint], list(self.lxd_images))

    def test_left_by_a_crash(self) -> None:
        self.session.delete('images', 'aliases', f'glance-{self.image_id}')
        self.assertEqual([], self.prune())
        self.pass_time(DAY + 1)
        self.assertEqual([self.fingerprint], self.prune())

    def test_one_failure_does_not_stop_the_others(self) -> None:
        second = self.ensure(self.glance.add(image_case.rootfs()))
        self.prune()
        self.pass_time(DAY + 1)
        self.lxd.fail_next('DELETE', '/1.0/images/*')
        removed = self.prune()
        self.assertEqual(1, len(removed))
        self.assertEqual(1, len(self.lxd_images))
        self.prune()
        self.assertNothingLeft()
        self.assertNotEqual(second, self.fingerprint)

    def test_what_servers_use(self) -> None:
        self.assertEqual({'a', 'b', 'c'}, image_cache.used_images([
            self.instance(image_ref='a'),
            self.instance(image_ref='b', system_metadata={
                'image_base_image_ref': 'c'}),
            self.instance(image_ref=''), objects.Instance(image_ref='a')]))

    def test_manage_cache(self) -> None:
        self.store.manage_cache([self.instance(image_ref=self.image_id)])
        self.pass_time(DAY + 1)
        self.store.manage_cache([])
        self.assertIn(self.fingerprint, self.lxd_images)
        self.pass_time(DAY + 1)
        self.store.manage_cache([])
        self.assertNothingLeft()
