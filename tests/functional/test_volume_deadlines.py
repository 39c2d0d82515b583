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

"""Volumes whose handling would take for ever: the driver limits it."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import uuid

from nova import exception
from oslo_privsep import priv_context

from nova_lxd_py.virt import privileged
from nova_lxd_py.virt.privileged import mounts
from nova_lxd_py.virt.privileged import network
from tests.fixtures import encrypted_volumes
from tests.fixtures import lab_volumes
from tests.fixtures import lxd_daemon
from tests.fixtures import volume_host

NO_LXD = lxd_daemon.missing()


@unittest.skipIf(NO_LXD, NO_LXD or '')
class KeyDerivationTest(encrypted_volumes.EncryptedCases,
                        unittest.TestCase):
    """LUKS headers that take hours and all memory to open."""

    kind = lab_volumes.FileVolume

    def refuse(self, header: bytes) -> None:
        volume = self.storage.volume()
        with open(volume.file, 'r+b') as stream:
            stream.write(header)
        self.assertRaisesRegex(
            exception.VolumeAttachFailed, 'costs too much',
            self.attach_encrypted, self.server, volume)
        self.assertFalse(self.opened(volume))
        self.assertEqual(set(), self.storage.left_on_host())

    def test_not_opened(self) -> None:
        self.install()
        self.server = self.host.spawn()
        self.metadata['provider'] = 'luks'
        first = bytearray(592)
        first[:8] = b'LUKS\xba\xbe\0\1'
        first[208:216] = struct.pack('>2I', 0x00ac71f3, 4_000_000_000)
        self.refuse(bytes(first))
        self.metadata['provider'] = 'luks2'
        second = bytearray(0x4000)
        second[:16] = b'LUKS\xba\xbe\0\2' + struct.pack('>Q', 0x4000)
        text = (b'{"keyslots":{"0":{"type":"luks2","kdf":{"type":"argon2id",'
                b'"time":4000000,"memory":4194304,"cpus":4}}}}')
        second[4096:4096 + len(text)] = text
        self.refuse(bytes(second))
        # In the copy of the header only.
        plain = bytearray(0x4000)
        plain[:16] = second[:16]
        copy = bytes(second).replace(b'LUKS', b'SKUL', 1)
        self.refuse(bytes(plain) + copy)
        self.assertNotIn('luksOpen', pathlib.Path(
            f'{self.program}.arguments').read_text())


@unittest.skipIf(NO_LXD, NO_LXD or '')
class ManyFilesTest(volume_host.VolumeHost, unittest.TestCase):
    """A detach whose look at the guest's processes would take for ever."""

    kind = lab_volumes.FileVolume
    PROCESSES, FILES = 26, 20_000
    SCRIPT = r'''
import os, resource, sys, time
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
for _process in range(int(sys.argv[1])):
    if os.fork() == 0:
        for _file in range(min(int(sys.argv[2]), most - 10)):
            os.dup(0)
        os.write(1, b'ready\n')
        time.sleep(1000)
time.sleep(1000)
'''

    def test_bounded(self) -> None:
        server = self.host.spawn()
        connection = self.attach(server, self.storage.volume())
        init = self.host.lxd.api.must(
            'GET', f'/1.0/instances/{server.name}/state',
            params={'project': self.host.project})['pid']
        # Programs of the host among the processes of the guest.
        started = subprocess.Popen(
            ['nsenter', '--target', str(init), '--pid', sys.executable, '-c',
             self.SCRIPT, str(self.PROCESSES), str(self.FILES)],
            stdout=subprocess.PIPE, stdin=subprocess.DEVNULL,
            start_new_session=True)
        try:
            assert started.stdout is not None
            for _process in range(self.PROCESSES):
                self.assertEqual(b'ready\n', started.stdout.readline())
            begin = time.monotonic()
            self.assertRaisesRegex(
                exception.DeviceDetachFailed, 'too many open files',
                self.detach, server, connection)
            self.assertLess(time.monotonic() - begin, 60)
        finally:
            os.killpg(started.pid, signal.SIGKILL)
            started.wait()
        deadline = time.monotonic() + 60
        while True:
            try:
                self.detach(server, connection)
                break
            except exception.DeviceDetachFailed:
                self.assertLess(time.monotonic(), deadline)
                time.sleep(0.5)


