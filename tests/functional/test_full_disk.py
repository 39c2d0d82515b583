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

"""Every change of a server whose guest has filled its root disk.

LXD keeps files of its own on the root disk, so that it can change nothing then
(:mod:`nova_lxd_py.virt.guest.root_extension`). That is on btrfs, which has
quotas. On a ``dir`` pool no disk of a server is full before the host's.
"""

from __future__ import annotations

import os
import subprocess
import time
from typing import Any
import unittest
import uuid

from nova.compute import power_state
from nova.compute import vm_states
from nova import exception
from nova.network import model
from nova import objects
from oslo_utils import units

from nova_lxd_py.virt.guest import root_quota
from nova_lxd_py.virt import privileged
from tests.fixtures import busybox_image
from tests.fixtures import lab_volumes
from tests.fixtures import lxd_daemon
from tests.fixtures import resize_case
from tests.fixtures import volume_host

NO_LXD = lxd_daemon.missing()

#: Writes to a new file, as /etc/shadow is replaced.
CHPASSWD = b'#!/bin/sh\ncat > /root/password && sync\n'

#: Fills the disk to the last block.
FILL = '''
busybox fallocate -l 900M /root/first
for size in 1M 64k 4k; do
    dd if=/dev/urandom bs=$size >>/root/full-$size
    sync
done
'''

#: Keeps writing, also whenever the quota is extended.
WRITE_ON = '''
for writer in 1 2 3 4; do
    (while true; do
        dd if=/dev/zero of=/root/on-$writer-$RANDOM bs=64k
    done) >/dev/null 2>&1 </dev/null &
done
'''


class FullDiskTestCase(volume_host.VolumeHost):

    kind = lab_volumes.FileVolume
    options = {'volume_filesystems': ['ext4']}

    def setUp(self) -> None:
        super().setUp()
        privileged.network_context.set_client_mode(False)
        self.addCleanup(privileged.network_context.set_client_mode, True)
        self.driver, self.context = self.host.driver, self.host.context
        self.made: list[str] = []
        self.addCleanup(lambda: self.assertEqual([], [
            name for name in os.listdir('/sys/class/net')
            if name[3:] in self.made]))
        self.image = self.host.image(busybox_image.unified(
            {'bin/chpasswd': CHPASSWD}))
        self.port = self.make_port(1)
        self.server = self.host.spawn(
            self.host.instance(self.image, metadata=self.metadata()),
            self.image, network_info=[self.port])
        self.ports = [self.port]
        self.server.info_cache = objects.InstanceInfoCache(
            instance_uuid=self.server.uuid,
            network_info=model.NetworkInfo(self.ports))
        self.addCleanup(lambda: self.driver.destroy(
            self.context, self.server, self.ports))
        self.fill()

    def metadata(self) -> dict[str, str]:
        return {}

    def make_port(self, number: int) -> model.VIF:
        port = str(uuid.uuid4())
        self.made.append(port[:11])
        network = model.Network(id=str(uuid.uuid4()), label='net', subnets=[],
                                mtu=1442)
        return model.VIF(id=port, address=f'fa:16:3e:00:05:{number:02x}',
                         network=network, type=model.VIF_TYPE_TAP,
                         devname=f'tap{port}'[:14], active=True, details={})

    # -- the disk -----------------------------------------------------------

    def fill(self) -> None:
        """Fill the disk as the guest can, and check that LXD is hurt."""
        deadline = time.monotonic() + 60
        while True:
            self.host.run(self.server, 'sh', '-c',
                          f'({FILL}) 2>/dev/null; true')
            answer = self.host.lxd.api.call(
                'PATCH', f'/1.0/instances/{self.server.name}',
                {'config': {'user.check': str(uuid.uuid4())}},
                params={'project': self.host.project})
            if 'quota exceeded' in str(answer).lower():
                return
            # btrfs has reserved more for what it writes than it needed.
            self.assertLess(time.monotonic(), deadline, answer)

    def free(self) -> None:
        self.host.run(self.server, 'sh', '-c', 'rm /root/f*; sync')

    def entry(self) -> dict[str, Any]:
        return self.host.lxd_instances()[self.server.name]

    def quota(self) -> int | None:
        return root_quota.size_bytes(self.entry()['devices']['root'])

    def assert_runs(self) -> None:
        self.assertEqual(power_state.RUNNING, self.host.state(self.server))

    def on_pool(self, *command: str) -> str:
        """Run a command in LXD's mount namespace."""
        return subprocess.run(
            ['nsenter', '--target', str(self.host.lxd._process.pid),
             '--mount', *command],
            check=True, capture_output=True, text=True).stdout


