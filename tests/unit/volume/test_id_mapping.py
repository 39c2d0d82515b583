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

"""User and group IDs of a guest."""

from __future__ import annotations

import json

from oslotest import base

from nova_lxd_py.virt.guest import guest as lxd_guest
from nova_lxd_py.virt.volume import base as volume_base
from nova_lxd_py.virt.volume import id_mapping


class IdRangeTestCase(base.BaseTestCase):

    def guest(self, idmap: list | None, **config: str) -> lxd_guest.Guest:
        if idmap is not None:
            config['volatile.idmap.next'] = json.dumps(idmap)
        return lxd_guest.Guest(None, {'config': config, 'name': 'x',
                                      'devices': {}})

    def entry(self, uid: bool, gid: bool, host: int) -> dict:
        return {'Isuid': uid, 'Isgid': gid, 'Hostid': host, 'Nsid': 0,
                'Maprange': 65536}

    def test_ranges(self) -> None:
        self.assertEqual((100, 200, 65536), id_mapping.id_range(self.guest(
            [self.entry(True, False, 100), self.entry(False, True, 200)])))
        self.assertEqual((100, 100, 65536), id_mapping.id_range(self.guest(
            [self.entry(True, True, 100)])))
        self.assertEqual((0, 0, 0), id_mapping.id_range(self.guest(
            None, **{'security.privileged': 'true'})))
        for idmap in (None, [], [self.entry(True, False, 100)]):
            self.assertRaises(volume_base.Refused, id_mapping.id_range,
                              self.guest(idmap))