class DeafFilesystem:
    """A FUSE filesystem that reads each request and answers none.

    As from an NFS server that has gone, nothing that asks it can be killed. It
    ends, with an error for all who wait, when its process does: that is
    another one, which ends with this one.
    """

    SERVER = '''
import ctypes, os, struct, sys, threading
channel = os.open('/dev/fuse', os.O_RDWR | os.O_CLOEXEC)
if ctypes.CDLL(None).mount(
        b'deaf', os.fsencode(sys.argv[1]), b'fuse', 0,
        f'fd={channel},rootmode=40000,user_id=0,group_id=0'.encode()):
    sys.exit(1)
# Nothing is sent before the first request is answered.
unique, = struct.unpack_from('<Q', os.read(channel, 1 << 17), 8)
body = struct.pack('<4I2HI', 7, 19, 0, 0, 0, 0, 4096)
os.write(channel, struct.pack('<IiQ', 16 + len(body), 0, unique) + body)

def swallow():
    while True:
        os.read(channel, 1 << 17)

threading.Thread(target=swallow, daemon=True).start()
print('ready', flush=True)
sys.stdin.read()
os._exit(0)
'''

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._server = subprocess.Popen(
            [sys.executable, '-c', self.SERVER, directory],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._server.stdout is not None
        if self._server.stdout.readline() != b'ready\n':
            raise OSError('FUSE cannot be mounted')

    def end(self) -> None:
        self._server.kill()
        self._server.communicate()
        subprocess.run(['umount', '-l', self._directory], check=True)


@unittest.skipIf(os.geteuid(), 'mounting needs root')
class DeafStorageTest(unittest.TestCase):
    """Storage that does not answer holds up nothing else."""

    def setUp(self) -> None:
        super().setUp()
        directory = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, directory)
        helper = pathlib.Path(sys.executable).parent / 'privsep-helper'
        config = pathlib.Path(directory, 'privsep.conf')
        config.write_text('[DEFAULT]\n')
        for context in (privileged.context, privileged.network_context):
            lab_volumes.CONF.set_override(
                'helper_command', f'{helper} --config-file {config}',
                context.cfg_section)
            self.addCleanup(lab_volumes.CONF.clear_override, 'helper_command',
                            context.cfg_section)
            context.set_client_mode(True)
            self.addCleanup(context.stop)
            context.start(priv_context.Method.ROOTWRAP)
        self.target = os.path.join(directory, str(uuid.uuid4()))
        os.mkdir(self.target)
        self.deaf = DeafFilesystem(self.target)
        self.addCleanup(self.deaf.end)

    def test_ports_and_other_volumes(self) -> None:
        """More requests than the daemon has threads; all end in time."""
        ended: list[BaseException | None] = []

        def ask() -> None:
            try:
                mounts.sync(self.target, 6.0)
                ended.append(None)
            except OSError as exc:
                ended.append(exc)

        threads = [threading.Thread(target=ask) for _number in range(
            lab_volumes.CONF[privileged.context.cfg_section].thread_pool_size
            + 8)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        suffix = str(uuid.uuid4())[:11]
        network.create_veth(f'tap{suffix}', f'tin{suffix}',
                            'fa:16:3e:00:00:01', 1442, False)
        # It has not waited for one of them.
        self.assertFalse(ended)
        network.delete_device(f'tap{suffix}')
        for thread in threads:
            thread.join(60)
            self.assertFalse(thread.is_alive())
        self.assertEqual({TimeoutError}, {type(exc) for exc in ended})
        # The storage daemon has threads again for volumes that answer.
        mounts.sync(os.path.join('/tmp', str(uuid.uuid4())), 30.0)
