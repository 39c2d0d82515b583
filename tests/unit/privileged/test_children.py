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

"""Child processes for work that can block on tenants' data."""

import errno
import importlib
import json
import logging
import os
import pkgutil
import select
import signal
import subprocess
import sys
import threading
import time
from typing import Any
import unittest
from unittest import mock

import fixtures
from oslo_privsep import capabilities
from oslotest import base

from nova_lxd_py.virt import privileged
from nova_lxd_py.virt.privileged import children
from nova_lxd_py.virt.privileged import command
from nova_lxd_py.virt.privileged import fuser
from nova_lxd_py.virt.privileged import mounts

#: eventlet replaces parts of select and subprocess. The privileged daemon
#: never runs with it, only unit tests that call its functions in their own
#: process.
_without_eventlet = unittest.skipUnless(
    hasattr(select, 'poll'), 'the privileged daemon runs without eventlet')


class ChildTestCase(base.BaseTestCase):

    def test_result(self) -> None:
        self.assertEqual(
            [b'\0', {'x': 1}], children.run(60, lambda: [b'\0', {'x': 1}]))
        large = children.run(60, lambda: bytes(4 << 20))
        self.assertEqual(4 << 20, len(large))

    def test_decorator(self) -> None:
        @children.killable(60)
        def example(one: int, *, other: int) -> tuple[int, int]:
            return one + other, os.getpid()

        total, process = example(1, other=2)
        self.assertEqual(3, total)
        self.assertNotEqual(os.getpid(), process)
        self.assertEqual('example', example.__name__)

    def test_errors(self) -> None:
        def refuse() -> None:
            raise FileNotFoundError(errno.ENOENT, 'no such thing', '/x')

        error = self.assertRaises(FileNotFoundError, children.run, 60, refuse)
        self.assertEqual((errno.ENOENT, 'no such thing', '/x'),
                         (error.errno, error.strerror, error.filename))

    def test_ends_without_result(self) -> None:
        self.assertRaises(
            ChildProcessError, children.run, 5,
            lambda: os.kill(os.getpid(), signal.SIGKILL))

    @_without_eventlet
    def test_deadline(self) -> None:
        """A child that hangs does not hold the thread that waits for it."""
        read, write = os.pipe()
        self.addCleanup(os.close, read)

        def hang() -> None:
            # What it has started ends as well.
            other = subprocess.Popen(['sleep', '600'])
            os.write(write, str(other.pid).encode())
            signal.pause()

        begin = time.monotonic()
        self.assertRaises(TimeoutError, children.run, 0.5, hang, (write,))
        self.assertLess(time.monotonic() - begin, 60)
        os.close(write)
        started = int(os.read(read, 16))
        for _attempt in range(1000):
            if not os.path.exists(f'/proc/{started}') or (
                    ') Z ' in open(f'/proc/{started}/stat').read()):
                break
            time.sleep(0.02)
        else:
            self.fail(f'{started} is still running')

    def test_cannot_be_killed(self) -> None:
        """A child in an uninterruptible system call is left behind."""
        self.useFixture(fixtures.MockPatchObject(children, '_EXIT_TIME', 0.2))
        with mock.patch.object(os, 'killpg'), mock.patch.object(os, 'kill'):
            self.assertRaises(TimeoutError, children.run, 0.1, signal.pause)
        (left,) = children._left
        os.kill(left, signal.SIGKILL)
        for _attempt in range(1000):
            children.run(60, int)
            if not children._left:
                break
            time.sleep(0.02)
        self.assertEqual(set(), children._left)
        self.assertFalse(os.path.exists(f'/proc/{left}'))

    def test_descriptors(self) -> None:
        read, write = os.pipe()
        self.addCleanup(os.close, read)
        self.addCleanup(os.close, write)
        found = children.run(60, lambda: os.listdir('/proc/self/fd'), (read,))
        self.assertIn(str(read), found)
        self.assertNotIn(str(write), found)

    def test_log(self) -> None:
        """Messages are logged by the parent; locks of handlers are its own."""
        logger = self.useFixture(fixtures.FakeLogger())
        handler = logging.getLogger().handlers[-1]
        held = threading.Event()
        done = threading.Event()

        def hold() -> None:
            with handler.lock:
                held.set()
                done.wait(10)

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        threading.Timer(0.5, done.set).start()
        children.run(60, lambda: logging.getLogger('x').warning('a %s', 'b'))
        thread.join()
        self.assertIn('a b', logger.output)


