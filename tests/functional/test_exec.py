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

"""Commands, passwords and files in guests of a real LXD."""

from __future__ import annotations

import pathlib
import time
from typing import Any
import unittest

from nova import exception

from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import exec as lxd_exec
from nova_lxd_py.virt.lxd import session
from tests.fixtures import busybox_image
from tests.fixtures import driver_case
from tests.fixtures import driver_host
from tests.fixtures import lxd_daemon

NO_LXD = lxd_daemon.missing()

CHPASSWD = b'#!/bin/sh\nexec cat >> /root/input\n'
PASSWORD = 'Gr\u00fcn: $(reboot) \'"\\ 7'


@unittest.skipIf(NO_LXD, NO_LXD or '')
class RunTest(driver_case.DriverCase, unittest.TestCase):

    def setUp(self) -> None:
        super().setUp()
        self.session = session.Session(driver_host.CONF.lxd)
        self.server = self.host.spawn()

    def run_in(self, *command: str, **kwargs: Any) -> lxd_exec.Result:
        return lxd_exec.run(self.session, self.server.name, command,
                            environment={'PATH': '/bin:/sbin'}, **kwargs)

    def test_outputs_and_code(self) -> None:
        for _time in range(5):
            result = self.run_in('sh', '-c',
                                 'cat; echo wrong >&2; exit 3', stdin=b'in')
            self.assertEqual(lxd_exec.Result(3, b'in', b'wrong\n'), result)

    def test_no_input(self) -> None:
        self.assertEqual(b'', self.run_in('cat').output)

    def test_much_of_everything(self) -> None:
        content = b'x' * 300000
        result = self.run_in('sh', '-c', 'cat; yes | head -c 500000 >&2',
                             stdin=content)
        self.assertEqual(0, result.code)
        self.assertEqual(lxd_exec.OUTPUT_LIMIT, len(result.output))
        self.assertEqual(lxd_exec.OUTPUT_LIMIT, len(result.errors))

    def test_input_that_nobody_reads(self) -> None:
        self.assertEqual(0, self.run_in('true', stdin=b'x' * 1000000).code)

    def test_missing_and_not_executable(self) -> None:
        self.assertEqual(lxd_exec.NOT_FOUND, self.run_in('nothing').code)
        self.assertEqual(lxd_exec.NOT_EXECUTABLE,
                         self.run_in('/etc/passwd').code)

    def test_deadline(self) -> None:
        with self.assertRaises(errors.DeadlineExceeded):
            # A busy LXD needs some of it to start the command.
            self.run_in('sleep', '1234', timeout=5)
        deadline = time.monotonic() + 60
        while 'sleep 1234' in self.host.run(self.server, 'ps'):
            self.assertLess(time.monotonic(), deadline,
                            'the command was not killed')
            time.sleep(0.1)

    def test_stopped(self) -> None:
        self.driver.power_off(self.server)
        with self.assertRaises(errors.InvalidRequest):
            self.run_in('true')


