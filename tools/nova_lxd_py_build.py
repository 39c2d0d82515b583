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

"""Build backend: pbr's, plus one ``.pth`` file in every wheel.

Nova imports its driver as ``nova.virt.lxd`` and looks nowhere but in its own
package. ``nova_lxd_py.loader`` teaches the interpreter that name, and a
``.pth`` file at the top of site-packages is what makes an interpreter load it
at start-up, wherever Nova itself lives. Setuptools has no way to put a file
there that holds for regular and editable installs alike, so the file is added
to the finished wheel here: both kinds of install go through one (PEP 517 and
PEP 660), and since the file is listed in the wheel's RECORD, uninstalling
removes it.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import subprocess
import zipfile

from pbr import build as pbr_build

PTH_NAME = 'nova_lxd_py.pth'

# One line, since site.py runs line by line. It stays silent when the package
# is gone or broken: an interpreter must not complain at every start because
# of a driver that it may not even need.
PTH_CONTENT = (
    "import sys; exec('try:\\n    import nova_lxd_py.loader\\n"
    "except Exception:\\n    pass')\n")


def _ensure_version() -> None:
    """Give pbr a version where it cannot find one.

    pbr takes the version from git or from an sdist's PKG-INFO and fails
    without either, as in an unpacked source archive, on a machine without
    git, or in a clone that belongs to another user.
    """
    if 'PBR_VERSION' in os.environ or os.path.exists('PKG-INFO'):
        return
    try:
        subprocess.run(['git', 'rev-parse', '--verify', 'HEAD'], check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        os.environ['PBR_VERSION'] = '0.0.1.dev0'


def _record_line(name: str, content: bytes) -> str:
    """Build the RECORD entry of a file in a wheel.

    :param name: path inside the wheel.
    :param content: the file's content.
    :returns: one CSV line.
    """
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest())
    line = io.StringIO()
    csv.writer(line, lineterminator='\n').writerow(
        [name, 'sha256=' + digest.rstrip(b'=').decode(), len(content)])
    return line.getvalue()


def add_pth(wheel: str) -> None:
    """Add the ``.pth`` file to a wheel.

    A zip archive cannot be changed in place where an entry (RECORD) grows,
    so the wheel is rewritten.

    :param wheel: path of the wheel.
    """
    content = PTH_CONTENT.encode()
    rewritten = wheel + '.new'
    with zipfile.ZipFile(wheel) as source, \
            zipfile.ZipFile(rewritten, 'w', zipfile.ZIP_DEFLATED) as target:
        record = None
        for entry in source.infolist():
            if entry.filename.endswith('.dist-info/RECORD'):
                record = entry
                continue
            target.writestr(entry, source.read(entry))
        if record is None:
            raise RuntimeError('%s holds no RECORD' % wheel)
        target.writestr(_like(PTH_NAME, record), content)
        target.writestr(
            record,
            source.read(record) + _record_line(PTH_NAME, content).encode())
    os.replace(rewritten, wheel)


def _like(name: str, entry: zipfile.ZipInfo) -> zipfile.ZipInfo:
    """Copy date and permissions of an entry, for reproducible wheels.

    :param name: the new entry's path.
    :param entry: the entry to follow.
    :returns: the new entry.
    """
    info = zipfile.ZipInfo(name, entry.date_time)
    info.external_attr = entry.external_attr
    info.compress_type = zipfile.ZIP_DEFLATED
    return info


# -- the hooks of PEP 517 and PEP 660 ----------------------------------------

def get_requires_for_build_sdist(config_settings=None):
    _ensure_version()
    return pbr_build.get_requires_for_build_sdist(config_settings)


def get_requires_for_build_wheel(config_settings=None):
    _ensure_version()
    return pbr_build.get_requires_for_build_wheel(config_settings)


def get_requires_for_build_editable(config_settings=None):
    _ensure_version()
    return pbr_build.get_requires_for_build_editable(config_settings)


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    _ensure_version()
    return pbr_build.prepare_metadata_for_build_wheel(
        metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory,
                                        config_settings=None):
    _ensure_version()
    return pbr_build.prepare_metadata_for_build_editable(
        metadata_directory, config_settings)


def build_sdist(sdist_directory, config_settings=None):
    _ensure_version()
    return pbr_build.build_sdist(sdist_directory, config_settings)


def build_wheel(wheel_directory, config_settings=None,
                metadata_directory=None):
    _ensure_version()
    name = pbr_build.build_wheel(
        wheel_directory, config_settings, metadata_directory)
    add_pth(os.path.join(wheel_directory, name))
    return name


def build_editable(wheel_directory, config_settings=None,
                   metadata_directory=None):
    _ensure_version()
    name = pbr_build.build_editable(
        wheel_directory, config_settings, metadata_directory)
    add_pth(os.path.join(wheel_directory, name))
    return name
