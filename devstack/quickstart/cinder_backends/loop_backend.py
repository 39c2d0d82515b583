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

"""A Cinder back end for one machine whose kernel has no storage network.

A volume is a sparse file with a loop device, which os-brick's ``local``
connector uses as it is: a block device that only this host can attach. For
test clouds only.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
from typing import Any

from cinder import exception
from cinder import interface
from cinder.volume import driver
from cinder.volume import volume_utils
from oslo_concurrency import processutils
from oslo_config import cfg
from oslo_utils import units

OPTIONS = [
    cfg.StrOpt('loop_directory',
               help='Directory in which the files of the volumes are kept.'),
]


def _execute(*command: str) -> str:
    out, _err = processutils.execute(*command)
    return out.strip()


@interface.volumedriver
class LoopDriver(driver.VolumeDriver):
    """Volumes that are files with loop devices."""

    VERSION = '1.0'

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.configuration.append_config_values(OPTIONS)

    @staticmethod
    def get_driver_options() -> list[cfg.Opt]:
        return OPTIONS

    @property
    def _directory(self) -> pathlib.Path:
        return pathlib.Path(self.configuration.loop_directory)

    def _file(self, thing: Any) -> pathlib.Path:
        """Return the file of a volume or snapshot."""
        return self._directory / thing.name

    def _link(self, volume: Any) -> pathlib.Path:
        """Return a path of a volume's device that does not change."""
        return self._directory / f'{volume.name}.device'

    def check_for_setup_error(self) -> None:
        if not self.configuration.loop_directory:
            raise exception.VolumeBackendAPIException(
                data='loop_directory is not set')
        self._directory.mkdir(parents=True, exist_ok=True)

    def _update_volume_stats(self) -> None:
        space = shutil.disk_usage(self._directory)
        self._stats = {
            'volume_backend_name':
                self.configuration.safe_get('volume_backend_name') or 'loop',
            'vendor_name': 'nova-lxd', 'driver_version': self.VERSION,
            'storage_protocol': 'local', 'multiattach': True,
            'online_extend_support': True, 'QoS_support': False,
            'total_capacity_gb': space.total / units.Gi,
            'free_capacity_gb': space.free / units.Gi,
            'reserved_percentage': 0, 'thin_provisioning_support': True,
            'max_over_subscription_ratio': '20.0',
            'provisioned_capacity_gb': self._provisioned(),
        }

    def _provisioned(self) -> float:
        return sum(path.stat().st_size for path in self._directory.iterdir()
                   if path.is_file() and not path.is_symlink()) / units.Gi

    # -- volumes and snapshots ----------------------------------------------

    def _size(self, path: pathlib.Path, gigabytes: int) -> None:
        with open(path, 'ab') as stream:
            stream.truncate(gigabytes * units.Gi)

    def _copy(self, source: pathlib.Path, target: pathlib.Path) -> None:
        _execute('cp', '--reflink=auto', '--sparse=always', str(source),
                 str(target))

    def create_volume(self, volume: Any) -> None:
        self._size(self._file(volume), volume.size)

    def delete_volume(self, volume: Any) -> None:
        self.remove_export(None, volume)
        self._file(volume).unlink(missing_ok=True)

    def create_snapshot(self, snapshot: Any) -> None:
        _execute('sync', '--file-system', str(self._directory))
        self._copy(self._file(snapshot.volume), self._file(snapshot))

    def delete_snapshot(self, snapshot: Any) -> None:
        self._file(snapshot).unlink(missing_ok=True)

    def create_volume_from_snapshot(self, volume: Any, snapshot: Any) -> None:
        self._copy(self._file(snapshot), self._file(volume))
        self._size(self._file(volume), volume.size)

    def create_cloned_volume(self, volume: Any, src_vref: Any) -> None:
        self._copy(self._file(src_vref), self._file(volume))
        self._size(self._file(volume), volume.size)

    def extend_volume(self, volume: Any, new_size: int) -> None:
        self._size(self._file(volume), new_size)
        if self._link(volume).exists():
            _execute('losetup', '--set-capacity', str(self._link(volume)))

    def local_path(self, volume: Any) -> str:
        return str(self._file(volume))

    def copy_image_to_volume(self, context: Any, volume: Any,
                             image_service: Any, image_id: str,
                             disable_sparse: bool = False) -> None:
        # The images of containers are archives, "raw" to Glance: nothing is
        # to be converted.
        with open(self._file(volume), 'r+b') as stream:
            image_service.download(context, image_id, stream)
        self._size(self._file(volume), volume.size)

    def copy_volume_to_image(self, context: Any, volume: Any,
                             image_service: Any, image_meta: Any) -> None:
        volume_utils.upload_volume(context, image_service, image_meta,
                                   self.local_path(volume), volume)

    # -- connections --------------------------------------------------------

    def _attached_device(self, volume: Any) -> str | None:
        out = _execute('losetup', '--noheadings', '--output', 'NAME',
                       '--associated', str(self._file(volume)))
        return out.splitlines()[0].strip() if out else None

    def ensure_export(self, context: Any, volume: Any) -> None:
        if volume.volume_attachment:
            self.create_export(context, volume, {})

    def create_export(self, context: Any, volume: Any, connector: Any
                      ) -> None:
        device = self._attached_device(volume) or _execute(
            'losetup', '--find', '--show', str(self._file(volume)))
        link = self._link(volume)
        new = link.with_suffix('.new')
        new.unlink(missing_ok=True)
        os.symlink(device, new)
        new.replace(link)

    def remove_export(self, context: Any, volume: Any) -> None:
        device = self._attached_device(volume)
        if device:
            _execute('losetup', '--detach', device)
        with contextlib.suppress(FileNotFoundError):
            self._link(volume).unlink()

    def initialize_connection(self, volume: Any, connector: Any
                              ) -> dict[str, Any]:
        return {'driver_volume_type': 'local',
                'data': {'device_path': str(self._link(volume))}}

    def terminate_connection(self, volume: Any, connector: Any,
                             **kwargs: Any) -> bool:
        """Keep the device; remove_export() removes it.

        :returns: whether another server still has the volume.
        """
        return len([attachment for attachment in volume.volume_attachment
                    if attachment.connector]) > 1
