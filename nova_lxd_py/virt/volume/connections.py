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

Finds the plugin for each connection (stevedore namespace
``nova_lxd_py.volume``, entry points named by Cinder's ``driver_volume_type``),
verifies that the device is the right one, opens encrypted volumes, and
converts errors to Nova's exceptions, without the secrets of a connection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import functools
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
from nova_lxd_py.virt.privileged import mounts
from nova_lxd_py.virt.volume import base
from nova_lxd_py.virt.volume import device_identity
from nova_lxd_py.virt.volume import encryption

LOG = logging.getLogger(__name__)

NAMESPACE = 'nova_lxd_py.volume'

#: Key of a connection: the ID that the volume had when the host was connected.
#: Cinder may have given it another one since.
LOCAL_ID = 'lxd_volume_id'

#: IDs of volumes; they become names of files and LXD devices.
UUID = re.compile(r'[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}')


class UnsupportedVolume(exception.VolumeDriverNotFound):
    msg_fmt = _('Volumes with connections of type %(driver_type)s cannot be '
                'given to containers on this host. Supported types: '
                '%(supported)s')


@dataclasses.dataclass(frozen=True)
class Connection:
    """A connection of the host to a volume.

    :ivar path: path of the volume's block device.
    :ivar instance: the instance for which it was made; None if an earlier
        process made it.
    :ivar connection_info: Cinder's description of the connection; None if an
        earlier process made it.
    """

    path: str
    instance: objects.Instance | None = None
    connection_info: dict[str, Any] | None = None


class VolumeConnections:
    """Connects the host to volumes and disconnects it.

    :param options: the ``[lxd]`` option group.
    """

    def __init__(self, options: cfg.ConfigOpts.GroupAttr) -> None:
        self._plugins = plugin_loader.load(
            NAMESPACE, base.VolumePlugin,  # type: ignore[type-abstract]
            'volume', 'Volumes', [options])
        self._encryption = encryption.VolumeEncryption(options)
        self._lock = threading.Lock()
        self._known: dict[str, Connection] = {}

    def check_supported(self, connection_info: dict[str, Any]) -> None:
        """Check that there is a plugin for a connection.

        :param connection_info: Cinder's description of the connection.
        :raises nova.exception.VolumeDriverNotFound: if there is none.
        """
        self._plugin(connection_info)

    def is_untraceable(self, connection_info: dict[str, Any]) -> bool:
        """Return whether only the description of a connection tells to which
        volume a device of the host belongs.

        :param connection_info: Cinder's description of the connection.
        :raises nova.exception.VolumeDriverNotFound: if there is no plugin for
            its type.
        """
        # os-brick leaves nothing on the host for local devices.
        return (connection_info.get('driver_volume_type') != 'local' and
                type(self._plugin(connection_info)).find_connected is
                base.VolumePlugin.find_connected)

    def connect(self, instance: objects.Instance,
                connection_info: dict[str, Any], size_gb: int | None, *,
                context: nova_context.RequestContext,
                encryption_metadata: dict[str, Any] | None = None,
                shared: bool = False) -> str:
        """Connect the host to a volume; no change if it is connected.

        A failure leaves nothing connected.

        :param instance: the instance that is to have the volume.
        :param connection_info: Cinder's description of the connection; the
            path of the device is added to it.
        :param size_gb: size of the volume in GiB, None if unknown.
        :param context: for requests to Cinder and the key manager.
        :param encryption_metadata: how the volume is encrypted, if Nova says
            so; Cinder is asked otherwise.
        :param shared: whether a guest uses the same connection already, which
            must survive a failure.
        :returns: path of the block device on the host, by a persistent name if
            there is one.
        :raises nova.exception.VolumeAttachFailed: if it cannot be connected.
        :raises nova.exception.VolumeDriverNotFound: if there is no plugin for
            its type.
        """
        plugin = self._plugin(connection_info)
        identifier = volume_id(connection_info)
        with contextlib.ExitStack() as undo:
            with map_exceptions('connect', instance, identifier,
                                exception.VolumeAttachFailed):
                metadata = self._encryption.metadata(
                    context, connection_info, encryption_metadata)
                if not shared:
                    undo.callback(self.disconnect, instance, connection_info,
                                  force=True)
                path = device_identity.stable_path(
                    plugin.connect(identifier, connection_info))
                device_identity.check(path, connection_info, size_gb)
                if metadata:
                    path = self._encryption.open(
                        context, connection_info, identifier, path, metadata)
            undo.pop_all()
        if device_identity.is_fleeting(path):
            LOG.warning('Volume %(volume)s is at %(path)s, for which there is '
                        'no persistent name in /dev/disk/by-id; is udev '
                        'missing?', {'volume': identifier, 'path': path},
                        instance=instance)
        connection_info[base.DEVICE_PATH] = path
        self.note(identifier, Connection(path, instance, connection_info))
        return path

    def note(self, identifier: str, connection: Connection) -> None:
        """Record that the host is connected to a volume.

        :param identifier: Cinder's ID of the volume.
        :param connection: the connection, which an earlier process may have
            made.
        """
        with self._lock:
            self._known[identifier] = connection

    def known(self) -> dict[str, Connection]:
        """List the recorded connections, also those that could not be removed.

        :returns: connections by Cinder's IDs of the volumes.
        """
        with self._lock:
            return dict(self._known)

    def find_unrecorded(self) -> set[str]:
        """Find connections on the host, whichever process made them.

        :returns: Cinder's IDs of the volumes; those of back ends that cannot
            tell are missing.
        """
        found = set(self._encryption.opened())
        for kind, plugin in self._plugins.items():
            try:
                found.update(plugin.find_connected())
            except Exception as error:
                LOG.warning('Could not list the connected volumes of type '
                            '%(kind)s: %(error)s',
                            {'kind': kind, 'error': error})
        return found

    def _remove_record(self, identifier: str) -> None:
        with self._lock:
            self._known.pop(identifier, None)

    def disconnect(self, instance: objects.Instance | None,
                   connection_info: dict[str, Any], *,
                   force: bool = False) -> None:
        """Disconnect the host from a volume; success if it is not connected.

        :param instance: the instance that had the volume, if known.
        :param connection_info: Cinder's description of the connection.
        :param force: log errors only.
        :raises nova.exception.VolumeDetachFailed: if something is left of it.
        """
        identifier = volume_id(connection_info)
        try:
            plugin = self._plugin(connection_info)
            with map_exceptions('disconnect', instance, identifier,
                                exception.VolumeDetachFailed):
                self._close(plugin, connection_info, identifier, force)
            self._remove_record(identifier)
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
               context: nova_context.RequestContext) -> None:
        """Make the host see the new size of a volume.

        :param instance: the instance that has the volume.
        :param connection_info: Cinder's description of the connection.
        :param wanted: new size of the volume in bytes.
        :param context: for requests to Cinder and the key manager.
        :raises nova.exception.VolumeExtendFailed: if the host does not see it.
        """
        identifier = volume_id(connection_info)
        path = (encryption.device_below(connection_info) or
                base.device_path(connection_info) or '')
        plugin = self._plugin(connection_info)
        with map_exceptions('extend', instance, identifier,
                            exception.VolumeExtendFailed):
            plugin.extend(identifier, connection_info)
            found = device_identity.size(path)
            if found < wanted:
                raise base.Refused(f'the host sees {found} bytes of it, not '
                                   f'{wanted}')
            self._encryption.extend(context, connection_info, identifier)

    def forget(self, instance: objects.Instance | None, identifier: str, *,
               force: bool) -> None:
        """Remove what can be found of a connection without its description.

        :param instance: the instance that had the volume and is gone, if
            known.
        :param identifier: Cinder's ID of the volume.
        :param force: go on after errors, which are logged only, and remove
            devices in use as soon as they are released.
        :raises nova.exception.VolumeDetachFailed: if something is left of it.
        """
        steps: list[Callable[[str], None]] = [
            functools.partial(self._encryption.close, {})]
        if not force:
            steps.append(self._check_released)
        steps += [plugin.forget for plugin in self._plugins.values()]
        for step in steps:
            with map_exceptions('disconnect', instance, identifier,
                                exception.VolumeDetachFailed, log_only=force):
                step(identifier)
        self._remove_record(identifier)

    def _check_released(self, identifier: str) -> None:
        for plugin in self._plugins.values():
            path = plugin.find_connected().get(identifier)
            if path and mounts.is_in_use(path):
                raise base.Refused('its filesystem is still mounted')

    def _plugin(self, connection_info: dict[str, Any]) -> base.VolumePlugin:
        kind = connection_info.get('driver_volume_type') or 'unknown'
        if kind not in self._plugins:
            raise UnsupportedVolume(driver_type=kind, supported=', '.join(
                sorted(self._plugins)) or 'none')
        return self._plugins[kind]


