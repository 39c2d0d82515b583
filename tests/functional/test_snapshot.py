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
"""Snapshots on a real LXD, through the driver as Nova calls it."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import threading
import time
import unittest

from nova.compute import power_state
from nova.compute import task_states
from nova import exception
import yaml

from nova_lxd_py.virt.server import snapshot
from tests.fixtures import busybox_image
from tests.fixtures import driver_case
from tests.fixtures import driver_host
from tests.fixtures import lxd_daemon
from tests.fixtures import variants

NO_LXD = lxd_daemon.missing()

#: Writes the uptime of the host, in hundredths of a second, to a tmpfs.
TICKER = ('while true; do read up rest < /proc/uptime; echo $up; '
          'usleep 10000; done > /mnt/ticks')


class SnapshotCases(driver_case.DriverCase):
    """Tests for every kind of storage pool."""

    def setUp(self) -> None:
        super().setUp()
        self.states: list[tuple[str, str]] = []

    def update_task_state(self, task_state: str,
                          expected_state: str = task_states.IMAGE_SNAPSHOT
                          ) -> None:
        self.states.append((task_state, expected_state))

    def snapshot(self, server) -> str:
        """Make an image.

        :returns: its ID.
        """
        self.states.clear()
        image_id = self.host.glance.create(
            None, {'name': 'backup', 'properties': {'a': 'b'}})['id']
        self.host.driver.snapshot(self.host.context, server, image_id,
                                  self.update_task_state)
        return image_id

    def describe(self, server) -> dict:
        """Return LXD's description of an instance."""
        answer = self.host.lxd.api.request(
            'GET', f'/1.0/instances/{server.name}',
            params={'project': self.host.project})
        described = dict(self.host.lxd_instances()[server.name])
        described['ETag'] = answer.headers['etag']
        return described

    def assert_clean(self) -> None:
        """Check that nothing of a snapshot is left in LXD."""
        roles = [entry['config'].get('user.nova.role')
                 for entry in self.host.lxd_instances().values()]
        self.assertNotIn('snapshot', roles)
        params = {'project': self.host.project, 'recursion': '1'}
        images = self.host.lxd.api.must('GET', '/1.0/images', params=params)
        names = [alias['name'] for image in images
                 for alias in image['aliases']]
        self.assertEqual([], [name for name in names
                              if name.startswith(snapshot.ALIAS_PREFIX)])
        # All of them are images that the driver has imported.
        self.assertEqual(len(images), len(names), images)

    def content(self, image_id: str) -> tarfile.TarFile:
        data = subprocess.run(['zstd', '-dc'], check=True, capture_output=True,
                              input=self.host.glance.data(image_id)).stdout
        return tarfile.open(fileobj=io.BytesIO(data))

    # -- content of the image -----------------------------------------------

    def test_image_boots_again(self) -> None:
        server = self.host.spawn()
        self.host.run(server, 'sh', '-c', 'echo kept > /root/mine; '
                      'chown 7:8 /root/mine; chmod 640 /root/mine')
        image_id = self.snapshot(server)
        image = self.host.glance.get(None, image_id)
        self.assertEqual(('backup', 'active', 'raw', 'bare'), tuple(
            image[key] for key in ('name', 'status', 'disk_format',
                                   'container_format')))
        properties = image['properties']
        self.assertEqual(('snapshot', 'available', 'project', 'b'), tuple(
            properties[key] for key in ('image_location', 'image_state',
                                        'owner_id', 'a')))
        self.assertEqual(
            [(task_states.IMAGE_PENDING_UPLOAD, task_states.IMAGE_SNAPSHOT),
             (task_states.IMAGE_UPLOADING, task_states.IMAGE_PENDING_UPLOAD)],
            self.states)
        self.assert_clean()
        # In a cloud without the original.
        other = driver_host.DriverHost(lxd_daemon.shared(self.pool_driver))
        other.setUp()
        self.addCleanup(other.cleanUp)
        copy = other.spawn(image=other.image(
            self.host.glance.data(image_id)))
        self.assertEqual('kept 7 8 640', ' '.join(other.run(
            copy, 'sh', '-c', 'cat /root/mine; '
            "stat -c '%u %g %a' /root/mine").split()))
        self.assertEqual('busybox', other.run(
            copy, 'cat', '/etc/hostname').strip())

    def test_image_tells_nothing_of_the_server(self) -> None:
        server = self.host.instance(self.host.image(), ephemeral_gb=1,
                                    config_drive='True')
        server = self.host.spawn(
            server, admin_password='very-secret', block_device_info={
                'ephemerals': [{'size': 1, 'guest_format': None}]})
        self.host.run(server, 'sh', '-c', 'echo scratch > /mnt/scratch')
        content = self.content(self.snapshot(server))
        metadata = yaml.safe_load(content.extractfile('metadata.yaml'))
        self.assertNotIn('nova.', json.dumps(metadata, default=str))
        self.assertNotIn(server.uuid, json.dumps(metadata, default=str))
        names = content.getnames()
        self.assertNotIn('rootfs/mnt/scratch', names)
        self.assertEqual([], [name for name in names if name.startswith(
            'rootfs/config-drive/')])
        self.assertEqual(0, content.getmember('rootfs/root').uid)

    def test_unchanged_in_every_state(self) -> None:
        server = self.host.spawn()
        steps = {
            power_state.RUNNING: lambda: None,
            power_state.PAUSED: lambda: self.driver.pause(server),
            power_state.SUSPENDED: lambda: (
                self.driver.unpause(server),
                self.driver.suspend(self.host.context, server)),
            power_state.SHUTDOWN: lambda: self.driver.power_off(server),
        }
        for state, step in steps.items():
            with self.subTest(state=state):
                step()
                before = self.describe(server)
                for _turn in range(2):
                    self.snapshot(server)
                    self.assertEqual(state, self.host.state(server))
                    self.assertEqual(before, self.describe(server))
                    self.assert_clean()

    def test_of_a_snapshot_that_lxd_has_imported(self) -> None:
        server = self.host.spawn()
        self.driver.power_off(server)
        first = self.snapshot(server)
        copy = self.host.spawn(image=self.host.glance.meta(first),
                               power_on=False)
        self.snapshot(server)
        self.snapshot(copy)
        self.assert_clean()

    def test_without_the_program_to_compress_with(self) -> None:
        self.host._set('snapshot_compression', 'xz', 'lxd')
        server = self.host.spawn()
        self.assertTrue(self.host.glance.data(self.snapshot(server))
                        .startswith(b'\xfd7zXZ'))

    # -- failures -----------------------------------------------------------

    def test_no_such_server(self) -> None:
        self.assertRaises(exception.InstanceNotRunning, self.snapshot,
                          self.host.instance())
        self.assert_clean()

    def test_glance_refuses(self) -> None:
        server = self.host.spawn()

        def refuse(*args, **kwargs):
            kwargs['data'].read(1000)
            raise exception.ImageNotAuthorized(image_id='x')
        self.host.glance.update = refuse
        self.assertRaises(exception.ImageNotAuthorized, self.snapshot, server)
        self.assert_clean()
        self.assertEqual(power_state.RUNNING, self.host.state(server))

    def test_glance_takes_a_part_only(self) -> None:
        server = self.host.spawn()
        update = self.host.glance.update

        def truncate(context, image_id, info, data=None, **kwargs):
            data.read(1000)
            return update(context, image_id, info, data=data, **kwargs)
        self.host.glance.update = truncate
        self.assertRaises(exception.ImageUnacceptable, self.snapshot, server)
        self.assert_clean()

    def test_image_deleted_meanwhile(self) -> None:
        server = self.host.spawn()
        self.assertRaises(
            exception.ImageNotFound, self.driver.snapshot, self.host.context,
            server, '8ea3ba1a-5f8e-4a4e-9d2c-7a3d3f9b7c55',
            self.update_task_state)
        self.assert_clean()

    def test_nova_gives_up(self) -> None:
        server = self.host.spawn()

        def update_task_state(task_state, expected_state=None):
            if task_state == task_states.IMAGE_UPLOADING:
                raise exception.UnexpectedDeletingTaskStateError(
                    instance_uuid=server.uuid, expected={}, actual={})
        image_id = self.host.glance.create(None, {'name': 'x'})['id']
        self.assertRaises(
            exception.UnexpectedDeletingTaskStateError, self.driver.snapshot,
            self.host.context, server, image_id, update_task_state)
        self.assert_clean()

    def test_deleted_meanwhile(self) -> None:
        image = self.host.image(busybox_image.unified(
            {'/root/filler': bytes(60 << 20)}))
        # Takes long enough to be interrupted.
        self.host._set('snapshot_compression', 'xz', 'lxd')
        server = self.host.spawn(image=image)
        self.host.run(server, 'dd', 'if=/dev/urandom', 'of=/root/noise',
                      'bs=1M', 'count=40')
        raised: list[BaseException] = []

        def run() -> None:
            try:
                self.snapshot(server)
            except BaseException as exc:
                raised.append(exc)
        thread = threading.Thread(target=run)
        thread.start()
        name = f'{server.name}-snapshot'
        deadline = time.monotonic() + 60
        while name not in self.host.lxd_instances():
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.05)
        self.driver.destroy(self.host.context, server, [], {})
        thread.join(60)
        # The snapshot was interrupted, not waited for.
        self.assertEqual(['InstanceNotFound'],
                         [type(exc).__name__ for exc in raised])
        self.assert_clean()
        self.assertNotIn(server.name, self.host.lxd_instances())

    def test_leftovers_of_a_crash(self) -> None:
        server = self.host.spawn()
        self._leave_something(server)
        self.host.restart_driver()
        self.assert_clean()
        self.assertEqual(power_state.RUNNING, self.host.state(server))
        self._leave_something(server)
        self.snapshot(server)
        self.assert_clean()
        self._leave_something(server)
        self.driver.destroy(self.host.context, server, [], {})
        self.assert_clean()
        self.assertNotIn(server.name, self.host.lxd_instances())

    def _leave_something(self, server) -> None:
        """Leave what an interrupted snapshot leaves in LXD."""
        api, params = self.host.lxd.api, {'project': self.host.project}
        name = f'{server.name}-snapshot'
        api.must('POST', '/1.0/instances', {
            'name': name, 'type': 'container', 'profiles': [],
            'source': {'type': 'copy', 'source': server.name,
                       'instance_only': True},
            'config': {'user.nova.uuid': server.uuid,
                       'user.nova.lxd_name': name,
                       'user.nova.role': 'snapshot'}}, params=params)
        api.must('POST', '/1.0/images', {
            'source': {'type': 'instance', 'name': name},
            'properties': {'description': name},
            'aliases': [{'name': f'{snapshot.ALIAS_PREFIX}{server.uuid}'}],
        }, params=params)

    # -- consistency --------------------------------------------------------

    def _quiescible(self):
        image = self.host.image(os_require_quiesce='yes')
        server = self.host.instance(image, system_metadata={
            'image_os_require_quiesce': 'yes'})
        return self.host.spawn(server, image), image

    def test_quiesce_on_request(self) -> None:
        server, image = self._quiescible()
        self.driver.quiesce(self.host.context, server, image)
        self.assertEqual('Frozen', self.describe(server)['status'])
        self.driver.unquiesce(self.host.context, server, image)
        self.driver.unquiesce(self.host.context, server, image)
        self.assertEqual('Running', self.describe(server)['status'])
        self.assertNotIn('user.nova.quiesced',
                         self.describe(server)['config'])
        self.snapshot(server)
        self.assertEqual('Running', self.describe(server)['status'])
        self.assertNotIn('user.nova.quiesced',
                         self.describe(server)['config'])

    def test_crash_while_quiesced(self) -> None:
        server, image = self._quiescible()
        self.driver.quiesce(self.host.context, server, image)
        self.host.restart_driver()
        self.assertEqual('Running', self.describe(server)['status'])

    def test_quiesce_unasked(self) -> None:
        image = self.host.image()
        server = self.host.spawn(image=image)
        self.assertRaises(exception.InstanceQuiesceNotSupported,
                          self.driver.quiesce, self.host.context, server,
                          image)
        self.assertEqual(power_state.RUNNING, self.host.state(server))