class FullDiskCases(FullDiskTestCase):
    """What works although the disk is full."""

    def test_volumes(self) -> None:
        for mode, check in (('block', '[ -b /dev/vdb ]'),
                            ('filesystem', 'touch /mnt/vdb/file')):
            self.server.metadata = {'lxd_volume_mode': mode}
            volume = self.storage.volume()
            connection = self.attach(self.server, volume)
            self.host.run(self.server, 'sh', '-c', check)
            self.detach(self.server, connection)
            self.assertEqual({}, self.devices(self.server))
            self.assertEqual(set(), self.storage.left_on_host())

    def test_ports(self) -> None:
        port = self.make_port(2)
        self.driver.attach_interface(self.context, self.server,
                                     objects.ImageMeta(), port)
        self.assertEqual(port['address'], self.host.run(
            self.server, 'cat', '/sys/class/net/eth1/address').strip())
        self.driver.detach_interface(self.context, self.server, port)
        self.assertEqual(['eth0', 'lo'], self.host.run(
            self.server, 'ls', '/sys/class/net').split())

    def test_suspend_and_pause(self) -> None:
        self.driver.suspend(self.context, self.server)
        self.assertEqual(power_state.SUSPENDED, self.host.state(self.server))
        self.driver.resume(self.context, self.server, self.ports)
        self.driver.pause(self.server)
        self.assertEqual(power_state.PAUSED, self.host.state(self.server))
        self.driver.unpause(self.server)
        self.assert_runs()

    def test_rescue(self) -> None:
        self.driver.power_off(self.server)
        self.driver.rescue(self.context, self.server, self.ports, self.image,
                           'secret', {}, [])
        self.server.vm_state = vm_states.RESCUED
        self.assert_runs()
        self.driver.unrescue(self.context, self.server)
        self.server.vm_state = vm_states.ACTIVE
        self.assert_runs()
        self.assertEqual({self.server.name}, self.instances())

    def test_images(self) -> None:
        """Of a running server, and of a stopped one as for a shelve."""
        self.snapshot()
        self.driver.power_off(self.server)
        self.snapshot()
        self.assertEqual({self.server.name}, self.instances())

    def snapshot(self) -> None:
        image_id = self.host.glance.create(
            None, {'name': 'backup', 'properties': {}})['id']
        self.driver.snapshot(self.context, self.server, image_id,
                             lambda **_states: None)
        self.assertEqual('active',
                         self.host.glance.get(None, image_id)['status'])

    def instances(self) -> set[str]:
        """Name the LXD instances, without templates."""
        return {name for name, entry in self.host.lxd_instances().items()
                if entry['config'].get('user.nova.role') != 'template'}

    def test_password(self) -> None:
        self.driver.set_admin_password(self.server, 'secret')
        self.assertEqual('root:secret', self.host.run(
            self.server, 'cat', '/root/password').strip())

    def test_power(self) -> None:
        self.driver.power_off(self.server, 20, 10)
        self.assertEqual(power_state.SHUTDOWN, self.host.state(self.server))
        self.driver.power_on(self.context, self.server, self.ports)
        self.assert_runs()
        for kind in ('SOFT', 'HARD'):
            self.driver.reboot(self.context, self.server, self.ports, kind)
            self.assert_runs()
        self.assertGreater(self.quota(), units.Gi)
        # A start takes the extension back once there is space.
        self.free()
        self.driver.reboot(self.context, self.server, self.ports, 'HARD')
        self.assertEqual(units.Gi, self.quota())

    def test_rebuild(self) -> None:
        """What Nova does for it: destroy and spawn."""
        self.driver.power_off(self.server)
        self.driver.destroy(self.context, self.server, self.ports,
                            destroy_disks=True)
        self.host.spawn(self.server, self.image, network_info=self.ports)
        self.assert_runs()
        self.assertEqual(units.Gi, self.quota())

    def test_delete(self) -> None:
        self.driver.destroy(self.context, self.server, self.ports)
        self.assertEqual(set(), self.instances())


