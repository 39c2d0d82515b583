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

"""Real environments to install the package into."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

SOURCE = pathlib.Path(__file__).resolve().parents[2]

# What is not source: caches, environments and results of builds.
_NOT_SOURCE = shutil.ignore_patterns(
    '.tox', '.venv', '.stestr', '.*_cache', '__pycache__', '*.egg-info',
    'build', 'dist', 'AUTHORS', 'ChangeLog')

#: Prints, as an interpreter that just started, every module it has loaded.
LOADED = 'import sys; print(*sorted(sys.modules), sep="\\n")'

#: Loads the driver the way nova-compute does: its console script imports
#: nova.cmd.compute, which settles the threading mode, before anything else.
LOAD_DRIVER = """
import sys
early = {name.partition('.')[0] for name in sys.modules}
assert not early & {'nova', 'eventlet', 'oslo_config', 'pylxd'}, early
from nova.cmd import compute
from nova import conf
from nova import objects
from nova.virt import driver
conf.CONF([], project='nova', default_config_files=[])
objects.register_all()
lxd = driver.load_compute_driver(None, 'lxd.LXDDriver')
import nova
print(type(lxd).__name__, type(lxd).__module__, nova.__file__, sep='\\n')
"""


def run(*command: object, cwd: object = '/', env: dict[str, str] | None = None,
        check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command and show what it said if it fails.

    :param command: program and arguments.
    :param cwd: working directory; / by default, since Python finds modules
        in the current one, which would hide a broken installation.
    :param env: variables to set on top of the present ones.
    :param check: raise when the command fails.
    :returns: the finished process with its output.
    :raises AssertionError: the command failed.
    """
    done = subprocess.run(
        [str(word) for word in command], cwd=str(cwd), text=True,
        stdin=subprocess.DEVNULL, capture_output=True,
        env={**_environment(), **(env or {})}, check=False)
    if check and done.returncode:
        raise AssertionError('%s\nfailed with %s:\n%s\n%s' % (
            ' '.join(str(word) for word in command), done.returncode,
            done.stdout[-4000:], done.stderr[-8000:]))
    return done


def _environment() -> dict[str, str]:
    """The present environment without what points at another Python."""
    return {key: value for key, value in os.environ.items()
            if key not in ('PYTHONPATH', 'PYTHONHOME', 'VIRTUAL_ENV',
                           'OS_NOVA_DISABLE_EVENTLET_PATCHING')}


def copy_source(target: pathlib.Path) -> pathlib.Path:
    """Copy the tree, so that builds leave nothing in the real one.

    :param target: directory to create.
    :returns: the same directory.
    """
    shutil.copytree(SOURCE, target, ignore=_NOT_SOURCE, symlinks=True)
    return target


class Python:
    """An interpreter with its own site-packages.

    :param command: how to run the interpreter, as a list of words.
    """

    def __init__(self, command: list[object]) -> None:
        self._command = command

    def __call__(self, *arguments: object,
                 check: bool = True) -> subprocess.CompletedProcess[str]:
        return run(*self._command, *arguments, check=check)

    def pip(self, *arguments: object) -> str:
        """Run this interpreter's pip.

        :returns: its standard output.
        """
        return self('-m', 'pip', '--disable-pip-version-check',
                    *arguments).stdout

    def loaded_at_start(self) -> set[str]:
        """Names of the modules that an interpreter has loaded at its start.

        :raises AssertionError: the interpreter printed a complaint.
        """
        done = self('-c', LOADED)
        assert not done.stderr, done.stderr
        return set(done.stdout.split())

    def load_driver(self) -> tuple[str, str]:
        """Let Nova load ``lxd.LXDDriver``.

        :returns: the driver's class as Nova got it, and where Nova is.
        """
        lines = self('-c', LOAD_DRIVER).stdout.split()
        return f'{lines[-2]}.{lines[-3]}', lines[-1]

    def version(self, distribution: str) -> str:
        """Version of an installed distribution."""
        return self('-c', 'import sys; from importlib import metadata; '
                    'print(metadata.version(sys.argv[1]))',
                    distribution).stdout.strip()


def virtualenv(path: pathlib.Path) -> Python:
    """Make a virtual environment.

    :param path: directory to create.
    :returns: its interpreter.
    """
    run(sys.executable, '-m', 'venv', path)
    return Python([path / 'bin' / 'python'])


def install_others(python: Python, path: pathlib.Path,
                   *arguments: object) -> None:
    """Install what is not under test, with uv where there is one.

    uv takes seconds where pip takes a minute.

    :param python: the environment's interpreter.
    :param path: the environment's directory.
    :param arguments: arguments of ``pip install``.
    """
    uv = shutil.which('uv')
    if uv is None:
        python.pip('install', *arguments)
    else:
        run(uv, 'pip', 'install', '--python', path / 'bin' / 'python',
            *arguments)
