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

"""Identification of the content of volumes."""

from __future__ import annotations

import os
import re
import tempfile
from unittest import mock

from oslotest import base

from nova_lxd_py.virt import privileged
from nova_lxd_py.virt.privileged import probe
from nova_lxd_py.virt.privileged import validation
from tests.fixtures import fake_kernel

VOLUME = '9a0b6f0e-5d2c-4f4e-8a57-6a1c1b1f0e11'


class ContentsTestCase(base.BaseTestCase):

    def setUp(self) -> None:
        super().setUp()
        privileged.context.set_client_mode(False)
        self.addCleanup(privileged.context.set_client_mode, True)
        self.useFixture(fake_kernel.InProcess())

    def test_only_opened_volumes_are_blanked(self) -> None:
        for path in ('/dev/mapper/root', f'/dev/{VOLUME}',
                     f'/dev/mapper/crypt-{VOLUME}/../root',
                     f'/dev/mapper/crypt-{VOLUME}x'):
            with mock.patch.object(probe, '_content',
                                   lambda path: 'unknown'):
                self.assertRaises(ValueError, probe.make_blank, path, '')

    def test_formatted_by_a_killed_nova_compute(self) -> None:
        header, size = 2 << 20, 8 << 20
        with (tempfile.NamedTemporaryFile() as opened,
              tempfile.NamedTemporaryFile() as below,
              mock.patch.object(validation, 'checked_device',
                                lambda path: path),
              mock.patch.object(probe, '_OPENED',
                                re.compile(re.escape(opened.name)))):
            below.truncate(size)
            os.pwrite(below.fileno(), b'LUKS\xba\xbe\0\1', 0)
            noise = os.urandom(size - header)
            os.pwrite(opened.fileno(), noise, 0)

            def is_left(name: str) -> bool:
                probe.make_blank(opened.name, name)
                return os.pread(opened.fileno(), size, 0) == noise

            for written in (header, header + (1 << 20) - 1):
                os.pwrite(below.fileno(), b'x', written)
                self.assertTrue(is_left(below.name))
                os.pwrite(below.fileno(), b'\0', written)
            # Of one that fills the device there is no header.
            self.assertTrue(is_left(opened.name))
            self.assertFalse(is_left(below.name))
            self.assertEqual(bytes(1 << 20) + noise[1 << 20:],
                             os.pread(opened.fileno(), size, 0))
            # Formatted just now: what was there before is of no interest.
            os.pwrite(opened.fileno(), noise, 0)
            os.pwrite(below.fileno(), b'x', header)
            self.assertFalse(is_left(''))

    def test_only_blank_is_empty(self) -> None:
        with (tempfile.NamedTemporaryFile() as file,
              mock.patch.object(validation, 'checked_device',
                                lambda path: path)):
            file.truncate(4 << 20)
            self.assertEqual('', probe.content(file.name))
            for offset in (0, (1 << 20) - 1):
                os.pwrite(file.fileno(), b'x', offset)
                self.assertEqual('unknown', probe.content(file.name))
                os.pwrite(file.fileno(), b'\0', offset)
            os.pwrite(file.fileno(), b'x', 2 << 20)
            self.assertEqual('', probe.content(file.name))
            os.pwrite(file.fileno(), b'LUKS\xba\xbe\0\1', 0)
            self.assertEqual('crypto_LUKS', probe.content(file.name))