class CommandTestCase(base.BaseTestCase):

    @_without_eventlet
    def test_deadline(self) -> None:
        self.useFixture(fixtures.MockPatchObject(command, 'DEADLINE', 0.3))
        begin = time.monotonic()
        self.assertRaises(TimeoutError, command.run, 'sleep', '600')
        self.assertLess(time.monotonic() - begin, 60)

    def test_privileges(self) -> None:
        """Programs do not gain capabilities by being executed as root."""
        self.assertIn('NoNewPrivs:\t1', command.run(
            sys.executable, '-c', 'print(open("/proc/self/status").read())'))
        with open('/proc/self/status') as stream:
            self.assertIn('NoNewPrivs:\t0', stream.read())


class EntryPointsTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        privileged.context.set_client_mode(False)
        self.addCleanup(privileged.context.set_client_mode, True)

    def test_mount_that_sleeps(self) -> None:
        """mount(2) does not hold a thread of the daemon."""
        target = ('/tmp/no-such-directory/'
                  '9a0b6f0e-5d2c-4f4e-8a57-6a1c1b1f0e11')
        for name, value in (('checked_device', lambda path: path),
                            ('checked_target', lambda path: path)):
            self.useFixture(fixtures.MockPatchObject(
                mounts.validation, name, value))
        for name, value in (('make_directory', lambda path: None),
                            ('attach_plain', lambda *args: signal.pause())):
            self.useFixture(fixtures.MockPatchObject(mounts, name, value))
        self.useFixture(fixtures.MockPatchObject(command, 'DEADLINE', 0.3))
        begin = time.monotonic()
        self.assertRaises(TimeoutError, mounts.mount, '/dev/x', 'ext4',
                          target, False, False, 0, 0, 0)
        self.assertLess(time.monotonic() - begin, 60)


class FuserTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        privileged.context.set_client_mode(False)
        self.addCleanup(privileged.context.set_client_mode, True)
        self.file = open(__file__)
        self.addCleanup(self.file.close)
        self.filesystem = os.fstat(self.file.fileno()).st_dev

    def test_finds_user(self) -> None:
        self.assertIn(os.getpid(), fuser.find_users(
            os.getpid(), 0, self.filesystem))

    def test_too_many_files(self) -> None:
        """The scan is bounded, however many files a guest has open."""
        self.useFixture(fixtures.MockPatchObject(fuser, '_MOST_LINKS', 3))
        error = self.assertRaises(OSError, fuser.find_users, os.getpid(),
                                  0, 1 << 30)
        self.assertEqual(errno.E2BIG, error.errno)

    def test_devices(self) -> None:
        about = os.stat('/dev/null')
        self.assertEqual((about.st_dev, about.st_rdev),
                         fuser._devices('/dev/null'))
        self.assertRaises(FileNotFoundError, fuser._devices, '/no-such-file')


class ContextsTestCase(base.BaseTestCase):
    """Storage and network have daemons of their own."""

    def daemon(self, context: str) -> list[Any]:
        """Import a context as its daemon does, and return its options."""
        return json.loads(subprocess.run(
            [sys.executable, '-c',
             'import json\n'
             'from nova_lxd_py.virt import privileged\n'
             f'conf = privileged.{context}.conf\n'
             'print(json.dumps([conf.capabilities, conf.thread_pool_size]))'],
            check=True, capture_output=True).stdout)

    def test_capabilities_and_threads(self) -> None:
        self.assertEqual([[capabilities.CAP_NET_ADMIN], 16],
                         self.daemon('network_context'))
        storage, threads = self.daemon('context')
        self.assertNotIn(capabilities.CAP_NET_ADMIN, storage)
        self.assertIn(capabilities.CAP_SYS_ADMIN, storage)
        self.assertEqual(32, threads)

    def test_capabilities_that_root_lacks(self) -> None:
        """A daemon that lacks one of its capabilities does not start."""
        bounding = 1 << capabilities.CAP_MKNOD
        with mock.patch('builtins.open', mock.mock_open(
                read_data=f'Name:\tx\nCapBnd:\t{bounding:016x}\n')):
            self.assertEqual([capabilities.CAP_MKNOD], privileged._available(
                capabilities.CAP_MKNOD, capabilities.CAP_SYS_RESOURCE))

    def test_entry_points(self) -> None:
        for module in pkgutil.iter_modules(privileged.__path__):
            loaded = importlib.import_module(
                f'{privileged.__name__}.{module.name}')
            for name, member in vars(loaded).items():
                for context in (privileged.context,
                                privileged.network_context):
                    self.assertEqual(
                        context.is_entrypoint(member) and
                        context is privileged.network_context,
                        context.is_entrypoint(member) and
                        module.name == 'network', f'{module.name}.{name}')
