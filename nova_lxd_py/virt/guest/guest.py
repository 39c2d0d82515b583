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

"""One LXD instance as Nova sees it, and the ones that are Nova's.

A :class:`Guest` is a thin handle: LXD holds the state, and what the driver has
to remember of an instance stands in its ``user.nova.*`` keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import datetime
import time
from typing import Any, TypeVar

from nova.compute import power_state
from oslo_log import log as logging
from oslo_utils import timeutils

from nova_lxd_py.virt.guest import mount_points
from nova_lxd_py.virt.guest import root_check
from nova_lxd_py.virt.lxd import errors
from nova_lxd_py.virt.lxd import metrics
from nova_lxd_py.virt.lxd import session as lxd

LOG = logging.getLogger(__name__)

#: Marks an LXD instance as the driver's; holds the Nova instance's uuid.
KEY_UUID = 'user.nova.uuid'
#: What the LXD instance is for, see the ROLE constants.
KEY_ROLE = 'user.nova.role'
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
#: reverted: which of Nova's migrations it is.
KEY_RESIZE = 'user.nova.resize'
#: Which volume a server boots from, for as long as its LXD instance exists;
#: its block device on the host while that is connected, and the host's boot
#: id at the time.
KEY_ROOT_VOLUME = 'user.nova.root_volume'
KEY_ROOT_DEVICE = 'user.nova.root_device'
KEY_ROOT_BOOT = 'user.nova.root_boot'
#: TCP port of a server's serial console, so that a restarted nova-compute
#: gives it the same one and nobody else gets it.
KEY_SERIAL_PORT = 'user.nova.serial_port'

ROLE_SERVER = 'server'
ROLE_RESCUE = 'rescue'
#: A copy of a server's root disk that an image is being made of.
ROLE_SNAPSHOT = 'snapshot'
#: A copy of a server's root disk that tells whether it fits a smaller quota.
ROLE_PROBE = 'probe'
ROLE_TEMPLATE = 'template'
#: An image that is being unpacked to a volume.
ROLE_UNPACKED = 'unpacked'

_SUFFIXES = {ROLE_SERVER: '', ROLE_RESCUE: '-rescue',
             ROLE_SNAPSHOT: '-snapshot', ROLE_PROBE: '-probe',
             ROLE_UNPACKED: '-unpacked'}

#: LXD's instance status to Nova's power state. Whatever is not listed, such as
#: LXD's Error, says nothing certain about the guest: Nova only warns about
#: NOSTATE, while it would stop servers for a wrong SHUTDOWN.
POWER_STATES = {
    'Running': power_state.RUNNING,
    'Ready': power_state.RUNNING,
    'Stopped': power_state.SHUTDOWN,
    'Frozen': power_state.PAUSED,
}

#: Seconds between attempts while another operation holds an instance.
BUSY_POLL = 0.1
#: Attempts at a change that keeps colliding with other changes.
UPDATE_ATTEMPTS = 10

_T = TypeVar('_T')


def lxd_name(instance: Any, role: str = ROLE_SERVER) -> str:
    """Name the LXD instance of a server.

    :param instance: the :class:`nova.objects.Instance`.
    :param role: one of the ROLE constants.
    :returns: the name that its LXD instance gets.
    """
    return instance.name + _SUFFIXES[role]


class Guest:
    """A handle on one LXD instance.

    :param session: the way to LXD.
    :param info: LXD's description of the instance.
    """

    def __init__(self, session: lxd.Session, info: Mapping[str, Any]) -> None:
        self._session = session
        self._info = info

    def __repr__(self) -> str:
        return f'<Guest {self.name} {self.role} {self.uuid}>'

    @property
    def name(self) -> str:
        """LXD's name of the instance."""
        return self._info['name']

    @property
    def container(self) -> str:
        """LXC's name of the container, of which LXD is the user."""
        project = self._session.project
        return self.name if project == 'default' else f'{project}_{self.name}'

    @property
    def uuid(self) -> str:
        """Uuid of the Nova instance, or '' for what serves none."""
        return self.config.get(KEY_UUID, '')

    @property
    def role(self) -> str:
        """What the instance is for, see the ROLE constants."""
        return self.config.get(KEY_ROLE, ROLE_SERVER)

    @property
    def is_ours(self) -> bool:
        """Whether the driver made it; all others are never touched."""
        return KEY_ROLE in self.config or KEY_UUID in self.config

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
        """LXD's word for the state when last read, such as 'Running'."""
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
        """When it was started last, None for one that is not running."""
        if POWER_STATES.get(self.status) == power_state.SHUTDOWN:
            return None
        try:
            started = timeutils.parse_isotime(self._info['last_used_at'])
        except (KeyError, ValueError):
            return None
        # So LXD says that it never was.
        return started if started.year > 1970 else None

    def reload(self) -> Guest:
        """Read the instance again.

        :returns: itself.
        :raises errors.NotFound: it is gone.
        """
        self._info = self._session.get('instances', self.name)
        return self

    def state(self) -> dict[str, Any]:
        """Read the live figures: processes, memory, disk, network.

        :returns: LXD's instance state.
        :raises errors.NotFound: it is gone.
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
        """Let LXD mount the root disk of a stopped instance for the next
        seconds.

        LXD does so for whoever looks at the files in it. On pools whose root
        disks are always mounted nothing changes.

        :raises errors.LXDError: LXD cannot mount it.
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
        """Write a file that belongs to the guest's root. See
        :meth:`nova_lxd_py.virt.lxd.session.Session.write_file`.
        """
        self._session.write_file(self.name, path, content, mode=mode,
                                 kind=kind)

    # -- power --------------------------------------------------------------

    def start(self) -> None:
        """Start it; a running one is left alone.

        :raises errors.LXDError: it cannot be started.
        """
        try:
            self._change_state('start', 'already running')
        except errors.OperationFailed:
            changes = mount_points.resolve(self._session, self.name,
                                           self.devices)
            if not changes:
                raise
            LOG.info('Mounting %s of %s where links in the guest lead to',
                     ', '.join(changes), self.name)
            self.update(devices=changes)
            self._change_state('start', 'already running')

    def shut_down(self, timeout: int) -> None:
        """Let the guest shut itself down.

        :param timeout: seconds that it gets.
        :raises errors.OperationFailed: it still runs then.
        """
        self._change_state('stop', 'already stopped', timeout=timeout)

    def stop(self) -> None:
        """Stop it by force; a stopped one is left alone.

        :raises errors.LXDError: it cannot be stopped.
        """
        self._change_state('stop', 'already stopped', force=True)

    def reboot(self, timeout: int) -> None:
        """Let the guest shut itself down and start it again.

        :param timeout: seconds that the guest gets to shut down.
        :raises errors.OperationFailed: it still runs then.
        """
        self._change_state('restart', '', timeout=timeout)

    def freeze(self) -> None:
        """Stop all its processes from running; a frozen one stays so."""
        self._change_state('freeze', 'already frozen')

    def unfreeze(self) -> None:
        """Let its processes run on; a running one is left alone."""
        self._change_state('unfreeze', 'already running')

    def _change_state(self, action: str, already: str, force: bool = False,
                      timeout: int = -1) -> None:
        body = {'action': action, 'force': force, 'timeout': timeout}
        # LXD answers within the guest's time plus its own.
        patience = self._session.operation_timeout + max(timeout, 0)

        def change() -> None:
            try:
                self._session.put('instances', self.name, 'state', body=body,
                                  timeout=patience)
            except (errors.InvalidRequest, errors.OperationFailed) as exc:
                if not already or already not in exc.message:
                    raise
        # LXD reports an instance as stopped before it has cleaned up after
        # it, and refuses to start it until then.
        self._when_free(change)

    def _when_free(self, change: Callable[[], _T]) -> _T:
        """Do something as soon as no other operation holds the instance."""
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
        :raises errors.LXDError: LXD refuses the result; nothing is changed.
        """
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
            return

    def add_devices(self, devices: Mapping[str, Mapping[str, str]]) -> None:
        """Add or replace devices, and keep all others. Takes LXD less time
        than :meth:`update`.

        :param devices: the devices.
        :raises errors.LXDError: LXD refuses it, or may have done it.
        """
        if all(self.devices.get(key) == value
               for key, value in devices.items()):
            return
        added = {key: dict(value) for key, value in devices.items()}
        self._when_free(lambda: self._session.patch(
            'instances', self.name, body={'devices': added},
            timeout=self._session.operation_timeout))
        self._info = {**self._info, 'devices': {**self.devices, **added}}

    def delete(self) -> None:
        """Stop it by force and delete it with its root disk; one that is gone
        already is a success.

        :raises errors.LXDError: LXD cannot delete it.
        """
        deadline = time.monotonic() + self._session.operation_timeout
        while True:
            try:
                self.stop()
                self._when_free(lambda: self._session.delete(
                    'instances', self.name))
                return
            except errors.NotFound:
                return
            except (errors.InvalidRequest, errors.OperationLost) as exc:
                # Started meanwhile by its own reboot, or LXD has restarted.
                if time.monotonic() > deadline:
                    raise
                LOG.debug('Deleting %s once more after: %s', self.name, exc)
                time.sleep(BUSY_POLL)


def root_volume(guest: Guest | None) -> str | None:
    """Return which volume a guest boots from.

    :param guest: the guest, just read.
    :returns: Cinder's ID of the volume, None for a root disk of LXD's.
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
