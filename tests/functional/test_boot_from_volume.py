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

"""Servers that boot from volumes, with a real LXD."""

from __future__ import annotations

import unittest

import fixtures
from nova.compute import power_state
from nova.compute import task_states
from nova import exception
from nova import objects
from oslo_utils import units

from nova_lxd_py import conf
from nova_lxd_py.virt.privileged import probe
from tests.fixtures import boot_volume_host
from tests.fixtures import busybox_image
from tests.fixtures import disks
from tests.fixtures import lab_volumes
from tests.fixtures import lxd_daemon

CONF = conf.CONF
NO_LXD = lxd_daemon.missing()

NO_GROWTH = ('This machine cannot grow a mounted ext4: CAP_SYS_RESOURCE is '
             'missing')

ROOT_PATH = boot_volume_host.ROOT_PATH


class BootCases(boot_volume_host.BootVolumeHost):
    """Tests for every back end and every filesystem."""

    def test_from_image_and_on_another_server(self) -> None:
        volume = self.volume_from_image()
        server = self.boot(volume)
        self.assertEqual(power_state.RUNNING, self.host.state(server))
        self.assertIn(self.filesystem, self.root_device(server))
        self.assertEqual('from the image\n',
                         self.host.run(server, 'cat', '/etc/motd'))
        filled = self.fill(server)
        self.assertTrue(filled.endswith(
            '\n0 0 755\n0 0 755\n7 8 4755\n'), filled)
        self.assertEqual([], self.pools())
        self.assertEqual([server.name], list(self.host.lxd_instances()))
        root = self.host.lxd_instances()[server.name]['devices']['root']
        self.assertNotIn('size', root)
        self.destroy(server, self.described(volume))
        self.assertEqual({}, self.host.lxd_instances())
        self.assert_clean()
        # The second server has another range of user ids.
        first = self.boot(self.volume_from_image())
        second = self.boot(volume)
        self.assertEqual(filled, self.sum(second))
        ranges = {entry['config']['volatile.idmap.base'] for entry in
                  self.host.lxd_instances().values()}
        self.assertEqual(2, len(ranges))
        for server in (first, second):
            self.destroy(server)
        self.assert_clean()

    def test_volume_is_looked_at_once(self) -> None:
        looks = []

        def content(path: str) -> str:
            looks.append(path)
            return found(path)
        found = probe.content
        volume = self.volume_from_image()
        with fixtures.MonkeyPatch(
                'nova_lxd_py.virt.privileged.probe.content', content):
            server = self.boot(volume)
            self.assertEqual(1, len(looks))
            self.reboot(server, self.described(volume))
            self.assertEqual(2, len(looks))
            self.destroy(server)
            server = self.boot(volume)
            self.assertEqual(3, len(looks))
        self.destroy(server)

    def test_programs_change_their_user(self) -> None:
        server = self.boot(self.volume_from_image())
        self.host.run(server, 'sh', '-c', 'cp /bin/busybox /bin/su && '
                      'chmod 4755 /bin/su && echo '
                      '"u:x:7:7:u:/:/bin/sh" >> /etc/passwd')
        line = self.root_device(server)
        self.assertNotIn('nosuid', line)
        self.assertIn('nodev', line)
        self.destroy(server)

    def test_reboots_and_restarts(self) -> None:
        volume = self.volume_from_image()
        server = self.boot(volume)
        filled = self.fill(server)
        info = self.described(volume)
        for kind in ('SOFT', 'HARD', 'HARD'):
            self.reboot(server, info, kind)
            self.assertEqual(filled, self.sum(server), kind)
        self.reboot_by_itself(server)
        self.assertEqual(filled, self.sum(server))
        self.host.restart_driver()
        self.assertEqual(filled, self.sum(server))
        self.host.driver.power_off(server)
        self.host.driver.power_off(server)
        for _turn in range(2):
            self.host.driver.power_on(self.host.context, server, [],
                                      self.described(volume))
            self.assertEqual(filled, self.sum(server))
        self.host.driver.pause(server)
        self.host.driver.unpause(server)
        self.assertEqual(filled, self.sum(server))
        # Without its volume it must not start from an empty disk.
        self.host.driver.power_off(server)
        self.assertRaises(exception.VolumeAttachFailed,
                          self.host.driver.power_on, self.host.context,
                          server, [], disks.described())
        self.destroy(server, self.described(volume))
        self.destroy(server, self.described(volume))
        self.assert_clean()

    def test_destroy_without_the_connection(self) -> None:
        for stopped in (True, False):
            server = self.boot(self.volume_from_image())
            if stopped:
                self.host.driver.power_off(server)
            self.destroy(server, disks.described())
            self.assert_clean()

    def test_with_other_disks(self) -> None:
        data = self.storage.volume().mapping()
        volume = self.volume_from_image()
        info = self.described(
            volume, data, ephemerals=[{
                'device_name': '/dev/vdc', 'size': 1, 'guest_format': None,
                'device_type': None, 'disk_bus': None}],
            swap={'device_name': '/dev/vdd', 'swap_size': 64})
        server = self.boot(volume, self.host.instance(
            root_gb=0, ephemeral_gb=1, swap=64), info)
        written = self.write(server)
        self.host.run(server, 'touch', '/mnt/x')
        hot = self.attach(server, self.storage.volume(), '/dev/vde')
        self.reboot(server, info)
        self.assertEqual(written, self.read(server))
        self.host.run(server, 'ls', '/mnt/x')
        self.detach(server, hot, '/dev/vde')
        self.destroy(server, info)
        self.assert_clean()

    def test_files_and_password(self) -> None:
        # Busybox of distributions lacks chpasswd; this one records its input.
        image = self.host.image(busybox_image.unified({
            'bin/chpasswd': b'#!/bin/sh\ncat >> /root/input\n'}))
        server = self.boot(self.volume_from_image(image), injected_files=[
            ('/etc/new/file', b'content')], admin_password='Geheim1')
        self.assertEqual('content',
                         self.host.run(server, 'cat', '/etc/new/file'))
        self.host.driver.set_admin_password(server, 'Other2')
        self.assertEqual('root:Geheim1\nroot:Other2\n',
                         self.host.run(server, 'cat', '/root/input'))
        self.destroy(server)

    def test_snapshot(self) -> None:
        """Nova asks the driver to quiesce the server, and has Cinder make
        snapshots of its volumes."""
        volume = self.volume_from_image()
        server = self.boot(volume)
        filled = self.fill(server)
        self.host.run(server, 'sh', '-c', 'echo last > /root/unsynced')
        self.assertRaises(exception.InstanceQuiesceNotSupported,
                          self.host.driver.quiesce, self.host.context, server,
                          self.image)
        clone = self.clone(volume)
        other = self.boot(clone)
        self.assertEqual(filled, self.sum(other))
        self.assertEqual('last\n', self.host.run(other, 'cat',
                                                 '/root/unsynced'))
        self.assertEqual(filled, self.sum(server))
        for each in (server, other):
            self.destroy(each)
        self.assert_clean()

    def test_rebuild(self) -> None:
        """Nova destroys the server and detaches its root, has Cinder copy
        the image to the volume, and spawns the server again."""
        volume = self.volume_from_image()
        server = self.boot(volume)
        self.fill(server)
        info = self.described(volume)
        self.host.driver.power_off(server)
        self.destroy(server, info)
        root = info['block_device_mapping'][0]
        self.detach(server, root['connection_info'], ROOT_PATH)
        self.assert_clean()
        new = self.host.image(busybox_image.unified({'etc/motd': b'new\n'}))
        self.copy_image(volume, new)
        self.boot(volume, server)
        self.assertEqual('new\n', self.host.run(server, 'cat', '/etc/motd'))
        with self.assertRaises(AssertionError):
            self.sum(server)
        # Without a new image, the volume keeps its content.
        filled = self.fill(server)
        info = self.described(volume)
        self.reboot(server, info)
        self.host.driver.power_off(server)
        root = info['block_device_mapping'][0]
        self.detach(server, root['connection_info'], ROOT_PATH)
        self.assertEqual(set(), self.storage.left_on_host())
        self.destroy(server, info)
        self.boot(volume, server)
        self.assertEqual(filled, self.sum(server))
        self.destroy(server)

    def test_running_root_is_not_detached(self) -> None:
        volume = self.volume_from_image()
        info = self.described(volume)
        server = self.boot(volume, info=info)
        root = info['block_device_mapping'][0]
        self.assertRaises(exception.DeviceDetachFailed, self.detach, server,
                          root['connection_info'], ROOT_PATH)
        self.fill(server)
        # Nor can it be attached to another server.
        self.assertRaises(exception.VolumeAttachFailed, self.attach,
                          self.host.spawn(), volume)
        self.assertRaises(exception.VolumeAttachFailed, self.boot, volume)
        self.fill(server)
        self.destroy(server)

    def test_resize_and_back(self) -> None:
        volume = self.volume_from_image()
        mapping = self.described(volume)
        server = self.boot(volume, info=mapping)
        filled = self.fill(server)
        old, new = server.flavor, server.flavor.obj_clone()
        new.memory_mb, new.root_gb = 192, 5
        migration = objects.Migration(source_compute='testhost',
                                      dest_compute='testhost', id=1)
        self.host.driver.migrate_disk_and_power_off(
            self.host.context, server, self.host.driver.get_host_ip_addr(),
            new, [], mapping, timeout=0)
        self.assertEqual(set(), self.storage.left_on_host())
        server.old_flavor, server.flavor = old, new
        server.new_flavor = new
        mapping = self.described(volume)
        self.host.driver.finish_migration(
            self.host.context, migration, server, {}, [],
            server.image_meta, False, {}, mapping, True)
        self.assertEqual(filled, self.sum(server))
        self.assertEqual('192MiB', self.host.lxd_instances()[server.name][
            'config']['limits.memory'])
        server.task_state = task_states.RESIZE_REVERTING
        self.destroy(server, mapping)
        self.assertEqual(set(), self.storage.left_on_host())
        server.flavor = old
        mapping = self.described(volume)
        self.host.driver.finish_revert_migration(
            self.host.context, server, [], migration, mapping, True)
        server.task_state = None
        self.assertEqual(filled, self.sum(server))
        root = self.host.lxd_instances()[server.name]['devices']['root']
        self.assertNotIn('size', root)
        self.destroy(server, mapping)
        self.assert_clean()

    # -- growth -------------------------------------------------------------

    def test_extend(self) -> None:
        if not self.grows():
            self.skipTest(NO_GROWTH)
        volume = self.volume_from_image()
        info = self.described(volume)
        server = self.boot(volume, info=info)
        filled = self.fill(server)
        before = self.size(server)
        root = info['block_device_mapping'][0]['connection_info']
        for size in (2 * units.Gi, 3 * units.Gi):
            # While it runs, and while it is stopped.
            volume.extend(size)
            self.host.driver.extend_volume(self.host.context, root, server,
                                           size)
            if self.host.state(server) == power_state.SHUTDOWN:
                self.host.driver.power_on(self.host.context, server, [],
                                          self.described(volume))
            more = (size - units.Gi) // units.Ki
            self.assertGreater(self.size(server), before + more * 9 // 10)
            self.assertEqual(filled, self.sum(server))
            self.host.driver.power_off(server)
        self.destroy(server, info)

    def test_extended_while_detached(self) -> None:
        volume = self.volume_from_image()
        server = self.boot(volume)
        filled = self.fill(server)
        before = self.size(server)
        self.destroy(server, self.described(volume))
        volume.extend(2 * units.Gi)
        server = self.boot(volume)
        if self.grows():
            self.assertGreater(self.size(server), before + 900 * 1024)
        else:
            self.assertIn('Could not grow', self.log.output)
        self.assertEqual(filled, self.sum(server))
        self.destroy(server)
        self.assert_clean()

    def test_extended_during_a_reboot_of_the_host(self) -> None:
        if not self.grows():
            self.skipTest(NO_GROWTH)
        volume = self.volume_from_image()
        server = self.boot(volume)
        filled = self.fill(server)
        before = self.size(server)
        self.reboot_host(server, volume)
        volume.extend(2 * units.Gi)
        self.host.driver.resume_state_on_host_boot(
            self.host.context, server, [], [], self.described(volume))
        self.assertGreater(self.size(server), before + 900 * 1024)
        self.assertEqual(filled, self.sum(server))
        self.destroy(server, self.described(volume))
        self.assert_clean()

    # -- interruptions ------------------------------------------------------

    def test_after_a_reboot_of_the_host(self) -> None:
        volume = self.volume_from_image()
        server = self.boot(volume)
        filled = self.fill(server)
        self.reboot_host(server, volume)
        self.host.driver.resume_state_on_host_boot(
            self.host.context, server, [], [], self.described(volume))
        self.assertEqual(filled, self.sum(server))
        self.destroy(server)

    # -- refusals -----------------------------------------------------------

    def test_policy(self) -> None:
        for change, reason in ((('multiattach', True), 'several servers'),
                               (('data', {'access_mode': 'ro'}), 'read-only')):
            info = self.described(self.volume_from_image())
            connection = info['block_device_mapping'][0]['connection_info']
            key, value = change
            connection[key] = {**connection['data'], **value} if isinstance(
                value, dict) else value
            self.assertRaisesRegex(
                exception.BuildAbortException, reason, self.boot,
                self.storage.volume(), info=info)
        CONF.set_override('volume_filesystems', [], 'lxd')
        self.assertRaisesRegex(
            exception.BuildAbortException, 'volume_filesystems', self.boot,
            self.volume_from_image())
        CONF.set_override('volume_filesystems', [self.filesystem], 'lxd')
        self.assert_clean()


@unittest.skipIf(NO_LXD, NO_LXD or '')
class Ext4BootTest(BootCases, unittest.TestCase):
    """On a file of a share, with a range of user ids for each server."""


@unittest.skipIf(NO_LXD, NO_LXD or '')
class XfsBootTest(boot_volume_host.BootVolumeHost, unittest.TestCase):
    """On a block device, with the capabilities of the privsep daemon."""

    filesystem = 'xfs'
    daemon = True
    test_from_image_and_on_another_server = (
        BootCases.test_from_image_and_on_another_server)
    test_rebuild = BootCases.test_rebuild
    test_snapshot = BootCases.test_snapshot
    test_extend = BootCases.test_extend
    test_extended_while_detached = BootCases.test_extended_while_detached
    test_extended_during_a_reboot_of_the_host = (
        BootCases.test_extended_during_a_reboot_of_the_host)


@unittest.skipIf(NO_LXD, NO_LXD or '')
class LocalBootTest(boot_volume_host.BootVolumeHost, unittest.TestCase):
    """On a block device, with one range of user ids for all."""

    kind = lab_volumes.LocalVolume
    options = {'idmap_isolation': 'off'}
    test_reboots_and_restarts = BootCases.test_reboots_and_restarts

    def test_privileged(self) -> None:
        server = self.boot(self.volume_from_image(), self.host.instance(
            extra_specs={'lxd:privileged_allowed': 'true'}))
        self.fill(server)
        for wrapper in self.roots.iterdir():
            # Its setuid programs would run as root on the host as well.
            self.assertEqual(0o100, wrapper.stat().st_mode & 0o777)
        self.destroy(server)
        self.assert_clean()
