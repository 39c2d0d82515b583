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


"""Templates that are left by a crash, or age out."""

from __future__ import annotations

import time
from unittest import mock

import ddt
import fixtures

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import roles
from nova_lxd_py.virt.guest import uid_ranges
from nova_lxd_py.virt.image import templates
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import retry
from tests.fixtures import template_case

BASE = template_case.BASE
DAY = template_case.DAY
ROOT = template_case.ROOT


@ddt.ddt
class CrashTestCase(template_case.TemplateTestCase):

    def setUp(self) -> None:
        super().setUp()
        # The session waits so long for an LXD that drops connections, and
        # longer for the answers of a busy one.
        outage = retry.Outage
        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.lxd.retry.Outage', lambda patience: outage(0.2)))
        self.use_new_session()

    def crash(self) -> None:
        """Let nova-compute die before the shift, as if by SIGKILL."""
        faults = [self.lxd.drop_connection('DELETE', '*', times=None),
                  self.lxd.drop_connection('PUT', '*/nova-template-*/state',
                                           times=None)]
        self.source_for()
        for fault in faults:
            fault.release()
        self.store = self.new_store()

    def test_before_the_shift(self) -> None:
        self.store.uid_range(self.instance())
        self.crash()
        self.assertEqual(1, len(self.templates()))
        self.assertEqual('Running', self.spawn('s1').status)
        self.assertEqual(1, len(self.templates()))

    def test_before_the_device_is_removed(self) -> None:
        self.store.uid_range(self.instance())
        faults = [self.lxd.drop_connection(
            'PUT', '/1.0/instances/nova-template-*', times=None,
            where={'ephemeral': False}),
            self.lxd.drop_connection('DELETE', '*', times=None)]
        self.source_for()
        for fault in faults:
            fault.release()
        self.store = self.new_store()
        self.assertEqual(2, len(self.templates()[0].devices))
        self.assertEqual('Running', self.spawn('s1').status)
        self.assertEqual(1, len(self.templates()[0].devices))

    def test_pruned(self) -> None:
        self.store.uid_range(self.instance())
        self.crash()
        self.assertEqual([self.templates()[0].name], self.store.prune())

    @ddt.data('1', '9')
    def test_shifted_otherwise_than_wanted(self, host_id: str) -> None:
        """Its files would have wrong owners in a server's range."""
        self.spawn('s1')
        [template] = self.templates()
        config = self.lxd.instance(template.name).config
        config['volatile.last_state.idmap'] = (
            f'[{{"Isuid":true,"Hostid":{host_id}00000}}]')
        self.assertEqual([template.name], self.store.prune())

    def test_holder_without_its_range(self) -> None:
        """Killed between making the holder and writing down its range."""
        faults = [self.lxd.drop_connection(
            'PUT', '/1.0/instances/nova-uids-*', times=None)]
        self.assertRaises(errors.LXDError, self.source_for)
        for fault in faults:
            fault.release()
        self.store = self.new_store()
        server = self.spawn('s1')
        self.assertEqual(self.holders()[0].config['volatile.idmap.base'],
                         server.config[BASE])


