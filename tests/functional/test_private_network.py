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

"""The namespaces of the tests of ports."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
import unittest

from tests.fixtures import private_network


@unittest.skipIf(os.geteuid(), 'namespaces need root')
class PrivateNetworkTest(unittest.TestCase):

    def test_mounts_of_other_tests_stay_free(self) -> None:
        """A filesystem is in use as long as a namespace has a copy."""
        path = os.path.realpath(tempfile.mkdtemp())
        self.addCleanup(os.rmdir, path)
        subprocess.run(['mount', '-t', 'tmpfs', 'tmpfs', path], check=True)
        self.addCleanup(subprocess.run, ['umount', path], check=True)
        self.assertIn(path, self.mounted())
        seen: list[set[str]] = []

        def look() -> None:
            with private_network.PrivateNetwork():
                seen.append(self.mounted())

        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        [inside] = seen
        self.assertNotIn(path, inside)
        self.assertLessEqual({'/', '/proc', '/sys'}, inside)
        self.assertIn(path, self.mounted())

    @staticmethod
    def mounted() -> set[str]:
        with open('/proc/thread-self/mountinfo', encoding='utf-8') as stream:
            return {line.split()[4] for line in stream}
