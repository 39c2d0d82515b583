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

"""A Debian in a directory, with Nova from Debian's own packages."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess

from tests.packaging import environment

#: The first Debian whose Nova is one that this driver supports (31).
SUITE = 'trixie'

#: Nova, what installs this driver, and those of its dependencies which the
#: distribution has and Nova does not bring along.
PACKAGES = ('nova-compute', 'python3-pip', 'python3-venv',
            'python3-requests-toolbelt', 'python3-websocket', 'python3-ws4py',
            'python3-zstandard')

# Services of the packages must not start in the directory.
_POLICY = '#!/bin/sh\nexit 101\n'

# Namespaces of its own let the mounts and the name of the "machine" go with
# the command. /proc is needed by package scripts and by Nova.
_ENTER = """
set -e
hostname scratch
mount -t proc proc "$1/proc"
mount --bind /dev "$1/dev"
root=$1
shift
exec chroot "$root" "$@"
"""


class ScratchRoot:
    """A directory that holds a distribution.

    :param path: the directory.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def command(self, *words: object) -> list[object]:
        """Words that run a command inside."""
        return ['unshare', '--mount', '--pid', '--uts', '--fork',
                '--kill-child', 'sh', '-c', _ENTER, 'sh', self.path, *words]

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        """Run a command inside."""
        return environment.run(
            *self.command(*words),
            env={'DEBIAN_FRONTEND': 'noninteractive', 'LC_ALL': 'C.UTF-8',
                 'HOME': '/root',
                 'PATH': '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:'
                         '/sbin:/bin'})

    def python(self, path: str) -> environment.Python:
        """An interpreter inside.

        :param path: its path inside.
        """
        return environment.Python(self.command(path))

    def put(self, file: pathlib.Path, directory: str) -> None:
        """Copy a file into the directory.

        :param file: the file.
        :param directory: where to, as a path inside.
        """
        shutil.copy(file, self.path / directory.lstrip('/'))

    def adopt_network(self) -> None:
        """Give the inside this host's name resolution and trusted CAs."""
        shutil.copy('/etc/resolv.conf', self.path / 'etc/resolv.conf')
        bundle = pathlib.Path('/etc/ssl/certs/ca-certificates.crt')
        if bundle.exists():
            shutil.copy(bundle, self.path / str(bundle).lstrip('/'))


def debian_mirror() -> str:
    """Find the Debian mirror that this host's apt uses.

    :returns: its URL.
    :raises RuntimeError: this host's apt uses none.
    """
    sources = [pathlib.Path('/etc/apt/sources.list')]
    sources += sorted(pathlib.Path('/etc/apt/sources.list.d').glob('*'))
    for source in sources:
        if not source.is_file():
            continue
        found = re.search(r'^(?:URIs:|deb\b.*?)\s*(https?://\S+/debian)/?\s',
                          source.read_text(), re.MULTILINE)
        if found:
            return found[1]
    raise RuntimeError('apt on this host is not set up for Debian')


def debian_with_nova() -> ScratchRoot:
    """Make the directory, or take the one of an earlier run.

    It takes two minutes and 1.5 GB, so it is kept below ``.venv`` like the
    other test environments.

    :returns: a Debian with :data:`PACKAGES`.
    """
    path = environment.SOURCE / '.venv' / f'{SUITE}-nova'
    root = ScratchRoot(path)
    if path.exists():
        root.adopt_network()
        return root
    making = path.with_name(f'{path.name}.{os.getpid()}')
    try:
        environment.run('debootstrap', '--variant=minbase',
                        '--include=ca-certificates', SUITE, making,
                        debian_mirror())
        root.path = making
        root.adopt_network()
        (making / 'etc/hosts').write_text('127.0.0.1 localhost scratch\n')
        policy = making / 'usr/sbin/policy-rc.d'
        policy.write_text(_POLICY)
        policy.chmod(0o755)
        root.run('apt-get', 'install', '--yes', '--no-install-recommends',
                 *PACKAGES)
        root.run('apt-get', 'clean')
        making.rename(path)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    root.path = path
    return root
