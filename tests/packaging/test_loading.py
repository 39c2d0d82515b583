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

"""``compute_driver = lxd.LXDDriver`` after every usual way of installing.

Nothing here is simulated: environments are made, Nova and this package are
installed into them, and Nova loads the driver.
"""

from __future__ import annotations

import os
import pathlib
import tarfile
import zipfile

import pytest

from tests.fixtures import environment
from tests.fixtures import scratch_root

NOVA = os.environ.get('NOVA_LXD_TEST_NOVA', 'nova==34.0.0')
CONSTRAINTS = environment.SOURCE / 'constraints.txt'
OURS_AT_START = {'nova_lxd_py', 'nova_lxd_py.loader'}
DRIVER = 'nova_lxd_py.virt.driver.LXDDriver'

#: Loads the validators of extra specs as nova-api does, and prints what has
#: been imported of this package and of the client of LXD.
LOAD_VALIDATORS = """
import sys
from nova.api.validation.extra_specs import validators
assert 'lxd:isolated' in validators.VALIDATORS
print(*(name for name in sys.modules
        if name.startswith(('nova_lxd_py', 'pylxd'))))
"""


@pytest.fixture(scope='module')
def source(tmp_path_factory) -> pathlib.Path:
    """Copy the source tree."""
    return environment.copy_source(tmp_path_factory.mktemp('source') / 'src')


@pytest.fixture(scope='module')
def wheel(tmp_path_factory, source) -> pathlib.Path:
    """Build the wheel from the source tree with pip."""
    builder = environment.virtualenv(tmp_path_factory.mktemp('builder') / 'v')
    target = tmp_path_factory.mktemp('wheel')
    builder.pip('wheel', '--no-deps', '--wheel-dir', target, source)
    wheels = list(target.glob('*.whl'))
    assert len(wheels) == 1, wheels
    return wheels[0]


def constraints() -> list[object]:
    """Return options of pip that pin the dependencies of dependencies."""
    return ['--constraint', CONSTRAINTS] if CONSTRAINTS.exists() else []


def test_wheel_adds_one_file_beside_the_package(wheel):
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
        record = next(content.read(name).decode() for name in names
                      if name.endswith('.dist-info/RECORD'))
    top = {name.partition('/')[0] for name in names}
    assert {name for name in top
            if not name.endswith(('.dist-info', '.data'))} == {
        'nova_lxd_py', 'nova_lxd_py.pth'}
    # A file that RECORD lacks stays behind when the package is uninstalled.
    recorded = {line.split(',')[0] for line in record.splitlines()}
    assert recorded == {name for name in names if not name.endswith('/')}


def test_wheel_builds_without_git_history(tmp_path, source):
    """As in an unpacked source archive, where pbr finds no version."""
    archive = environment.copy_source(tmp_path / 'archive')
    environment.run('rm', '-rf', archive / '.git')
    python = environment.virtualenv(tmp_path / 'venv')
    python.pip('wheel', '--no-deps', '--wheel-dir', tmp_path, archive)
    assert len(list(tmp_path.glob('nova_lxd_py-*.whl'))) == 1


@pytest.fixture(scope='module')
def nova_venv(tmp_path_factory):
    """Make a virtual environment as operators have it: Nova from PyPI."""
    path = tmp_path_factory.mktemp('nova') / 'venv'
    python = environment.virtualenv(path)
    environment.install_others(python, path, NOVA, *constraints())
    return python


def test_wheel_in_the_virtualenv_of_nova(nova_venv, wheel):
    """As Kolla and OpenStack-Ansible install."""
    nova_before = nova_venv.version('nova')
    before = nova_venv.loaded_at_start()

    nova_venv.pip('install', wheel, *constraints())

    assert nova_venv.version('nova') == nova_before
    # Modules loaded at start slow down each interpreter of the environment.
    assert nova_venv.loaded_at_start() - before == OURS_AT_START
    driver, nova = nova_venv.load_driver()
    assert driver == DRIVER
    assert 'site-packages' in nova

    nova_venv.pip('uninstall', '--yes', 'nova-lxd-py')
    assert nova_venv.loaded_at_start() == before
    gone = nova_venv('-c', 'import nova.virt.lxd', check=False)
    assert "No module named 'nova.virt.lxd'" in gone.stderr


def test_wheel_beside_nova_api(nova_venv, wheel):
    """As the installation guide has it for API hosts."""
    nova_venv.pip('install', '--no-deps', wheel)
    try:
        loaded = nova_venv('-c', LOAD_VALIDATORS).stdout.split()
    finally:
        nova_venv.pip('uninstall', '--yes', 'nova-lxd-py')
    assert set(loaded) - OURS_AT_START == {
        'nova_lxd_py.extra_specs', 'nova_lxd_py.extra_spec_validators'}


