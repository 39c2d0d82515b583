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

"""Encrypted volumes, opened on the host: the guest never has the key.

os-brick's encryptors run ``cryptsetup`` and pass the passphrase through a
pipe. They need a link of their own to the volume's device, which they point to
the opened one. It is in a directory of the driver, so that nothing of the
storage is changed.
"""

from __future__ import annotations

import os
import pathlib
import shutil
from typing import Any

from castellan import key_manager
from nova import context as nova_context
from nova import utils
from nova.virt import block_device
from nova.volume import cinder
from os_brick import encryptors
from oslo_config import cfg
from oslo_log import log as logging

from nova_lxd_py.virt.privileged import probe
from nova_lxd_py.virt.volume import base

LOG = logging.getLogger(__name__)

#: Keys of a connection: the encryption provider of the volume, and the block
#: device below the opened one.
_PROVIDER = 'lxd_encryption'
_BELOW = 'lxd_encrypted_device'

#: Content of volumes that os-brick may open, or format if they are empty.
_CONTENT = {'luks': ('', 'crypto_LUKS'), 'luks2': ('', 'crypto_LUKS')}

MAPPER = '/dev/mapper'
#: Where the kernel lists its drivers, and directory of its modules.
MISC_DEVICES = '/proc/misc'
MODULES = '/lib/modules'
_PROGRAM_PATH = '/usr/sbin:/usr/bin:/sbin:/bin'


