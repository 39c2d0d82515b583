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


"""What the watcher of LXD's events keeps in memory."""

from __future__ import annotations

from nova.compute import power_state
from nova import exception

from tests.fixtures import fake_driver_host


class MemoryTest(fake_driver_host.FakeDriverTestCase):

    def watcher(self):
        return self.driver._services.watcher

    def test_nothing_is_kept_of_deleted_servers(self):
        for _server in range(3):
            server = self.host.spawn()
            self.assert_state(power_state.RUNNING, server)
            self.driver.destroy(self.context, server, [])
            # Nova asks once more, and a deletion may come twice.
            self.assertRaises(exception.InstanceNotFound,
                              self.driver.get_info, server)
            self.driver.destroy(self.context, server, [])
        watcher = self.watcher()
        self.lxd.wait_for(lambda: not [
            name for name in (*watcher._known, *watcher._changes)
            if name.startswith('instance-')])
