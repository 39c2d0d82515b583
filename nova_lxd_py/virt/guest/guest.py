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

"""One LXD instance of the driver.

A :class:`Guest` is a thin handle: LXD holds the state, and what the driver has
to remember of an instance is stored in its ``user.nova.*`` keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import datetime
import time
from typing import Any, TypeVar

from nova.compute import power_state
from oslo_log import log as logging
from oslo_utils import timeutils

from nova_lxd_py.virt.guest import disk_view
from nova_lxd_py.virt.guest import mount_points
from nova_lxd_py.virt.guest import roles
from nova_lxd_py.virt.guest import root_check
from nova_lxd_py.virt.guest import root_extension
from nova_lxd_py.virt.guest import root_quota
from nova_lxd_py.virt.guest import volume_limits
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import metrics
from nova_lxd_py.virt.lxd import session as lxd

LOG = logging.getLogger(__name__)

#: Marks an LXD instance as the driver's; UUID of the Nova instance.
KEY_UUID = 'user.nova.uuid'
#: Purpose of the LXD instance, see :mod:`.roles`.
KEY_ROLE = 'user.nova.role'
#: Name of the LXD instance that the driver created: a copy that an operator
#: makes has all keys, but another name.
KEY_LXD_NAME = 'user.nova.lxd_name'
#: OpenStack project of the server.
KEY_PROJECT = 'user.nova.project_id'
KEY_USER = 'user.nova.user_id'
KEY_NAME = 'user.nova.name'
KEY_FLAVOR = 'user.nova.flavor'
KEY_IMAGE = 'user.nova.image'
#: 'true' on a server's own instance while its rescue instance runs instead.
KEY_RESCUED = 'user.nova.rescued'
#: 'true' while the server is frozen for Nova's suspend rather than pause.
KEY_SUSPENDED = 'user.nova.suspended'
#: 'true' while the server is frozen for a snapshot that asks for it.
KEY_QUIESCED = 'user.nova.quiesced'
#: On a server that is resized on this host, until that is confirmed or
#: reverted: ID of Nova's migration record.
KEY_RESIZE = 'user.nova.resize'
#: On what a migration between hosts has copied or left: ID of Nova's record.
KEY_MIGRATION = 'user.nova.migration'
#: 'true' on a copy from another host that is complete.
KEY_COMPLETE = 'user.nova.complete'
#: Cinder's ID of the volume that a server boots from, for as long as its LXD
#: instance exists; its block device on the host while that is connected, the
#: host's boot ID at the time, and the counters of the block device.
KEY_ROOT_VOLUME = 'user.nova.root_volume'
KEY_ROOT_DEVICE = disk_view.KEY_ROOT_DEVICE
KEY_ROOT_BOOT = 'user.nova.root_boot'
KEY_ROOT_COUNTERS = 'user.nova.root_counters'
#: TCP port of a server's serial console: it survives a restart of
#: nova-compute, and no other server gets it.
KEY_SERIAL_PORT = 'user.nova.serial_port'

#: LXD's instance status to Nova's power state. Any other, such as LXD's Error,
#: becomes NOSTATE: Nova only warns about that, but stops servers for SHUTDOWN.
POWER_STATES = {
    'Running': power_state.RUNNING,
    'Ready': power_state.RUNNING,
    'Stopped': power_state.SHUTDOWN,
    'Frozen': power_state.PAUSED,
}

#: Seconds between attempts while another operation holds an instance.
BUSY_POLL = 0.1

# Parts of error texts that say that an instance has the wanted state: of LXD's
# own check, and of liblxc if the state changes after that.
_RUNNING = ('already running', 'container is not frozen')
_STOPPED = ('already stopped', 'container is not running')
_FROZEN = ('already frozen',)
# The same of an instance that has stopped since its state was read, such as
# by a request of a driver that was killed.
_NOT_RUNNING = ("isn't running", 'is not running')
#: Attempts at an update that collides with other updates (ETag mismatch).
UPDATE_ATTEMPTS = 10

_T = TypeVar('_T')


class Guest:
    """A handle on one LXD instance.

    :param session: the LXD session.
    :param info: LXD's description of the instance.
    """

    def __init__(self, session: lxd.Session, info: Mapping[str, Any]) -> None:
        self._session = session
        self._info = info
        self._extender = root_extension.RootExtender(session, self,
                                                     self._update)

    def __repr__(self) -> str:
        return f'<Guest {self.name} {self.role} {self.uuid}>'

    @property
    def name(self) -> str:
        """Name of the LXD instance."""
        return self._info['name']

    @property
    def container(self) -> str:
        """Name of the container in liblxc, and of its directory in a pool."""
        project = self._session.project
        return self.name if project == 'default' else f'{project}_{self.name}'

    @property
    def uuid(self) -> str:
        """UUID of the Nova instance, '' if there is none."""
        return self.config.get(KEY_UUID, '')

    @property
    def role(self) -> str:
        """Purpose of the instance, see :mod:`.roles`."""
        return self.config.get(KEY_ROLE, roles.SERVER)

    @property
    def is_ours(self) -> bool:
        """Whether the driver created it; it never changes any other."""
        return ((KEY_ROLE in self.config or KEY_UUID in self.config) and
                not self.is_copy)

    @property
    def is_copy(self) -> bool:
        """Whether it was copied from an instance of the driver, or renamed,
        by hand."""
        return self.config.get(KEY_LXD_NAME, self.name) != self.name

    @property
    def is_rescued(self) -> bool:
        """Whether the rescue instance of the server runs in its place."""
        return self.config.get(KEY_RESCUED) == 'true'

    @property
    def config(self) -> Mapping[str, str]:
        """LXD's configuration keys when last read."""
        return self._info['config']

    @property
    def devices(self) -> Mapping[str, Mapping[str, str]]:
        """LXD's devices when last read."""
        return self._info['devices']

    @property
    def status(self) -> str:
        """LXD's status when last read, such as 'Running'."""
        return self._info['status']

    @property
    def power_state(self) -> int:
        """Nova's power state when last read."""
        state = POWER_STATES.get(self.status, power_state.NOSTATE)
        if (state == power_state.PAUSED and
                self.config.get(KEY_SUSPENDED) == 'true'):
            return power_state.SUSPENDED
        return state

    @property
    def started_at(self) -> datetime.datetime | None:
        """Time of the last start, None if it is not running."""
        if POWER_STATES.get(self.status) == power_state.SHUTDOWN:
            return None
        try:
            started = timeutils.parse_isotime(self._info['last_used_at'])
        except (KeyError, ValueError):
            return None
        # LXD's value for an instance that was never started.
        return started if started.year > 1970 else None

    def reload(self) -> Guest:
        """Read the instance again.

        :returns: itself.
        :raises errors.InstanceNotFound: if it is gone.
        """
        self._info = self._session.get('instances', self.name)
        return self

    def state(self) -> dict[str, Any]:
        """Read the current usage: processes, memory, disks, network.

        :returns: LXD's instance state.
        :raises errors.InstanceNotFound: if it is gone.
        """
        return self._session.get('instances', self.name, 'state')

    def metrics(self) -> metrics.Metrics:
        """Read LXD's metrics of the instance, which take LXD longer than
        :meth:`state`.

        :returns: the metrics; empty ones if this LXD has none.
        :raises errors.LXDError: if the request fails.
        """
        return metrics.read(self._session, self.name)

    def ensure_root_mounted(self) -> None:
        """Have LXD mount the root disk of a stopped instance for the next
        seconds.

        LXD mounts it for a request about its files. On pools whose root disks
        are always mounted nothing changes.

        :raises errors.LXDError: if LXD cannot mount it.
        """
        self._session.get('instances', self.name, 'files',
                          params={'path': '/'})

    def ensure_own_root(self) -> None:
        """Check that its root is a directory on its pool; before LXD reads or
        writes in it as root. See :mod:`.root_check`.

        :raises errors.OperationFailed: if it is a link, or no directory.
        """
        root_check.ensure_own_root(self._session, self)

    def write_file(self, path: str, content: bytes, *, mode: int,
                   kind: str = 'file') -> None:
        """Write a file owned by root in the guest. See
        :meth:`nova_lxd_py.virt.lxd.session.Session.write_file`.
        """
        self._extender.with_space(lambda: self._session.write_file(
            self.name, path, content, mode=mode, kind=kind))

    # -- power --------------------------------------------------------------

    def start(self) -> None:
        """Start the guest; a running one is a success.

        :raises errors.LXDError: if it cannot be started.
        """
        self.show_disks()
        try:
            self._change_state('start', _RUNNING)
        except errors.OperationFailed:
            changes = mount_points.resolve(self._session, self.name,
                                           self.devices)
            if not changes:
                raise
            LOG.info('Resolved symbolic links in the mount points of devices '
                     '%s of LXD instance %s', ', '.join(changes), self.name,
                     instance_uuid=self.uuid)
            self.update(devices=changes)
            self._change_state('start', _RUNNING)
        volume_limits.apply(self)

    def shut_down(self, timeout: int) -> None:
        """Ask the guest to shut down and wait for it.

        :param timeout: seconds to wait.
        :raises errors.OperationFailed: if it still runs then.
        """
        self._change_state('stop', _STOPPED, timeout=timeout)

    def stop(self) -> None:
        """Stop the guest by force; a stopped one is a success.

        :raises errors.LXDError: if it cannot be stopped.
        """
        try:
            self._change_state('stop', _STOPPED, force=True)
        except errors.LXDError as exc:
            # LXD stops a guest with a full root disk, and then cannot write.
            if (not root_quota.is_exceeded(exc) or
                    self.reload().power_state != power_state.SHUTDOWN):
                raise

    def reboot(self, timeout: int) -> None:
        """Ask the guest to shut down and start it again.

        :param timeout: seconds to wait for the shutdown.
        :raises errors.OperationFailed: if it still runs then.
        """
        self._change_state('restart', (), timeout=timeout)

    def freeze(self) -> None:
        """Freeze all processes of the guest; a frozen one is a success.

        :raises errors.NotRunning: if it does not run.
        :raises errors.LXDError: if it cannot be frozen.
        """
        self._change_state('freeze', _FROZEN)

    def unfreeze(self) -> None:
        """Thaw the processes of the guest; a running one is a success.

        :raises errors.NotRunning: if it does not run.
        :raises errors.LXDError: if it cannot be thawed.
        """
        self._change_state('unfreeze', _RUNNING)

    def _change_state(self, action: str, already: tuple[str, ...],
                      force: bool = False, timeout: int = -1) -> None:
        body = {'action': action, 'force': force, 'timeout': timeout}
        # The guest's time plus LXD's own.
        patience = self._session.operation_timeout + max(timeout, 0)

        def change() -> None:
            try:
                self._session.put('instances', self.name, 'state', body=body,
                                  timeout=patience)
            except (errors.InvalidRequest, errors.OperationFailed) as exc:
                if any(text in exc.message for text in already):
                    return
                if any(text in exc.message for text in _NOT_RUNNING):
                    raise errors.NotRunning(exc.message, exc.code) from exc
                raise
        # LXD reports an instance as stopped before it has cleaned up after
        # it, and refuses to start it until then.
        if action == 'stop':
            # Without an extension, which may fail: it has to stop anyway.
            self._when_free(change)
        else:
            self._extender.with_space(lambda: self._when_free(change))

    def _when_free(self, change: Callable[[], _T]) -> _T:
        """Call a function, again while another operation holds the
        instance."""
        deadline = time.monotonic() + self._session.operation_timeout
        while True:
            try:
                return change()
            except errors.Busy:
                if time.monotonic() > deadline:
                    raise
                time.sleep(BUSY_POLL)

    # -- changes ------------------------------------------------------------

    def update(self, config: Mapping[str, str | None] | None = None,
               devices: Mapping[str, Mapping[str, str] | None] | None = None,
               ) -> None:
        """Change configuration keys and devices, and keep all others.

        :param config: new values; None removes a key.
        :param devices: new devices; None removes one.
        :raises errors.DiskFull: if the root disk is full.
        :raises errors.LXDError: if LXD refuses the result; nothing is changed
            then.
        """
        def change() -> None:
            wanted = devices
            if root is not None and wanted and wanted.get(root_quota.DEVICE):
                wanted = {**wanted, root_quota.DEVICE: root_quota.extended(
                    wanted[root_quota.DEVICE] or {}, root)}
            self._update(config, wanted)

        root: int | None = None

        def note(size: int) -> None:
            nonlocal root
            root = size

        self._extender.with_space(change, note)
        self.show_disks()

    def _update(self, config: Mapping[str, str | None] | None,
                devices: Mapping[str, Mapping[str, str] | None] | None
                ) -> None:
        for attempt in range(UPDATE_ATTEMPTS):
            info, etag = self._session.get_with_etag('instances', self.name)
            self._info = info
            wanted = {key: info[key] for key in (
                'architecture', 'config', 'devices', 'ephemeral', 'profiles',
                'description', 'stateful') if key in info}
            wanted['config'] = _merged(info['config'], config)
            wanted['devices'] = _merged(info['devices'], devices)
            if (wanted['config'] == info['config'] and
                    wanted['devices'] == info['devices']):
                return
            try:
                self._when_free(lambda: self._session.put(
                    'instances', self.name, body=wanted, etag=etag))
            except errors.PreconditionFailed:
                if attempt == UPDATE_ATTEMPTS - 1:
                    raise
                continue
            self._info = {**info, **wanted}
            volume_limits.apply(self, info)
            return

    def add_devices(self, devices: Mapping[str, Mapping[str, str]]) -> None:
        """Add or replace devices, and keep all others; faster than
        :meth:`update`.

        :param devices: the devices.
        :raises errors.DiskFull: if the root disk is full.
        :raises errors.LXDError: if LXD refuses it, or may have done it.
        """
        if all(self.devices.get(key) == value
               for key, value in devices.items()):
            return
        added = {key: dict(value) for key, value in devices.items()}

        def add() -> None:
            self._session.patch('instances', self.name,
                                body={'devices': added},
                                timeout=self._session.operation_timeout)

        self._extender.with_space(lambda: self._when_free(add))
        before = self._info
        self._info = {**before, 'devices': {**self.devices, **added}}
        volume_limits.apply(self, before)
        self.show_disks()

    def show_disks(self) -> None:
        """Show the guest in its sysfs its disks as they were last read."""
        disk_view.show(self.name, self.config, self.devices, self.uuid)

    def delete(self) -> None:
        """Stop the guest by force and delete it with its root disk; one that
        is gone is a success.

        :raises errors.LXDError: if LXD cannot delete it.
        """
        deadline = time.monotonic() + self._session.operation_timeout
        runs = self.power_state != power_state.SHUTDOWN
        while True:
            try:
                if runs:
                    self.stop()
                self._when_free(lambda: self._session.delete(
                    'instances', self.name))
                disk_view.remove(self.name)
                return
            except errors.InstanceNotFound:
                return
            except (errors.InvalidRequest, errors.OperationLost) as exc:
                # It has been started meanwhile, also by a reboot of its own,
                # or LXD has restarted.
                if time.monotonic() > deadline:
                    raise
                runs = True
                LOG.debug('Retrying to delete LXD instance %s after: %s',
                          self.name, exc, instance_uuid=self.uuid)
                time.sleep(BUSY_POLL)

    def with_space(self, change: Callable[[], _T]) -> _T:
        """Call a function for which LXD may need space in the root disk, such
        as for a copy of it; extend a full disk and call it again.

        :param change: the function.
        :returns: its result.
        :raises errors.DiskFull: if the disk may not be extended any more.
        """
        return self._extender.with_space(change)

    def extend_full_root(self) -> bool:
        """Extend the root disk if it is so full that LXD cannot write to it.

        :returns: whether it was.
        :raises errors.DiskFull: if it may not be extended any more.
        :raises errors.LXDError: if LXD refuses it.
        """
        return self._extender.extend_if_full()


def root_volume(guest: Guest | None) -> str | None:
    """Return the volume that a guest boots from.

    :param guest: the guest, freshly read.
    :returns: Cinder's ID of the volume, None for a root disk in LXD's pool.
    """
    return guest.config.get(KEY_ROOT_VOLUME) if guest else None


def _merged(present: Mapping[str, Any], changes: Mapping[str, Any] | None
            ) -> dict[str, Any]:
    result = dict(present)
    for key, value in (changes or {}).items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = value if isinstance(value, str) else dict(value)
    return result