@unittest.skipIf(NO_LXD, NO_LXD or '')
class FullDiskTest(FullDiskCases, unittest.TestCase):
    """With what the guest can do at a time."""


@unittest.skipIf(NO_LXD, NO_LXD or '')
class ExceededQuotaTest(FullDiskCases, unittest.TestCase):
    """With less than the 16 KiB that btrfs needs for another quota.

    Metadata can bring a disk there, and a quota that was made too small.
    """

    def fill(self) -> None:
        super().fill()
        pool = (f'{self.host.lxd.directory}/storage-pools/'
                f'{self.host.lxd.pool}')
        disk = f'{pool}/containers/{self.host.project}_{self.server.name}'
        group, used, *_rest = self.on_pool(
            'btrfs', 'qgroup', 'show', '-f', '--raw', disk
            ).splitlines()[-1].split()
        self.on_pool('btrfs', 'qgroup', 'limit', str(int(used) - 4096), group,
                     pool)


@unittest.skipIf(NO_LXD, NO_LXD or '')
class WritingGuestTest(FullDiskTestCase, unittest.TestCase):
    """With a guest that fills each extension."""

    def fill(self) -> None:
        super().fill()
        self.host.run(self.server, 'sh', '-c', WRITE_ON)

    def wait_until_full(self) -> None:
        """Wait until the guest has filled what the disk was extended by."""
        deadline = time.monotonic() + 120
        while 'free' in self.host.run(
                self.server, 'sh', '-c',
                'dd if=/dev/zero of=/root/probe bs=64k count=1 2>/dev/null '
                '&& echo free; rm -f /root/probe'):
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.05)

    def test_changes_have_an_end(self) -> None:
        """Each change works, or says why not and leaves nothing."""
        refused = 0
        for number in range(12):
            self.wait_until_full()
            volume = self.storage.volume()
            try:
                self.attach(self.server, volume, f'/dev/vd{chr(99 + number)}')
            except exception.NovaException as exc:
                self.assertIn('is full', str(exc))
                refused += 1
        self.assertGreater(refused, 0)
        self.assertEqual(12 - refused, len(self.devices(self.server)))
        self.assertLessEqual(self.quota(),
                             units.Gi + root_quota.MAX_EXTENSION)
        self.driver.power_off(self.server)
        self.assertEqual(power_state.SHUTDOWN, self.host.state(self.server))
        self.driver.destroy(self.context, self.server, self.ports)
        self.assertNotIn(self.server.name, self.host.lxd_instances())


@unittest.skipIf(NO_LXD, NO_LXD or '')
class FullDiskResizeTest(resize_case.ResizeTestCase):

    def test_resize(self) -> None:
        server = self.server()
        self.host.run(server, 'sh', '-c', f'({FILL}) 2>/dev/null; true')
        self.resize(server, memory_mb=256, root_gb=2)
        self.assertEqual(power_state.RUNNING, self.host.state(server))
        self.confirm(server)
        self.host.run(server, 'sh', '-c', 'echo more > /root/more')
        self.assertEqual('2GiB', self.host.lxd_instances()[server.name][
            'devices']['root']['size'])
