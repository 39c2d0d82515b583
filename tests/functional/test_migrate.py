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

"""Servers that move between two real LXD daemons, each with a driver."""

from __future__ import annotations

import hashlib
import os
import pathlib
import socket
import stat
import struct
import threading
import time
from typing import Any
import unittest

from nova.compute import power_state
from nova import exception
from nova import objects

from tests.fixtures import disks
from tests.fixtures import driver_host
from tests.fixtures import lxd_daemon
from tests.fixtures import two_hosts

NO_LXD = lxd_daemon.missing() or (
    'needs LXD daemons of its own' if os.environ.get('LXD_SOCKET') else None)
CONF = driver_host.CONF
MIB = 1 << 20

_FILE_CAPABILITIES = 'security.capability'
_ACL = 'system.posix_acl_access'


def _listen(lxd: lxd_daemon.RealLXD) -> str:
    """Choose an address for an LXD of this machine."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return '127.0.0.1:%d' % free.getsockname()[1]


class MigrateTestCase(unittest.TestCase):
    """Two hosts.

    :cvar pools: drivers of their storage pools.
    """

    pools: tuple[str, str]
    lxds: list[lxd_daemon.RealLXD]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.lxds = []
        for driver in cls.pools:
            lxd = lxd_daemon.RealLXD(driver).__enter__()
            cls.addClassCleanup(lxd.close)
            cls.lxds.append(lxd)

    def setUp(self) -> None:
        super().setUp()
        self.bus = self.use(two_hosts.Bus())
        CONF.set_override('rpc_response_timeout', 30)
        self.addCleanup(CONF.clear_override, 'rpc_response_timeout')
        for lxd in self.lxds:
            # The driver sets it again.
            lxd.api.must('PATCH', '/1.0', {
                'config': {'core.https_address': ''}})
        self.host = self.use(driver_host.DriverHost(
            self.lxds[0], migration_address=_listen(self.lxds[0])))
        self.other = self.use(two_hosts.SecondHost(
            self.host, self.lxds[1],
            migration_address=_listen(self.lxds[1])))
        self.info: dict[str, Any] | None = None

    def use(self, fixture: Any) -> Any:
        fixture.setUp()
        self.addCleanup(fixture.cleanUp)
        return fixture

    def make(self, **fields: Any) -> objects.Instance:
        image = self.host.image()
        return self.host.spawn(self.host.instance(image, **fields), image,
                               block_device_info=self.info)

    def move(self, server: objects.Instance, **kwargs: Any) -> two_hosts.Move:
        return two_hosts.Move(self.bus, server, self.host, self.other,
                              info=self.info, **kwargs)

    def root(self, host: driver_host.DriverHost, server: objects.Instance
             ) -> pathlib.Path:
        """Return the root directory of a server on the host."""
        return (host.lxd.directory / 'storage-pools' / host.lxd.pool /
                'containers' / f'{host.project}_{server.name}' / 'rootfs')

    def first_uid(self, host: driver_host.DriverHost,
                  server: objects.Instance) -> int:
        """Return the host's uid for root in a server."""
        return int(host.lxd_instances()[server.name]['config'][
            'volatile.idmap.base'])

    def write_all_kinds(self, server: objects.Instance) -> None:
        """Write files of all types, with attributes that copies may lose."""
        base = self.first_uid(self.host, server)
        where = self.root(self.host, server) / 'kinds'
        where.mkdir()
        (where / 'random').write_bytes(os.urandom(MIB))
        (where / 'owned').write_bytes(b'owned')
        os.chmod(where / 'owned', 0o4750)
        (where / 'capable').write_bytes(b'program')
        # Version 3, with the uid of the range's root.
        os.setxattr(where / 'capable', _FILE_CAPABILITIES, struct.pack(
            '<IIIIII', 0x03000001, 1 << 10, 0, 0, 0, base))
        (where / 'attributed').write_bytes(b'attributed')
        os.setxattr(where / 'attributed', 'user.about', b'it')
        (where / 'listed').write_bytes(b'listed')
        os.setxattr(where / 'listed', _ACL, struct.pack(
            '<I' + 'HHI' * 5, 2, 1, 6, 0xffffffff, 2, 4, base + 1000,
            4, 4, 0xffffffff, 0x10, 4, 0xffffffff, 0x20, 4, 0xffffffff))
        with open(where / 'sparse', 'wb') as sparse:
            sparse.seek(32 * MIB)
            sparse.write(b'end')
        os.link(where / 'random', where / 'linked')
        os.symlink('random', where / 'symbolic')
        os.mkfifo(where / 'fifo')
        with socket.socket(socket.AF_UNIX) as listener:
            previous = os.open('.', os.O_RDONLY)
            os.chdir(where)
            try:
                listener.bind('socket')
            finally:
                os.fchdir(previous)
                os.close(previous)
        for path in [where, *where.iterdir()]:
            uid = base + (1000 if path.name == 'owned' else 0)
            # Clears setuid bits and capabilities.
            kept = (os.getxattr(path, _FILE_CAPABILITIES)
                    if path.name == 'capable' else None)
            mode = path.lstat().st_mode
            os.chown(path, uid, uid, follow_symlinks=False)
            if not path.is_symlink():
                os.chmod(path, stat.S_IMODE(mode))
            if kept:
                os.setxattr(path, _FILE_CAPABILITIES, kept)
            os.utime(path, ns=(1_600_000_000_123_456_789,
                               1_600_000_000_123_456_789),
                     follow_symlinks=False)

    def census(self, host: driver_host.DriverHost, server: objects.Instance
               ) -> dict[str, Any]:
        """Describe all files of a server, by path, as its root sees them."""
        root = self.root(host, server)
        base = self.first_uid(host, server)
        found: dict[str, Any] = {}
        inodes: dict[int, list[str]] = {}
        for directory, names, files in os.walk(root):
            for name in [*names, *files]:
                path = pathlib.Path(directory, name)
                about = path.lstat()
                shown = str(path.relative_to(root))
                inodes.setdefault(about.st_ino, []).append(shown)
                found[shown] = self._described(path, about, base)
        if set(self.pools) == {'btrfs'}:
            # Elsewhere LXD 5.0.2 makes a file of its own of each link.
            for names in inodes.values():
                for name in names:
                    found[name]['links'] = sorted(names)
        return found

    @staticmethod
    def _described(path: pathlib.Path, about: os.stat_result, base: int
                   ) -> dict[str, Any]:
        told: dict[str, Any] = {
            'mode': oct(about.st_mode), 'uid': about.st_uid - base,
            'gid': about.st_gid - base, 'attributes': {}}
        for name in os.listxattr(path, follow_symlinks=False):
            value = os.getxattr(path, name, follow_symlinks=False)
            if name == _FILE_CAPABILITIES:
                *rest, uid = struct.unpack('<IIIIII', value)
                told['attributes'][name] = (rest, uid - base)
            elif name == _ACL:
                told['attributes'][name] = [
                    (tag, mode, uid - base if tag in (2, 8) else uid)
                    for tag, mode, uid in struct.iter_unpack('<HHI',
                                                             value[4:])]
            else:
                told['attributes'][name] = value
        if stat.S_ISREG(about.st_mode):
            content = path.read_bytes()
            told.update(
                size=about.st_size, mtime=about.st_mtime_ns,
                content=hashlib.sha256(content).hexdigest(),
                sparse=about.st_size - about.st_blocks * 512 > 16 * MIB)
        elif path.is_symlink():
            told['target'] = os.readlink(path)
        elif not stat.S_ISDIR(about.st_mode):
            told['mtime'] = about.st_mtime_ns
        return told

    def assert_same(self, before: dict[str, Any], after: dict[str, Any]
                    ) -> None:
        self.maxDiff = None
        different = {name: (before.get(name), after.get(name))
                     for name in {*before, *after}
                     if before.get(name) != after.get(name)}
        self.assertEqual({}, different)

    def assert_runs(self, host: driver_host.DriverHost,
                    server: objects.Instance) -> None:
        """Check that a server runs on one host and on no other."""
        self.assertEqual(power_state.RUNNING, host.state(server))
        self.assertEqual('0', host.run(server, 'id', '-u').strip())
        for each in (self.host, self.other):
            self.assertEqual(
                [server.uuid] if each is host else [],
                each.driver.list_instance_uuids())