def test_wheel_in_the_virtualenv_of_the_oldest_nova(tmp_path, wheel):
    """With libraries of that time, some of which pip has to upgrade."""
    path = tmp_path / 'venv'
    python = environment.virtualenv(path)
    environment.install_others(
        python, path, 'nova==31.3.1', 'cryptography==43.0.3',
        'pyOpenSSL==24.2.1', 'cursive==0.2.3')

    python.pip('install', wheel)

    assert python.version('nova') == '31.3.1'
    assert python.load_driver()[0] == DRIVER


@pytest.fixture
def bare_venv(tmp_path, wheel):
    """Make an environment with this package and nothing else."""
    python = environment.virtualenv(tmp_path / 'venv')
    python.pip('install', '--no-deps', wheel)
    return python, next((tmp_path / 'venv').glob('lib/python*/site-packages'))


def test_too_old_nova_is_named(bare_venv):
    """pip does not upgrade Nova; the driver checks its version."""
    python, packages = bare_venv
    nova = packages / 'nova'
    (nova / 'virt').mkdir(parents=True)
    (nova / '__init__.py').touch()
    (nova / 'virt' / '__init__.py').touch()
    (nova / 'version.py').write_text(
        'class version_info:\n'
        '    version_string = staticmethod(lambda: "29.2.0")\n')
    failed = python('-c', 'import nova.virt.lxd', check=False)
    assert ('nova-lxd-py needs Nova 31 (2025.1) or later, this is Nova 29.2.0'
            in failed.stderr)


def test_half_removed_package_does_not_disturb_python(bare_venv):
    python, packages = bare_venv
    environment.run('rm', '-rf', packages / 'nova_lxd_py')
    assert not python.loaded_at_start() & OURS_AT_START


def test_editable_beside_an_editable_nova(tmp_path, source):
    """As DevStack installs: two checkouts, with ``pip install -e``."""
    path = tmp_path / 'venv'
    python = environment.virtualenv(path)
    python.pip('download', '--no-deps', '--no-binary', 'nova', '--dest',
               tmp_path, NOVA)
    archive = next(tmp_path.glob('nova-*.tar.gz'))
    with tarfile.open(archive) as content:
        content.extractall(tmp_path, filter='data')
    checkout = tmp_path / archive.name.removesuffix('.tar.gz')
    environment.install_others(
        python, path, '--editable', checkout, *constraints())
    before = python.loaded_at_start()

    python.pip('install', '--editable', source, *constraints())

    at_start = python.loaded_at_start()
    assert OURS_AT_START <= at_start
    assert not {name for name in at_start if name.startswith('nova.')}
    driver, nova = python.load_driver()
    assert driver == DRIVER
    assert nova.startswith(str(checkout))

    python.pip('uninstall', '--yes', 'nova-lxd-py')
    assert python.loaded_at_start() == before


@pytest.fixture(scope='module')
def debian():
    """Return a Debian with its nova-compute package."""
    if os.geteuid() != 0:
        pytest.skip('debootstrap needs root')
    return scratch_root.debian_with_nova()


def test_pip_beside_the_nova_of_the_distribution(debian, wheel):
    """As in the installation guide for Debian and Ubuntu."""
    python = debian.python('/usr/bin/python3')
    before = python.loaded_at_start()
    packages_before = set(python.pip('list', '--format', 'freeze').split())
    debian.put(wheel, '/root')

    python.pip('install', '--break-system-packages', '--no-deps',
               'pylxd>=2.4', f'/root/{wheel.name}')
    try:
        assert python.loaded_at_start() - before == OURS_AT_START
        driver, nova = python.load_driver()
        assert driver == DRIVER
        assert nova.startswith('/usr/lib/python3/dist-packages/')
        # No dependency of the distribution's Nova was replaced.
        added = set(python.pip('list', '--format', 'freeze').split())
        added -= packages_before
        assert {line.partition('=')[0] for line in added} == {
            'nova-lxd-py', 'pylxd'}
    finally:
        python.pip('uninstall', '--break-system-packages', '--yes',
                   'pylxd', 'nova-lxd-py')
    assert python.loaded_at_start() == before


def test_virtualenv_that_sees_the_nova_of_the_distribution(debian, wheel):
    system = debian.python('/usr/bin/python3')
    system('-m', 'venv', '--clear', '--system-site-packages', '/opt/lxd')
    python = debian.python('/opt/lxd/bin/python')
    debian.put(wheel, '/root')
    python.pip('install', f'/root/{wheel.name}')

    driver, nova = python.load_driver()

    assert driver == DRIVER
    assert nova.startswith('/usr/lib/python3/dist-packages/')
    assert not system.loaded_at_start() & OURS_AT_START