class VolumeEncryption:
    """Opens and closes encrypted volumes.

    :param options: the ``[lxd]`` option group.
    """

    def __init__(self, options: cfg.ConfigOpts.GroupAttr) -> None:
        self._options = options
        self._cinder = cinder.API()

    def metadata(self, context: nova_context.RequestContext,
                 connection_info: dict[str, Any],
                 given: dict[str, Any] | None) -> dict[str, Any]:
        """Return how a volume is encrypted, and validate that this host can
        open it.

        :param context: for requests to Cinder.
        :param connection_info: Cinder's description of the connection, which
            has not been made yet.
        :param given: Nova's encryption metadata, None if Nova passes none.
        :returns: arguments of os-brick's encryptors; empty if the host does
            not have to open the volume.
        :raises base.Refused: if the host cannot open it.
        """
        if not connection_info['data'].get('encrypted'):
            return {}
        if not given:
            # Cinder may have changed its ID since it was connected.
            given = encryptors.get_encryption_metadata(
                context, self._cinder,
                block_device.get_volume_id(connection_info), connection_info)
        if not given or not given.get('provider'):
            raise base.Refused('Cinder does not say how it is encrypted')
        if (given.get('control_location') or '').lower() != 'front-end':
            return {}
        lacking = missing()
        if lacking:
            raise base.Refused(f'it is encrypted, and the host cannot open '
                               f'it: {lacking}')
        return dict(given)

    def open(self, context: nova_context.RequestContext,
             connection_info: dict[str, Any], identifier: str, path: str,
             metadata: dict[str, Any]) -> str:
        """Open a volume to which the host is connected; no change if it is
        open.

        :param context: for requests to the key manager.
        :param connection_info: Cinder's description of the connection; what
            :meth:`close` needs is added to it.
        :param identifier: Cinder's ID of the volume.
        :param path: path of its block device.
        :param metadata: what :meth:`metadata` returned.
        :returns: path of the block device with the decrypted content.
        :raises Exception: if it cannot be opened; nothing is left open.
        """
        provider = encryptors.LEGACY_PROVIDER_CLASS_TO_FORMAT_MAP.get(
            metadata['provider'], metadata['provider'])
        connection_info[_PROVIDER] = provider
        connection_info[_BELOW] = path
        opened = self._mapping(identifier)
        if os.path.exists(opened):
            if _lies_on(opened, path):
                return opened
            # Left by an earlier connection.
            self._close(identifier, provider)
        found = probe.content(path)
        if found not in _CONTENT.get(provider, (found,)):
            raise base.Refused(f'it is to be encrypted, but holds {found}')
        self._point_link(identifier, path)
        try:
            self._encryptor(identifier, metadata).attach_volume(
                context, **metadata)
            if provider in _CONTENT:
                # If os-brick has just formatted it, or did when nova-compute
                # was killed: blank blocks are noise after decryption, which
                # would be taken for content.
                probe.make_blank(opened, path if found else '')
        except Exception:
            self._close(identifier, provider)
            raise
        return opened

    def close(self, connection_info: dict[str, Any], identifier: str) -> None:
        """Close a volume before the host is disconnected; success if it is
        not open.

        :param connection_info: Cinder's description of the connection; empty
            if only the ID of the volume is known.
        :param identifier: Cinder's ID of the volume.
        :raises Exception: if something uses it.
        """
        provider = connection_info.get(_PROVIDER)
        # If nova-compute has crashed there is a link without a record.
        if provider or os.path.lexists(self._link(identifier)):
            self._close(identifier, provider or encryptors.LUKS)

    def opened(self) -> list[str]:
        """List the volumes that may be open.

        :returns: Cinder's IDs of the volumes.
        """
        try:
            return os.listdir(self._options.volume_encryption_directory)
        except FileNotFoundError:
            return []

    def extend(self, context: nova_context.RequestContext,
               connection_info: dict[str, Any], identifier: str) -> None:
        """Grow an open volume to the new size of the device below it.

        :param context: for requests to Cinder and the key manager.
        :param connection_info: Cinder's description of the connection.
        :param identifier: Cinder's ID of the volume.
        :raises Exception: if that fails.
        """
        if not connection_info.get(_PROVIDER):
            return
        metadata = self.metadata(context, connection_info, None)
        self._point_link(identifier, self._mapping(identifier))
        self._encryptor(identifier, metadata).extend_volume(
            context, **metadata)

    def _close(self, identifier: str, provider: str) -> None:
        link = self._link(identifier)
        if not os.path.lexists(link):
            self._point_link(identifier, self._mapping(identifier))
        if missing():
            # Without these no volume can have been opened.
            os.unlink(link)
            return
        self._encryptor(identifier, {
            'control_location': 'front-end', 'provider': provider,
            }).detach_volume()
        os.unlink(link)

    def _encryptor(self, identifier: str, metadata: dict[str, Any]) -> Any:
        return encryptors.get_volume_encryptor(
            root_helper=utils.get_root_helper(),
            # The encryptor uses nothing else of the connection.
            connection_info={'driver_volume_type': 'local',
                             'serial': identifier, 'data': {
                                 'device_path': self._link(identifier)}},
            keymgr=key_manager.API(cfg.CONF), **metadata)

    def _link(self, identifier: str) -> str:
        return os.path.join(self._options.volume_encryption_directory,
                            identifier)

    @staticmethod
    def _mapping(identifier: str) -> str:
        # os-brick names it after the link.
        return f'{MAPPER}/crypt-{identifier}'

    def _point_link(self, identifier: str, path: str) -> None:
        link = pathlib.Path(self._link(identifier))
        link.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.realpath(path) if not path.startswith(MAPPER)
                        else path)


def device_below(connection_info: dict[str, Any]) -> str | None:
    """Return the block device on which an encrypted volume was opened.

    :param connection_info: as :meth:`VolumeEncryption.open` left it.
    """
    return connection_info.get(_BELOW)


def missing() -> str | None:
    """Describe what the host lacks to open encrypted volumes, if anything."""
    if shutil.which('cryptsetup', path=os.pathsep.join(
            (os.environ.get('PATH', ''), _PROGRAM_PATH))) is None:
        return 'cryptsetup is not installed'
    lines = _lines(MISC_DEVICES)
    if any(line.split()[1:] == ['device-mapper'] for line in lines):
        return None
    directory = os.path.join(MODULES, os.uname().release)
    for name in ('modules.builtin', 'modules.dep'):
        for line in _lines(os.path.join(directory, name)):
            if '/dm-mod.ko' in line.split(':')[0]:
                return None
    return 'its kernel has no device-mapper'


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding='utf-8') as stream:
            return stream.read().splitlines()
    except OSError:
        return []


def _lies_on(opened: str, path: str) -> bool:
    """Whether a mapping has been made on a device."""
    name = os.path.basename(os.path.realpath(opened))
    try:
        below = os.listdir(f'/sys/class/block/{name}/slaves')
    except OSError:
        return False
    return below == [os.path.basename(os.path.realpath(path))]