@unittest.skipIf(NO_LXD, NO_LXD or '')
class PasswordTest(driver_case.DriverCase, unittest.TestCase):
    """Passwords, with a chpasswd that records its input.

    Busybox of distributions lacks chpasswd.
    """

    def image(self, chpasswd: bytes = CHPASSWD) -> Any:
        return self.host.image(busybox_image.unified({
            'bin/chpasswd': chpasswd}))

    def passwords(self, server: Any) -> list[str]:
        return self.host.run(server, 'cat', '/root/input').splitlines()

    def test_at_create(self) -> None:
        server = self.host.spawn(image=self.image(), admin_password=PASSWORD)
        self.assert_secret(PASSWORD)
        self.assertEqual(['root:' + PASSWORD], self.passwords(server))

    def assert_secret(self, password: str) -> None:
        """Check that LXD has stored the password nowhere."""
        lxd = self.host.lxd
        for entry in self.host.lxd_instances().values():
            self.assertNotIn(password, str(entry))
        if lxd.directory is None:
            return
        for path in pathlib.Path(lxd.directory).glob(
                f'logs/{self.host.project}_*/*'):
            if path.is_file():
                self.assertNotIn(password.encode(), path.read_bytes())
        self.assertNotIn(password, lxd.log())

    def test_not_wanted_at_create(self) -> None:
        driver_host.CONF.set_override('inject_password', False, 'lxd')
        self.addCleanup(driver_host.CONF.clear_override, 'inject_password',
                        'lxd')
        server = self.host.spawn(image=self.image(), admin_password=PASSWORD)
        with self.assertRaises(AssertionError):
            self.passwords(server)

    def test_later(self) -> None:
        server = self.host.spawn(image=self.image())
        for password in ('first', PASSWORD):
            self.driver.set_admin_password(server, password)
        self.assert_secret(PASSWORD)
        self.assertEqual(['root:first', 'root:' + PASSWORD],
                         self.passwords(server))

    def test_other_user(self) -> None:
        image = self.image()
        server = self.host.instance(image, system_metadata={
            'image_os_admin_user': 'admin'})
        self.host.spawn(server, image)
        self.driver.set_admin_password(server, 'his')
        self.assertEqual(['admin:his'], self.passwords(server))

    def test_what_could_be_another_line(self) -> None:
        server = self.host.spawn(image=self.image())
        for password in ('a\ndaemon:b', 'a\rb', 'a\0b'):
            with self.assertRaises(exception.InstancePasswordSetFailed):
                self.driver.set_admin_password(server, password)
        server.system_metadata = {'image_os_admin_user': 'root:x\nadmin'}
        with self.assertRaises(exception.InstancePasswordSetFailed):
            self.driver.set_admin_password(server, 'x')
        with self.assertRaises(AssertionError):
            self.passwords(server)

    def test_image_without_it(self) -> None:
        server = self.host.spawn(admin_password=PASSWORD)
        with self.assertRaises(exception.SetAdminPasswdNotSupported):
            self.driver.set_admin_password(server, PASSWORD)

    def test_refused_by_the_guest(self) -> None:
        server = self.host.spawn(image=self.image(b'#!/bin/sh\nexit 1\n'),
                                 admin_password=PASSWORD)
        with self.assertRaises(exception.InstancePasswordSetFailed):
            self.driver.set_admin_password(server, PASSWORD)

    def test_stopped(self) -> None:
        server = self.host.spawn()
        self.driver.power_off(server)
        with self.assertRaises(exception.InstanceAgentNotEnabled):
            self.driver.set_admin_password(server, PASSWORD)


@unittest.skipIf(NO_LXD, NO_LXD or '')
class InjectedFilesTest(driver_case.DriverCase, unittest.TestCase):

    def test_written(self) -> None:
        server = self.host.spawn(injected_files=[
            ('/etc/motd', b'hello'), ('/new/dir/file', b'\x00\xff' * 999),
            ('//etc//./passwd', b'root:x:0:0::/root:/bin/sh\n'),
            ('opt/relative', b'to the root')])
        self.assertEqual('to the root',
                         self.host.run(server, 'cat', '/opt/relative'))
        self.assertEqual('hello', self.host.run(server, 'cat', '/etc/motd'))
        self.assertEqual('1998', self.host.run(
            server, 'stat', '-c', '%s', '/new/dir/file').strip())
        for path in ('/etc/motd', '/new', '/new/dir', '/new/dir/file'):
            self.assertEqual('0 0', self.host.run(
                server, 'stat', '-c', '%u %g', path).strip())

    def test_links_lead_nowhere(self) -> None:
        outside = pathlib.Path('/tmp/nova-lxd-outside')
        self.addCleanup(outside.unlink, missing_ok=True)
        image = self.host.image(busybox_image.unified(
            {'out': '../../../../../../../tmp', 'abs': '/tmp'}))
        server = self.host.spawn(image=image, injected_files=[
            ('/out/nova-lxd-outside', b'1'), ('/abs/absolute', b'2')])
        self.assertFalse(outside.exists())
        self.assertEqual('1', self.host.run(
            server, 'cat', '/tmp/nova-lxd-outside'))
        self.assertEqual('2', self.host.run(server, 'cat', '/tmp/absolute'))

    def test_refused_paths(self) -> None:
        for path in ('', '../motd', '/etc/../../motd', '/etc/', '/a\0b', '/',
                     '/etc/passwd/file', '/etc'):
            with self.assertRaises(exception.InvalidInput, msg=path):
                self.host.spawn(injected_files=[(path, b'x')])
        self.assertEqual([], self.driver.list_instances())