class MigrateCases:
    """Tests for every pair of storage pools."""

    def test_there_and_back(self: Any) -> None:
        server = self.make()
        self.write_all_kinds(server)
        move = self.move(server)
        # So that the ranges of host uids differ.
        image = self.host.image()
        self.other.spawn(self.other.instance(
            image, id=1000, project_id='another'), image)
        move.send()
        before = self.census(self.host, server)
        self.assertIn('kinds/socket', before)
        move.finish()
        self.assertEqual(power_state.RUNNING, self.other.state(server))
        self.assertEqual('0', self.other.run(server, 'id', '-u').strip())
        self.other.driver.power_off(server)
        self.assertNotEqual(self.first_uid(self.host, server),
                            self.first_uid(self.other, server))
        after = self.census(self.other, server)
        self.assert_same(
            {name: about for name, about in before.items()
             if name.startswith('kinds')},
            {name: about for name, about in after.items()
             if name.startswith('kinds')})
        move.revert()
        self.assertEqual(power_state.RUNNING, self.host.state(server))
        self.assertNotIn(server.name, self.other.lxd_instances())

    def test_resize_with_disks(self: Any) -> None:
        self.info = disks.described(ephemerals=[
            {'size': 1, 'device_name': '/dev/sdb', 'guest_format': None}])
        server = self.make(ephemeral_gb=1, config_drive='True')
        self.host.run(server, 'sh', '-c', 'echo data > /mnt/file; sync')
        drive = self.host.run(server, 'cat',
                              '/config-drive/openstack/latest/meta_data.json')
        bigger = self.host.instance(memory_mb=256, root_gb=2,
                                    ephemeral_gb=2).flavor
        move = self.move(server, flavor=bigger)
        move.whole()
        self.assert_runs(self.other, server)
        self.assertEqual('data\n', self.other.run(server, 'cat', '/mnt/file'))
        self.assertEqual(drive, self.other.run(
            server, 'cat', '/config-drive/openstack/latest/meta_data.json'))
        shown = self.other.lxd_instances()[server.name]
        self.assertEqual('2GiB', shown['devices']['root']['size'])
        self.assertEqual('256MiB', shown['config']['limits.memory'])
        move.confirm()
        self.assertNotIn(server.name, self.host.lxd_instances())
        self.assertEqual([], self.host.lxd_volumes())
        self.assertEqual('data\n', self.other.run(server, 'cat', '/mnt/file'))
        self.other.driver.destroy(self.host.context, server, [], self.info)
        self.assertEqual([], self.other.lxd_volumes())
        self.assertNotIn(server.name, self.other.lxd_instances())


