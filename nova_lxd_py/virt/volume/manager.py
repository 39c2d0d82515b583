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

"""The connections of this host to Cinder volumes, whatever their type.

This is what the rest of the driver knows of storage networks. It finds the
plugin for each connection (stevedore namespace ``nova_lxd_py.volume``, entry
points named by Cinder's ``driver_volume_type``), sees that the device is the
right one, and turns what goes wrong into Nova's exceptions. The secrets of a
connection never leave it.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import re
import threading
from typing import Any

from nova import context as nova_context
from nova import exception
from nova.i18n import _
from nova import objects
from nova.virt import block_device
from oslo_concurrency import lockutils
from oslo_config import cfg
from oslo_log import log as logging
from oslo_utils import strutils

from nova_lxd_py import plugin_loader
from nova_lxd_py.virt.volume import base
from nova_lxd_py.virt.volume import device_identity
from nova_lxd_py.virt.volume import encryption

LOG = logging.getLogger(__name__)

NAMESPACE = 'nova_lxd_py.volume'

#: Under this key of a connection is the id that the volume had when it was
#: connected, where Cinder may have given it another one since.
LOCAL_ID = 'lxd_volume_id'

_UUID = re.compile(r'[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}')


class UnsupportedVolume(exception.VolumeDriverNotFound):
    msg_fmt = _('Volumes with connections of type %(driver_type)s cannot be '
                'given to containers on this host. Supported types: '
                '%(supported)s')


class VolumeManager:
    """Connects and disconnects volumes.

    :param options: the ``[lxd]`` option group.
    """

    def __init__(self, options: cfg.ConfigOpts.GroupAttr) -> None:
        self._plugins = plugin_loader.load(
            NAMESPACE, base.VolumePlugin,  # type: ignore[type-abstract]
            'volume', 'Volumes', [options])
        self._encryption = encryption.VolumeEncryption(options)
        self._lock = threading.Lock()
        self._connections: dict[str, str] = {}

    @property
    def supported_types(self) -> list[str]:
        """Name the connection types that there is a plugin for."""
        return sorted(self._plugins)

    def check(self, connection_info: dict[str, Any]) -> None:
        """See that a volume is one that this host can connect.

        :param connection_info: Cinder's description of the connection.
        :raises nova.exception.VolumeDriverNotFound: it is of a type that
            there is no plugin for.
        """
        self._plugin(connection_info)

    def connect(self, instance: objects.Instance,
                connection_info: dict[str, Any], size_gb: int | None, *,
                context: nova_context.RequestContext | None = None,
                encrypted: dict[str, Any] | None = None,
                shared: bool = False) -> str:
        """Connect the host to a volume; again is no change.

        A failure leaves nothing connected.

        :param instance: the server that is to have it.
        :param connection_info: Cinder's description of the connection, which
            gets the device's path.
        :param size_gb: GiB that the volume has, if that is known.
        :param context: for asking Cinder and the key manager; without, an
            encrypted volume is refused.
        :param encrypted: how it is encrypted; Cinder is asked if Nova does
            not say.
        :param shared: whether another server uses the same connection, which
            stays in any case.
        :returns: path of the block device on the host, by a name that lasts
            if there is one.
        :raises nova.exception.VolumeAttachFailed: it cannot be connected.
        :raises nova.exception.VolumeDriverNotFound: see :meth:`check`.
        """
        self.check(connection_info)
        plugin = self._plugin(connection_info)
        identifier = volume_id(connection_info)
        with explained('connect', instance, identifier,
                       exception.VolumeAttachFailed):
            encrypted = self._encryption.metadata(
                context, connection_info, encrypted)
        with contextlib.ExitStack() as undo:
            if not shared:
                undo.callback(self.disconnect, instance, connection_info,
                              force=True)
            with explained('connect', instance, identifier,
                           exception.VolumeAttachFailed):
                path = device_identity.stable_path(
                    plugin.connect(identifier, connection_info))
                device_identity.check(path, connection_info, size_gb)
                if encrypted:
                    path = self._encryption.open(
                        context, connection_info, identifier, path, encrypted)
            undo.pop_all()
        if device_identity.is_fleeting(path):
            LOG.warning('Volume %(volume)s is at %(path)s, for which the host '
                        'knows no lasting name in /dev/disk/by-id; is udev '
                        'missing?', {'volume': identifier, 'path': path},
                        instance=instance)
        connection_info[base.DEVICE_PATH] = path
        self.note(identifier, path)
        return path

    def note(self, identifier: str, path: str) -> None:
        """Take down that the host is connected to a volume, perhaps by a
        process before this one.

        :param identifier: Cinder's id of the volume.
        :param path: of its block device.
        """
        with self._lock:
            self._connections[identifier] = path

    def connections(self) -> dict[str, str]:
        """List what the host is connected to, and may be where it could not
        be disconnected.

        :returns: paths of block devices by volume.
        """
        with self._lock:
            return dict(self._connections)

    def _forget(self, identifier: str) -> None:
        with self._lock:
            self._connections.pop(identifier, None)

    def disconnect(self, instance: objects.Instance,
                   connection_info: dict[str, Any], *,
                   force: bool = False) -> None:
        """Disconnect the host from a volume; again is a success.

        :param instance: the server that had it.
        :param connection_info: Cinder's description of the connection.
        :param force: the server is being deleted: nothing is raised.
        :raises nova.exception.VolumeDetachFailed: something of it is left.
        """
        identifier = volume_id(connection_info)
        try:
            plugin = self._plugin(connection_info)
            with explained('disconnect', instance, identifier,
                           exception.VolumeDetachFailed):
                self._close(plugin, connection_info, identifier, force)
            self._forget(identifier)
        except exception.NovaException:
            if not force:
                raise
            LOG.error('Something of the connection to volume %s may be left '
                      'on this host', identifier, instance=instance)
        connection_info.pop(base.DEVICE_PATH, None)

    def _close(self, plugin: base.VolumePlugin,
               connection_info: dict[str, Any], identifier: str, force: bool
               ) -> None:
        try:
            self._encryption.close(connection_info, identifier)
        except Exception:
            if force:
                # That is no reason to leave the connection as well.
                plugin.disconnect(identifier, connection_info, force=True)
            raise
        plugin.disconnect(identifier, connection_info, force=force)

    def extend(self, instance: objects.Instance,
               connection_info: dict[str, Any], wanted: int,
               context: nova_context.RequestContext | None = None) -> None:
        """Have the host see the new size of a volume.

        :param instance: the server that has it.
        :param connection_info: Cinder's description of the connection.
        :param wanted: bytes that the volume has by now.
        :param context: for asking Cinder and the key manager.
        :raises nova.exception.VolumeExtendFailed: the host does not see it.
        """
        identifier = volume_id(connection_info)
        path = (encryption.device_below(connection_info) or
                base.device_path(connection_info) or '')
        plugin = self._plugin(connection_info)
        with explained('extend', instance, identifier,
                       exception.VolumeExtendFailed):
            plugin.extend(identifier, connection_info)
            found = device_identity.size(path)
            if found < wanted:
                raise base.Refused(f'the host sees {found} bytes of it, not '
                                   f'{wanted}')
            self._encryption.extend(context, connection_info, identifier)

    def forget(self, instance: objects.Instance, identifier: str) -> None:
        """Remove what can be found of a volume without its connection.

        :param instance: the server that had it and is gone.
        :param identifier: Cinder's id of the volume.
        """
        with (contextlib.suppress(exception.VolumeDetachFailed),
              explained('close', instance, identifier,
                        exception.VolumeDetachFailed)):
            self._encryption.forget(identifier)
        for plugin in self._plugins.values():
            with (contextlib.suppress(exception.VolumeDetachFailed),
                  explained('forget', instance, identifier,
                            exception.VolumeDetachFailed)):
                plugin.forget(identifier)

    def _plugin(self, connection_info: dict[str, Any]) -> base.VolumePlugin:
        kind = connection_info.get('driver_volume_type') or 'unknown'
        if kind not in self._plugins:
            raise UnsupportedVolume(driver_type=kind, supported=', '.join(
                self.supported_types) or 'none')
        return self._plugins[kind]


def volume_id(connection_info: dict[str, Any]) -> str:
    """Read which volume a connection leads to.

    :param connection_info: as Nova hands it over.
    :returns: Cinder's id of the volume.
    :raises nova.exception.InvalidVolume: it does not say.
    """
    identifier = (connection_info.get(LOCAL_ID) or
                  block_device.get_volume_id(connection_info))
    if not identifier or not _UUID.fullmatch(identifier):
        raise exception.InvalidVolume(
            reason='the connection does not say which volume it leads to')
    return identifier


@contextlib.contextmanager
def explained(what: str, instance: objects.Instance, identifier: str,
              kind: type[exception.NovaException]) -> Iterator[None]:
    """Make of whatever goes wrong with a volume what its owner may read.

    :param what: what is being done, for the log.
    :param instance: the server.
    :param identifier: Cinder's id of the volume.
    :param kind: the exception to raise, which takes ``volume_id`` and
        ``reason``.
    """
    try:
        yield
    except exception.NovaException:
        raise
    except Exception as error:
        _log(what, instance, identifier, error)
        # The cause may hold the secrets of the connection.
        raise kind(volume_id=identifier, reason=_told(error)) from None


@contextlib.contextmanager
def growing(instance: objects.Instance, identifier: str) -> Iterator[None]:
    """Go on without the growth of a volume's filesystem where that fails: all
    is there, on a filesystem of the old size.

    :param instance: the server.
    :param identifier: Cinder's id of the volume.
    """
    try:
        yield
    except Exception as error:
        LOG.warning('Could not grow the filesystem of volume %(volume)s: '
                    '%(error)s', {'volume': identifier, 'error': error},
                    instance=instance)


def lock(identifier: str) -> contextlib.AbstractContextManager[Any]:
    """Keep servers from connecting and disconnecting one volume at a time.

    :param identifier: Cinder's id of the volume.
    :returns: a context manager that holds the volume's lock.
    """
    return lockutils.lock(f'lxd-volume-{identifier}', lock_file_prefix=None)


def _log(what: str, instance: objects.Instance, identifier: str,
         error: Exception) -> None:
    LOG.error('Could not %(what)s volume %(volume)s: %(kind)s: %(error)s',
              {'what': what, 'volume': identifier,
               'kind': type(error).__name__,
               'error': strutils.mask_password(str(error))},
              instance=instance)


def _told(error: Exception) -> str:
    """Say of an error what the owner of a server may know."""
    if isinstance(error, base.Refused):
        return str(error)
    if isinstance(error, device_identity.WrongDevice):
        return ('the device that turned up on the host is not this volume; '
                'the log of nova-compute has the details')
    return (f'the host could not do it ({type(error).__name__}); the log of '
            f'nova-compute has the details')
