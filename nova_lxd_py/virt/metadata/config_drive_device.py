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

"""Config drives as read-only block devices with the label ``config-2``.

For guests that do not search ``/config-drive``: ``blkid -L config-2`` finds
the device. Only privileged containers can mount it; others can read it with
isoinfo, mtools or bsdtar.

The device is a read-only loop device whose backing file has the content of the
config drive. The file is unlinked once the loop device holds it, so that the
kernel frees it with the device. The device lives as long as the instance has
its config drive, and is recreated after a reboot of the host. The kernel keeps
the path of the backing file, which is in a directory of the driver: scripts
that purge Nova from a host find the devices by it. In the guest the device has
the same name as on the host, because blkid reads ``/proc/partitions``, which
shows the host's devices.
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

from nova_lxd_py import extra_specs
from nova_lxd_py.virt.guest import flavor as lxd_flavor
from nova_lxd_py.virt.privileged import loop

LOG = logging.getLogger(__name__)
CONF = nova_conf.CONF

#: Image property; Nova copies it to the instance's system metadata.
_PROPERTY = 'lxd_config_drive_device'

#: Directory of the backing files, below Nova's state_path.
DIRECTORY = 'config-drives'

#: LXD devices of the drive and their paths in the guest; None means the path
#: of the device on the host.
_PATHS = {'config-drive-disk': None,
          'config-drive-label': '/dev/disk/by-label/config-2'}


def is_wanted(instance: objects.Instance, options: cfg.ConfigOpts.GroupAttr
              ) -> bool:
    """Return whether a config drive is to be a block device as well.

    The flavor's extra spec overrides the image's property, and that overrides
    ``[lxd] config_drive_device``.

    :param instance: the instance, which has a config drive.
    :param options: the ``[lxd]`` option group.
    :raises nova.exception.InvalidInput: if the extra spec or the property is
        not a boolean.
    """
    flavor = lxd_flavor.flag(instance.flavor,
                             extra_specs.CONFIG_DRIVE_DEVICE)
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


def missing_requirement(is_local: bool) -> str | None:
    """Return what this host lacks for creating the devices.

    :param is_local: whether LXD runs on this host.
    :returns: a sentence for the operator, or None if nothing is missing.
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
            return (f'the host has no {program}, which creates config drives '
                    f'of the format {CONF.config_drive_format}; install '
                    f'{package}, or set [DEFAULT] mkisofs_cmd or '
                    f'config_drive_format')
    return None


def check(is_local: bool) -> None:
    """Check that this host can create the devices.

    :param is_local: whether LXD runs on this host.
    :raises nova.exception.ComputeResourcesUnavailable: if it cannot, so that
        Nova reschedules the build.
    """
    reason = missing_requirement(is_local)
    if reason:
        raise exception.ComputeResourcesUnavailable(reason=reason)


def find(name: str) -> str | None:
    """Find the loop device of a config drive.

    Another nova-compute on this machine may have one for the same instance,
    while it migrates.

    :param name: name of the config drive's volume, and of the backing file.
    :returns: path of the device, or None if there is none.
    """
    for backing in pathlib.Path('/sys/block').glob('*/loop/backing_file'):
        # The device may be detached meanwhile.
        with contextlib.suppress(OSError):
            file = backing.read_text(errors='replace').strip()
            if (os.path.basename(file.removesuffix(' (deleted)')) == name and
                    loop.is_own(file, _directory())):
                return f'/dev/{backing.parts[3]}'
    return None


def create(instance: objects.Instance, name: str,
           files: Iterable[tuple[str, str | bytes]]) -> str:
    """Create the device of a config drive.

    :param instance: the instance, which has no such device yet.
    :param name: name of the config drive's volume.
    :param files: pairs of relative path and content.
    :returns: path of the device.
    :raises nova.exception.ComputeResourcesUnavailable: if the host cannot
        create it; nothing is left behind.
    """
    path = _path(name)
    try:
        fileutils.ensure_tree(os.path.dirname(path), 0o700)
        try:
            _write_image(path, list(files))
            device = loop.attach(path, instance.uuid, True, _directory())
        finally:
            fileutils.delete_if_exists(path)
    except (processutils.ProcessExecutionError, OSError) as exc:
        LOG.error('Could not create the block device of the config drive: %s',
                  exc, instance=instance)
        raise exception.ComputeResourcesUnavailable(
            reason='the host could not create the block device of the config '
                   'drive; the log of nova-compute has the details') from exc
    LOG.debug('Created block device %s of the config drive', device,
              instance=instance)
    return device


def _directory() -> str:
    return os.path.join(CONF.state_path, DIRECTORY)


def _path(name: str) -> str:
    return os.path.join(_directory(), name)


def _write_image(path: str, files: Iterable[tuple[str, str | bytes]]) -> None:
    """Write an ISO 9660 or VFAT image, as [DEFAULT] config_drive_format says.
    """
    if CONF.config_drive_format != 'vfat':
        builder = nova_configdrive.ConfigDriveBuilder()
        builder.mdfiles.extend(files)
        builder.make_drive(path)
        return
    # Nova's builder would mount the image, which needs root and the kernel's
    # vfat module.
    with open(path, 'wb') as image:
        image.truncate(nova_configdrive.CONFIGDRIVESIZE_BYTES)
    processutils.execute('mkfs.vfat', '-n', 'config-2', path)
    with utils.tempdir() as directory:
        for name, content in files:
            file = pathlib.Path(directory, name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content.encode() if isinstance(content, str)
                             else content)
        processutils.execute(
            'mcopy', '-Q', '-s', '-i', path,
            *(str(entry) for entry in pathlib.Path(directory).iterdir()), '::')


def remove(instance: objects.Instance, name: str) -> None:
    """Remove the device of a config drive. Idempotent.

    :param instance: the instance, whose guest does not run.
    :param name: name of the config drive's volume.
    """
    # Most instances have none: do not call the privsep daemon for them.
    if find(name) is not None:
        loop.detach(instance.uuid, True, _directory())
    # The file exists only if nova-compute was killed in create().
    fileutils.delete_if_exists(_path(name))


def devices(path: str) -> dict[str, dict[str, str]]:
    """Return the LXD devices for the block device of a config drive.

    :param path: path of the device on the host.
    :returns: LXD devices by name.
    """
    return {name: {'type': 'unix-block', 'source': path,
                   'path': in_guest or path, 'mode': '0400'}
            for name, in_guest in _PATHS.items()}