class CrashCases:
    """Tests for one pair with each way of copying: btrfs send, and rsync."""

    def test_crash_of_either_lxd(self: Any) -> None:
        server = self.make()
        self.host.write_random(server, '/big', 200)
        for lxd in reversed(self.lxds):
            with self.subTest(lxd=self.lxds.index(lxd)):
                killer = threading.Thread(target=self._kill_during_copy,
                                          args=(lxd, server))
                killer.start()
                move = self.move(server)
                sent = True
                try:
                    move.send()
                except exception.InstanceFaultRollback:
                    sent = False
                    server.task_state = None
                finally:
                    # LXD may be killed only now, and is running after that.
                    killer.join()
                if sent:
                    # The transfer was begun once more when LXD was back.
                    move.finish()
                    self.assert_big_file(server)
                    move.revert()
                self.assert_runs(self.host, server)
        # The next attempt replaces an incomplete copy.
        self.move(server).whole()
        self.assert_big_file(server)

    def assert_big_file(self: Any, server: objects.Instance) -> None:
        """Check that the server runs on the other host with all its data."""
        self.assert_runs(self.other, server)
        self.assertEqual(
            str(200 * MIB),
            self.other.run(server, 'stat', '-c', '%s', '/big').strip())

    def _kill_during_copy(self: Any, lxd: lxd_daemon.RealLXD,
                          server: objects.Instance) -> None:
        deadline = time.monotonic() + 60
        while not self._is_copying(server) and time.monotonic() < deadline:
            time.sleep(0.02)
        lxd.kill()
        time.sleep(1)
        lxd.start()

    def _is_copying(self: Any, server: objects.Instance) -> bool:
        """Whether the other LXD makes a copy now: one that an earlier attempt
        has left does not count."""
        running = self.other.lxd.api.must('GET', '/1.0/operations', params={
            'project': self.other.project, 'recursion': '1'}).get('running')
        return (server.name in self.other.lxd_instances() and any(
            server.name in str(operation['resources'])
            for operation in running or ()))


@unittest.skipIf(NO_LXD, NO_LXD or '')
class BtrfsTest(MigrateCases, CrashCases, MigrateTestCase):
    pools = ('btrfs', 'btrfs')


@unittest.skipIf(NO_LXD, NO_LXD or '')
class DirTest(MigrateCases, CrashCases, MigrateTestCase):
    pools = ('dir', 'dir')

    def test_only_changes_after_the_stop(self) -> None:
        server = self.make()
        self.host.write_random(server, '/big', 300)
        with self.assertLogs('nova_lxd_py.virt.server.migrate', 'INFO'
                             ) as logs:
            self.move(server).send()
        [record] = [record for record in logs.records
                    if 'after the guest' in record.getMessage()]
        stopped = record.created - record.args['seconds']
        # Whatever the guest has not changed was written there before.
        big = (self.root(self.other, server) / 'big').stat()
        self.assertEqual(300 * MIB, big.st_size)
        self.assertLess(big.st_ctime, stopped)


@unittest.skipIf(NO_LXD, NO_LXD or '')
class BtrfsToDirTest(MigrateCases, MigrateTestCase):
    pools = ('btrfs', 'dir')


@unittest.skipIf(NO_LXD, NO_LXD or '')
class DirToBtrfsTest(MigrateCases, MigrateTestCase):
    pools = ('dir', 'btrfs')
