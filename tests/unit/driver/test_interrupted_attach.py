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

"""Volumes that LXD was attaching when it stopped answering."""

from __future__ import annotations

from nova import exception

from tests.fixtures import volume_case


class InterruptedAttachTest(volume_case.VolumeTestCase):
    """Filesystems that LXD may have mounted in the guest without recording
    it."""

    options = {'volume_mode': 'filesystem', 'volume_filesystems': ['ext4']}

    def setUp(self) -> None:
        super().setUp()
        path = f'/1.0/instances/{self.server.name}'
        # LXD does not record the device, nor that it is to be removed.
        gone = self.lxd.drop_connection('PATCH', path, times=None)
        self.assertRaises(exception.HypervisorUnavailable, self.attach)
        gone.release()
        self.lxd.clear_requests()
        self.assertEqual({}, self.given())
        self.left = self.storage.left()
        self.assertEqual(2, len(self.left))

    def cleared(self) -> list[dict[str, str]]:
        """List the devices with which LXD was made to remove a leftover."""
        name = f'volume-{self.volume.id}'
        return [device for request in self.lxd.requests
                if request.method == 'PATCH' and
                (device := request.body.get('devices', {}).get(name)) and
                device['source'].endswith('.nothing')]

    def test_the_guest_uses_it(self) -> None:
        """It keeps the volume, which therefore stays connected."""
        self.storage.processes = [4711]
        self.assertRaises(exception.DeviceDetachFailed, self.attach)
        self.assertEqual(self.left, self.storage.left())
        self.assertEqual([], self.cleared())
        self.storage.processes = []
        connection = self.attach()
        self.assertEqual([self.volume.id], list(self.given()))
        self.assertEqual(1, len(self.cleared()))
        self.detach(connection)
        self.assert_detached()

    def test_attaching_it_fails_again(self) -> None:
        """Nothing uses it, so that it is disconnected this time."""
        self.lxd.fail_next('PATCH', f'/1.0/instances/{self.server.name}')
        self.assertRaises(exception.NovaException, self.attach)
        self.assert_detached()