@unittest.skipIf(NO_LXD, NO_LXD or '')
class BtrfsSnapshotTest(SnapshotCases, unittest.TestCase):
    pool_driver = 'btrfs'

    def test_guest_does_not_notice(self) -> None:
        server = self.host.spawn()
        self.host.run(server, 'dd', 'if=/dev/urandom', 'of=/root/noise',
                      'bs=1M', 'count=20')
        events = self.host.lxd.api.events(project=self.host.project,
                                          type='lifecycle')
        self.addCleanup(events.close)
        began = time.monotonic()
        gaps = self.gaps_during(server, lambda: self.snapshot(server))
        took = time.monotonic() - began
        self.assertEqual(set(), self.actions(events, server) & {
            'instance-paused', 'instance-resumed', 'instance-restarted',
            'instance-shutdown', 'instance-started', 'instance-stopped'})
        # A guest that LXD itself keeps from running has one long gap, and so
        # has a busy host a short one. benchmarks.snapshot measures those.
        self.assertLess(max(gaps), max(2, took / 2))

    def actions(self, events, server) -> set[str]:
        """List what LXD has done with a server until now."""
        self.host.lxd.api.must(
            'PATCH', '/1.0/profiles/default', {'description': 'end'},
            params={'project': self.host.project})
        found = set()
        while True:
            about = json.loads(events.recv())['metadata']
            if about['action'] == 'profile-updated':
                return found
            if about['source'].partition('?')[0].endswith(
                    f'/{server.name}'):
                found.add(about['action'])

    def gaps_during(self, server, action) -> list[float]:
        """Let the guest record the time every 10 ms.

        :returns: the seconds between the records.
        """
        self.host.run(server, 'mount', '-t', 'tmpfs', 'tmpfs', '/mnt')
        self.host.run(server, 'sh', '-c', f'({TICKER}) > /dev/null 2>&1 &')
        deadline = time.monotonic() + 30
        while not self.host.run(
                server, 'sh', '-c', 'cat /mnt/ticks 2>/dev/null || :'):
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.05)
        action()
        ticks = [float(line) for line in self.host.run(
            server, 'cat', '/mnt/ticks').splitlines()[:-1]]
        self.assertGreater(len(ticks), 10)
        return [after - before for before, after
                in zip(ticks, ticks[1:], strict=False)]


@unittest.skipIf(NO_LXD, NO_LXD or '')
@variants.keep(
    'test_image_boots_again', 'test_image_tells_nothing_of_the_server',
    'test_unchanged_in_every_state',
    'test_of_a_snapshot_that_lxd_has_imported', 'test_leftovers_of_a_crash')
class DirectorySnapshotTest(SnapshotCases, unittest.TestCase):
    pool_driver = 'dir'
