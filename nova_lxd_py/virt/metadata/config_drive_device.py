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

"""Config drives as disks: read-only block devices labelled ``config-2``.

For guests that do not look into a folder: ``blkid -L config-2`` finds one, and
whoever may not mount it, which in containers are all but privileged ones, can
read it with isoinfo, mtools or bsdtar.

The device is a read-only loop device on a file made of what is in the folder.
The file is deleted as soon as the loop device holds it, so the kernel frees it
with the device, which lives as long as the server has its config drive; after
a reboot of the host it is made again. What the kernel still says of the file
is where it was: in a folder of the driver's own, by which whoever removes Nova
with all it has knows the devices. In the guest it must have the name that it
has on the host, since blkid goes through ``/proc/partitions``, which is the
host's.
"""

from __future__ import annotations

from collections.abc import Iterable
import contextlib
import os
import pathlib
import shutil

from nova import conf as nova_conf
from nova import exception
from nova import objects
from nova import utils
from nova.virt import configdrive as nova_configdrive
from oslo_concurrency import processutils
from oslo_config import cfg
from oslo_log import log as logging
from oslo_utils import fileutils
from oslo_utils import strutils

from nova_lxd_py.virt.guest import flavor as lxd_flavor
from nova_lxd_py.virt.privileged import loop

LOG = logging.getLogger(__name__)
CONF = nova_conf.CONF

#: Property of images, as Nova keeps it with the servers made from them.
_PROPERTY = 'lxd_config_drive_device'

#: Folder below Nova's state_path where the files are made.
FOLDER = 'config-drives'

#: LXD devices of the drive and where they are in the guest; None for the name
#: that the device has on the host.
_PATHS = {'config-drive-disk': None,
          'config-drive-label': '/dev/disk/by-label/config-2'}


def is_wanted(instance: objects.Instance, options: cfg.ConfigOpts.GroupAttr
              ) -> bool:
    """Decide whether a server's config drive is a block device as well.

    What its flavor says counts before what its image says, then comes the
    host.

    :param instance: the server, which has a config drive.
    :param options: the ``[lxd]`` option group.
    :raises nova.exception.InvalidInput: the flavor or the image says neither
        yes nor no.
    """
    flavor = lxd_flavor.flag(instance.flavor,
                             lxd_flavor.SPEC_CONFIG_DRIVE_DEVICE)
    if flavor is not None:
        return flavor
    value = instance.system_metadata.get(f'image_{_PROPERTY}')
    if value is None:
        return options.config_drive_device
    try:
        return strutils.bool_from_string(value, strict=True)
    except ValueError as exc:
        raise exception.InvalidInput(reason=(
            f'property {_PROPERTY} of the image is "{value}"; set it to true '
            f'or false')) from exc


def lacking(is_local: bool) -> str | None:
    """Tell what the host lacks for making the devices.

    :param is_local: whether LXD is this host's.
    :returns: a sentence for the operator, None if it lacks nothing.
    """
    if not is_local:
        return ('config drives can be block devices only where LXD is '
                'reached through its unix socket')
    if CONF.config_drive_format == 'vfat':
        programs = {'mkfs.vfat': 'dosfstools', 'mcopy': 'mtools'}
    else:
        programs = {CONF.mkisofs_cmd: 'genisoimage'}
    for program, package in programs.items():
        if not shutil.which(program):
            return (f'the host has no {program}, which makes config drives of '
                    f'the format {CONF.config_drive_format}; install '
                    f'{package}, or set [DEFAULT] mkisofs_cmd or '
                    f'config_drive_format')
    return None


def check(is_local: bool) -> None:
    """See that this host can make the devices.

    :param is_local: whether LXD is this host's.
    :raises nova.exception.ComputeResourcesUnavailable: it cannot; Nova tries
        another one.
    """
    reason = lacking(is_local)
    if reason:
        raise exception.ComputeResourcesUnavailable(reason=reason)


def find(name: str) -> str | None:
    """Look for the device of a config drive.

    :param name: of the drive, which is that of the device's file.
    :returns: path of the device.
    """
    for backing in pathlib.Path('/sys/block').glob('*/loop/backing_file'):
        # A device may go in between.
        with contextlib.suppress(OSError):
            file = backing.read_text(errors='replace').strip()
            if os.path.basename(file.removesuffix(' (deleted)')) == name:
                return f'/dev/{backing.parts[3]}'
    return None


def make(instance: objects.Instance, name: str,
         files: Iterable[tuple[str, str | bytes]]) -> str:
    """Make the device of a config drive.

    :param instance: the server; it has none.
    :param name: of the drive.
    :param files: pairs of relative path and content.
    :returns: path of the device.
    :raises nova.exception.ComputeResourcesUnavailable: the host cannot make
        it; nothing is left of it.
    """
    path = _path(name)
    try:
        fileutils.ensure_tree(os.path.dirname(path), 0o700)
        try:
            _make_file(path, list(files))
            device = loop.attach(path, instance.uuid, True)
        finally:
            fileutils.delete_if_exists(path)
    except (processutils.ProcessExecutionError, OSError) as exc:
        LOG.error('Could not make the block device of the config drive: %s',
                  exc, instance=instance)
        raise exception.ComputeResourcesUnavailable(
            reason='the host could not make the block device of the config '
                   'drive; its log tells the operator why') from exc
    LOG.debug('The config drive is %s as well', device, instance=instance)
    return device


def _path(name: str) -> str:
    return os.path.join(CONF.state_path, FOLDER, name)


def _make_file(path: str, files: Iterable[tuple[str, str | bytes]]) -> None:
    """Write the content of a device into a file."""
    if CONF.config_drive_format != 'vfat':
        builder = nova_configdrive.ConfigDriveBuilder()
        builder.mdfiles.extend(files)
        builder.make_drive(path)
        return
    # Nova would mount it, which takes root and a kernel that has vfat.
    with open(path, 'wb') as disk:
        disk.truncate(nova_configdrive.CONFIGDRIVESIZE_BYTES)
    processutils.execute('mkfs.vfat', '-n', 'config-2', path)
    with utils.tempdir() as folder:
        for name, content in files:
            file = pathlib.Path(folder, name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content.encode() if isinstance(content, str)
                             else content)
        processutils.execute(
            'mcopy', '-Q', '-s', '-i', path,
            *(str(entry) for entry in pathlib.Path(folder).iterdir()), '::')


def remove(instance: objects.Instance, name: str) -> None:
    """Take the device of a config drive away; none is a success.

    :param instance: the server, whose guest does not run.
    :param name: of the drive.
    """
    # This saves nearly all servers a question to the privileged daemon.
    if find(name) is not None:
        loop.detach(instance.uuid, True)
    # It is there only if nova-compute died while it made the device.
    fileutils.delete_if_exists(_path(name))


def devices(path: str) -> dict[str, dict[str, str]]:
    """Describe the device of a config drive to LXD.

    :param path: of the device on the host.
    :returns: LXD devices by name.
    """
    return {name: {'type': 'unix-block', 'source': path,
                   'path': in_guest or path, 'mode': '0400'}
            for name, in_guest in _PATHS.items()}