class PruneTestCase(template_case.TemplateTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.now = time.time()
        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.image.templates.time.time', lambda: self.now))

    def names(self) -> set[str]:
        return {guest.name for guest in self.guests.all()
                if guest.role == roles.TEMPLATE}

    def test_used(self) -> None:
        self.spawn('s1')
        names = self.names()
        for _round in range(3):
            self.assertEqual([], self.store.prune())
            self.now += 9 * DAY
        self.assertEqual(names, self.names())

    def test_nothing_changes_while_used(self) -> None:
        self.spawn('s1')
        with self.lxd.recording() as requests:
            self.store.prune()
        self.assertEqual({'GET'}, {entry.method for entry in requests})

    def test_unused(self) -> None:
        self.spawn('s1').delete()
        self.store.prune()
        self.now += DAY - 10
        self.assertEqual([], self.store.prune())
        self.now += 20
        deleted = self.store.prune()
        self.assertEqual([name for name in deleted
                          if name.startswith('nova-template-')], deleted)
        # The range goes when nothing that was shifted to it is left.
        self.store.prune()
        self.now += DAY + 10
        self.assertEqual(1, len(self.store.prune()))
        self.assertEqual(set(), self.names())
        # And a new template can be made.
        self.spawn('s2')

    def test_deleted_meanwhile(self) -> None:
        """By an operator, after the list of instances was read."""
        for name in ('s1', 's2'):
            self.spawn(name, name).delete()
        self.store.prune()
        self.now += DAY + 10
        listed = self.guests.all()
        first = next(guest for guest in listed
                     if templates.KEY_TEMPLATE in guest.config)
        first.delete()
        with mock.patch.object(self.guests, 'all', lambda: listed):
            deleted = self.store.prune()
        self.assertEqual(1, len(deleted))
        self.assertNotIn(first.name, deleted)

    def test_no_range_left(self) -> None:
        """Projects without servers lose theirs then, but not at once."""
        first, size = self.lxd.daemon.uid_range[0], 65536
        self.lxd.daemon.uid_range = (first, 3 * size)
        self.spawn('s1', 'p1').delete()
        self.spawn('s2', 'p2')
        self.assertRaises(errors.OperationFailed, self.spawn, 's3', 'p3')
        self.now += uid_ranges.GRACE + 10
        self.spawn('s3', 'p3')
        self.assertEqual({'p2', 'p3'}, {
            guest.config[lxd_guest.KEY_PROJECT] for guest in
            self.guests.all()})
        # Who has servers keeps it.
        self.now += uid_ranges.GRACE + 10
        self.assertRaises(errors.OperationFailed, self.spawn, 's4', 'p1')
        self.assertIn('s2', self.lxd.instances)

    def test_used_again(self) -> None:
        self.spawn('s1').delete()
        self.store.prune()
        self.now += DAY + 10
        self.spawn('s2')
        self.assertEqual([], self.store.prune())

    def test_asked_for_again(self) -> None:
        self.spawn('s1').delete()
        self.store.prune()
        self.now += DAY + 10
        self.source_for()
        self.assertEqual([], self.store.prune())

    def test_server_of_another_project(self) -> None:
        self.spawn('s1', 'p1').delete()
        self.spawn('s2', 'p2')
        self.store.prune()
        self.now += DAY + 10
        deleted = self.store.prune()
        self.assertEqual(1, len(deleted))
        self.assertEqual('p2', self.templates()[0].config[
            lxd_guest.KEY_PROJECT])

    def test_image_is_gone(self) -> None:
        self.spawn('s1')
        self.session.delete('images', self.image)
        self.assertEqual(1, len(self.store.prune()))
        self.assertEqual([], self.templates())
        self.assertEqual(1, len(self.holders()))

    def test_never_at_once(self) -> None:
        """A server may just be about to be made from it."""
        self.cfg.config(group='image_cache',
                        remove_unused_original_minimum_age_seconds=0)
        self.source_for()
        self.assertEqual([], self.store.prune())
        self.now += 700
        self.assertEqual(1, len(self.store.prune()))

    def test_switched_off(self) -> None:
        self.cfg.config(group='image_cache', remove_unused_base_images=False)
        self.source_for()
        self.store.prune()
        self.now += 9 * DAY
        self.assertEqual([], self.store.prune())

    def test_foreign_instances(self) -> None:
        self.session.post('instances', body={
            'name': 'theirs', 'source': {'type': 'image',
                                         'fingerprint': self.image},
            'profiles': [], 'devices': ROOT})
        self.store.prune()
        self.now += 9 * DAY
        self.assertEqual([], self.store.prune())
        self.assertIn('theirs', self.lxd.instances)