def volume_id(connection_info: Mapping[str, Any]) -> str:
    """Return the ID of the volume that a connection leads to.

    :param connection_info: as Nova passes it.
    :returns: Cinder's ID of the volume when the host was connected.
    :raises nova.exception.InvalidVolume: if the connection does not name it.
    """
    identifier = (connection_info.get(LOCAL_ID) or
                  block_device.get_volume_id(connection_info))
    if not identifier or not UUID.fullmatch(identifier):
        raise exception.InvalidVolume(
            reason='the connection does not say which volume it leads to')
    return identifier


@contextlib.contextmanager
def map_exceptions(what: str, instance: objects.Instance | None,
                   identifier: str, kind: type[exception.NovaException], *,
                   log_only: bool = False) -> Iterator[None]:
    """Log whatever fails, and raise it as an exception for the volume's owner.

    :param what: what is being done, for the log.
    :param instance: the instance, if known.
    :param identifier: Cinder's ID of the volume.
    :param kind: the exception to raise, which takes ``volume_id`` and
        ``reason``.
    :param log_only: whether to go on instead.
    """
    try:
        yield
    except exception.NovaException:
        raise
    except Exception as error:
        LOG.error('Could not %(what)s volume %(volume)s: %(kind)s: %(error)s',
                  {'what': what, 'volume': identifier,
                   'kind': type(error).__name__,
                   'error': strutils.mask_password(str(error))},
                  instance=instance)
        if not log_only:
            # The cause may hold the secrets of the connection.
            raise kind(volume_id=identifier,
                       reason=public_reason(error)) from None


def public_reason(error: Exception) -> str:
    """Describe an error without anything that tenants must not read."""
    if isinstance(error, base.Refused):
        return str(error)
    if isinstance(error, device_identity.WrongDevice):
        return ('the device that turned up on the host is not this volume; '
                'the log of nova-compute has the details')
    return (f'the host could not do it ({type(error).__name__}); the log of '
            f'nova-compute has the details')


def lock(identifier: str) -> contextlib.AbstractContextManager[Any]:
    """Serialize operations on one volume.

    :param identifier: Cinder's ID of the volume.
    :returns: a context manager that holds the volume's lock.
    """
    return lockutils.lock(f'lxd-volume-{identifier}', lock_file_prefix=None)
