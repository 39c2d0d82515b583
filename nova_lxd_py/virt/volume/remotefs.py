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

"""Volumes that are files on a share such as NFS, used through loop devices."""

from __future__ import annotations

from collections.abc import Mapping
import contextlib
import os
from typing import Any

from nova import utils
from os_brick.remotefs import remotefs
from oslo_concurrency import lockutils
from oslo_log import log as logging

from nova_lxd_py.virt.privileged import loop
from nova_lxd_py.virt.volume import base

LOG = logging.getLogger(__name__)

#: os-brick's clients, which mount the shares, by Cinder's connection type.
_CLIENTS = {'nfs': remotefs.RemoteFsClient,
            'quobyte': remotefs.RemoteFsClient,
            'vzstorage': remotefs.VZStorageRemoteFSClient}


class FilePlugin(base.VolumePlugin):
    """Has os-brick mount the share, and puts a loop device on the file.

    The share stays mounted as long as a volume on it is connected.
    """

    def connect(self, volume_id: str, connection_info: dict[str, Any]) -> str:
        """See :meth:`.base.VolumePlugin.connect`."""
        data = connection_info['data']
        # A guest can write whatever it likes at the beginning of a raw
        # volume, so the format is never guessed from the content.
        if data.get('format', 'raw') != 'raw':
            raise base.Refused(
                f'its file has the format {data["format"]}, and containers '
                f'can use raw files only (a snapshot of an attached volume '
                f'makes others)')
        client = self._client(connection_info)
        with _share_lock(data):
            client.mount(data['export'], (data.get('options') or '').split())
            share = client.get_mount_point(data['export'])
            try:
                return loop.attach(f'{share}/{data["name"]}', volume_id,
                                   data.get('access_mode') == 'ro',
                                   self._directory)
            except Exception:
                with contextlib.suppress(OSError):
                    loop.release_share(share)
                raise

    def disconnect(self, volume_id: str, connection_info: dict[str, Any], *,
                   force: bool) -> None:
        """See :meth:`.base.VolumePlugin.disconnect`."""
        data = connection_info['data']
        with _share_lock(data):
            loop.detach(volume_id, force, self._directory)
            loop.release_share(self._client(connection_info).get_mount_point(
                data['export']))

    def extend(self, volume_id: str, connection_info: dict[str, Any]) -> None:
        """See :meth:`.base.VolumePlugin.extend`."""
        loop.update_size(volume_id, self._directory)

    def forget(self, volume_id: str) -> None:
        """See :meth:`.base.VolumePlugin.forget`."""
        share = loop.share_path(volume_id, self._directory)
        loop.detach(volume_id, True, self._directory)
        if share is not None:
            loop.release_share(share)

    def find_connected(self) -> Mapping[str, str]:
        """See :meth:`.base.VolumePlugin.find_connected`."""
        directory = os.path.realpath(self._directory)
        if not loop.is_used_below(directory):
            return {}
        return loop.volumes(directory)

    @property
    def _directory(self) -> str:
        return self.options.volume_share_directory

    def _client(self, connection_info: dict[str, Any]) -> Any:
        kind = connection_info['driver_volume_type']
        return _CLIENTS[kind](
            kind, utils.get_root_helper(), **{
                f'{kind}_mount_point_base':
                    self.options.volume_share_directory,
                f'{kind}_mount_options':
                    self.options.volume_nfs_options if kind == 'nfs'
                    else None})


def _share_lock(data: dict[str, Any]) -> contextlib.AbstractContextManager:
    """Keep a share mounted while a volume on it is being connected."""
    return lockutils.lock(f'lxd-share-{data["export"]}',
                          lock_file_prefix=None)
