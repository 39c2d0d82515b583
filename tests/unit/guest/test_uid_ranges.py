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

"""Uid ranges of projects."""

from __future__ import annotations

import json
import time

import fixtures
from oslotest import base

from nova_lxd_py import conf
from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.guest import registry
from nova_lxd_py.virt.guest import uid_ranges
from tests.fixtures import session_case


class ProjectTestCase(session_case.SessionTestCase):

    def setUp(self) -> None:
        super().setUp()
        self.guests = registry.GuestRegistry(self.session)
        self.ranges = self.new_ranges()

    def new_ranges(self) -> uid_ranges.ProjectUIDRanges:
        return uid_ranges.ProjectUIDRanges(conf.CONF.lxd, self.guests)

    def base(self, project: str = 'p1') -> str:
        return self.ranges.config_for(project)[uid_ranges.BASE]

    def test_a_project_keeps_its_range(self) -> None:
        base = self.base()
        self.assertNotEqual(base, self.base('p2'))
        self.ranges = self.new_ranges()
        self.lxd.clear_requests()
        self.assertEqual(base, self.base())
        # Its holder is only read.
        self.assertEqual(['GET'],
                         [each.method for each in self.lxd.requests])

    def test_holder_without_a_range(self) -> None:
        self.base()
        [name] = self.lxd.instances
        config = self.lxd.instance(name).config
        for key in (uid_ranges.BASE, 'volatile.idmap.base'):
            config.pop(key)
        self.assertTrue(self.base())
        self.assertIsNot(config, self.lxd.instance(name).config)

    def test_range_that_is_used_again(self) -> None:
        base = self.base()
        [name] = self.lxd.instances
        config = self.lxd.instance(name).config
        config[uid_ranges.KEY_UNUSED] = '1'
        self.assertEqual(base, self.base())
        self.assertNotIn(uid_ranges.KEY_UNUSED,
                         self.lxd.instance(name).config)

    def test_used_while_unused_ranges_are_released(self) -> None:
        """That range stays; the other projects without instances lose
        theirs."""
        now = time.time()
        self.useFixture(fixtures.MonkeyPatch(
            'nova_lxd_py.virt.guest.uid_ranges.time.time', lambda: now))
        self.lxd.daemon.uid_range = (self.lxd.daemon.uid_range[0], 4 * 65536)
        holders = {}
        for project in ('p1', 'p2', 'p3'):
            self.base(project)
            [holders[project]] = set(self.lxd.instances) - set(
                holders.values())
            now += 1
        now += uid_ranges.GRACE
        # p1 has waited longest and is the first.
        self.lxd.before('DELETE', f'/1.0/instances/{holders["p1"]}',
                        lambda request: self.base('p2') and None)
        self.base('p4')
        self.assertEqual({'p2', 'p4'}, {
            guest.config[lxd_guest.KEY_PROJECT] for guest in
            self.guests.all()})


class OfGuestTestCase(base.BaseTestCase):

    def guest(self, idmap: list | None, **config: str) -> lxd_guest.Guest:
        if idmap is not None:
            config['volatile.idmap.next'] = json.dumps(idmap)
        return lxd_guest.Guest(None, {'config': config, 'name': 'x',
                                      'devices': {}})

    def entry(self, uid: bool, gid: bool, host: int) -> dict:
        return {'Isuid': uid, 'Isgid': gid, 'Hostid': host, 'Nsid': 0,
                'Maprange': 65536}

    def test_ranges(self) -> None:
        self.assertEqual((100, 200, 65536), uid_ranges.of_guest(self.guest(
            [self.entry(True, False, 100), self.entry(False, True, 200)])))
        self.assertEqual((100, 100, 65536), uid_ranges.of_guest(self.guest(
            [self.entry(True, True, 100)])))
        self.assertEqual((0, 0, 0), uid_ranges.of_guest(self.guest(
            None, **{'security.privileged': 'true'})))
        for idmap in (None, [], [self.entry(True, False, 100)]):
            self.assertIsNone(uid_ranges.of_guest(self.guest(idmap)))
